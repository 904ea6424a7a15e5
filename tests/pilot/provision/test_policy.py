"""Who is to run, by tables: thresholds with hysteresis, then limits over all clients."""

import math
from typing import Any

import pytest

from pilot.provision.policy import (
    Decision,
    Fact,
    Limits,
    Memory,
    Own,
    Wish,
    by_signal,
    decide,
)
from pilot.provision.readings import Reading
from pilot.rules.thresholds import Thresholds

PAPER = Thresholds(start=100.0, drain=100.0, hold_s=600.0)
BAND = Thresholds(start=80.0, drain=120.0, hold_s=0.0)
SURPLUS = Thresholds(start=5.0, drain=2.0, rising=True, hold_s=0.0)


def wishes(thresholds: Thresholds, values: list[tuple[float, float]], running: bool) -> list[Wish]:
    """What a client asks for at each (time, value); it does what it asks for."""
    memory, found = Memory(), []
    for time_s, value in values:
        memory = memory.after(value, thresholds, time_s)
        reading = Reading(value, "g/kWh", time_s)
        own = by_signal(reading, memory, thresholds, running=running, until_s=None, now_s=time_s)
        running = {Wish.START: True, Wish.DRAIN: False, Wish.KEEP: running}[own.wish]
        found.append(own.wish)
    return found


START, KEEP, DRAIN = Wish.START, Wish.KEEP, Wish.DRAIN


@pytest.mark.parametrize(
    ("thresholds", "running", "values", "expected"),
    [
        # the paper's: 100 for 600 s, in both directions
        (PAPER, False, [(0, 90), (599, 90), (600, 90), (700, 90)], [KEEP, KEEP, START, KEEP]),
        (PAPER, False, [(0, 100), (600, 100)], [KEEP, START]),
        (PAPER, True, [(0, 101), (599, 101), (600, 101)], [KEEP, KEEP, DRAIN]),
        (PAPER, True, [(0, 100), (9000, 100)], [KEEP, KEEP]),
        # a moment on the other side begins the wait again
        (
            PAPER,
            False,
            [(0, 90), (300, 101), (310, 90), (600, 90), (910, 90)],
            [KEEP] * 4 + [START],
        ),
        (PAPER, True, [(0, 150), (300, 90), (310, 150), (900, 150)], [KEEP] * 4),
        # between two thresholds nothing changes
        (BAND, False, [(0, 100), (60, 80), (120, 120)], [KEEP, START, KEEP]),
        (BAND, True, [(0, 119), (60, 121), (120, 100), (180, 80)], [KEEP, DRAIN, KEEP, START]),
        # surplus: more is better
        (SURPLUS, False, [(0, 4), (1, 5), (2, 2), (3, 1.9)], [KEEP, START, KEEP, DRAIN]),
    ],
)
def test_a_signal_must_hold(
    thresholds: Thresholds, running: bool, values: list[tuple[float, float]], expected: list[Wish]
) -> None:
    assert wishes(thresholds, values, running) == expected


@pytest.mark.parametrize(
    ("until_s", "wish"),
    [(None, Wish.START), (math.inf, Wish.START), (1900.0, Wish.START), (1899.0, Wish.KEEP)],
)
def test_a_window_known_to_be_too_short_is_not_begun(until_s: float | None, wish: Wish) -> None:
    thresholds = Thresholds(start=100.0, drain=100.0, hold_s=0.0, min_window_s=900.0)
    reading, memory = Reading(50.0, "g/kWh", 1000.0), Memory(good_since_s=1000.0)
    own = by_signal(reading, memory, thresholds, running=False, until_s=until_s, now_s=1000.0)
    assert own.wish == wish
    assert ("its window ends in 899 s, min-window is 900" in own.why) == (wish == Wish.KEEP)


def test_reasons_are_sentences_with_value_threshold_and_time() -> None:
    reading = Reading(87.25, "g/kWh", 0.0)
    memory = Memory(good_since_s=0.0)
    waiting = by_signal(reading, memory, PAPER, running=False, until_s=None, now_s=480.0)
    assert waiting.why == "87.25 g/kWh, below 100 for 480 of 600 s"
    bad = by_signal(
        Reading(312.0, "g/kWh", 0.0),
        Memory(bad_since_s=0.0),
        PAPER,
        running=True,
        until_s=None,
        now_s=612.0,
    )
    assert bad == Own(Wish.DRAIN, "312 g/kWh, above 100 for 612 s", pytest.approx(2.12))


def fact(name: str, wish: Wish, rank: float = 0.0, **values: Any) -> Fact:
    values = {"running": False, "grams_per_hour": 100.0, "money_per_hour": 1.0} | values
    return Fact(name=name, own=Own(wish, f"{name}'s signal", rank), **values)


def runs(found: dict[str, Decision]) -> str:
    return " ".join(sorted(name for name, decision in found.items() if decision.run))


