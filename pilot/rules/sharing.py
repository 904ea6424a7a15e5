"""Fair shares of rows that are too few for all clients that want them. Pure: standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

StepRows = int | Mapping[str, int]  # of all clients, or of each


@dataclass(frozen=True)
class ClientGroup:
    """Clients that have the same shards: what each wants, and the free rows of those shards.

    `free_rows` need not be counted further than the sum of what is wanted.
    """

    wanted: Mapping[str, int]
    free_rows: int

    @property
    def demand(self) -> int:
        return sum(self.wanted.values())

    @property
    def usable(self) -> int:
        """What these clients could be leased if they were alone."""
        return min(self.demand, self.free_rows)


def fair_shares(
    groups: Sequence[ClientGroup], free_rows: int, *, step_rows: StepRows
) -> dict[str, int]:
    """Rows that each client may take, in the order of `groups`: what it wants where there is enough.

    Otherwise groups share `free_rows` in proportion to what each could use, and the clients of one
    in proportion to what they want, in whole steps of `step_rows` rows, at least one. The last client
    may take what rounding down has left over.
    """
    shares: dict[str, int] = {}
    usable = sum(group.usable for group in groups)
    scarce = free_rows < usable
    for group in groups:
        budget = free_rows * group.usable // usable if scarce and usable else group.usable
        free_rows, usable = free_rows - budget, usable - group.usable
        shares |= _apportion(group.wanted, budget, step_rows)
        if not scarce or group is groups[-1]:
            last = list(group.wanted)[-1]
            shares[last] = group.wanted[last]
    return shares


def _apportion(wanted: Mapping[str, int], budget: int, step_rows: StepRows) -> dict[str, int]:
    demand, shares = sum(wanted.values()), {}
    if budget >= demand:
        return dict(wanted)
    for client, rows in wanted.items():
        share = budget * rows // demand
        step = step_rows if isinstance(step_rows, int) else step_rows[client]
        shares[client] = min(rows, max(step, share - share % step))
        budget, demand = budget - shares[client], demand - rows
    return shares
