"""Who takes how many rows of an optimizer step, where the batch is the federation's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot.rules.batch import alike, step_shares

ONE = {"a": 1, "b": 1, "c": 1}
EQUAL = dict.fromkeys("abc", 1.0)


@pytest.mark.parametrize(
    ("rows", "ranks", "speeds", "shares"),
    [
        (16, {"a": 1}, {"a": 3.0}, {"a": 16}),
        (16, {"a": 1, "b": 1}, EQUAL, {"a": 8, "b": 8}),
        (16, ONE, EQUAL, {"a": 6, "b": 5, "c": 5}),
        (17, ONE, EQUAL, {"a": 6, "b": 6, "c": 5}),
        (14, ONE, {"a": 1, "b": 2, "c": 4}, {"a": 2, "b": 4, "c": 8}),
        (16, ONE, {"a": 1, "b": 2, "c": 4}, {"a": 2, "b": 5, "c": 9}),
        # a slow client has a row for each of its ranks; the others share the rest
        (16, {"a": 4, "b": 1, "c": 1}, {"a": 1, "b": 10, "c": 20}, {"a": 4, "b": 4, "c": 8}),
        (16, ONE, {"a": 1e-300, "b": 1.0, "c": 1e300}, {"a": 1, "b": 1, "c": 14}),
        # shares need not be multiples of ranks
        (16, {"a": 3, "b": 8}, {"a": 1, "b": 1}, {"a": 8, "b": 8}),
        (15, {"a": 3, "b": 8}, {"a": 1, "b": 1}, {"a": 7, "b": 8}),
        # more ranks than rows: each has one
        (4, {"a": 2, "b": 8}, {"a": 1, "b": 1}, {"a": 2, "b": 8}),
        (2, ONE, {"a": 9, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}),
    ],
)
def test_rows_of_a_step_are_shared_by_speed(
    rows: int, ranks: dict[str, int], speeds: dict[str, float], shares: dict[str, int]
) -> None:
    assert step_shares(rows, ranks, speeds) == shares


@given(
    st.integers(1, 5000),
    st.lists(
        st.tuples(st.integers(1, 64), st.floats(min_value=1e-300, max_value=1e300)),
        min_size=1,
        max_size=40,
    ),
)
def test_shares_are_whole_rows_of_one_batch_and_at_least_a_row_of_each_rank(
    rows: int, clients: list[tuple[int, float]]
) -> None:
    ranks = {number: count for number, (count, _) in enumerate(clients)}
    speeds = {number: speed for number, (_, speed) in enumerate(clients)}
    shares = step_shares(rows, ranks, speeds)
    assert list(shares) == list(ranks)
    assert sum(shares.values()) == max(rows, sum(ranks.values()))
    assert all(shares[one] >= ranks[one] for one in ranks)
    free = [one for one in ranks if shares[one] > ranks[one]]
    for one in free:  # whoever is faster has no less, but for the row that rounding leaves over
        assert all(
            shares[one] + 1 >= shares[two]
            for two in ranks
            if speeds[two] <= speeds[one] and two in free
        )


@pytest.mark.parametrize(
    ("rows", "ranks", "speeds"),
    [(0, {"a": 1}, EQUAL), (4, {"a": 0}, EQUAL), (4, {"a": 1}, {"a": 0.0})],
)
def test_numbers_that_none_are_raise(
    rows: int, ranks: dict[str, int], speeds: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match=r"shared|positive"):
        step_shares(rows, ranks, speeds)


def test_speeds_are_alike_within_a_quarter() -> None:
    assert alike(1.0, 1.25) and alike(1.25, 1.0) and alike(3.0, 3.0)
    assert not alike(1.0, 1.26) and not alike(1.26, 1.0)
