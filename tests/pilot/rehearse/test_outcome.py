"""What is said of a comparison: a table, and a sentence that follows from it."""

from dataclasses import replace

import pytest

from pilot.rehearse.outcome import Outcome, length_advice, recommendation, table
from pilot.rules.energy import Footprint
from pilot.rules.round_length import RoundCosts

ONE = Outcome(
    policy="always-on",
    settings={},
    seed=0,
    hours=10.0,
    tokens=36_000_000,
    wasted_tokens=4_000_000,
    rounds=50,
    empty_rounds=0,
    terms=1,
    goodput=0.8,
    participation=0.9,
    target_h=None,
    footprint=Footprint(72_000, 36_000, 100.0, 36_000.0, 12.5),
    clients={},
)
SLOW = replace(
    ONE, policy="sun", tokens=18_000_000, footprint=Footprint(36_000, 18_000, 50, 3600, 5.0)
)
DONE = replace(ONE, policy="all", target_h=9.0, hours=9.0)


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        ([ONE], "It does not have its tokens within 10 h."),
        ([DONE], "It has its tokens after 9.0 h."),
        (
            [SLOW, ONE],
            "Take always-on: it trains 100.0 % more tokens per second than sun; if emissions count more, sun: "
            "80 % less CO2 per token, at 50 % of the speed.",
        ),
        (
            [SLOW, DONE],
            "Take all: it has its tokens after 9.0 h; not all others have them at all; if emissions count "
            "more, sun: 80 % less CO2 per token, at 45 % of the speed.",
        ),
        (
            [DONE, replace(DONE, policy="late", target_h=12.0, hours=12.0)],
            "Take all: it has its tokens after 9.0 h, late after 12.0 h.",
        ),
        ([replace(ONE, failure="x"), SLOW], "Only sun trained anything."),
        ([replace(ONE, tokens=0)], "None of these can be recommended: no run got anywhere."),
    ],
)
def test_the_recommendation_follows_from_the_figures(
    outcomes: list[Outcome], sentence: str
) -> None:
    assert recommendation(outcomes) == sentence


def test_the_table_has_a_line_a_point_in_units_that_people_read() -> None:
    lines = table([ONE, replace(SLOW, settings={"quorum": 2}, failure="x")]).splitlines()
    assert lines[1].split() == (
        [
            "always-on",
            "10.0",
            "-",
            "36.0",
            "1,000",
            "10.0",
            "%",
            "50",
            "80",
            "%",
            "90",
            "%",
            "100.0",
            "36.0",
            "1,000.00",
            "12.50",
        ]
    )
    assert lines[2].startswith("sun, quorum=2 (failed)")
    assert len({len(line) for line in lines}) == 1


def test_json_has_what_follows_from_the_figures() -> None:
    values = ONE.to_json()
    assert values["wasted_share"] == 0.1 and values["grams_per_million_tokens"] == 1000
    assert values["footprint"]["kwh"] == 100 and values["tokens_per_s"] == 1000


def test_a_point_says_how_long_its_rounds_should_be() -> None:
    one = replace(ONE, costs=RoundCosts(fixed_s=30, losses=9, client_s=3600 * 95))
    assert length_advice(one) == (
        "Under always-on a round costs 30 s beside training, and a client's work is lost once in 10.0 h: "
        "rounds of 1470 s would lose least."
    )
    assert one.to_json()["best_length_s"] == pytest.approx(1470, abs=1)
    assert length_advice(ONE) == "" and ONE.to_json()["best_length_s"] is None
