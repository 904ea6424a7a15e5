"""Series that are drawn have the shapes that they say; a client that follows one starts and stops by it."""

import statistics
from pathlib import Path

import pytest

from pilot.rehearse.signals import less, read_series, spot_price, sun, wind, windows
from pilot.rehearse.trace import TraceError
from pilot.rules.energy import Series
from pilot.rules.thresholds import Thresholds

HOUR = 3600.0


def test_the_sun_is_highest_at_noon_and_gone_at_night() -> None:
    # 21 June at 50 degrees north: 90 - 50 + 23.4 degrees high at noon, 16 hours of daylight
    summer = sun(24, latitude=50, noon_h=12, day=172)
    assert summer.at(12 * HOUR) == pytest.approx(0.894, abs=0.001)
    assert summer.at(0) == 0
    assert sum(value > 0 for value in summer.values) / 4 == pytest.approx(16.1, abs=0.5)
    winter = sun(24, latitude=50, noon_h=12, day=355)
    assert winter.at(12 * HOUR) == pytest.approx(0.285, abs=0.001)
    assert max(sun(24, latitude=50, noon_h=20, day=172).values) == pytest.approx(
        summer.at(12 * HOUR), abs=0.001
    )


def test_clouds_take_a_share_of_each_day() -> None:
    clear, cloudy = (sun(240, latitude=40, noon_h=12, cloud=cloud, seed=1) for cloud in (0.0, 0.5))
    noons = [cloudy.at(t) / clear.at(t) for t in (HOUR * (24 * d + 12) for d in range(10))]
    assert all(0.5 <= noon <= 1 for noon in noons) and len(set(noons)) == 10


def test_wind_gives_what_a_turbine_gives_at_its_mean_speed() -> None:
    def mean(speed: float) -> float:
        series = wind(24 * 365, mean_m_s=speed, seed=2)
        assert all(0 <= value <= 1 for value in series.values)
        return statistics.mean(series.values)

    # the cubic curve over a Rayleigh distribution, integrated numerically: 0.215 at 6 m/s, 0.523 at 10
    assert mean(6) == pytest.approx(0.215, abs=0.04)
    assert mean(10) == pytest.approx(0.523, abs=0.05)


def test_a_spot_price_returns_to_its_mean_and_is_highest_in_the_evening() -> None:
    price = spot_price(24 * 365, mean=0.2, evening=0.3, peak_h=18, seed=3)
    assert statistics.mean(price.values) == pytest.approx(0.2, rel=0.05)
    by_hour = [statistics.mean(price.values[hour * 4 :: 96]) for hour in (18, 6)]
    assert by_hour[0] / by_hour[1] == pytest.approx(1.3 / 0.7, rel=0.1)
    assert spot_price(24, mean=0.2, seed=3) == spot_price(24, mean=0.2, seed=3)
    assert spot_price(24, mean=0.2, seed=3) != spot_price(24, mean=0.2, seed=4)


def test_renewables_cover_a_part_of_the_grid_and_never_more_than_all() -> None:
    grid = less(Series((0, 1, 2), (0.0, 0.5, 1.0)), base=400, covers=1.2)
    assert grid.values == pytest.approx((400, 160, 0))


@pytest.mark.parametrize(
    ("values", "least_h", "expected"),
    [
        ([150, 90, 90, 120, 150], 0, [(1, 3)]),  # hourly values; thresholds 100
        ([150, 90, 150, 150], 2.5, [(1, 3.5)]),  # not before its time
        ([150, 90, 150, 90, 150], 2.2, [(1, 4)]),  # low again when its time is over
        ([90, 150, 90], 0, [(0, 1), (2, 5)]),  # up to the end
        ([90, 90, 90], 0, [(0, 5)]),
        ([100, 150], 0, [(0, 1)]),  # at the threshold it runs, as under `pilot provision`
        ([90, 150, 90], 9, [(0, 5)]),
    ],
)
def test_a_client_follows_a_series_with_hysteresis(
    values: list[float], least_h: float, expected: list[tuple[float, float]]
) -> None:
    series = Series(tuple(HOUR * i for i in range(len(values))), tuple(values))
    thresholds = Thresholds(start=100, drain=100, hold_s=0.0, min_on_s=least_h * HOUR)
    found = windows(series, thresholds, hours=5)
    assert found == expected


def test_between_two_thresholds_nothing_changes() -> None:
    series = Series.of((HOUR * i, v) for i, v in enumerate([110, 90, 110, 130, 110, 90]))
    assert windows(series, Thresholds(start=100, drain=120, hold_s=0.0), hours=6) == [
        (1, 3),
        (5, 6),
    ]


def test_a_series_is_read_or_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("time,value\n# night\n3600,200\n0,100\n")
    assert read_series(tmp_path / "s.csv") == Series((0, 3600), (100, 200))
    (tmp_path / "s.csv").write_text("0,100\n5,dear\n")
    with pytest.raises(TraceError, match=r"s\.csv, line 2: needs two numbers"):
        read_series(tmp_path / "s.csv")
    with pytest.raises(TraceError, match="cannot read the series"):
        read_series(tmp_path / "none.csv")
