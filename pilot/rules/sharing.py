"""Fair shares of rows that are too few for all who want them. Pure: standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Party:
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


def fair_shares(parties: Sequence[Party], free_rows: int, *, step_rows: int) -> dict[str, int]:
    """Rows that each client may take, in the order of `parties`: what it wants where there is enough.

    Otherwise parties share `free_rows` in proportion to what each could use, and the clients of one
    in proportion to what they want, in whole steps of `step_rows` rows, at least one. Whoever comes
    last may take what rounding down has left over.
    """
    shares: dict[str, int] = {}
    usable = sum(party.usable for party in parties)
    scarce = free_rows < usable
    for party in parties:
        budget = free_rows * party.usable // usable if scarce and usable else party.usable
        free_rows, usable = free_rows - budget, usable - party.usable
        shares |= _apportion(party.wanted, budget, step_rows)
        if not scarce or party is parties[-1]:
            last = list(party.wanted)[-1]
            shares[last] = party.wanted[last]
    return shares


def _apportion(wanted: Mapping[str, int], budget: int, step_rows: int) -> dict[str, int]:
    demand, shares = sum(wanted.values()), {}
    if budget >= demand:
        return dict(wanted)
    for client, rows in wanted.items():
        share = budget * rows // demand
        shares[client] = min(rows, max(step_rows, share - share % step_rows))
        budget, demand = budget - shares[client], demand - rows
    return shares
