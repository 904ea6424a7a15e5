"""The books: who owns which rows, and which rows the model has seen.

Every row of every epoch is in exactly one state: free, leased (open) or committed. Leasing moves free
rows to a client; committing moves a prefix of a lease to committed and returns the rest; giving back
returns all of it. Nothing else changes a state, so `leased = committed + returned + open` holds at any
moment, and a row can be committed only once.

A shard's row count is unknown until somebody has packed it. Such a shard is leased open-ended, to one
client at a time, and the count comes back with the reply. Only counts that were committed enter the
books, so that a resumed server leases exactly what an uninterrupted one would have.

Pure: standard library only, no clock, no randomness (the order of shards is passed in).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class LedgerError(ValueError):
    """A commit that the books can't take; the message says why. The books are unchanged."""


@dataclass(frozen=True, order=True)
class Segment:
    """Rows [first_row, end_row) of a shard in an epoch; `end_row` None: to the shard's unknown end."""

    epoch: int
    shard: int
    first_row: int
    end_row: int | None

    @property
    def key(self) -> tuple[int, int]:
        return (self.epoch, self.shard)

    @property
    def rows(self) -> int | None:
        return None if self.end_row is None else self.end_row - self.first_row

    def to_list(self) -> list[int]:
        """As JSON and messages carry it: an open end is -1."""
        return [
            self.epoch,
            self.shard,
            self.first_row,
            -1 if self.end_row is None else self.end_row,
        ]

    @staticmethod
    def from_list(values: Sequence[int]) -> "Segment":
        epoch, shard, first_row, end_row = (int(v) for v in values)
        return Segment(epoch, shard, first_row, None if end_row < 0 else end_row)


@dataclass(frozen=True)
class Lease:
    """Rows that one client may train on in one round, in this order.

    `last` says that nothing was left to lease behind it: only then may a final, shorter optimizer
    step use up a tail that doesn't fill a batch.
    """

    lease_id: int
    client: str
    segments: tuple[Segment, ...]
    last: bool


@dataclass
class _Epoch:
    """One pass over the shards: their order, what is free of each, and what is committed.

    `untouched` shards are free as a whole; `pieces` has what is free of the others. `tenants` says who
    last committed rows of a shard: that client has it packed.
    """

    position: dict[int, int]  # shard → place in the epoch's order
    untouched: dict[int, None]  # an ordered set
    pieces: dict[int, list[tuple[int, int | None]]] = field(default_factory=dict)
    committed: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    tenants: dict[int, str] = field(default_factory=dict)

    def next_shard(self, client: str, shards: Collection[int] | None) -> int | None:
        """The free shard that `client` takes next: one it was at, else a new one, else another's.

        A function of what is committed and open, not of how it came about: a resumed server, which
        sees the same, chooses the same.
        """
        allowed = [shard for shard in self.pieces if shards is None or shard in shards]
        own = [shard for shard in allowed if self.tenants.get(shard) == client]
        new = [shard for shard in allowed if shard not in self.tenants]
        new += [s for s in self.untouched if shards is None or s in shards][:1]
        for candidates in (own, new, allowed):
            if candidates:
                return min(candidates, key=self.position.__getitem__)
        return None


