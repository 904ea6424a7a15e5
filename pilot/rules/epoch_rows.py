"""One pass over the shards: the state of each row, and which shard a client takes next.

A shard's rows are kept as intervals of free, leased and committed rows; those of a shard that nobody
has touched need none. Every change updates three indexes over the epoch's order, so that a choice
costs the same for ten shards and for ten thousand.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pilot.rules import intervals
from pilot.rules.intervals import UNKNOWN_END, Interval, Places, PlaceSet


@dataclass
class _ShardRows:
    """`leased`: (first, end, client). `last_committer`: the client that last
    committed rows here, and so has the shard packed.

    `listed`: the clients in whose index this shard stands.
    """

    free: list[Interval]
    leased: list[tuple[int, int, str]] = field(default_factory=list)
    committed: list[Interval] = field(default_factory=list)
    last_committer: str | None = None
    listed: frozenset[str] = frozenset()


_NOBODY: frozenset[str] = frozenset()


class EpochRows:
    """All rows of one epoch. `row_counts`: shard → number of its rows, where known; others add to it."""

    def __init__(self, order: Sequence[int], row_counts: Mapping[int, int]) -> None:
        """`order`: a permutation of the shards; a shard's place in it is its rank in every choice."""
        self.order = order
        self.place = {shard: place for place, shard in enumerate(order)}
        self._row_counts = row_counts
        self._shards: dict[int, _ShardRows] = {}  # those that were touched
        everything = b"1" * len(order)
        self._free = PlaceSet.from_flags(everything)  # shards with free rows
        self._new = PlaceSet.from_flags(everything)  # those of them that nobody is at
        self._at: dict[str, PlaceSet] = {}  # client → those of them that it is at

    # -- choosing --------------------------------------------------------------------------------

    @property
    def any_free(self) -> bool:
        return bool(self._free)

    def has_free(self, within: Places) -> bool:
        return next(self._free.common(within), None) is not None

    def choose(self, client: str, within: Places) -> int | None:
        """The shard in the places `within` that `client` takes next; None if none has free rows.

        First one it is at (it committed there last, or has a lease there), then one that nobody is
        at, then somebody else's; in each case the earliest of the epoch's order. A function of what
        is committed and leased, not of how it came about: a resumed server, which sees the same,
        chooses the same.
        """
        for places in (self._at.get(client), self._new, self._free):
            if places and (place := next(places.common(within), None)) is not None:
                return self.order[place]
        return None

    def free_rows(self, within: Places) -> Iterator[Interval]:
        """Intervals of free rows, shard by shard, in the order of the epoch."""
        for place in self._free.common(within):
            shard = self.order[place]
            rows = self._shards.get(shard)
            yield from rows.free if rows else [self._whole(shard)]

    # -- the states of rows ----------------------------------------------------------------------

    def lease_rows(self, shard: int, max_rows: int, client: str) -> Interval:
        """Free → leased: up to `max_rows` off the front of the shard's free rows.

        Rows of an unknown end are taken whole.
        """
        rows = self._touch(shard)
        first, end = intervals.take_front(rows.free, max_rows)
        rows.leased.append((first, end, client))
        self._index(shard, rows)
        return first, end

    def release(self, shard: int, lease: Interval, client: str, used_end: int) -> None:
        """Leased → free for the rows from `used_end` on; those before stay leased."""
        rows = self._shards[shard]
        first, end = lease
        rows.leased.remove((first, end, client))
        if used_end > first:
            rows.leased.append((first, used_end, client))
        if end == UNKNOWN_END:
            end = self._row_counts.get(shard, UNKNOWN_END)
        if used_end < end:
            intervals.add(rows.free, used_end, end)
        self._index(shard, rows)

    def absorb(self, shard: int, lease: Interval, client: str) -> None:
        """Leased → committed, all of it."""
        rows = self._shards[shard]
        rows.leased.remove((*lease, client))
        intervals.add(rows.committed, *lease)
        rows.last_committer = client
        self._index(shard, rows)

    def restore(self, shard: int, committed: list[Interval], last_committer: str) -> None:
        """The committed rows of a shard as a snapshot has them; raises ValueError if they can't be."""
        if shard not in self.place or shard in self._shards:
            raise ValueError(f"shard {shard} does not exist, or is there twice")
        end = self._row_counts.get(shard, UNKNOWN_END)
        checked: list[Interval] = []
        for first, last in committed:
            intervals.add(checked, first, last)
        if not checked or checked[0][0] < 0 or checked[-1][1] > end:
            raise ValueError(f"{checked or 'no rows'} of shard {shard}, which has {end}")
        rows = _ShardRows(intervals.gaps(checked, end), [], checked, last_committer)
        self._shards[shard] = rows
        self._index(shard, rows)

    def close(self, shard: int, count: int) -> None:
        """The shard turned out to have `count` rows: nothing behind them is free."""
        rows = self._touch(shard) if count == 0 else self._shards.get(shard)
        if rows is not None:
            intervals.cut(rows.free, count)
            self._index(shard, rows)

    # -- what the books say ----------------------------------------------------------------------

    def committed_rows(self, shard: int) -> int:
        rows = self._shards.get(shard)
        return intervals.total(rows.committed) if rows else 0

    def used_rows(self, shard: int) -> int:
        """The least that a shard of unknown size has: up to the last row that anybody trained on."""
        rows = self._shards.get(shard)
        if rows is None:
            return 0
        ends = [end for _, end in rows.committed] + [end for _, end, _ in rows.leased]
        return max((end for end in ends if end != UNKNOWN_END), default=0)

    def committed(self) -> Iterator[tuple[int, str, list[Interval]]]:
        """(shard, last_committer, sorted intervals) of each shard with committed rows."""
        for shard, rows in self._shards.items():
            if rows.last_committer is not None:
                yield shard, rows.last_committer, rows.committed

    # -- inside ----------------------------------------------------------------------------------

    def _whole(self, shard: int) -> Interval:
        return 0, self._row_counts.get(shard, UNKNOWN_END)

    def _touch(self, shard: int) -> _ShardRows:
        if shard not in self._shards:
            self._shards[shard] = _ShardRows([self._whole(shard)])
        return self._shards[shard]

    def _index(self, shard: int, rows: _ShardRows) -> None:
        """Bring the indexes up to date with what `rows` says."""
        place = self.place[shard]
        there = {client for _, _, client in rows.leased}
        if rows.last_committer is not None:
            there.add(rows.last_committer)
        _set(self._free, place, bool(rows.free))
        _set(self._new, place, bool(rows.free) and not there)
        listed = frozenset(there) if rows.free else _NOBODY
        if listed != rows.listed:
            for client in rows.listed - listed:
                self._at[client].discard(place)
            for client in listed - rows.listed:
                self._at.setdefault(client, PlaceSet()).add(place)
            rows.listed = listed


def _set(places: PlaceSet, place: int, present: bool) -> None:
    if present:
        places.add(place)
    else:
        places.discard(place)
