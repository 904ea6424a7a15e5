"""Too few rows are shared fairly, in whole steps, and none of them is left over for nobody."""

from hypothesis import given
from hypothesis import strategies as st

from pilot.rules.sharing import ClientGroup, fair_shares

WANTED = st.lists(st.integers(1, 500), min_size=1, max_size=6)


def group(name: str, wanted: list[int], free_rows: int) -> ClientGroup:
    return ClientGroup({f"{name}{number}": rows for number, rows in enumerate(wanted)}, free_rows)


@given(st.lists(st.tuples(WANTED, st.integers(0, 2000)), max_size=4), st.integers(1, 64))
def test_share_is_a_whole_number_of_steps_at_least_one_or_all_that_is_wanted(
    groups: list[tuple[list[int], int]], step_rows: int
) -> None:
    all_of_them = [group(str(i), wanted, free) for i, (wanted, free) in enumerate(groups)]
    wanted = {client: rows for one in all_of_them for client, rows in one.wanted.items()}
    usable = sum(one.usable for one in all_of_them)
    for free_rows in (usable, usable // 2, 0):
        shares = fair_shares(all_of_them, free_rows, step_rows=step_rows)
        assert list(shares) == list(wanted)
        for client, rows in shares.items():
            assert 0 < rows <= wanted[client]
            assert rows == wanted[client] or rows % step_rows == 0


@given(WANTED, st.integers(0, 3000), st.integers(1, 64))
def test_clients_with_the_same_shards_use_up_what_is_free_but_for_parts_of_steps(
    wanted: list[int], free_rows: int, step_rows: int
) -> None:
    one = group("c", wanted, min(free_rows, sum(wanted)))
    shares = fair_shares([one], one.free_rows, step_rows=step_rows)
    assert sum(shares.values()) > one.usable - step_rows * len(wanted)
    if free_rows >= sum(wanted):
        assert shares == one.wanted


def test_shares_follow_what_is_wanted() -> None:
    shares = fair_shares([group("c", [100, 300, 600], 500)], 500, step_rows=10)
    assert shares == {"c0": 50, "c1": 150, "c2": 600}  # of which 300 are left
    many = fair_shares([group("c", [1000] * 10, 3200)], 3200, step_rows=32)
    assert list(many.values()) == [320] * 9 + [1000]


def test_parties_whose_shards_overlap_share_in_proportion_to_what_each_could_use() -> None:
    poor, rich = group("poor", [1000], 500), group("rich", [1000], 1000)
    shares = fair_shares([poor, rich], 1000, step_rows=1)
    assert shares == {"poor0": 333, "rich0": 1000}
    apart = fair_shares([poor, rich], 1500, step_rows=1)
    assert apart == {"poor0": 1000, "rich0": 1000}
