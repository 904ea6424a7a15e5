"""How many rows of an optimizer step each client of a round takes, where the batch is the federation's. Pure.

With `batch-of = "federation"`, `total-batch-size` is what all clients of a round take together in one step: a
share each, so that a step has the tokens that the run says, no matter who is there. Standard library only.
"""

from collections.abc import Hashable, Mapping
from fractions import Fraction
from typing import TypeVar

Client = TypeVar("Client", bound=Hashable)
_ALIKE = 1.25  # two speeds that differ by less: what measuring them again may show


def alike(one: float, other: float) -> bool:
    """Whether two speeds count as one: shares that change with every round would cost a GPU site a compilation
    each time."""
    return max(one, other) <= _ALIKE * min(one, other)


def step_shares(
    batch_rows: int, ranks: Mapping[Client, int], speeds: Mapping[Client, float]
) -> dict[Client, int]:
    """Rows of a step that each client takes, in proportion to `speeds`; their sum is `batch_rows`.

    `ranks`: processes of each client, of which each has at least one row. Where that is more than the batch
    holds, each client takes just these, and a step of all is larger. What rounding down leaves over goes, a
    row each, to those that lost most by it; of equal ones to the first. Raises ValueError for numbers below 1,
    and for speeds that are not positive.
    """
    if batch_rows < 1 or not all(count >= 1 for count in ranks.values()):
        raise ValueError(f"{batch_rows} rows can't be shared by clients of {dict(ranks)} ranks")
    if not all(speeds[client] > 0 for client in ranks):
        raise ValueError(f"speeds must be positive, not {dict(speeds)}")
    left = max(batch_rows, sum(ranks.values()))
    weights = {client: Fraction(speeds[client]) for client in ranks}
    shares: dict[Client, int] = {}
    while slow := [c for c, w in weights.items() if w * left < ranks[c] * sum(weights.values())]:
        for client in slow:  # fewer rows than ranks: the others share what is left
            shares[client] = ranks[client]
            left -= ranks[client]
            del weights[client]
    total = sum(weights.values())
    exact = {client: left * weight / total for client, weight in weights.items()}
    floors = {client: int(share) for client, share in exact.items()}
    over = left - sum(floors.values())
    most = set(sorted(exact, key=lambda client: floors[client] - exact[client])[:over])
    shares |= {client: rows + (client in most) for client, rows in floors.items()}
    return {client: shares[client] for client in ranks}