ON: dict[str, Any] = {"running": True}


@pytest.mark.parametrize(
    ("facts", "limits", "expected"),
    [
        # without limits, each follows its own signal
        (
            [fact("a", START), fact("b", KEEP), fact("c", KEEP, **ON), fact("d", DRAIN, **ON)],
            {},
            "a c",
        ),
        # at most N: the best of those that want to, and none that runs gives way
        ([fact("a", START, 0.3), fact("b", START, -0.5)], {"max_clients": 1}, "b"),
        ([fact("a", KEEP, 0.9, **ON), fact("b", START, -0.5)], {"max_clients": 1}, "a"),
        ([fact("a", DRAIN, 0.9, **ON), fact("b", START, -0.5)], {"max_clients": 1}, "b"),
        # N was lowered: the worst goes
        ([fact("a", KEEP, 0.1, **ON), fact("b", KEEP, 0.9, **ON)], {"max_clients": 1}, "a"),
        # never fewer than min-clients: the best stays, or is started
        ([fact("a", DRAIN, 3.0, **ON), fact("b", DRAIN, 2.0, **ON)], {"min_clients": 1}, "b"),
        ([fact("a", KEEP, 3.0), fact("b", KEEP, 2.0)], {"min_clients": 1}, "b"),
        ([fact("a", DRAIN, 3.0, **ON), fact("b", START, -1.0)], {"min_clients": 1}, "a b"),
        ([fact("a", KEEP, 3.0), fact("b", KEEP, 2.0, held="x")], {"min_clients": 1}, "a"),
        # an operator keeps it away
        ([fact("a", START, held="maintenance")], {}, ""),
        ([fact("a", KEEP, held="maintenance", **ON)], {}, "a"),
        # budgets of an hour: not started beyond them, and the worst goes when they are exceeded
        ([fact("a", START, 0.1), fact("b", START, 0.2)], {"grams_per_hour": 150.0}, "a"),
        ([fact("a", START, 0.1), fact("b", START, 0.2)], {"money_per_hour": 1.5}, "a"),
        ([fact("a", KEEP, 0.1, **ON), fact("b", KEEP, 0.2, **ON)], {"money_per_hour": 1.5}, "a"),
        ([fact("a", KEEP, **ON)], {"grams_per_hour": 99.0, "min_clients": 1}, ""),
        ([fact("a", KEEP)], {"grams_per_hour": 99.0, "min_clients": 1}, ""),
        # budgets of the run: used up at 50 g and 5 money
        ([fact("a", START), fact("b", KEEP, **ON)], {"grams": 50.0}, ""),
        ([fact("a", START), fact("b", KEEP, **ON)], {"money": 5.0, "min_clients": 1}, ""),
        ([fact("a", START), fact("b", KEEP, **ON)], {"grams": 50.1, "money": 5.1}, "a b"),
    ],
)
def test_limits_over_all_clients(facts: list[Fact], limits: dict[str, Any], expected: str) -> None:
    found = decide(facts, Limits(**limits), grams=50.0, money=5.0, now_s=0.0)
    assert runs(found) == expected
    assert all(decision.why for decision in found.values())


@pytest.mark.parametrize(("now_s", "expected"), [(1599.0, "a"), (1600.0, "")])
def test_min_on_outlasts_a_signal_and_a_limit_but_not_the_runs_budget(
    now_s: float, expected: str
) -> None:
    drained = [fact("a", DRAIN, since_s=1000.0, min_on_s=600.0, **ON)]
    dear = [fact("a", KEEP, since_s=1000.0, min_on_s=600.0, **ON)]
    assert runs(decide(drained, Limits(), grams=0, money=0, now_s=now_s)) == expected
    hourly = Limits(grams_per_hour=1.0)
    assert runs(decide(dear, hourly, grams=0, money=0, now_s=now_s)) == expected
    assert runs(decide(dear, Limits(grams=1.0), grams=1, money=0, now_s=now_s)) == ""


def test_the_reason_names_the_limit() -> None:
    facts = [fact("a", START, 0.1), fact("b", START, 0.2), fact("c", KEEP, held="maintenance")]
    found = decide(facts, Limits(max_clients=1), grams=0, money=0, now_s=0)
    assert found == {
        "a": Decision(True, "a's signal"),
        "b": Decision(False, "b's signal; max-clients is 1"),
        "c": Decision(False, "held: maintenance"),
    }
    found = decide(facts[:2], Limits(money_per_hour=1.5), grams=0, money=0, now_s=0)
    assert found["b"].why == "b's signal; all together 2 money an hour, money-per-hour is 1.5"
    found = decide(facts[:1], Limits(grams=7), grams=7, money=0, now_s=0)
    assert found["a"].why == "the run's budget of 7 grams is used up"
