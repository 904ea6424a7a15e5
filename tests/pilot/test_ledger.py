"""The books about rows: whatever the clients do, no row is lost and none is committed twice."""

import copy
import json
import pickle
import random
from collections.abc import Collection
from dataclasses import replace

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

from nanochat.dataloader import shard_order
from pilot.ledger import Lease, Ledger, LedgerError, Segment

Row = tuple[int, int, int]  # epoch, shard, row
FREE, COMMITTED = "free", "committed"


def order(num_shards: int, epoch: int) -> list[int]:
    return random.Random(epoch).sample(range(num_shards), num_shards)


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
        self.disks: dict[str, tuple[set[int], bool]] = {}
        self.rows: dict[Row, str | int] = {
            (epoch, shard, row): FREE
            for epoch in range(epochs)
            for shard, size in enumerate(sizes)
            for row in range(size)
        }

    @rule(client=st.sampled_from(CLIENTS), shards=SHARDS, fetches=st.booleans())
    def join(self, client: str, shards: set[int], fetches: bool) -> None:
        self.ledger.register(client, shards, fetches=fetches)
        self.disks[client] = (shards, fetches)

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
        for client, (shards, fetches) in self.disks.items():
            self.ledger.register(client, shards, fetches=fetches)
        self.rows = {r: COMMITTED if s == COMMITTED else FREE for r, s in self.rows.items()}
        # and goes on exactly as if nothing had happened
        resumed = copy.deepcopy(self.ledger)
        for ledger in (uninterrupted, resumed):
            ledger.lease_all(wanted)
            ledger.lease("a", 3)
            ledger.lease_all(wanted, step_rows=3)
        assert uninterrupted.open == resumed.open

    def allowed(self, client: str) -> Collection[int]:
        shards, fetches = self.disks.get(client, (set(), True))
        return range(len(self.sizes)) if fetches else shards

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


# -- sharing -------------------------------------------------------------------------------------


def known(*sizes: int, epochs: int = 1) -> Ledger:
    """A ledger that knows how many rows each shard has; nothing is committed."""
    return Ledger.from_state(
        make(len(sizes), epochs).to_state() | {"row_counts": [list(p) for p in enumerate(sizes)]},
        shard_order=lambda _: range(len(sizes)),
    )


def rows_leased(leases: dict[str, Lease]) -> dict[str, int]:
    return {c: sum(s.rows or 0 for s in lease.segments) for c, lease in leases.items()}


def test_shards_are_split_by_rows_when_clients_outnumber_them() -> None:
    ledger = known(1000, 1000)
    names = [f"c{number}" for number in range(10)]
    leases = ledger.lease_all(dict.fromkeys(names, 1000), step_rows=32)
    assert list(leases) == names
    rows = rows_leased(leases)
    assert sum(rows.values()) == 2000 and all(rows[name] % 32 == 0 for name in names[:-1])
    assert min(rows.values()) >= 192 and max(rows.values()) <= 256
    assert [leases[name].last for name in names] == [False] * 9 + [True]


def test_clients_share_too_few_rows_in_proportion_to_what_they_want() -> None:
    rows = rows_leased(known(500, 500).lease_all({"slow": 500, "fast": 1500}, step_rows=10))
    assert rows == {"slow": 250, "fast": 750}


def test_everybody_is_leased_all_that_it_wants_where_there_is_enough() -> None:
    rows = rows_leased(known(500, 500).lease_all({"a": 333, "b": 444}, step_rows=10))
    assert rows == {"a": 333, "b": 444}


def test_when_steps_are_too_few_whole_ones_go_to_the_first_and_no_tail_is_left() -> None:
    ledger = known(70)
    leases = ledger.lease_all(dict.fromkeys("abcd", 320), step_rows=32)
    assert rows_leased(leases) == {"a": 32, "b": 32, "c": 6}
    assert leases["c"].last and ledger.exhausted


def test_shards_of_unknown_size_are_shared_as_shards() -> None:
    leases = make(num_shards=2).lease_all({"a": 1000, "b": 1000}, step_rows=32)
    assert [leases[c].segments for c in "ab"] == [
        (Segment(0, 0, 0, None),),
        (Segment(0, 1, 0, None),),
    ]


def test_shard_of_unknown_size_counts_as_a_step_at_least() -> None:
    leases = make(num_shards=2).lease_all({"a": 32, "b": 32}, step_rows=32)
    assert {client: len(lease.segments) for client, lease in leases.items()} == {"a": 1, "b": 1}


