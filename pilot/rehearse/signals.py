"""Carbon and price over time, drawn or read, and when a client trains that follows one.

The shapes are those of textbooks, for choosing and comparing; they forecast nothing. All times are seconds of
the rehearsal's clock, which begins at midnight UTC of `day`; the same seed gives the same series.
"""

import csv
import math
import random
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from pilot.rehearse.trace import TraceError
from pilot.rules.energy import Series
from pilot.rules.thresholds import Thresholds

_HOUR_S = 3600.0
_STEP_S = 900.0  # of a drawn series: markets and grids settle quarters of an hour
_TILT_DEG = 23.44  # of the earth's axis
# A wind turbine: at this speed it gives all, above the last nothing (m/s)
_RATED_M_S, _CUT_OUT_M_S = 12.0, 25.0


def sun(
    hours: float,
    *,
    latitude: float,
    noon_h: float,
    day: int = 172,
    cloud: float = 0.0,
    seed: int | str = 0,
) -> Series:
    """What panels give, as a share of what they would with the sun overhead: the sine of its elevation.

    `latitude` in degrees north, `noon_h` the hour UTC of the highest sun (12 - longitude / 15), `day` of the
    year (172: 21 June). `cloud`: each day gives a share of it, drawn evenly from 1 - `cloud` to 1.
    Cooper's formula gives the declination (Solar Energy 12, 1969).
    """
    rng, phi = random.Random(f"sun {seed}"), math.radians(latitude)
    skies = [1.0 - cloud * rng.random() for _ in range(math.ceil(hours / 24) + 1)]

    def share(at_h: float) -> float:
        days = day + at_h / 24
        delta = math.radians(_TILT_DEG) * math.sin(2 * math.pi * (284 + days) / 365)
        angle = 2 * math.pi * (at_h - noon_h) / 24
        height = math.sin(phi) * math.sin(delta) + math.cos(phi) * math.cos(delta) * math.cos(angle)
        return max(0.0, height) * skies[int(at_h // 24)]

    return Series.of((at_h * _HOUR_S, share(at_h)) for at_h in _grid(hours))


def wind(
    hours: float, *, mean_m_s: float = 8.0, memory_h: float = 12.0, seed: int | str = 0
) -> Series:
    """What turbines give, as a share of their rated power.

    Speeds are Rayleigh (Weibull of shape 2) with this mean, as over years; their normal scores follow an
    Ornstein-Uhlenbeck process that forgets within `memory_h`. Power grows with the cube up to 12 m/s, and is 0
    above 25 m/s.
    """
    scale = mean_m_s / math.gamma(1.5)

    def share(score: float) -> float:
        exceeded = max(1e-12, 0.5 * math.erfc(score / math.sqrt(2)))
        speed = scale * math.sqrt(-math.log(exceeded))
        return 0.0 if speed > _CUT_OUT_M_S else min(1.0, (speed / _RATED_M_S) ** 3)

    scores = _reverting(random.Random(f"wind {seed}"), memory_h)
    return Series.of((at_h * _HOUR_S, share(next(scores))) for at_h in _grid(hours))


def spot_price(
    hours: float,
    *,
    mean: float,
    spread: float = 0.3,
    memory_h: float = 6.0,
    evening: float = 0.3,
    peak_h: float = 18.0,
    seed: int | str = 0,
) -> Series:
    """A price per kWh or hour that returns to its `mean`: its logarithm is an Ornstein-Uhlenbeck process with
    this `spread`, on a day's wave of `evening` (a share of the mean) that is highest at `peak_h` UTC."""
    scores = _reverting(random.Random(f"price {seed}"), memory_h)

    def price(at_h: float) -> float:
        wave = 1 + evening * math.cos(2 * math.pi * (at_h - peak_h) / 24)
        return mean * wave * math.exp(spread * next(scores) - spread**2 / 2)

    return Series.of((at_h * _HOUR_S, price(at_h)) for at_h in _grid(hours))


def less(series: Series, *, base: float, covers: float) -> Series:
    """What `base` is where renewables cover part of it: base · (1 - covers · share), at least 0."""
    values = tuple(max(0.0, base * (1 - covers * share)) for share in series.values)
    return Series(series.times_s, values)


def windows(series: Series, thresholds: Thresholds, *, hours: float) -> list[tuple[float, float]]:
    """Windows in hours, within `hours`, in which a client runs that follows `series` without a hold."""
    end_s, times_s = hours * _HOUR_S, series.times_s
    found, i = [], 0
    while i < len(times_s) and times_s[i] < end_s:
        if not thresholds.good(series.values[i]):
            i += 1
            continue
        since_s = max(0.0, times_s[i])
        stop_s = _first_bad(series, thresholds, max(times_s[i], since_s + thresholds.min_on_s))
        found.append((since_s / _HOUR_S, min(stop_s, end_s) / _HOUR_S))
        i = bisect_right(times_s, stop_s)
    return found


def _first_bad(series: Series, thresholds: Thresholds, from_s: float) -> float:
    """The first moment from `from_s` on at which a client would leave; infinity if there is none."""
    if thresholds.bad(series.at(from_s)):
        return from_s
    later = range(bisect_right(series.times_s, from_s), len(series.times_s))
    return next((series.times_s[i] for i in later if thresholds.bad(series.values[i])), math.inf)


def read_series(path: Path) -> Series:
    """A CSV of `time,value`, in seconds since the run began. Raises TraceError, with one sentence."""
    points = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, line in enumerate(csv.reader(file), start=1):
                fields = [field.strip() for field in line]
                if not any(fields) or fields[0].startswith("#") or fields == ["time", "value"]:
                    continue
                try:
                    time_s, value = map(float, fields)
                except ValueError as error:
                    raise TraceError(
                        f"{path}, line {number}: needs two numbers, time and value"
                    ) from error
                points.append((time_s, value))
        return Series.of(points)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise TraceError(f"cannot read the series {path}: {error}") from error


def _grid(hours: float) -> Iterator[float]:
    for i in range(math.ceil(hours * _HOUR_S / _STEP_S)):
        yield i * _STEP_S / _HOUR_S


def _reverting(rng: random.Random, memory_h: float) -> Iterator[float]:
    """An Ornstein-Uhlenbeck process of variance 1, a value each step of `_grid`, exact in distribution."""
    kept = math.exp(-_STEP_S / _HOUR_S / memory_h)
    value = rng.gauss(0.0, 1.0)
    while True:
        yield value
        value = kept * value + math.sqrt(1 - kept**2) * rng.gauss(0.0, 1.0)
