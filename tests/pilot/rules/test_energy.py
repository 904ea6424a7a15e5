"""Energy, grams and money: tables whose figures one can work out by hand."""

import math

import pytest

from pilot.rules.energy import (
    Footprint,
    PowerModel,
    Price,
    Series,
    footprint,
    footprint_of_work,
    overlaps,
)

HOUR = 3600.0
DAY = Series.of([(0, 400), (6 * HOUR, 100), (18 * HOUR, 400)])  # the sun shines from 6 to 18


@pytest.mark.parametrize(
    ("begin_h", "end_h", "mean"),
    [
        (0, 6, 400),
        (6, 18, 100),
        (5, 7, 250),
        (0, 24, 250),
        (17, 21, 325),
        (-2, 0, 400),  # before the first value: as it
        (30, 40, 400),  # after the last: as it
        (7, 7, 100),
    ],
)
def test_the_mean_of_a_series_weighs_its_values_by_time(
    begin_h: float, end_h: float, mean: float
) -> None:
    assert DAY.mean(begin_h * HOUR, end_h * HOUR) == pytest.approx(mean)


def test_a_value_holds_from_its_time_on() -> None:
    moments = [-1, 0, 6 * HOUR - 1, 6 * HOUR, 18 * HOUR, 99 * HOUR]
    assert [DAY.at(moment) for moment in moments] == [400, 400, 400, 100, 400, 400]
    assert Series.of([(5, 1), (0, 2), (5, 3)]) == Series((0, 5), (2, 3))
    assert Series.constant(7).integral(10, 12) == 14


@pytest.mark.parametrize(
    ("times", "values", "why"),
    [
        ((), (), "at least one time"),
        ((0.0, 1.0), (1.0,), "a value for each"),
        ((0.0, 0.0), (1.0, 2.0), "times ascend, but 0 s follows 0 s"),
        ((0.0,), (math.nan,), "only finite numbers"),
    ],
)
def test_what_is_no_series_is_refused(
    times: tuple[float, ...], values: tuple[float, ...], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        Series(times, values)


@pytest.mark.parametrize("watts", [(-1, 5, 1), (10, 5, 1), (1, math.inf, 1), (1, 5, 0.9)])
def test_a_machine_that_cannot_be_is_refused(watts: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="at least"):
        PowerModel(*watts)


@pytest.mark.parametrize(
    ("begin_h", "end_h", "training", "price", "expected"),
    [
        # 2 kW of training with PUE 1.2 for an hour at 400 g/kWh and 0.25 a kWh
        (0, 1, True, Price(Series.constant(0.25)), Footprint(HOUR, HOUR, 2.4, 960, 0.6)),
        (0, 1, False, Price(Series.constant(0.25)), Footprint(HOUR, 0, 0.6, 240, 0.15)),
        (5, 7, True, None, Footprint(2 * HOUR, 2 * HOUR, 4.8, 1200, 0)),
        # rented by the hour: what it draws is the landlord's
        (0, 2, False, Price(DAY, per="hour"), Footprint(2 * HOUR, 0, 1.2, 480, 800)),
        (0, 1, True, Price(Series.constant(-0.1)), Footprint(HOUR, HOUR, 2.4, 960, -0.24)),
        (3, 3, True, Price(DAY), Footprint()),
        (4, 3, True, Price(DAY), Footprint()),
    ],
)
def test_an_interval_costs_its_energy_at_the_time_s_carbon_and_price(
    begin_h: float, end_h: float, training: bool, price: Price | None, expected: Footprint
) -> None:
    watts = PowerModel(500, 2000, pue=1.2).watts(training=training)
    found = footprint(
        begin_h * HOUR, end_h * HOUR, watts=watts, training=training, carbon=DAY, price=price
    )
    assert vars(found) == pytest.approx(vars(expected))


def test_without_series_there_is_energy_alone() -> None:
    found = footprint(0, HOUR, watts=1000, training=True)
    assert found == Footprint(HOUR, HOUR, 1.0)
    assert found.grams_per_million_tokens(0) is None
    assert Footprint(grams=50).grams_per_million_tokens(2_000_000) == 25


def test_a_machine_idles_where_it_is_on_and_does_not_train() -> None:
    power = PowerModel(100, 1000)
    on = [(0, 2 * HOUR), (10 * HOUR, 11 * HOUR)]
    training = [(10.5 * HOUR, 12 * HOUR), (0, HOUR), (1.5 * HOUR, 2 * HOUR), (5 * HOUR, 6 * HOUR)]
    found = footprint_of_work(on, training, power, price=Price(Series.constant(1.0), per="hour"))
    # trained 1 h + 0.5 h + 0.5 h of the three hours in which it was on
    assert vars(found) == pytest.approx(vars(Footprint(3 * HOUR, 2 * HOUR, 2.1, 0, 3.0)))
    assert footprint_of_work([], training, power) == Footprint()
    assert footprint_of_work(on, [], power).kwh == pytest.approx(0.3)


def test_overlaps_are_where_both_are() -> None:
    some, others = [(0, 4), (6, 9), (12, 13)], [(1, 2), (3, 7), (8, 12)]
    assert list(overlaps(some, others)) == [(1, 2), (3, 4), (6, 7), (8, 9)]
