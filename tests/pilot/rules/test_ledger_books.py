"""The books about rows: whatever the clients do, no row is lost and none is committed twice."""

import copy
import json
from collections.abc import Collection

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from pilot.rules.ledger import Lease, Ledger, LedgerError
from pilot.segment import Segment

from .ledger_kit import Row, consume, order, rows_of

FREE, COMMITTED = "free", "committed"
CLIENTS = "abcd"
SHARDS = st.sets(st.integers(0, 6))  # more than there are: a site may have others on its disk


class BooksMachine(RuleBasedStateMachine):
    """The ledger beside a naive model of it: the state of every single row.

    Clients come, go, come back with other disks, reply in part, in any order, twice, or never.
    """

    leases = Bundle("leases")

    @initialize(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5), epochs=st.integers(1, 3))
    def start(self, sizes: list[int], epochs: int) -> None:
        self.sizes, self.epochs = sizes, epochs
        self.ledger = Ledger(
            num_shards=len(sizes), epochs=epochs, shard_order=lambda e: order(len(sizes), e)
        )
        self.disks: dict[str, set[int]] = {}
        self.rows: dict[Row, str | int] = {
            (epoch, shard, row): FREE
            for epoch in range(epochs)
            for shard, size in enumerate(sizes)
            for row in range(size)
        }

    @rule(client=st.sampled_from(CLIENTS), shards=SHARDS)
    def join(self, client: str, shards: set[int]) -> None:
        self.ledger.register(client, shards)
        self.disks[client] = shards

    @rule(client=st.sampled_from(CLIENTS))
    def leave(self, client: str) -> None:
        for lease_id in [i for i, lease in self.ledger.open.items() if lease.client == client]:
            self.end(lease_id)

    @rule(target=leases, client=st.sampled_from(CLIENTS), rows=st.integers(1, 12))
    def lease(self, client: str, rows: int) -> Lease | None:
        lease = self.ledger.lease(client, rows)
        self.grant({client: rows}, {client: lease} if lease else {})
        return lease

    @rule(
        target=leases,
        wanted=st.dictionaries(st.sampled_from(CLIENTS), st.integers(1, 12), min_size=1),
        step_rows=st.integers(1, 4),
    )
    def lease_all(self, wanted: dict[str, int], step_rows: int) -> MultipleResults[Lease | None]:
        leases = self.ledger.lease_all(wanted, step_rows=step_rows)
        for client, rows in wanted.items():
            wanted[client] = max(rows, step_rows)  # at least a step
        self.grant(wanted, leases)
        return multiple(*leases.values())

    def grant(self, wanted: dict[str, int], leases: dict[str, Lease]) -> None:
        """Enter new leases into the model; whoever asked gets rows unless there are none."""
        for client, lease in leases.items():
            assert lease.client == client and self.ledger.open[lease.lease_id] is lease
            disk = self.allowed(client)
            for segment in lease.segments:
                assert segment.shard in disk and 0 <= segment.shard < len(self.sizes)
                assert segment.end_row or segment.shard not in self.ledger.row_counts
                for row in rows_of(segment, self.sizes):
                    assert self.rows[row] == FREE, f"{row} is leased, but {self.rows[row]}"
                    self.rows[row] = lease.lease_id
            known = sum(segment.rows or 0 for segment in lease.segments[:-1])
            assert known < wanted[client], "more was leased than was asked for"
            assert not (lease.last and self.free(disk))
        for client in wanted.keys() - leases.keys():
            assert not self.ledger.free_for(client) and not self.free(self.allowed(client))

    @rule(lease=leases, share=st.floats(0, 1), packed=st.sets(st.integers(0, 4)))
    def accept(self, lease: Lease | None, share: float, packed: set[int]) -> None:
        """A reply is there, and not merged yet. It may come after the lease has ended."""
        if lease is None or lease.lease_id not in self.ledger.open:
            return
        lease = self.ledger.open[lease.lease_id]
        used, counts = self.reply(lease, share, packed)
        kept = self.ledger.accept(lease.lease_id, used, counts)
        assert list(kept.segments) == used
        self.end(lease.lease_id, keep=kept)

    @rule(lease=consumes(leases), share=st.floats(0, 1), packed=st.sets(st.integers(0, 4)))
    def commit(self, lease: Lease | None, share: float, packed: set[int]) -> None:
        if lease is None or lease.lease_id not in self.ledger.open:
            return
        lease = self.ledger.open[lease.lease_id]  # as it was accepted, maybe
        used, counts = self.reply(lease, share, packed)
        assert self.ledger.commit(lease.lease_id, used, counts) == sum(s.rows or 0 for s in used)
        for row in (row for segment in used for row in rows_of(segment, self.sizes)):
            self.rows[row] = COMMITTED
        self.end(lease.lease_id)
        with pytest.raises(LedgerError, match="not open"):  # the same reply once more
            self.ledger.commit(lease.lease_id, used, counts)

    def reply(
        self, lease: Lease, share: float, packed: set[int]
    ) -> tuple[list[Segment], dict[int, int]]:
        rows = [row for segment in lease.segments for row in rows_of(segment, self.sizes)]
        used, ended = consume(lease, round(share * len(rows)), self.sizes)
        packed &= set(range(len(self.sizes)))
        return used, {shard: self.sizes[shard] for shard in packed | ended}

    @rule(lease=consumes(leases))
    def give_back(self, lease: Lease | None) -> None:
        if lease is not None:
            self.end(lease.lease_id)

    def end(self, lease_id: int, *, keep: Lease | None = None) -> None:
        """Free what the model has under this lease, but for what `keep` has."""
        kept = {row for s in (keep.segments if keep else ()) for row in rows_of(s, self.sizes)}
        if keep is None:
            self.ledger.give_back(lease_id)
        for row, state in self.rows.items():
            if state == lease_id and row not in kept:
                self.rows[row] = FREE

    @rule(wanted=st.dictionaries(st.sampled_from(CLIENTS), st.integers(1, 12), min_size=1))
    def crash_and_resume(self, wanted: dict[str, int]) -> None:
        uninterrupted = copy.deepcopy(self.ledger)
        for lease_id in list(uninterrupted.open):
            uninterrupted.give_back(lease_id)
        state = json.loads(json.dumps(self.ledger.to_state()))
        self.ledger = Ledger.from_state(state, shard_order=lambda e: order(len(self.sizes), e))
        assert self.ledger.to_state() == state
        assert self.ledger.progress() == uninterrupted.progress()
        for client, shards in self.disks.items():
            self.ledger.register(client, shards)
        self.rows = {r: COMMITTED if s == COMMITTED else FREE for r, s in self.rows.items()}
        # and goes on exactly as if nothing had happened
        resumed = copy.deepcopy(self.ledger)
        for ledger in (uninterrupted, resumed):
            ledger.lease_all(wanted)
            ledger.lease("a", 3)
            ledger.lease_all(wanted, step_rows=3)
        assert uninterrupted.open == resumed.open

    def allowed(self, client: str) -> Collection[int]:
        return self.disks.get(client, range(len(self.sizes)))

    def free(self, shards: Collection[int]) -> list[Row]:
        return [row for row, state in self.rows.items() if state == FREE and row[1] in shards]

    @invariant()
    def leased_is_committed_and_returned_and_open(self) -> None:
        books = self.ledger
        assert books.rows_leased == books.rows_committed + books.rows_returned + books.rows_open

    @invariant()
    def the_same_rows_are_leased(self) -> None:
        held = [
            (row, lease.lease_id)
            for lease in self.ledger.open.values()
            for segment in lease.segments
            for row in rows_of(segment, self.sizes)
        ]
        assert len(held) == len(dict(held)), "a row is leased twice"
        assert dict(held) == {row: s for row, s in self.rows.items() if isinstance(s, int)}

    @invariant()
    def the_same_rows_are_committed(self) -> None:
        intervals = [
            (*key, *pair) for key, pairs in self.ledger.committed().items() for pair in pairs
        ]
        rows = [(e, s, row) for e, s, first, end in intervals for row in range(first, end)]
        assert len(rows) == len(set(rows)) == self.ledger.rows_committed
        assert set(rows) == {row for row, state in self.rows.items() if state == COMMITTED}

    @invariant()
    def progress_counts_what_is_committed(self) -> None:
        left = {row[:2] for row, state in self.rows.items() if state != COMMITTED}
        shards = [(e, s) for e in range(self.epochs) for s in self.ledger.row_counts]
        share, complete, total = self.ledger.progress()
        assert complete == len(set(shards) - left)
        assert 0 <= share <= 1 and total == len(self.sizes) * self.epochs

    def teardown(self) -> None:
        """Whatever has happened: clients that go on get everything committed."""
        if not hasattr(self, "ledger"):
            return
        for lease_id in list(self.ledger.open):
            self.ledger.give_back(lease_id)
        for _ in range(100):
            leases = self.ledger.lease_all({"new": 5, "newer": 3}, step_rows=2)
            if not leases:
                break
            for lease in leases.values():
                used, _ = consume(lease, 1000, self.sizes)
                counts = {s.shard: self.sizes[s.shard] for s in lease.segments}
                self.ledger.commit(lease.lease_id, used, counts)
        assert self.ledger.exhausted and self.ledger.rows_committed == len(self.rows)
        if self.ledger.row_counts.keys() == set(range(len(self.sizes))):
            share, complete, total = self.ledger.progress()
            assert share == 1.0 and complete == total


BooksMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
TestBooks = BooksMachine.TestCase