class Ledger:
    """The state of all rows of a run; see the module's text for the rules."""

    def __init__(
        self, *, num_shards: int, epochs: int, shard_order: Callable[[int], Sequence[int]]
    ) -> None:
        """`shard_order(epoch)` gives the permutation of range(num_shards) that the epoch follows."""
        self.num_shards = num_shards
        self.row_counts: dict[int, int] = {}
        self.open: dict[int, Lease] = {}
        self._next_lease_id = 1
        self._epochs = []
        for epoch in range(epochs):
            order = list(shard_order(epoch))
            if sorted(order) != list(range(num_shards)):
                raise ValueError(
                    f"shard_order({epoch}) is not a permutation of {num_shards} shards"
                )
            position = {shard: place for place, shard in enumerate(order)}
            self._epochs.append(_Epoch(position, untouched=dict.fromkeys(order)))
        self.rows_leased = self.rows_committed = self.rows_returned = 0

    # -- leasing ---------------------------------------------------------------------------------

    def lease(
        self, client: str, rows_wanted: int, *, shards: Collection[int] | None = None
    ) -> Lease | None:
        """Lease about `rows_wanted` free rows of `shards` (those the client has; None: any).

        Earlier epochs are leased before later ones; within one, see `_Epoch.next_shard`.
        Shards of unknown size count as an average known one, or half of what is wanted if none is
        known. Returns None when nothing is free for this client.
        """
        if rows_wanted < 1:
            raise ValueError(f"rows_wanted must be positive, not {rows_wanted}")
        segments: list[Segment] = []
        missing = rows_wanted
        for number, epoch in enumerate(self._epochs):
            while missing > 0 and (shard := epoch.next_shard(client, shards)) is not None:
                segment = self._take(number, epoch, shard, missing)
                segments.append(segment)
                missing -= self._estimated_rows(segment, rows_wanted)
            if missing <= 0:
                break
        if not segments:
            return None
        last = not self.free_for(shards)
        lease = Lease(self._next_lease_id, client, tuple(segments), last)
        self._next_lease_id += 1
        self.open[lease.lease_id] = lease
        self.rows_leased += sum(s.rows or 0 for s in segments)
        return lease

    def _take(self, number: int, epoch: _Epoch, shard: int, rows: int) -> Segment:
        """Cut up to `rows` rows off the front of the shard's free rows (an open end is taken whole)."""
        if shard in epoch.untouched:
            del epoch.untouched[shard]
            epoch.pieces[shard] = [(0, self.row_counts.get(shard))]
        pieces = epoch.pieces[shard]
        first, end = pieces.pop(0)
        if end is not None and end - first > rows:
            pieces.insert(0, (first + rows, end))
            end = first + rows
        if not pieces:
            del epoch.pieces[shard]
        return Segment(number, shard, first, end)

    def _estimated_rows(self, segment: Segment, rows_wanted: int) -> int:
        if segment.rows is not None:
            return segment.rows
        if not self.row_counts:
            return max(1, -(-rows_wanted // 2))
        mean = sum(self.row_counts.values()) // len(self.row_counts)
        return max(1, mean - segment.first_row)

    # -- ending a lease --------------------------------------------------------------------------

    def check(
        self, lease_id: int, consumed: Sequence[Segment], row_counts: Mapping[int, int]
    ) -> None:
        """Raise LedgerError unless `consumed` is a prefix of the open lease `lease_id`.

        `row_counts` are the sizes of shards that the client has packed: they must agree with those
        that are known, and every segment but the last must have been consumed to its end.
        """
        self._used_ends(lease_id, consumed, row_counts)

    def _used_ends(
        self, lease_id: int, consumed: Sequence[Segment], row_counts: Mapping[int, int]
    ) -> list[int]:
        """Where the client stopped in each segment of its lease; raises as `check` does."""
        lease = self.open.get(lease_id)
        if lease is None:
            raise LedgerError(f"lease {lease_id} is not open")
        for shard, count in row_counts.items():
            self._check_count(shard, count)
        ends = []
        left = list(reversed(consumed))
        whole = True  # all segments so far were used to their end
        for leased in lease.segments:
            end, used_end = self._end(leased, row_counts), leased.first_row
            # a segment that turned out to be empty may be left out
            if left and (left[-1].key, left[-1].first_row) == (leased.key, leased.first_row):
                used = left.pop()
                used_end = -1 if used.end_row is None else used.end_row
                if used_end < used.first_row or (end is not None and used_end > end):
                    raise LedgerError(f"{used} goes beyond the leased {leased}")
                if not whole:
                    raise LedgerError(
                        f"{used} was used, but not all rows that are leased before it"
                    )
            whole = whole and used_end == end
            ends.append(used_end)
        if left:
            raise LedgerError(f"{left[-1]} does not start as the leased rows do")
        return ends

    def _check_count(self, shard: int, count: int) -> None:
        """Raise LedgerError if the shard can't have `count` rows."""
        known = self.row_counts.get(shard)
        if not 0 <= shard < self.num_shards or known not in (None, count):
            raise LedgerError(f"shard {shard} has {known} rows in the books, not {count}")
        seen = max((i[-1][1] for e in self._epochs if (i := e.committed.get(shard))), default=0)
        if count < seen:
            raise LedgerError(f"shard {shard} has {count} rows, but {seen} of it are committed")

    def _end(self, segment: Segment, row_counts: Mapping[int, int]) -> int | None:
        known = row_counts.get(segment.shard, self.row_counts.get(segment.shard))
        return known if segment.end_row is None else segment.end_row

    def commit(
        self, lease_id: int, consumed: Sequence[Segment], row_counts: Mapping[int, int]
    ) -> int:
        """The model has absorbed `consumed`; the rest of the lease is free again. Returns its rows.

        Raises LedgerError (nothing changes) as `check` does.
        """
        used_ends = self._used_ends(lease_id, consumed, row_counts)
        lease = self.open.pop(lease_id)
        # an open end is leased only once its rows are known: counted here, where they are consumed
        for shard in {s.shard for s in lease.segments}:
            if shard in row_counts:
                self._learn_count(shard, row_counts[shard])
        committed = 0
        for leased, used_end in zip(lease.segments, used_ends, strict=True):
            rows = used_end - leased.first_row
            if rows:
                self._mark_committed(lease.client, leased, used_end)
            committed += rows
            if leased.end_row is None:
                self.rows_leased += rows
            self._return(leased, used_end, self._end(leased, row_counts))
        self.rows_committed += committed
        return committed

    def give_back(self, lease_id: int) -> None:
        """All rows of the lease are free again; a lease that is not open is no error."""
        lease = self.open.pop(lease_id, None)
        for segment in lease.segments if lease else ():
            self._return(segment, segment.first_row, self._end(segment, {}))

    def _learn_count(self, shard: int, count: int) -> None:
        """Close the open ends that free pieces of this shard have in any epoch."""
        if shard in self.row_counts:
            return
        self.row_counts[shard] = count
        for epoch in self._epochs:
            if count == 0:
                epoch.untouched.pop(shard, None)
            pieces = epoch.pieces.pop(shard, [])
            closed = [(first, count if end is None else end) for first, end in pieces]
            if kept := [(first, end) for first, end in closed if first < end]:
                epoch.pieces[shard] = [*kept]

    def _mark_committed(self, client: str, leased: Segment, end: int) -> None:
        self._epochs[leased.epoch].tenants[leased.shard] = client
        committed = self._epochs[leased.epoch].committed
        committed[leased.shard] = _insert(committed.get(leased.shard, []), leased.first_row, end)

    def _return(self, leased: Segment, first: int, end: int | None) -> None:
        if leased.end_row is not None:
            self.rows_returned += leased.end_row - first
        if end is not None and first >= end:
            return
        pieces = self._epochs[leased.epoch].pieces
        pieces[leased.shard] = _insert_open(pieces.get(leased.shard, []), first, end)

    # -- what the books say ----------------------------------------------------------------------

    @property
    def rows_open(self) -> int:
        """Rows in open leases (open ends have no count yet and are left out)."""
        return sum(s.rows or 0 for lease in self.open.values() for s in lease.segments)

    @property
    def exhausted(self) -> bool:
        """Nothing is free: every row is committed or leased."""
        return not any(epoch.untouched or epoch.pieces for epoch in self._epochs)

    def free_for(self, shards: Collection[int] | None) -> bool:
        """Whether any row of `shards` is free."""
        return any(epoch.next_shard("", shards) is not None for epoch in self._epochs)

    def committed(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """(epoch, shard) → sorted, disjoint intervals of rows that the model has seen."""
        return {
            (number, shard): list(intervals)
            for number, epoch in enumerate(self._epochs)
            for shard, intervals in epoch.committed.items()
        }

    def progress(self) -> tuple[float, int, int]:
        """(share of the data committed, 0..1; shards complete; shards of all epochs)."""
        complete, share, total = 0, 0.0, self.num_shards * len(self._epochs)
        for epoch in self._epochs:
            for shard, count in self.row_counts.items():
                rows = sum(end - first for first, end in epoch.committed.get(shard, []))
                complete += rows == count
                share += rows / count if count else 1.0
        return share / total, complete, total

    # -- disk ------------------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """What a snapshot keeps, as JSON: open leases are left out, so resuming returns them."""
        return {
            "num_shards": self.num_shards,
            "epochs": len(self._epochs),
            "next_lease_id": self._next_lease_id,
            "row_counts": sorted([s, n] for s, n in self.row_counts.items()),
            "committed": sorted(
                [epoch, shard, self._epochs[epoch].tenants[shard], [list(p) for p in intervals]]
                for (epoch, shard), intervals in self.committed().items()
            ),
        }

    @staticmethod
    def from_state(
        state: Mapping[str, Any], *, shard_order: Callable[[int], Sequence[int]]
    ) -> "Ledger":
        """The books of a snapshot; raises LedgerError if rows overlap or exceed their shard."""
        ledger = Ledger(
            num_shards=state["num_shards"], epochs=state["epochs"], shard_order=shard_order
        )
        ledger._next_lease_id = state["next_lease_id"]
        for shard, count in state["row_counts"]:
            ledger._learn_count(shard, count)
        for number, shard, tenant, intervals in state["committed"]:
            ledger._restore(number, shard, [(first, end) for first, end in intervals])
            ledger._epochs[number].tenants[shard] = tenant
        ledger.rows_leased = ledger.rows_committed
        return ledger

    def _restore(self, number: int, shard: int, intervals: list[tuple[int, int]]) -> None:
        epoch, count = self._epochs[number], self.row_counts.get(shard)
        del epoch.untouched[shard]
        free: list[tuple[int, int | None]] = []
        position = 0
        for first, end in intervals:
            if first < position or end <= first or (count is not None and end > count):
                raise LedgerError(
                    f"committed rows {first}-{end} of shard {shard} overlap or exceed"
                )
            if first > position:
                free.append((position, first))
            position = end
            self.rows_committed += end - first
        if count is None or position < count:
            free.append((position, count))
        epoch.committed[shard] = intervals
        if free:
            epoch.pieces[shard] = free


def _insert(intervals: Iterable[tuple[int, int]], first: int, end: int) -> list[tuple[int, int]]:
    """Add [first, end) to disjoint sorted intervals, joining neighbours; raises if it overlaps."""
    merged: list[tuple[int, int]] = []
    for a, b in sorted([*intervals, (first, end)]):
        if merged and a < merged[-1][1]:
            raise LedgerError(f"rows {a}-{min(b, merged[-1][1])} are there twice")
        if merged and a == merged[-1][1]:
            merged[-1] = (merged[-1][0], b)
        else:
            merged.append((a, b))
    return merged


def _insert_open(
    intervals: Iterable[tuple[int, int | None]], first: int, end: int | None
) -> list[tuple[int, int | None]]:
    """As `_insert`, where an end may be open (the last interval's only)."""
    far = 1 << 62
    closed = _insert([(a, far if b is None else b) for a, b in intervals], first, end or far)
    return [(a, None if b == far else b) for a, b in closed]
