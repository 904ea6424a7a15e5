"""The books: which client holds which rows, and which rows the model has seen.

Every row of every epoch is in exactly one state: free, leased (open) or committed. Leasing moves free
rows to a client; committing moves a prefix of a lease to committed and returns the rest; giving back
returns all of it. Nothing else changes a state, so `leased = committed + returned + open` holds at any
moment, and a row can be committed only once.

A shard's row count is unknown until somebody has packed it. Such a shard is leased open-ended, to one
client at a time, and the count comes back with the reply. Only counts of accepted replies enter the
books, so that a resumed server leases exactly what an uninterrupted one would have.

What a round costs grows with the leases that it opens and ends, not with the shards there are.

Pure: standard library only, no clock, no randomness (the order of shards is passed in).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pilot.rules.epoch_rows import EpochRows
from pilot.rules.intervals import UNKNOWN_END
from pilot.rules.shard_sets import ShardSet, ShardSets
from pilot.rules.sharing import ClientGroup, StepRows, fair_shares
from pilot.segment import Segment


class LedgerError(ValueError):
    """A commit that the books can't take; the message says why. The books are unchanged."""


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
        for number in range(epochs):
            order = list(shard_order(number))
            if sorted(order) != list(range(num_shards)):
                raise ValueError(
                    f"shard_order({number}) is not a permutation of {num_shards} shards"
                )
            self._epochs.append(EpochRows(order, self.row_counts))
        self._shard_sets = ShardSets(num_shards)
        self._known_rows = 0  # the sum of row_counts
        self._complete = 0  # shards, in each epoch, of which all rows are committed
        self.rows_leased = self.rows_committed = self.rows_returned = 0

    # -- leasing ---------------------------------------------------------------------------------

    def register(self, client: str, shards: Collection[int]) -> None:
        """`client` has `shards` on its disk (numbers that are no training shards are ignored).

        From now on it is leased rows of these only. A client that was never registered may be leased any
        shard. Called again when its shards change.
        """
        self._shard_sets.register(client, shards)

    def lease(self, client: str, rows_wanted: int) -> Lease | None:
        """Lease about `rows_wanted` free rows; None when nothing is free for this client.

        Earlier epochs come before later ones; within one, see `EpochRows.choose`. Shards of
        unknown size count as an average known one, or half of what is wanted if none is known. A
        client may have several open leases.
        """
        return self.lease_all({client: rows_wanted}).get(client)

    def lease_all(self, wanted: Mapping[str, int], *, step_rows: StepRows = 1) -> dict[str, Lease]:
        """Lease to each client about the rows `wanted`, or its fair share where too few are free.

        Shares are those of `fair_shares`, in whole steps of `step_rows` rows. Clients with the
        fewest shards choose first. Clients for which nothing is left are not in the result.
        """
        sharing: dict[ShardSet, dict[str, int]] = {}
        for client, rows in wanted.items():
            if rows < 1:
                raise ValueError(f"rows_wanted must be positive, not {rows}")
            sharing.setdefault(self._shard_sets.of(client), {})[client] = rows
        # an unknown shard counts as half of what is wanted on average, in whole steps
        step = step_rows if isinstance(step_rows, int) else max(step_rows.values(), default=1)
        guess = -(-sum(wanted.values()) // max(1, 2 * len(wanted) * step)) * step
        groups = [
            ClientGroup(rows, self._free_rows(shards, sum(rows.values()), guess))
            for shards, rows in sorted(sharing.items(), key=lambda item: item[0].size)
        ]
        usable = sum(group.usable for group in groups)
        free_rows = self._free_rows(self._shard_sets.everything, usable, guess)
        shares = fair_shares(groups, free_rows, step_rows=step_rows)
        leases = {client: self._lease(client, rows, guess) for client, rows in shares.items()}
        return {client: lease for client, lease in leases.items() if lease}

    def _free_rows(self, shards: ShardSet, enough: int, guess: int) -> int:
        """Free rows of `shards`; looks no further once it has seen `enough`."""
        rows = 0
        for epoch in (epoch for epoch in self._epochs if epoch.any_free):
            for first, end in epoch.free_rows(shards.places(epoch)):
                if rows >= enough:
                    return rows
                rows += self._size(first, end, guess)
        return rows

    def _lease(self, client: str, rows: int, guess: int) -> Lease | None:
        """Take about `rows` free rows; a shard counts as `guess` rows where nothing is known."""
        shards = self._shard_sets.of(client)
        segments: list[Segment] = []
        for number, epoch in enumerate(self._epochs):
            places = shards.places(epoch) if epoch.any_free and rows > 0 else None
            while places and rows > 0 and (shard := epoch.choose(client, places)) is not None:
                first, end = epoch.lease_rows(shard, rows, client)
                rows -= self._size(first, end, guess)
                end_row = None if end == UNKNOWN_END else end
                segments.append(Segment(number, shard, first, end_row))
        if not segments:
            return None
        lease = Lease(self._next_lease_id, client, tuple(segments), not self.free_for(client))
        self._next_lease_id += 1
        self.open[lease.lease_id] = lease
        self.rows_leased += sum(segment.rows or 0 for segment in segments)
        return lease

    def _size(self, first: int, end: int, guess: int) -> int:
        """Rows in [first, end); as a mean shard has them if nobody knows, or `guess`."""
        if end != UNKNOWN_END:
            return end - first
        return max(1, self.mean_shard_rows - first) if self.row_counts else guess

    # -- ending a lease --------------------------------------------------------------------------

    def check(
        self, lease_id: int, consumed: Sequence[Segment], row_counts: Mapping[int, int]
    ) -> None:
        """Raise LedgerError unless `consumed` is a prefix of the open lease `lease_id`.

        `row_counts` are the sizes of shards that the client has packed. Those of leased shards must
        agree with what is known, others must only be training shards; every segment but the last
        must have been consumed to its end.
        """
        self._used_ends(lease_id, consumed, row_counts)

    def accept(
        self, lease_id: int, consumed: Sequence[Segment], row_counts: Mapping[int, int]
    ) -> Lease:
        """The client is done with the lease: it shrinks to `consumed`, the rest is free at once.

        Returns the shrunk lease, which stays open until it is committed or given back. Raises
        LedgerError (nothing changes) as `check` does.
        """
        used_ends = self._used_ends(lease_id, consumed, row_counts)
        lease = self.open[lease_id]
        for shard in {segment.shard for segment in lease.segments} & row_counts.keys():
            self._learn_count(shard, row_counts[shard])
        kept = []
        for segment, used_end in zip(lease.segments, used_ends, strict=True):
            epoch, used = self._epochs[segment.epoch], used_end - segment.first_row
            if segment.end_row is None:  # only now is it known how many rows that were
                self.rows_leased += used
            else:
                self.rows_returned += segment.end_row - used_end
            if segment.end_row != used_end:
                epoch.release(segment.shard, _interval(segment), lease.client, used_end)
            if used:
                kept.append(replace(segment, end_row=used_end))
        self.open[lease_id] = replace(lease, segments=tuple(kept))
        return self.open[lease_id]

    def commit(
        self, lease_id: int, consumed: Sequence[Segment], row_counts: Mapping[int, int]
    ) -> int:
        """The model has absorbed `consumed`; the rest of the lease is free again. Returns its rows.

        Raises LedgerError (nothing changes) as `check` does.
        """
        lease = self.accept(lease_id, consumed, row_counts)
        del self.open[lease_id]
        committed = 0
        for segment in lease.segments:
            epoch, shard = self._epochs[segment.epoch], segment.shard
            epoch.absorb(shard, _interval(segment), lease.client)
            self._complete += epoch.committed_rows(shard) == self.row_counts.get(shard)
            committed += segment.rows or 0
        self.rows_committed += committed
        return committed

    def give_back(self, lease_id: int) -> None:
        """All rows of the lease are free again; a lease that is not open is no error."""
        if (lease := self.open.pop(lease_id, None)) is None:
            return
        for segment in lease.segments:
            epoch = self._epochs[segment.epoch]
            epoch.release(segment.shard, _interval(segment), lease.client, segment.first_row)
            self.rows_returned += segment.rows or 0

    def _used_ends(
        self, lease_id: int, consumed: Sequence[Segment], row_counts: Mapping[int, int]
    ) -> list[int]:
        """Where the client stopped in each segment of its lease; raises as `check` does."""
        lease = self.open.get(lease_id)
        if lease is None:
            raise LedgerError(f"lease {lease_id} is not open")
        leased_shards = {segment.shard for segment in lease.segments}
        for shard, count in row_counts.items():
            if shard in leased_shards or not 0 <= shard < self.num_shards:
                self._check_count(shard, count)
        ends = []
        left = [segment for segment in reversed(consumed) if segment.rows != 0]
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
        if not 0 <= shard < self.num_shards or known not in (None, count) or count < 0:
            raise LedgerError(f"shard {shard} has {known} rows in the books, not {count}")
        used = max((epoch.used_rows(shard) for epoch in self._epochs), default=0)
        if known is None and count < used:
            raise LedgerError(f"shard {shard} has {count} rows, but {used} of it were trained on")

    def _end(self, segment: Segment, row_counts: Mapping[int, int]) -> int | None:
        known = row_counts.get(segment.shard, self.row_counts.get(segment.shard))
        return known if segment.end_row is None else segment.end_row

    def _learn_count(self, shard: int, count: int) -> None:
        """Close the open ends that free rows of this shard have in any epoch."""
        if shard not in self.row_counts:
            self.row_counts[shard] = count
            self._known_rows += count
            for epoch in self._epochs:
                epoch.close(shard, count)
                self._complete += epoch.committed_rows(shard) == count

    def keep_lease_ids_of(self, later: "Ledger") -> None:
        """These are the books of before `later`, which go on from there: no lease id is given twice."""
        self._next_lease_id = max(self._next_lease_id, later._next_lease_id)

    # -- what the books say ----------------------------------------------------------------------

    @property
    def rows_open(self) -> int:
        """Rows in open leases (open ends have no count yet and are left out)."""
        return sum(s.rows or 0 for lease in self.open.values() for s in lease.segments)

    @property
    def exhausted(self) -> bool:
        """Nothing is free: every row is committed or leased."""
        return not any(epoch.any_free for epoch in self._epochs)

    def free_for(self, client: str) -> bool:
        """Whether any row is free that `client` may be leased."""
        shards = self._shard_sets.of(client)
        return any(e.any_free and e.has_free(shards.places(e)) for e in self._epochs)

    @property
    def mean_shard_rows(self) -> int:
        """Rows of an average shard, of those whose number is known; 0 if there is none."""
        return self._known_rows // max(1, len(self.row_counts))

    def committed(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """(epoch, shard) → sorted, disjoint intervals of rows that the model has seen."""
        return {
            (number, shard): list(intervals)
            for number, epoch in enumerate(self._epochs)
            for shard, _, intervals in epoch.committed()
        }

    def progress(self) -> tuple[float, int, int]:
        """(share of the rows committed, 0..1; shards complete; shards of all epochs).

        Shards of unknown size count as average ones.
        """
        unknown, epochs = self.num_shards - len(self.row_counts), len(self._epochs)
        rows = epochs * (self._known_rows + unknown * self.mean_shard_rows)
        done = float(unknown == 0)  # if there is no row in them
        share = min(1.0, self.rows_committed / rows) if rows else done
        return share, self._complete, self.num_shards * epochs

    # -- disk ------------------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """What a snapshot keeps, as JSON: open leases are left out, so resuming returns them."""
        return {
            "num_shards": self.num_shards,
            "epochs": len(self._epochs),
            "next_lease_id": self._next_lease_id,
            "row_counts": sorted([s, n] for s, n in self.row_counts.items()),
            "committed": sorted(
                [number, shard, last_committer, [list(interval) for interval in intervals]]
                for number, epoch in enumerate(self._epochs)
                for shard, last_committer, intervals in epoch.committed()
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
            ledger._check_count(shard, count)
            ledger._learn_count(shard, count)
        for number, shard, last_committer, intervals in state["committed"]:
            ledger._restore(
                number, shard, last_committer, [(first, end) for first, end in intervals]
            )
        ledger.rows_leased = ledger.rows_committed
        return ledger

    def _restore(
        self, number: int, shard: int, last_committer: str, committed: list[tuple[int, int]]
    ) -> None:
        if not 0 <= number < len(self._epochs):
            raise LedgerError(f"rows of epoch {number} are committed, but there is no such epoch")
        epoch = self._epochs[number]
        try:
            epoch.restore(shard, committed, last_committer)
        except ValueError as error:
            raise LedgerError(f"the committed rows of epoch {number} can't be: {error}") from error
        rows = epoch.committed_rows(shard)
        self.rows_committed += rows
        self._complete += rows == self.row_counts.get(shard)


def _interval(segment: Segment) -> tuple[int, int]:
    end = UNKNOWN_END if segment.end_row is None else segment.end_row
    return segment.first_row, end
