"""Leases: which rows a client is given, what its reply frees, and what the books refuse."""

import json
import pickle

import pytest

from pilot.rules.ledger import Lease, Ledger, LedgerError
from pilot.segment import Segment

from .ledger_kit import known, make

# -- leases --------------------------------------------------------------------------------------


def test_shards_outside_the_training_shards_are_never_leased() -> None:
    ledger = make(num_shards=2)
    ledger.register("c", {2, 3, 1822, -1})
    assert ledger.lease("c", 5) is None
    ledger.register("c", {1, 2, 3})
    lease = ledger.lease("c", 1000)
    assert lease is not None and {s.shard for s in lease.segments} == {1}


def test_shard_of_unknown_size_is_leased_to_one_client_only() -> None:
    ledger = make(num_shards=1)
    assert ledger.lease("a", 1) is not None
    assert ledger.lease("b", 1) is None


def test_client_goes_on_with_its_own_shard_then_new_ones_then_those_of_others() -> None:
    ledger = make(num_shards=3, epochs=2)
    for client, shard in (("a", 0), ("b", 1)):
        lease = ledger.lease(client, 1)
        assert lease is not None and lease.segments[0].key == (0, shard)
        ledger.commit(lease.lease_id, [Segment(0, shard, 0, 4)], {shard: 10})
    lease = ledger.lease("b", 27)
    assert lease is not None and lease.segments == (
        Segment(0, 1, 4, 10),
        Segment(0, 2, 0, None),
        Segment(0, 0, 4, 10),
        Segment(1, 0, 0, 5),
    )


def test_shard_belongs_to_the_client_that_committed_there_last() -> None:
    ledger = known(100, 100)
    ledger.register("b", [0])
    for client, first in (("a", 0), ("b", 10)):
        lease = ledger.lease(client, 10)
        assert lease is not None and lease.segments == (Segment(0, 0, first, first + 10),)
        ledger.commit(lease.lease_id, list(lease.segments), {})
    ledger.register("b", [0, 1])
    leases = ledger.lease_all({"a": 10, "b": 10})
    assert leases["a"].segments == (Segment(0, 1, 0, 10),)
    assert leases["b"].segments == (Segment(0, 0, 20, 30),)


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


# -- in mid-round --------------------------------------------------------------------------------


def test_second_lease_in_a_round_has_later_rows_of_the_same_shard_in_any_order_of_ends() -> None:
    ledger = known(100, 100)
    first, other = ledger.lease("a", 20), ledger.lease("b", 20)
    second = ledger.lease("a", 20)
    assert first is not None and second is not None and other is not None
    assert second.segments == (Segment(0, 0, 20, 40),)
    assert ledger.commit(second.lease_id, [Segment(0, 0, 20, 30)], {}) == 10
    ledger.give_back(first.lease_id)
    assert ledger.committed() == {(0, 0): [(20, 30)]}
    again = ledger.lease("a", 30)
    assert again is not None
    assert again.segments == (Segment(0, 0, 0, 20), Segment(0, 0, 30, 40))


def test_accepted_reply_frees_at_once_what_it_did_not_use() -> None:
    ledger = known(100)
    first = ledger.lease("a", 50)
    assert first is not None
    kept = ledger.accept(first.lease_id, [Segment(0, 0, 0, 48)], {})
    assert kept == Lease(first.lease_id, "a", (Segment(0, 0, 0, 48),), last=False)
    assert (ledger.rows_open, ledger.rows_returned, ledger.rows_committed) == (48, 2, 0)
    second = ledger.lease("a", 100)
    assert second is not None and second.segments == (Segment(0, 0, 48, 100),) and second.last
    assert ledger.commit(second.lease_id, [Segment(0, 0, 48, 100)], {}) == 52
    assert ledger.commit(first.lease_id, [Segment(0, 0, 0, 48)], {}) == 48
    assert ledger.committed() == {(0, 0): [(0, 100)]} and ledger.progress() == (1.0, 1, 1)


def test_shard_of_unknown_size_is_leased_on_behind_an_accepted_reply() -> None:
    ledger = make(num_shards=1)
    first = ledger.lease("a", 10)
    assert first is not None
    ledger.accept(first.lease_id, [Segment(0, 0, 0, 8)], {})
    second = ledger.lease("b", 10)
    assert second is not None and second.segments == (Segment(0, 0, 8, None),)
    with pytest.raises(LedgerError, match="8 of it were trained on"):
        ledger.commit(second.lease_id, [], {0: 7})
    assert ledger.commit(second.lease_id, [Segment(0, 0, 8, 11)], {0: 12}) == 3
    ledger.give_back(first.lease_id)
    lease = ledger.lease("c", 100)
    assert lease is not None and lease.segments == (Segment(0, 0, 0, 8), Segment(0, 0, 11, 12))


