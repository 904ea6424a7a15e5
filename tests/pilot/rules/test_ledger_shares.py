"""Who is leased what when rows are few: fair shares in whole steps, tails, and the next epoch."""

from dataclasses import replace

import pytest

from nanochat.rows.stream import shard_order
from pilot.rules.ledger import Ledger
from pilot.segment import Segment

from .ledger_kit import consume, known, make, rows_leased


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


def test_clients_with_different_shards_are_leased_each_its_own() -> None:
    ledger = known(100, 100)
    ledger.register("a", [0])
    ledger.register("b", [1])
    leases = ledger.lease_all({"a": 200, "b": 200}, step_rows=10)
    assert leases["a"].segments == (Segment(0, 0, 0, 100),)
    assert leases["b"].segments == (Segment(0, 1, 0, 100),)


def test_nobody_is_leased_anything_where_nobody_asks_or_nothing_is_free() -> None:
    assert make().lease_all({}) == {} and known(0).lease_all({"a": 5, "b": 5}) == {}


def test_only_shards_on_a_clients_disk_are_leased_to_it_as_it_last_said() -> None:
    ledger = known(10, 10, 10)
    for shards in ([2], [2, 0]):
        ledger.register("a", shards)
        lease = ledger.lease("a", 100)
        assert lease is not None
        assert {segment.shard for segment in lease.segments} == set(shards)
        ledger.give_back(lease.lease_id)


def test_clients_start_with_a_shard_that_nobody_is_at_even_in_a_known_epoch() -> None:
    ledger = known(100, 100, 100)
    leases = ledger.lease_all({"a": 10, "b": 10})
    assert leases["a"].segments == (Segment(0, 0, 0, 10),)
    assert leases["b"].segments == (Segment(0, 1, 0, 10),)


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
