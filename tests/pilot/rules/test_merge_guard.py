"""Which merge is taken back, and how the client that spoils merges is found."""

import json
import math
from collections.abc import Collection

import pytest

from pilot.rules.merge_guard import GuardBooks, Verdict
from pilot.rules.validation import Figure, bpb, figure, slices
from pilot.segment import Score

ROWS = 32


def scored(by_client: dict[str, float], rows: int = ROWS) -> Figure:
    """What the clients find, each in bits per byte; None: it has scored nothing."""
    asked = dict(zip(by_client, slices(rows, len(by_client)), strict=True))
    said = {
        name: [Score(f, e, value * math.log(2) * 10 * (e - f), 10 * (e - f)) for f, e in one.pieces]
        for (name, value), one in zip(by_client.items(), asked.values(), strict=True)
        if not math.isnan(value)
    }
    return figure(asked, said)


def all_say(value: float, clients: str = "abc") -> Figure:
    return scored(dict.fromkeys(clients, value))


def books(*earlier: float, clients: str = "abc") -> GuardBooks:
    """After rounds whose models were worth `earlier` bits per byte, and one more merge."""
    guard = GuardBooks()
    for number, value in enumerate(earlier):
        guard.was_good(number, all_say(value, clients))
        guard.merged(set(clients))
    return guard


def judge(guard: GuardBooks, found: Figure, max_ratio: float = 1.25) -> Verdict:
    return guard.judge(found, wanted_rows=ROWS, max_ratio=max_ratio)


@pytest.mark.parametrize(
    ("now", "verdict"),
    [(4.0, Verdict.GOOD), (5.5, Verdict.GOOD), (5.8, Verdict.BAD), (1e6, Verdict.BAD)],
)
def test_merge_that_makes_the_model_much_worse_is_bad(now: float, verdict: Verdict) -> None:
    assert judge(books(4.6), all_say(now)) is verdict
    assert judge(books(4.6), all_say(now), max_ratio=0.0) is Verdict.GOOD


def test_slow_ruin_is_seen_beside_the_best_of_the_last_versions() -> None:
    assert judge(books(4.0, 4.4, 4.8), all_say(5.2)) is Verdict.BAD
    assert judge(books(1.0, 4.4, 4.4, 4.4, 4.4, 4.4), all_say(5.2)) is Verdict.GOOD, "long ago"


def test_first_version_is_good_whatever_it_is_and_so_is_one_without_a_merge() -> None:
    assert judge(GuardBooks(since=["a"]), all_say(99.0)) is Verdict.GOOD
    guard = books(4.0)
    guard.since = []
    assert judge(guard, all_say(99.0)) is Verdict.GOOD


@pytest.mark.parametrize(
    ("says", "verdict"),
    [
        ({"a": 7.9, "b": 4.0, "c": 4.0}, Verdict.GOOD),
        ({"a": 7.9, "b": 7.9, "c": 4.0}, Verdict.BAD),
        ({"a": 4.0, "b": 7.9}, Verdict.BAD),
        ({"a": 7.9}, Verdict.BAD),
        ({"a": 4.0, "b": 4.0, "c": 7.9, "d": 4.0, "e": 7.9}, Verdict.GOOD),
    ],
    ids=str,
)
def test_half_of_the_clients_must_see_it(says: dict[str, float], verdict: Verdict) -> None:
    guard = books(4.0, clients="".join(says))
    assert judge(guard, scored(says)) is verdict


def test_too_few_rows_say_nothing() -> None:
    nan = math.nan
    assert judge(books(4.0), scored({"a": 9.0, "b": nan, "c": nan})) is Verdict.UNKNOWN
    assert judge(books(4.0), scored({"a": 9.0, "b": 9.0, "c": nan})) is Verdict.BAD
    assert judge(books(4.0), Figure()) is Verdict.UNKNOWN


def test_another_number_of_clients_compares_the_rows_they_have_in_common() -> None:
    guard = GuardBooks(since=["a"])
    guard.was_good(3, scored(dict.fromkeys("abc", 4.0), rows=512))
    guard.merged("abc")
    found = scored(dict.fromkeys("ab", 8.0), rows=512)
    assert guard.judge(found, wanted_rows=512, max_ratio=1.25) is Verdict.BAD


def test_good_version_is_what_later_ones_go_back_to() -> None:
    guard = books(4.0, 3.9)
    assert (guard.trusted_round, guard.since) == (1, ["a", "b", "c"])
    guard.was_good(2, all_say(3.8))
    assert (guard.trusted_round, guard.since, guard.taken_back) == (2, [], 0)
    assert [round(bpb(version) or 0, 6) for version in guard.versions] == [4.0, 3.9, 3.8]
    guard.was_good(3, all_say(1.0))
    assert guard.trusted_round == 3 and len(guard.versions) == 3, "the same model, scored again"


def spoiled_by(wrong: str, clients: str, rounds: int = 40) -> list[str]:
    """Who is found, of `clients` of which `wrong` spoils each merge that it takes part in."""
    guard, found, resting = GuardBooks(), [], dict[str, int]()
    for number in range(rounds):
        at_work: Collection[str] = [c for c in clients if resting.get(c, 0) <= number]
        at_work = [c for c in at_work if c not in guard.aside] or at_work
        guard.merged(at_work)
        if wrong in at_work:
            if culprit := guard.was_bad(number):
                found.append(culprit)
                resting[culprit] = number + 10
        else:
            guard.was_good(number, all_say(4.0))
    return found


@pytest.mark.parametrize("clients", ["a", "ab", "abc", "abcdefgh"])
def test_client_that_spoils_merges_is_found_and_no_other(clients: str) -> None:
    for wrong in clients:
        found = spoiled_by(wrong, clients)
        assert found and set(found) == {wrong}


def test_client_is_found_in_as_many_rounds_as_halves_need() -> None:
    for wrong in "abcdefgh":
        assert spoiled_by(wrong, "abcdefgh", rounds=8) == [wrong], (
            "2 log2(8) + 1 of them, and one more"
        )


def test_nobody_stays_aside_for_a_suspect_that_never_comes_back() -> None:
    guard = books(4.0)
    guard.merged("ab")
    assert guard.was_bad(2) == "" and guard.aside == ["c"]
    guard.merged("d")  # a and b have left for good
    guard.was_good(3, all_say(4.0))
    assert guard.aside == ["a", "b"]
    guard.merged("cd")
    guard.was_good(4, all_say(4.0))
    assert "c" not in guard.suspects


def test_one_bad_merge_by_chance_convicts_nobody() -> None:
    guard = books(4.0)
    assert guard.was_bad(2) == ""
    for number in range(3, 8):
        guard.merged([c for c in "abc" if c not in guard.aside])
        guard.was_good(number, all_say(4.0))
    assert guard.suspects == guard.aside == []


def test_momentum_counts_where_the_last_version_is_the_better_one() -> None:
    assert not GuardBooks().improving and not books(4.0).improving
    assert (
        books(4.0, 3.9).improving
        and not books(3.9, 4.0).improving
        and not books(4.0, 4.0).improving
    )


def test_books_survive_a_snapshot() -> None:
    guard = books(4.0, 3.9)
    guard.was_bad(3)
    assert GuardBooks.from_json(json.loads(json.dumps(guard.to_json())), round_number=3) == guard
    assert GuardBooks.from_json(None, round_number=7) == GuardBooks(trusted_round=7)
