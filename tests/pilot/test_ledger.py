"""The books about rows: whatever the clients do, no row is lost and none is committed twice."""

import copy
import json
import random
from collections.abc import Collection

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from pilot.ledger import Lease, Ledger, LedgerError, Segment

Row = tuple[int, int, int]  # epoch, shard, row
FREE, COMMITTED = "free", "committed"


def order(num_shards: int) -> list[int]:
    return random.Random(num_shards).sample(range(num_shards), num_shards)


def make(num_shards: int = 3, epochs: int = 1) -> Ledger:
    return Ledger(num_shards=num_shards, epochs=epochs, shard_order=lambda _: range(num_shards))


def rows_of(segment: Segment, sizes: list[int]) -> list[Row]:
    end = sizes[segment.shard] if segment.end_row is None else segment.end_row
    return [(segment.epoch, segment.shard, row) for row in range(segment.first_row, end)]


def consume(lease: Lease, num_rows: int, sizes: list[int]) -> tuple[list[Segment], set[int]]:
    """What a client reports that trained on `num_rows`: its segments, the shards read to their end."""
    used, ended, left = [], set(), num_rows
    for segment in lease.segments:
        rows = len(rows_of(segment, sizes))
        if not left and rows:
            break
        taken = min(rows, left)
        left -= taken
        if taken:
            end_row = segment.first_row + taken
            used.append(Segment(segment.epoch, segment.shard, segment.first_row, end_row))
        if left and taken == rows:
            ended.add(segment.shard)
    return used, ended


class BooksMachine(RuleBasedStateMachine):
    """The ledger beside a naive model of it: the state of every single row."""

    leases = Bundle("leases")

    @initialize(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5), epochs=st.integers(1, 3))
    def start(self, sizes: list[int], epochs: int) -> None:
        self.sizes, self.epochs = sizes, epochs
        self.ledger = Ledger(
            num_shards=len(sizes), epochs=epochs, shard_order=lambda _: order(len(sizes))
        )
        self.rows: dict[Row, str | int] = {
            (epoch, shard, row): FREE
            for epoch in range(epochs)
            for shard, size in enumerate(sizes)
            for row in range(size)
        }

    @rule(
        target=leases,
        client=st.sampled_from("ab"),
        wanted=st.integers(1, 12),
        held=st.none() | st.sets(st.integers(0, 4)),
    )
    def lease(self, client: str, wanted: int, held: set[int] | None) -> Lease | None:
        lease = self.ledger.lease(client, wanted, shards=held)
        shards = range(len(self.sizes)) if held is None else held
        if lease is None:
            assert not self.ledger.free_for(held) and not self.free(shards)
            return None
        for segment in lease.segments:
            assert segment.shard in shards and 0 <= segment.shard < len(self.sizes)
            assert (segment.end_row is None) == (segment.shard not in self.ledger.row_counts)
            for row in rows_of(segment, self.sizes):
                assert self.rows[row] == FREE, f"{row} is leased, but {self.rows[row]}"
                self.rows[row] = lease.lease_id
        known = sum(segment.rows or 0 for segment in lease.segments[:-1])
        assert known < wanted, "more was leased than was asked for"
        assert lease.last == (not self.ledger.free_for(held))
        assert not (lease.last and self.free(shards))
        return lease

    @rule(lease=consumes(leases), share=st.floats(0, 1), packed=st.sets(st.integers(0, 4)))
    def commit(self, lease: Lease | None, share: float, packed: set[int]) -> None:
        if lease is None or lease.lease_id not in self.ledger.open:
            return
        rows = [row for segment in lease.segments for row in rows_of(segment, self.sizes)]
        used, ended = consume(lease, round(share * len(rows)), self.sizes)
        leased = {segment.shard for segment in lease.segments}
        counts = {shard: self.sizes[shard] for shard in (packed & leased) | ended}
        committed = self.ledger.commit(lease.lease_id, used, counts)
        assert committed == sum(segment.rows or 0 for segment in used)
        for position, row in enumerate(rows):
            self.rows[row] = COMMITTED if position < committed else FREE

    @rule(lease=consumes(leases))
    def give_back(self, lease: Lease | None) -> None:
        if lease is None or lease.lease_id not in self.ledger.open:
            return
        self.ledger.give_back(lease.lease_id)
        self.rows = {r: FREE if s == lease.lease_id else s for r, s in self.rows.items()}

    @rule()
    def crash_and_resume(self) -> None:
        uninterrupted = copy.deepcopy(self.ledger)
        for lease_id in list(uninterrupted.open):
            uninterrupted.give_back(lease_id)
        state = json.loads(json.dumps(self.ledger.to_state()))
        self.ledger = Ledger.from_state(state, shard_order=lambda _: order(len(self.sizes)))
        assert self.ledger.to_state() == state
        self.rows = {r: COMMITTED if s == COMMITTED else FREE for r, s in self.rows.items()}
        # and goes on exactly as if nothing had happened
        resumed = copy.deepcopy(self.ledger)
        for client, wanted, held in (("a", 1, None), ("b", 5, {0, 2}), ("b", 9, None)):
            lease = uninterrupted.lease(client, wanted, shards=held)
            assert resumed.lease(client, wanted, shards=held) == lease

    def free(self, shards: Collection[int]) -> list[Row]:
        return [row for row, state in self.rows.items() if state == FREE and row[1] in shards]

    @invariant()
    def leased_is_committed_and_returned_and_open(self) -> None:
        books = self.ledger
        assert books.rows_leased == books.rows_committed + books.rows_returned + books.rows_open

    @invariant()
    def the_same_rows_are_committed(self) -> None:
        intervals = [
            (*key, *pair) for key, pairs in self.ledger.committed().items() for pair in pairs
        ]
        rows = [(e, s, row) for e, s, first, end in intervals for row in range(first, end)]
        assert len(rows) == len(set(rows)) == self.ledger.rows_committed
        assert set(rows) == {row for row, state in self.rows.items() if state == COMMITTED}
        share, complete, total = self.ledger.progress()
        assert 0 <= share <= 1 and 0 <= complete <= total == len(self.sizes) * self.epochs

    def teardown(self) -> None:
        """Whatever has happened: clients that go on get everything committed."""
        if not hasattr(self, "ledger"):
            return
        for lease_id in list(self.ledger.open):
            self.ledger.give_back(lease_id)
        for _ in range(100):
            lease = self.ledger.lease("client", 5)
            if lease is None:
                break
            used, _ = consume(lease, 1000, self.sizes)
            counts = {s.shard: self.sizes[s.shard] for s in lease.segments}
            self.ledger.commit(lease.lease_id, used, counts)
        assert self.ledger.exhausted and self.ledger.rows_committed == len(self.rows)
        if self.ledger.row_counts.keys() == set(range(len(self.sizes))):
            share, complete, total = self.ledger.progress()
            assert share == pytest.approx(1.0) and complete == total


BooksMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=25, deadline=None, derandomize=True, database=None
)
TestBooks = BooksMachine.TestCase


# -- leases --------------------------------------------------------------------------------------


def test_shards_outside_the_training_shards_are_never_leased() -> None:
    ledger = make(num_shards=2)
    assert ledger.lease("c", 5, shards={2, 3, 1822}) is None
    lease = ledger.lease("c", 1000, shards={1, 2, 3})
    assert lease is not None and {s.shard for s in lease.segments} == {1}


def test_shard_of_unknown_size_is_leased_to_one_client_only() -> None:
    ledger = make(num_shards=1)
    assert ledger.lease("a", 1) is not None
    assert ledger.lease("b", 1) is None


def test_client_goes_on_with_its_own_shard_then_new_ones_then_those_of_others() -> None:
    ledger = make(num_shards=3, epochs=2)
    for client, shard in (("a", 0), ("b", 1)):
        lease = ledger.lease(client, 1, shards={shard})
        assert lease is not None and lease.segments[0].key == (0, shard)
        ledger.commit(lease.lease_id, [Segment(0, shard, 0, 4)], {shard: 10})
    lease = ledger.lease("b", 27)
    assert lease is not None and lease.segments == (
        Segment(0, 1, 4, 10),
        Segment(0, 2, 0, None),
        Segment(0, 0, 4, 10),
        Segment(1, 0, 0, 5),
    )


def test_lease_that_nobody_used_leaves_no_trace_in_the_order_of_shards() -> None:
    ledger = Ledger(num_shards=4, epochs=1, shard_order=lambda _: [3, 1, 2, 0])
    first = ledger.lease("a", 100)
    assert first is not None
    ledger.give_back(first.lease_id)
    second = ledger.lease("a", 100)
    assert first.segments == (Segment(0, 3, 0, None), Segment(0, 1, 0, None))
    assert second is not None and second.segments == first.segments


def test_empty_shard_is_never_leased_once_it_is_known_to_be_empty() -> None:
    ledger = make(num_shards=2, epochs=2)
    lease = ledger.lease("a", 100)
    assert lease is not None
    # the stream of a client doesn't list segments without rows
    assert ledger.commit(lease.lease_id, [Segment(0, 1, 0, 3)], {0: 0, 1: 3}) == 3
    lease = ledger.lease("a", 100)
    assert lease is not None and lease.segments == (Segment(1, 1, 0, 3),) and lease.last
    ledger.commit(lease.lease_id, [Segment(1, 1, 0, 3)], {})
    assert ledger.exhausted and ledger.progress() == (1.0, 4, 4)