def test_clients_with_few_shards_choose_before_those_that_have_others() -> None:
    ledger = known(100, 100, 100, 100)
    ledger.register("rich", range(4))
    ledger.register("poor", [0])
    ledger.register("poor2", [0])
    leases = ledger.lease_all({"rich": 100, "poor": 100, "poor2": 100}, step_rows=10)
    assert rows_leased(leases) == {"poor": 50, "poor2": 50, "rich": 100}
    assert leases["rich"].segments == (Segment(0, 1, 0, 100),)


def test_clients_whose_shards_overlap_share_them_too() -> None:
    ledger = known(100, 100, 100)
    for client, shards in (("a", [0, 1]), ("b", [1, 2]), ("c", [2, 0])):
        ledger.register(client, shards)
    leases = ledger.lease_all({"a": 200, "b": 200, "c": 200}, step_rows=10)
    assert rows_leased(leases) == {"a": 100, "b": 100, "c": 100}
    almost = known(*[100] * 10)
    almost.register("nine", range(9))
    rows = rows_leased(almost.lease_all({"ten": 1000, "nine": 1000}, step_rows=10))
    assert rows == {"nine": 470, "ten": 530}


def test_clients_that_fetch_share_whatever_they_have() -> None:
    ledger = known(100, 100)
    ledger.register("a", [0], fetches=True)
    ledger.register("b", [1], fetches=True)
    leases = ledger.lease_all({"a": 200, "b": 200}, step_rows=10)
    assert leases["a"].segments == (Segment(0, 0, 0, 100),)
    assert leases["b"].segments == (Segment(0, 1, 0, 100),)


def test_nobody_is_leased_anything_where_nobody_asks_or_nothing_is_free() -> None:
    assert make().lease_all({}) == {} and known(0).lease_all({"a": 5, "b": 5}) == {}


def test_shards_on_a_clients_disk_come_first_and_others_only_if_it_fetches_them() -> None:
    ledger = known(10, 10, 10)
    for fetches, shards in ((False, [2]), (True, [2, 0, 1])):
        ledger.register("a", [2], fetches=fetches)
        lease = ledger.lease("a", 100)
        assert lease is not None and [segment.shard for segment in lease.segments] == shards
        ledger.give_back(lease.lease_id)


def test_clients_start_with_a_shard_that_nobody_is_at_even_in_a_known_epoch() -> None:
    ledger = known(100, 100, 100)
    leases = ledger.lease_all({"a": 10, "b": 10})
    assert leases["a"].segments == (Segment(0, 0, 0, 10),)
    assert leases["b"].segments == (Segment(0, 1, 0, 10),)


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


# -- tails and epochs ----------------------------------------------------------------------------


def train(ledger: Ledger, clients: str, *, rows: int, step_rows: int) -> list[int]:
    """Rounds of clients that take whole steps, and one short step if their lease is the last.

    Returns the size of each short step.
    """
    short = []
    for _ in range(100):
        leases = ledger.lease_all(dict.fromkeys(clients, rows), step_rows=step_rows)
        for lease in leases.values():
            leased = sum(segment.rows or 0 for segment in lease.segments)
            tail = leased % step_rows
            if tail and lease.last:
                short.append(tail)
            used, _ = consume(lease, leased - (0 if lease.last else tail), [])
            ledger.commit(lease.lease_id, used, {})
    return short


@pytest.mark.parametrize("clients", ["a", "abc"])
def test_no_tail_smaller_than_a_step_is_stranded(clients: str) -> None:
    ledger = known(37, 5, 0, 41, 3, epochs=2)
    short = train(ledger, clients, rows=40, step_rows=8)
    assert ledger.exhausted and ledger.progress() == (1.0, 10, 10)
    assert short == [172 % 8]


def test_tail_of_an_epoch_is_filled_up_with_rows_of_the_next() -> None:
    ledger = known(10, epochs=2)
    lease = ledger.lease("a", 16)
    assert lease is not None and not lease.last
    assert lease.segments == (Segment(0, 0, 0, 10), Segment(1, 0, 0, 6))


def test_each_epoch_follows_the_order_of_its_own_seed() -> None:
    def follow(epoch: int) -> list[int]:
        return shard_order(20, epoch, seed=7)

    ledger = Ledger(num_shards=20, epochs=3, shard_order=follow)
    seen: list[tuple[int, int]] = []
    while lease := ledger.lease("a", 40):
        seen += [segment.key for segment in lease.segments]
        used = [replace(segment, end_row=10) for segment in lease.segments]
        ledger.commit(lease.lease_id, used, {segment.shard: 10 for segment in used})
    assert seen == [(epoch, shard) for epoch in range(3) for shard in follow(epoch)]
    assert follow(0) != follow(1) != follow(2)


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
