"""What may be merged, and which client is left out for a while: pure rules over a reply and the run's books.

A reply reaches the model only through `refusal`, `token_refusal`, `Norm` and `norm_refusal`. That it was
trained from the model of this round needs no rule here: its fence names run, term and round, within a term a
round opens once, and every order of it carries the same weights; so the fence *is* the base version,
and `open_round.py` refuses any other.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pilot.rules.rounds import Clock

# Of fewer accepted updates the median says little: one outlier would be half of it.
MIN_NORMS = 3
MAX_NORM = 1e25  # times the tokens of a round it is still finite in fp32
# Norms fall during a run: the median is that of the last rounds, not of the whole run.
MAX_NORMS = 100
REFUSALS_IN_A_ROW = 3
_PIECE = 1 << 18  # values at once in float64


@dataclass
class AdmissionBooks:
    """What the rules remember between rounds; a snapshot keeps it.

    `norms` are those of the last updates that were merged, oldest first, `steps` the optimizer steps behind
    each (fewer of them, where an older version wrote the books); `in_a_row` counts, by client, the replies
    refused for their content since the last one that was not.
    """

    norms: list[float] = field(default_factory=list)
    in_a_row: dict[str, int] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    def accepted(self, client: str) -> None:
        self.in_a_row.pop(client, None)

    def refused(self, client: str) -> None:
        self.in_a_row[client] = self.in_a_row.get(client, 0) + 1

    def merged(self, norms: Iterable[float], steps: Iterable[float] = ()) -> None:
        """A round is over: from now on later updates are compared with its norms, in lease order."""
        self.norms = [*self.norms, *norms][-MAX_NORMS:]
        self.steps = [*self.steps, *steps][-MAX_NORMS:]

    def longer(self, steps: float) -> float:
        """How many times further `steps` optimizer steps may move than those behind the norms, at least 1."""
        usual = statistics.median(self.steps) if self.steps else 0.0
        return max(1.0, steps / usual) if usual > 0 else 1.0


def refusal(
    update: Mapping[str, Sequence[int]], model: Mapping[str, Sequence[int]], *, tokens: int
) -> str | None:
    """Why an update of these shapes, by name, may not be merged into a `model` of those, or None: it may.

    The right names and shapes, with tokens behind them.
    """
    if tokens <= 0:
        return f"it reports {tokens} tokens"
    if update.keys() != model.keys():
        strange = sorted(update.keys() ^ model.keys())
        return f"its tensors are not the model's (first difference: {strange[0]})"
    for name, shape in update.items():
        if tuple(shape) != tuple(model[name]):
            return f"{name} has shape {tuple(shape)}, not {tuple(model[name])}"
    return None


def token_refusal(
    tokens: int, *, rows: int, leased_rows: int | None, row_tokens: int
) -> str | None:
    """Why `tokens` can't be what `rows` consumed rows of T = `row_tokens` tokens give, or None.

    `leased_rows` None: the lease has an open end, and the shard's size bounds it (the ledger checks that).
    """
    if leased_rows is not None and rows > leased_rows:
        return f"it consumed {rows} rows of {leased_rows} that were leased"
    if rows * row_tokens != tokens:
        return f"it reports {tokens} tokens for {rows} rows"
    return None


class Norm:
    """The L2 norm of an update, in float64, tensor by tensor, whatever their order: a resumed server has
    another one."""

    def __init__(self) -> None:
        self._squares: list[float] = []

    def add(self, name: str, tensor: Tensor) -> str | None:
        """Count a tensor (fp32) in; why it may not be merged, or None: it may."""
        # float64 a piece at a time; a sum of squares is finite unless a term isn't
        norms = [
            float(torch.linalg.vector_norm(piece, dtype=torch.float64))
            for piece in tensor.reshape(-1).split(_PIECE)
        ]
        square = (
            math.fsum(norm**2 for norm in norms) if all(map(math.isfinite, norms)) else math.inf
        )
        self._squares.append(square)
        return None if math.isfinite(square) else f"{name} is not finite"

    @property
    def value(self) -> float:
        return math.sqrt(math.fsum(self._squares))


def update_norm(update: Mapping[str, Tensor]) -> float:
    """The `Norm` of a whole update."""
    norm = Norm()
    for name, tensor in update.items():
        norm.add(name, tensor)
    return norm.value


def norm_refusal(
    norm: float, earlier: Sequence[float], *, max_ratio: float, longer: float = 1.0
) -> str | None:
    """Why an update of L2 norm `norm` may not be merged after updates of norms `earlier`, or None.

    `earlier` are of rounds before this one, never of this one: the order of arrival decides nothing. With
    fewer than MIN_NORMS of them, or a `max_ratio` of 0, any norm up to MAX_NORM will do. `longer`: how many
    times further it may be for the steps that it took.
    """
    if norm > MAX_NORM:
        return f"its norm {norm:.4g} is beyond what a mean in fp32 can hold"
    if max_ratio == 0 or len(earlier) < MIN_NORMS:
        return None
    median = statistics.median(earlier)
    if median == 0 or norm <= max_ratio * median * longer:
        return None
    return (
        f"its norm {norm:.4g} is {norm / median:.1f} times the median of the last {len(earlier)} merged "
        f"updates ({median:.4g}), and max-update-norm-ratio is {max_ratio:g}"
    )


def movement_refusal(norm: float, limit: float, *, steps: int) -> str | None:
    """Why an update of L2 norm `norm` is none of `steps` optimizer steps, which move `limit` at most; or
    None."""
    if norm <= limit:
        return None
    return (
        f"its norm {norm:.4g} is more than {steps} optimizer steps at this run's learning rates can move "
        f"({limit:.4g} at most)"
    )


class Cooling:
    """Leaves out a client whose content was refused REFUSALS_IN_A_ROW times running, for a cooling time.

    A client, not a run: if there is no other, the run waits until its time is over. What a client is not to
    blame for (it died, its reply was lost, it had to leave) never counts. After its time a client starts
    with a clean record; when a server resumes, the time starts over.
    """

    def __init__(self, books: AdmissionBooks, clock: Clock, cooling_time_s: float) -> None:
        self._books, self._clock, self._cooling_time_s = books, clock, cooling_time_s
        self._until_s: dict[str, float] = {}

    def ready(self, client: str) -> bool:
        """Whether `client` may get work. Its time begins when this is first asked after the refusals."""
        if self._books.in_a_row.get(client, 0) < REFUSALS_IN_A_ROW:
            return True
        now_s = self._clock.now_s()
        if now_s < self._until_s.setdefault(client, now_s + self._cooling_time_s):
            return False
        del self._until_s[client]
        self._books.accepted(client)
        return True