def test_client_that_stopped_exactly_at_an_unknown_end_doesnt_block_the_shard() -> None:
    ledger = make(num_shards=2)
    lease = ledger.lease("a", 1)
    assert lease is not None
    ledger.commit(lease.lease_id, [Segment(0, 0, 0, 5)], {})  # all five rows, as it turns out
    again = ledger.lease("a", 100)
    assert again is not None and again.segments[0] == Segment(0, 0, 5, None)
    assert ledger.commit(again.lease_id, [Segment(0, 1, 0, 2)], {0: 5, 1: 2}) == 2
    assert ledger.exhausted


# -- bad commits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "counts"),
    [
        ([[0, 0, 0, 11]], {}),  # beyond the lease
        ([[0, 0, 2, 5]], {}),  # not from its start
        ([[0, 1, 0, 5]], {}),  # the second segment only
        ([[0, 0, 0, 9], [0, 1, 0, 5]], {}),  # a gap
        ([[0, 0, 0, 10], [0, 1, 0, 21]], {1: 20}),  # beyond its shard
        ([[0, 0, 0, 10], [0, 1, 0, 5], [1, 0, 0, 1]], {1: 6}),  # the shard before isn't used up
        ([[0, 0, 0, 10], [0, 1, 0, 5], [1, 0, 0, 1]], {}),  # nobody knows that it is
        ([[0, 0, 0, 10], [0, 0, 0, 10]], {}),  # twice
        ([[0, 0, 0, 10], [0, 1, 0, 5], [0, 2, 0, 1]], {1: 5, 2: 1}),  # not leased
        ([[1, 0, 0, 5]], {}),  # another epoch
        ([[0, 0, 0, -1]], {}),  # an open end
        ([[0, 0, 5, 0]], {}),  # backwards
        ([], {0: 9}),  # another size than known
        ([], {1: -1}),
        ([], {3: 10}),  # the validation shard
        ([], {-1: 10}),
    ],
)
def test_commit_that_is_no_prefix_of_its_lease_leaves_the_books_unchanged(
    used: list[list[int]], counts: dict[int, int]
) -> None:
    ledger = make(num_shards=3, epochs=2)
    first, other = ledger.lease("a", 1), ledger.lease("b", 1, shards={2})
    assert first is not None and other is not None
    ledger.commit(first.lease_id, [], {0: 10})
    lease = ledger.lease("a", 25)
    assert lease is not None
    wanted = (Segment(0, 0, 0, 10), Segment(0, 1, 0, None), Segment(1, 0, 0, 5))
    assert lease.segments == wanted
    lease_id, before = lease.lease_id, copy.deepcopy(vars(ledger))
    with pytest.raises(LedgerError):
        ledger.commit(lease_id, [Segment.from_list(values) for values in used], counts)
    assert vars(ledger) == before
    ledger.give_back(lease_id)


def test_size_below_rows_that_are_committed_is_refused() -> None:
    ledger = make(num_shards=1, epochs=2)
    first, second = ledger.lease("a", 1, shards={0}), ledger.lease("b", 1, shards={0})
    assert first is not None and second is not None and second.segments[0].epoch == 1
    ledger.commit(first.lease_id, [Segment(0, 0, 0, 8)], {})
    with pytest.raises(LedgerError, match="8 of it are committed"):
        ledger.commit(second.lease_id, [Segment(1, 0, 0, 5)], {0: 5})


def test_lease_is_committed_once() -> None:
    ledger = make()
    lease = ledger.lease("a", 1)
    assert lease is not None
    ledger.commit(lease.lease_id, [Segment(0, 0, 0, 1)], {})
    for lease_id in (lease.lease_id, 77):
        with pytest.raises(LedgerError, match="not open"):
            ledger.commit(lease_id, [], {})
        ledger.give_back(lease_id)  # harmless


@pytest.mark.parametrize("rows", [0, -1])
def test_lease_of_no_rows_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match="rows_wanted"):
        make().lease("a", rows)


def test_order_that_is_no_permutation_is_refused() -> None:
    with pytest.raises(ValueError, match="permutation"):
        Ledger(num_shards=3, epochs=1, shard_order=lambda _: [0, 1, 1])


@pytest.mark.parametrize("intervals", [[[0, 4], [3, 5]], [[2, 2]], [[0, 11]], [[-1, 3]]])
def test_state_with_overlapping_or_impossible_rows_is_refused(intervals: list[list[int]]) -> None:
    state = make().to_state() | {"row_counts": [[0, 10]], "committed": [[0, 0, "a", intervals]]}
    with pytest.raises(LedgerError):
        Ledger.from_state(state, shard_order=lambda _: range(3))


def test_segments_travel_as_lists() -> None:
    for segment in (Segment(1, 2, 3, 4), Segment(0, 5, 6, None)):
        assert Segment.from_list(json.loads(json.dumps(segment.to_list()))) == segment
