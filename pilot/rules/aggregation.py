"""What becomes of the pseudo-gradients of a round: their mean, or something that one outlier can't move.

`mean` weights each reply by its tokens and folds them in the order given (lease order), one at a time:
the result does not depend on the order of arrival.

`trimmed-mean` and `median` work coordinate by coordinate (Yin et al., arXiv 1803.01498). There every client
has one vote, whatever its tokens: weights that a client reports itself would be a way to outvote the others.
The replies of one client in one round are first folded into its vote, weighted by tokens. A single outlier
can be recognised only where three vote: with fewer clients both are the mean.

All of them work on a few rows of a tensor at a time, read from the replies' files: memory is a piece of each.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pilot.rules.agreement import Votes
from pilot.rules.lengths import Lengths, factors, squares
from pilot.tensor_file import TensorFile, pieces, rows_of

MIN_VOTES = 3
_TINY = 1e-300
_CHUNK = 1 << 20  # coordinates that are sorted at once

log = logging.getLogger("pilot")


@dataclass(frozen=True)
class Spilled:
    """A pseudo-gradient on disk (safetensors, fp32), made from `tokens` tokens of `client` in `steps`
    optimizer steps (which only `votes_of` asks for)."""

    client: str
    tokens: int
    path: Path
    steps: float = 0.0


class Merged:
    """The pseudo-gradient of a round, fp32, of which each piece is made when it is asked for.

    `method`: "mean", "trimmed-mean" (of n votes, floor(trim_fraction * n) are cut at each end, but at least
    one, unless the fraction is 0) or "median" (of an even number: the mean of the two in the middle).
    `restore_lengths`: as `lengths.py` says; of robust methods by the same method. Replies in lease order, at
    least one. Raises ValueError for tokens that aren't positive, and for files that hold other tensors.
    """

    def __init__(
        self,
        replies: Sequence[Spilled],
        *,
        method: str,
        trim_fraction: float = 0.0,
        restore_lengths: bool = False,
    ) -> None:
        self._by_client, self._in_order = _open(replies)
        self._restore_lengths = restore_lengths
        self._cut: int | None = None  # None: the mean
        votes = len(self._by_client)
        if method != "mean" and votes >= MIN_VOTES:
            self._cut = _cut(votes, method, trim_fraction)
        elif method != "mean":
            log.info("%d clients are too few for a %s: using their mean", votes, method)
        self.shapes = self._in_order[0][1].shapes
        if any(file.shapes != self.shapes for _, file in self._in_order):
            raise ValueError("the replies of a round hold different tensors")

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows of one tensor, as `tensor_file.rows_of` has them; whole tensors are the same bits."""
        if self._cut is not None:
            return self._robust(name, first, end, self._cut)
        updates = ((w, {name: file.rows(name, first, end)}) for w, file in self._in_order)
        mean = weighted_mean(updates, restore_lengths=self._restore_lengths)
        assert mean is not None
        return mean[name]

    def _robust(self, name: str, first: int, end: int, cut: int) -> Tensor:
        votes = list(_votes(self._by_client, name, first, end))
        found = _middle(votes, cut)
        if self._restore_lengths:
            usual = _middle([squares(vote) for vote in votes], cut).double()
            found *= factors(found, usual, most=float(len(votes)))
        return found


def weighted_mean(
    updates: Iterable[tuple[float, Mapping[str, Tensor]]],
    *,
    restore_lengths: bool = False,
) -> dict[str, Tensor] | None:
    """sum(weight * update) / sum(weight), fp32, folded in the order given; None if there are none.

    `restore_lengths`: its rows as long as those of the updates, as `lengths.py` says. Raises ValueError for a
    weight that isn't positive: a mean without tokens has no meaning.
    """
    total_weight = 0.0
    total: dict[str, Tensor] = {}
    lengths = Lengths()
    for weight, update in updates:
        if not weight > 0:
            raise ValueError(f"weights must be positive, not {weight}")
        total_weight += weight
        if restore_lengths:
            lengths.add(weight, update)
        for name, tensor in update.items():
            if name in total:
                total[name].add_(tensor.float(), alpha=weight)
            else:
                total[name] = tensor.float() * weight
    if not total:
        return None
    for tensor in total.values():
        tensor.div_(total_weight)
    if restore_lengths:
        lengths.restore(total)
    return total


def votes_of(replies: Sequence[Spilled], *, momentum: Mapping[str, Tensor]) -> Votes:
    """All dot products of the clients' updates, a piece at a time from the files.

    `momentum` of the outer step by "momentum." and name, among others, or of no name before there is one.
    """
    by_client, in_order = _open(replies)
    gram = torch.zeros(len(by_client), len(by_client), dtype=torch.float64)
    along = torch.zeros(len(by_client), dtype=torch.float64)
    square = 0.0
    for name, shape in in_order[0][1].shapes.items() if in_order else ():
        has_momentum = f"momentum.{name}" in momentum
        for first, end in pieces(shape):
            votes = _votes(by_client, name, first, end)
            flat = torch.stack([vote.reshape(-1).double() for vote in votes])
            gram += flat @ flat.T
            if has_momentum:
                piece = rows_of(momentum, f"momentum.{name}", first, end).reshape(-1).double()
                along += flat @ piece
                square += float(piece @ piece)
    size = math.sqrt(square)
    norms = gram.diagonal().sqrt()
    heading = (along / (norms * size).clamp_min(_TINY)).tolist() if size > 0 else None
    taken = {c: [reply.steps for reply in replies if reply.client == c] for c in by_client}
    steps = [sum(several) / len(several) for several in taken.values()]
    return Votes(list(by_client), steps, gram.tolist(), heading)


# -- robust ------------------------------------------------------------------------------------------


def _cut(votes: int, method: str, trim_fraction: float) -> int:
    """How many of the sorted votes are left out at each end; at least one always stays."""
    most = (votes - 1) // 2
    if method == "median":
        return most
    wanted = max(1, int(trim_fraction * votes)) if trim_fraction > 0 else 0
    return min(wanted, most)


_Files = list[tuple[float, TensorFile]]  # tokens, and what they led to


def _open(replies: Sequence[Spilled]) -> tuple[dict[str, _Files], _Files]:
    """Client → its replies; and all of them in the order given. Closed when nobody has them any more."""
    by_client: dict[str, _Files] = {}
    in_order: _Files = []
    for reply in replies:
        in_order.append((float(reply.tokens), TensorFile(reply.path)))
        by_client.setdefault(reply.client, []).append(in_order[-1])
    return by_client, in_order


def _votes(by_client: Mapping[str, _Files], name: str, first: int, end: int) -> Iterator[Tensor]:
    """Each client's rows of the tensor of that name."""
    for files in by_client.values():
        found = [(tokens, {name: file.rows(name, first, end)}) for tokens, file in files]
        mean = weighted_mean(found) if len(found) > 1 else found[0][1]
        assert mean is not None
        yield mean[name]


def _middle(votes: Sequence[Tensor], cut: int) -> Tensor:
    """The mean of what is left of each coordinate's sorted votes without `cut` at each end."""
    flat = [vote.reshape(-1) for vote in votes]
    middle = torch.empty_like(flat[0], dtype=torch.float32)
    for first in range(0, len(middle), _CHUNK):
        block = torch.stack([vote[first : first + _CHUNK].float() for vote in flat])
        kept = block.sort(dim=0).values[cut : len(flat) - cut]
        middle[first : first + _CHUNK] = kept.mean(dim=0)
    return middle.reshape(votes[0].shape)