def test_accepted_reply_goes_back_whole_if_it_is_not_merged() -> None:
    ledger = make(num_shards=1)
    lease = ledger.lease("a", 10)
    assert lease is not None
    ledger.accept(lease.lease_id, [Segment(0, 0, 0, 8)], {0: 20})
    ledger.give_back(lease.lease_id)
    assert ledger.committed() == {}
    assert (ledger.rows_leased, ledger.rows_returned, ledger.rows_open) == (8, 8, 0)
    again = ledger.lease("b", 100)
    assert again is not None and again.segments == (Segment(0, 0, 0, 20),) and again.last


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
    ledger.register("b", {2})
    first, other = ledger.lease("a", 1), ledger.lease("b", 1)
    assert first is not None and other is not None
    ledger.commit(first.lease_id, [], {0: 10})
    lease = ledger.lease("a", 25)
    assert lease is not None
    wanted = (Segment(0, 0, 0, 10), Segment(0, 1, 0, None), Segment(1, 0, 0, 5))
    assert lease.segments == wanted
    before = pickle.dumps(ledger)
    for method in (ledger.check, ledger.accept, ledger.commit):
        with pytest.raises(LedgerError):
            method(lease.lease_id, [Segment.from_list(values) for values in used], counts)
    assert pickle.dumps(ledger) == before


@pytest.mark.parametrize("merged", [False, True])
def test_size_below_rows_that_are_committed_is_refused(merged: bool) -> None:
    ledger = make(num_shards=1, epochs=2)
    first, second = ledger.lease("a", 1), ledger.lease("b", 1)
    assert first is not None and second is not None and second.segments[0].epoch == 1
    end = ledger.commit if merged else ledger.accept
    end(first.lease_id, [Segment(0, 0, 0, 8)], {})
    with pytest.raises(LedgerError, match="8 of it were trained on"):
        ledger.commit(second.lease_id, [Segment(1, 0, 0, 5)], {0: 5})


def test_sizes_of_shards_that_were_not_leased_are_not_believed() -> None:
    ledger = known(10, 10)
    lease = ledger.lease("a", 5)
    assert lease is not None and lease.segments[0].shard == 0
    ledger.commit(lease.lease_id, [], {1: 3})
    assert ledger.row_counts == {0: 10, 1: 10}


def test_reply_can_be_committed_once_it_was_accepted_whatever_comes_in_between() -> None:
    ledger = make(num_shards=2)
    first = ledger.lease("a", 3)
    assert first is not None and [segment.shard for segment in first.segments] == [0, 1]
    used, counts = [Segment(0, 0, 0, 3), Segment(0, 1, 0, 0)], {0: 3, 1: 9}
    ledger.check(first.lease_id, used, counts)
    ledger.accept(first.lease_id, used, counts)  # shard 1 is no part of the lease any more
    second = ledger.lease("b", 9)
    assert second is not None and second.segments == (Segment(0, 1, 0, 9),)
    ledger.commit(second.lease_id, [Segment(0, 1, 0, 9)], {1: 9})
    assert ledger.commit(first.lease_id, used, counts) == 3
    assert ledger.exhausted and ledger.progress() == (1.0, 2, 2)


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


def test_state_with_rows_of_an_epoch_that_is_not_there_is_refused() -> None:
    for epoch in (1, -1):
        state = make().to_state() | {"committed": [[epoch, 0, "a", [[0, 4]]]]}
        with pytest.raises(LedgerError, match="no such epoch"):
            Ledger.from_state(state, shard_order=lambda _: range(3))


def test_state_with_a_shard_twice_or_one_that_is_not_there_is_refused() -> None:
    for shards in ((0, 0), (3,), (-1,)):
        state = make().to_state() | {"committed": [[0, s, "a", [[4, 5]]] for s in shards]}
        with pytest.raises(LedgerError, match="does not exist, or is there twice"):
            Ledger.from_state(state, shard_order=lambda _: range(3))


@pytest.mark.parametrize("intervals", [[[0, 4], [3, 5]], [[2, 2]], [[0, 11]], [[-1, 3]], []])
def test_state_with_overlapping_or_impossible_rows_is_refused(intervals: list[list[int]]) -> None:
    state = make().to_state() | {"row_counts": [[0, 10]], "committed": [[0, 0, "a", intervals]]}
    with pytest.raises(LedgerError):
        Ledger.from_state(state, shard_order=lambda _: range(3))


def test_segments_travel_as_lists() -> None:
    for segment in (Segment(1, 2, 3, 4), Segment(0, 5, 6, None)):
        assert Segment.from_list(json.loads(json.dumps(segment.to_list()))) == segment
