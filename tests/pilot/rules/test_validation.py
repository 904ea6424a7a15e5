"""One validation figure of many: exact where clients agree, and told where they don't."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot.rules.validation import Figure, figure, slices
from pilot.segment import Score

ROWS = 64
Lie = dict[str, float]


def bpb_of(row: int) -> float:
    """Of the truth: rows differ."""
    return 4.0 + (row * 7 % 10) / 20


def scores_of(pieces: tuple[tuple[int, int], ...], factor: float = 1.0) -> list[Score]:
    return [
        Score(f, e, factor * sum(bpb_of(r) * math.log(2) * 50 for r in range(f, e)), 50 * (e - f))
        for f, e in pieces
    ]


TRUTH = sum(map(bpb_of, range(ROWS))) / ROWS


def ask(clients: int, lies: Lie, last: float | None = None) -> Figure:
    names = "abcdefgh"[:clients]
    asked = dict(zip(names, slices(ROWS, clients), strict=True))
    said = {n: scores_of(one.pieces, lies.get(n, 1.0)) for n, one in asked.items()}
    return figure(asked, said, last_bpb=last)


@given(rows=st.integers(1, 600), clients=st.integers(1, 40))
def test_slices_cover_all_rows_once_and_the_next_ones_head_a_second_time(
    rows: int, clients: int
) -> None:
    asked = slices(rows, clients)
    own = [row for one in asked for row in range(*one.own)]
    assert own == list(range(rows))
    for one, following in zip(asked, [*asked[1:], asked[0]], strict=True):
        mine = [p for p in one.pieces if one.is_own(p)]
        assert [r for p in mine for r in range(*p)] == list(range(*one.own))
        checked = [p for p in one.pieces if not one.is_own(p)]
        assert set(checked) <= set(following.pieces), "in the same pieces, to be compared"
        if clients > 1 and following.own[0] < following.own[1]:
            assert checked and checked[0][0] == following.own[0]
        assert one.without_check.pieces == tuple(mine)


def test_rounds_of_two_and_of_five_clients_have_pieces_in_common() -> None:
    two, five = ({p for one in slices(512, n) for p in one.pieces} for n in (2, 5))
    assert len(two & five) >= 8


@pytest.mark.parametrize("clients", [1, 2, 3, 7])
def test_figure_of_honest_clients_is_exact_and_stands_on_all_rows(clients: int) -> None:
    found = ask(clients, {})
    assert found.bpb == pytest.approx(TRUTH) and found.rows == ROWS and found.doubts == ()


@pytest.mark.parametrize("clients", [1, 2, 3, 7])
@pytest.mark.parametrize("lie", [0.0, 1e-9])
def test_client_that_says_zero_nats_is_left_out_and_told(clients: int, lie: float) -> None:
    found = ask(clients, {"a": lie})
    assert len(found.doubts) == 1 and "a says" in found.doubts[0]
    assert "which no model reaches" in found.doubts[0]
    if clients == 1:
        assert found.bpb is None and found.rows == 0
        return
    assert found.rows < ROWS
    assert found.bpb == pytest.approx(TRUTH, rel=0.05)


@pytest.mark.parametrize("lie", [0.4, 3.0, 1e9])
def test_figure_that_the_others_contradict_by_far_is_left_out(lie: float) -> None:
    found = ask(4, {"b": lie})
    assert found.doubts[0].startswith("b says")
    assert found.bpb == pytest.approx(TRUTH, rel=0.05) and set(found.by_client) == {"a", "c", "d"}


def test_of_two_the_one_that_is_far_better_than_ever_is_left_out() -> None:
    found = ask(2, {"a": 0.4}, last=TRUTH)
    assert set(found.by_client) == {"b"} and "nor the last round" in found.doubts[0]
    assert set(ask(2, {"a": 0.4}).by_client) == {"a", "b"}, "nobody knows which one is right"


def test_of_two_the_one_that_sees_a_spoilt_model_is_believed_as_well() -> None:
    found = ask(2, {"a": 3.0}, last=TRUTH)
    assert set(found.by_client) == {"a", "b"} and "disagree on validation rows" in found.doubts[0]


@pytest.mark.parametrize("lie", [0.9, 1.1])
def test_small_lie_is_found_by_the_rows_that_two_clients_score(lie: float) -> None:
    found = ask(4, {"c": lie})
    assert found.doubts[0].startswith("c is contradicted by b and d on rows")
    assert set(found.by_client) == {"a", "b", "d"}
    two = ask(2, {"a": lie})
    assert len(two.doubts) == 2 and all("a and b disagree" in doubt for doubt in two.doubts)


def test_rounding_of_other_devices_is_no_lie() -> None:
    assert ask(4, {"c": 1.005, "d": 0.995}).doubts == ()


def test_model_that_has_become_much_worse_for_all_is_no_lie() -> None:
    found = ask(3, dict.fromkeys("abc", 3.0), last=TRUTH)
    assert found.doubts == () and found.bpb == pytest.approx(3 * TRUTH)


def test_other_bytes_for_the_same_rows_are_a_contradiction() -> None:
    asked = dict(zip("ab", slices(ROWS, 2), strict=True))
    said = {name: scores_of(one.pieces) for name, one in asked.items()}
    said["a"] = [Score(s.first_row, s.end_row, s.nats, s.num_bytes + 1) for s in said["a"]]
    assert "a and b disagree" in figure(asked, said).doubts[0]


@pytest.mark.parametrize(
    "extra", [Score(0, 64, 1.0, 1), Score(0, 1, 1.0, 1), Score(5000, 6000, 1e12, 1)]
)
def test_rows_that_were_not_asked_for_are_left_out_with_their_client(extra: Score) -> None:
    asked = dict(zip("ab", slices(ROWS, 2), strict=True))
    said = {name: scores_of(one.pieces) for name, one in asked.items()}
    said["a"] = [*said["a"], extra]
    found = figure(asked, said)
    assert set(found.by_client) == {"b"} and "was not asked for, or twice" in found.doubts[0]


def test_slice_told_as_one_counts_as_well() -> None:
    asked = dict(zip("ab", slices(ROWS, 2), strict=True))
    said = {name: scores_of((one.own,)) for name, one in asked.items()}
    found = figure(asked, said)
    assert found.rows == ROWS and found.bpb == pytest.approx(TRUTH)


def test_no_row_counts_twice_whoever_scored_it() -> None:
    asked = dict(zip("abc", slices(ROWS, 3), strict=True))
    said = {name: scores_of(one.pieces) for name, one in asked.items() if name != "b"}
    asked["d"] = asked["b"].without_check  # somebody else did it in its place
    said["d"] = scores_of((asked["d"].own,))
    found = figure(asked, said)
    rows = sorted(row for score in found.scores for row in range(*score.piece))
    assert all(one < other for one, other in pairwise(rows))
