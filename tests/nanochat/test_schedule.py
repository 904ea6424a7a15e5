"""Schedules, to the number."""

import math

import pytest

from nanochat.errors import UserError
from nanochat.schedule import (
    Schedule,
    learning_rates,
    make_schedule,
    scale_lr_for_batch,
    scale_weight_decay,
    scale_weight_decay_for_tokens,
)


def test_pilots_learning_rate_is_constant_then_falls_to_zero_over_the_last_two_fifths() -> None:
    schedule = make_schedule("pilot", total_steps=1000, weight_decay=0.1)
    expected = {0: 1.0, 600: 1.0, 700: 0.75, 800: 0.5, 800.5: 0.49875, 1000: 0.0, 1200: 0.0}
    for step, value in expected.items():
        assert schedule.at(step).lr_multiplier == pytest.approx(value)


def test_pilots_momentum_rises_over_300_steps_and_weight_decay_falls_linearly() -> None:
    schedule = make_schedule("pilot", total_steps=1000, weight_decay=0.072)
    for step, momentum in {0: 0.85, 150: 0.90, 300: 0.95, 999: 0.95}.items():
        assert schedule.at(step).momentum == pytest.approx(momentum)
    for step, decay in {0: 0.072, 250: 0.054, 1000: 0.0, 1100: 0.0}.items():
        assert schedule.at(step).weight_decay == pytest.approx(decay)


def test_upstreams_schedule() -> None:
    schedule = make_schedule("upstream", total_steps=2000, weight_decay=0.2)
    lr = {0: 1 / 40, 19: 0.5, 39: 1.0, 700: 1.0, 1350: 0.525, 2000: 0.05}
    for step, value in lr.items():
        assert schedule.at(step).lr_multiplier == pytest.approx(value)
    momentum = {0: 0.85, 200: 0.91, 400: 0.97, 700: 0.97, 1350: 0.935, 2000: 0.90}
    for step, value in momentum.items():
        assert schedule.at(step).momentum == pytest.approx(value)
    for step, share in {0: 1.0, 1000: 0.5, 500: 0.5 * (1 + math.sqrt(0.5)), 2000: 0.0}.items():
        assert schedule.at(step).weight_decay == pytest.approx(0.2 * share)


@pytest.mark.parametrize("kind", ["pilot", "upstream"])
@pytest.mark.parametrize("total_steps", [0.5, 1, 7, 50, 5000])
def test_values_stay_in_their_limits_however_short_the_run(kind: str, total_steps: float) -> None:
    schedule = make_schedule(kind, total_steps=total_steps, weight_decay=0.2)
    for i in range(60):
        hyper = schedule.at(total_steps * i / 40)
        assert 0 <= hyper.lr_multiplier <= 1
        assert 0.85 <= hyper.momentum <= 0.97
        assert 0 <= hyper.weight_decay <= 0.2


def test_single_values_can_be_replaced() -> None:
    schedule = make_schedule(
        "pilot",
        total_steps=100,
        weight_decay=0.0,
        warmup_steps=10,
        warmdown_ratio=0.5,
        final_lr_fraction=0.2,
    )
    assert schedule.at(4).lr_multiplier == pytest.approx(0.5)
    assert schedule.at(75).lr_multiplier == pytest.approx(0.6)
    flat = make_schedule("pilot", total_steps=10, weight_decay=0.0, warmdown_ratio=0.0)
    assert flat.at(10).lr_multiplier == 1.0


def test_impossible_schedules_are_user_errors() -> None:
    for values in ({"total_steps": 0}, {"warmdown_ratio": 1.5}, {"warmup_steps": -1}):
        with pytest.raises(UserError):
            Schedule(**{"total_steps": 10.0, "weight_decay": 0.1, **values})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pilot, upstream"):
        make_schedule("linear", total_steps=10, weight_decay=0.1)


def test_scaling_rules() -> None:
    assert scale_lr_for_batch(2**19) == 1.0
    assert scale_lr_for_batch(2**17) == 0.5
    assert f"{scale_weight_decay(0.2, 20):.6f}" == "0.072000"
    assert scale_weight_decay(0.2, 12) == 0.2
    scaled = scale_weight_decay_for_tokens(
        0.28, total_batch_tokens=2**21, train_tokens=4e9, reference_tokens=1e9
    )
    assert scaled == pytest.approx(0.28 * 2 / 4)


@pytest.mark.parametrize("group", ["matrix", "embedding", "unembedding", "scalar"])
def test_a_rate_of_its_own_changes_its_group_alone(group: str) -> None:
    expected = learning_rates("modern").replace(**{group: 0.123})
    assert learning_rates("modern", **{f"{group}_lr": 0.123}) == expected


def test_other_rates_keep_their_ratio_to_lr_unless_given() -> None:
    default, given = learning_rates("modern"), learning_rates("modern", lr=0.01, scalar_lr=0.3)
    assert (default.matrix, default.embedding, default.unembedding) == (0.02, 0.3, 0.008)
    assert (given.matrix, given.embedding, given.unembedding) == (0.01, 0.15, 0.004)
    assert (given.scalar, given.smear) == (0.3, 0.1)
    assert learning_rates("classic").unembedding == 0.004


def test_batch_scaling_takes_the_smear_group_too() -> None:
    rates = learning_rates("modern").scaled(0.5)
    assert (rates.matrix, rates.scalar, rates.smear) == (0.01, 0.25, 0.1)
