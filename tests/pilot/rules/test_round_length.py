"""How long rounds should be, in figures that one can work out by hand."""

import pytest

from pilot.rules.round_length import RoundCosts, best_length_s, round_costs


def account(period_s: float, goodput_s: float) -> dict[str, float]:
    return {"period_s": period_s, "goodput_s": goodput_s}


EVENTS = [
    {"event": "round_time", "clients": {"a": account(630, 600), "b": account(630, 590)}},
    {"event": "reply_refused", "round": 2, "client": "b", "reason": "its node is gone"},
    {"event": "reply_refused", "reason": "late", "client": None},  # of no open round
    {"event": "round_time", "clients": {"a": account(632, 600), "b": account(300, 0)}},
    {"event": "round_opened", "round": 3},
]


def test_costs_are_what_rounds_took_beside_training_and_how_often_work_was_lost() -> None:
    costs = round_costs(EVENTS)
    assert costs == RoundCosts(fixed_s=32, losses=1, client_s=2192)
    assert round_costs(EVENTS[1:3]) is None


@pytest.mark.parametrize(
    ("fixed_s", "losses", "hours", "expected"),
    [
        (30, 9, 95, 1470),  # a loss in ten hours: √(2 · 30 s · 36,000 s)
        (30, 95, 95.5, 465),  # ten times as often: shorter by √10
        (300, 9, 95, 3600),  # rounds that cost ten times as much: no longer than allowed
        (1, 95, 9.55, 60),
        (30, 0, 1, 657),  # none yet, in an hour: there may be one in two
    ],
)
def test_a_round_is_as_long_as_both_losses_together_are_least(
    fixed_s: float, losses: int, hours: float, expected: float
) -> None:
    costs = RoundCosts(fixed_s, losses, 3600 * hours)
    length_s = best_length_s(costs, shortest_s=60, longest_s=3600)
    assert length_s == pytest.approx(expected, abs=1)


def test_no_other_length_loses_less() -> None:
    costs = RoundCosts(fixed_s=40, losses=20, client_s=400_000)
    best_s = best_length_s(costs, shortest_s=1, longest_s=1e6)

    def lost(length_s: float) -> float:
        return costs.fixed_s / length_s + costs.losses_per_s * length_s / 2

    assert all(lost(best_s) < lost(best_s * factor) for factor in (0.5, 0.9, 1.1, 2.0))
