"""When a round ends: one row a rule."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot.config import RunConfig
from pilot.rules.rounds import (
    EndReason,
    MonotonicClock,
    RoundRules,
    RoundView,
    begin_patience_s,
    blind_seconds,
    end_reason,
    grace_s,
    join_min_remaining_s,
    remaining_s,
    return_s,
    silence_s,
    waits_for_beginning,
)

RULES = RoundRules(
    min_duration_s=10.0,
    max_duration_s=100.0,
    quorum=2,
    target_tokens=0,
    run_tokens_left=1000,
    fixed_steps=False,
)
TARGET = replace(RULES, target_tokens=500)
FIXED = replace(RULES, fixed_steps=True, target_tokens=500)
VIEW = RoundView(elapsed_s=5.0, tokens=0, training=2, pending=2)


@pytest.mark.parametrize(
    ("rules", "changes", "expected"),
    [
        (RULES, {}, None),
        (RULES, {"elapsed_s": 9.999}, None),
        (RULES, {"elapsed_s": 10.0}, EndReason.MIN_DURATION),
        (RULES, {"elapsed_s": 50.0, "training": 1}, None),
        (RULES, {"elapsed_s": 100.0, "training": 1}, EndReason.MAX_DURATION),
        (RULES, {"elapsed_s": 100.0}, EndReason.MAX_DURATION),
        (RULES, {"tokens": 999}, None),
        (RULES, {"tokens": 1000}, EndReason.RUN_TOKENS),
        (RULES, {"pending": 0, "replied": 2}, EndReason.ALL_REPLIED),
        (RULES, {"pending": 0, "replied": 1, "elapsed_s": 0.0}, EndReason.ALL_REPLIED),
        (RULES, {"pending": 0, "replied": 1, "rows_left": False}, EndReason.DATA_EXHAUSTED),
        (RULES, {"pending": 0, "training": 0}, EndReason.NOBODY_LEFT),
        # a lone client goes on until a second one is there to take part, or the maximum
        (RULES, {"elapsed_s": 99.0, "training": 1, "pending": 1}, None),
        (RULES, {"elapsed_s": 50.0, "training": 1, "waiting": 1}, EndReason.MIN_DURATION),
        (RULES, {"elapsed_s": 9.0, "training": 1, "waiting": 1}, None),
        # who has replied counts for those that are silent; a round of nobody waits for somebody
        (RULES, {"pending": 1, "silent": 1, "replied": 1}, EndReason.ALL_REPLIED),
        (RULES, {"pending": 2, "silent": 1, "replied": 1}, None),
        (RULES, {"pending": 2, "silent": 2, "training": 0}, None),
        (RULES, {"pending": 2, "silent": 2, "training": 0, "waiting": 1}, EndReason.NOBODY_LEFT),
        (RULES, {"pending": 2, "silent": 2, "elapsed_s": 100.0}, EndReason.MAX_DURATION),
        (FIXED, {"pending": 1, "silent": 1, "replied": 1}, EndReason.ALL_REPLIED),
        (TARGET, {"tokens": 499, "elapsed_s": 99.0}, None),
        (TARGET, {"tokens": 500}, EndReason.TARGET_TOKENS),
        (TARGET, {"tokens": 1000}, EndReason.TARGET_TOKENS),
        (replace(TARGET, run_tokens_left=300), {"tokens": 300}, EndReason.RUN_TOKENS),
        (TARGET, {"elapsed_s": 100.0}, EndReason.MAX_DURATION),
        # who was asked and may still begin is waited for, but not beyond the run's tokens or the maximum
        (TARGET, {"tokens": 500, "starting": 1}, None),
        (TARGET, {"tokens": 1000, "starting": 1}, EndReason.TARGET_TOKENS),
        (TARGET, {"tokens": 500, "starting": 1, "elapsed_s": 100.0}, EndReason.MAX_DURATION),
        (TARGET, {"pending": 0, "replied": 2, "starting": 0}, EndReason.ALL_REPLIED),
        (RULES, {"elapsed_s": 10.0, "starting": 1}, None),
        (RULES, {"tokens": 1000, "starting": 1}, EndReason.RUN_TOKENS),
        (FIXED, {"tokens": 10**9, "elapsed_s": 99.0}, None),
        (FIXED, {"elapsed_s": 100.0}, EndReason.MAX_DURATION),
        (FIXED, {"pending": 0, "replied": 2}, EndReason.ALL_REPLIED),
    ],
)
def test_round_ends_for_the_reason_that_its_rules_give(
    rules: RoundRules, changes: dict[str, float], expected: EndReason | None
) -> None:
    assert end_reason(rules, replace(VIEW, **changes)) is expected  # type: ignore[arg-type]


@given(
    elapsed_s=st.floats(100.0, 1e9),
    tokens=st.integers(0, 10**15),
    training=st.integers(0, 99),
    pending=st.integers(0, 99),
    rules=st.sampled_from([RULES, TARGET, FIXED]),
)
def test_no_round_outlives_its_longest_duration(
    rules: RoundRules, elapsed_s: float, tokens: int, training: int, pending: int
) -> None:
    view = RoundView(elapsed_s=elapsed_s, tokens=tokens, training=training, pending=pending)
    assert end_reason(rules, view) is not None


def test_rules_are_those_of_the_configuration() -> None:
    config = RunConfig(round_min_duration=1.0, round_max_duration=2.0, quorum=3, target_tokens=4)
    assert RoundRules.of(config, run_tokens_left=5) == RoundRules(
        min_duration_s=1.0,
        max_duration_s=2.0,
        quorum=3,
        target_tokens=4,
        run_tokens_left=5,
        fixed_steps=False,
    )
    assert RoundRules.of(RunConfig(round_steps=1), run_tokens_left=5).fixed_steps


def test_clock_never_goes_back() -> None:
    clock = MonotonicClock()
    assert clock.now_s() <= clock.now_s()


@pytest.mark.parametrize(
    ("rules", "changes", "expected"),
    [
        (RULES, {"training": 1}, 95.0),
        (RULES, {"training": 2}, 5.0),
        (RULES, {"training": 1, "waiting": 1}, 5.0),
        (RULES, {"training": 1, "tokens": 900, "tokens_per_s": 10.0}, 10.0),
        (TARGET, {"tokens": 400, "tokens_per_s": 50.0}, 2.0),
        (TARGET, {"tokens": 600, "tokens_per_s": 50.0}, 0.0),
        (TARGET, {"tokens": 400}, 95.0),
        (TARGET, {"tokens": 500}, 0.0),  # all have used up their leases: nobody is at work
        (FIXED, {"tokens": 400, "tokens_per_s": 50.0}, 95.0),
        (TARGET, {"tokens": 600, "starting": 1, "begin_left_s": 20.0}, 20.0),
        (TARGET, {"tokens": 600, "starting": 1, "begin_left_s": 200.0}, 95.0),
        (TARGET, {"tokens": 1000, "starting": 1, "begin_left_s": 20.0}, 0.0),
    ],
)
def test_what_is_left_of_a_round_follows_from_what_will_end_it(
    rules: RoundRules, changes: dict[str, float], expected: float
) -> None:
    assert remaining_s(rules, replace(VIEW, **changes)) == expected  # type: ignore[arg-type]


def test_a_site_joins_when_twice_the_cost_of_a_round_is_left_or_what_is_configured() -> None:
    assert join_min_remaining_s(0.0, [3.0, 50.0, 4.0]) == 8.0
    assert join_min_remaining_s(7.0, [3.0, 50.0, 4.0]) == 7.0
    assert join_min_remaining_s(0.0, []) == 30.0


def test_grace_is_three_times_the_slowest_upload_within_its_bounds() -> None:
    assert grace_s([], 600.0) == 600.0
    assert grace_s([5.0, 20.0], 600.0) == 40.0
    assert grace_s([0.1], 600.0) == 5.0
    assert grace_s([500.0], 600.0) == 600.0
    assert grace_s([0.1], 4.0) == 4.0


def test_grace_is_longer_where_the_missing_replies_are_worth_it() -> None:
    assert grace_s([5.0], 600.0, worth_s=200.0) == 200.0
    assert grace_s([5.0], 600.0, worth_s=3.0) == 10.0
    assert grace_s([5.0], 600.0, worth_s=math.inf) == 600.0


def test_a_round_waits_to_open_for_a_tenth_of_what_rounds_last() -> None:
    assert return_s([]) == 15.0
    assert return_s([40.0, 60.0, 1000.0]) == 6.0
    assert return_s([1.0]) == 2.0
    assert return_s([3600.0]) == 15.0


def test_silence_is_three_heartbeats_and_not_less_than_two_seconds() -> None:
    assert silence_s(5.0) == 15.0
    assert silence_s(0.2) == 2.0


def test_client_may_take_twice_as_long_to_begin_as_before_or_as_the_slowest_other() -> None:
    assert begin_patience_s(40.0, [90.0]) == 80.0
    assert begin_patience_s(None, [50.0, 20.0]) == 100.0
    assert begin_patience_s(None, []) == begin_patience_s(1.0, []) == 30.0
    assert [waits_for_beginning(late) for late in (0, 2, 3, 9, 10, 11)] == [
        True,
        True,
        False,
        False,
        True,
        False,
    ]


def test_who_cannot_hear_the_end_of_a_round_trains_for_seven_tenths_of_what_it_will_last() -> None:
    timed = RunConfig(round_min_duration=40.0, round_max_duration=100.0)
    assert blind_seconds(timed, []) == 28.0
    assert blind_seconds(timed, [], 10.0) == 18.0
    assert blind_seconds(timed, [], 50.0) == 0.0
    tokens = RunConfig(target_tokens=8, round_min_duration=1.0, round_max_duration=100.0)
    assert blind_seconds(tokens, []) is None
    assert blind_seconds(tokens, [30.0, 20.0]) == 14.0
    assert blind_seconds(tokens, [1000.0], 10.0) == 90.0
    assert blind_seconds(RunConfig(round_steps=2, round_max_duration=900.0), [], 100.0) == 800.0
