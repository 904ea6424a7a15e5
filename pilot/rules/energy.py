"""What training takes besides time: energy, carbon and money, as arithmetic over series of time.

Grams are those of the electricity that a client draws, by the carbon intensity of its grid at that moment
(the operational emissions of arXiv 2602.22760); what its hardware took to make is not in them.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

PricePer = Literal["kwh", "hour"]
_KWH_J = 3.6e6  # joules
_HOUR_S = 3600.0


@dataclass(frozen=True)
class PowerModel:
    """What a client's machine draws, in watts at its plug: `idle_w` while on, `training_w` while it trains.

    `pue`: what its building draws for each watt of it (power usage effectiveness). A machine that is off draws
    nothing. Raises ValueError for what no machine has.
    """

    idle_w: float
    training_w: float
    pue: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.idle_w <= self.training_w < math.inf:
            raise ValueError(
                f"a machine draws at least 0 W idle and no less training, not {self.idle_w:g} W and "
                f"{self.training_w:g} W"
            )
        if not 1 <= self.pue < math.inf:
            raise ValueError(f"PUE is at least 1, not {self.pue:g}")

    def watts(self, *, training: bool) -> float:
        """Of machine and building together."""
        return self.pue * (self.training_w if training else self.idle_w)


@dataclass(frozen=True)
class Series:
    """A step function of time: `values[i]` holds from `times_s[i]` until the next; the first also before it.

    Seconds of any clock, as long as it is the same one for all. Values: g CO2-equivalent per kWh, or money per
    kWh or hour, which may be negative. Raises ValueError if the times do not ascend or a number is not finite.
    """

    times_s: tuple[float, ...]
    values: tuple[float, ...]
    _areas: tuple[float, ...] = field(init=False, repr=False, compare=False)  # from the first time

    def __post_init__(self) -> None:
        if not self.times_s or len(self.times_s) != len(self.values):
            raise ValueError("a series needs at least one time, and a value for each")
        if not all(math.isfinite(number) for number in (*self.times_s, *self.values)):
            raise ValueError("a series holds only finite numbers")
        areas = [0.0]
        for i in range(1, len(self.times_s)):
            seconds = self.times_s[i] - self.times_s[i - 1]
            if seconds <= 0:
                raise ValueError(
                    f"a series' times ascend, but {self.times_s[i]:g} s follows {self.times_s[i - 1]:g} s"
                )
            areas.append(areas[-1] + seconds * self.values[i - 1])
        object.__setattr__(self, "_areas", tuple(areas))

    @staticmethod
    def constant(value: float) -> "Series":
        return Series((0.0,), (value,))

    @staticmethod
    def of(points: Iterable[Sequence[float]]) -> "Series":
        """From (time in seconds, value), in any order; of two at one time the later of `points` holds."""
        ordered = sorted({float(time_s): float(value) for time_s, value in points}.items())
        return Series(tuple(time_s for time_s, _ in ordered), tuple(value for _, value in ordered))

    def at(self, time_s: float) -> float:
        return self.values[max(0, bisect_right(self.times_s, time_s) - 1)]

    def integral(self, begin_s: float, end_s: float) -> float:
        """Value times seconds from `begin_s` to `end_s`."""
        return self._area(end_s) - self._area(begin_s)

    def mean(self, begin_s: float, end_s: float) -> float:
        """Over the time from `begin_s` to `end_s`; of an instant, what it is then."""
        if end_s == begin_s:
            return self.at(begin_s)
        return self.integral(begin_s, end_s) / (end_s - begin_s)

    def _area(self, time_s: float) -> float:
        i = max(0, bisect_right(self.times_s, time_s) - 1)
        return self._areas[i] + (time_s - self.times_s[i]) * self.values[i]


@dataclass(frozen=True)
class Price:
    """What a client costs: money per kWh that it draws, or per hour that it is on, as rented machines do."""

    series: Series
    per: PricePer = "kwh"


@dataclass(frozen=True)
class Footprint:
    """Sums over any clients and times: `training_s` of the seconds in which machines were on, `on_s`."""

    on_s: float = 0.0
    training_s: float = 0.0
    kwh: float = 0.0
    grams: float = 0.0
    money: float = 0.0

    def __add__(self, other: "Footprint") -> "Footprint":
        return Footprint(
            self.on_s + other.on_s,
            self.training_s + other.training_s,
            self.kwh + other.kwh,
            self.grams + other.grams,
            self.money + other.money,
        )

    def grams_per_million_tokens(self, tokens: int) -> float | None:
        """None without tokens."""
        return 1e6 * self.grams / tokens if tokens else None


def footprint(
    begin_s: float,
    end_s: float,
    *,
    watts: float,
    training: bool,
    carbon: Series | None = None,
    price: Price | None = None,
) -> Footprint:
    """Of a machine that is on from `begin_s` to `end_s` and draws `watts`, its building's share included.

    `watts`: by `PowerModel.watts`, or as measured (then times PUE). `carbon` in g/kWh; without it or `price`,
    there are no grams and no money.
    """
    seconds = max(0.0, end_s - begin_s)
    if not seconds:
        return Footprint()
    kwh = watts * seconds / _KWH_J
    grams = 0.0 if carbon is None else kwh * carbon.mean(begin_s, end_s)
    money = 0.0
    if price is not None:
        amount = kwh if price.per == "kwh" else seconds / _HOUR_S
        money = amount * price.series.mean(begin_s, end_s)
    return Footprint(seconds, seconds if training else 0.0, kwh, grams, money)


def footprint_of_work(
    on: Iterable[tuple[float, float]],
    training: Iterable[tuple[float, float]],
    power: PowerModel,
    *,
    carbon: Series | None = None,
    price: Price | None = None,
) -> Footprint:
    """Of a machine that is on in the spans `on` (begin, end; seconds) and trains in the spans `training`.

    Neither overlap among themselves. What it trains outside `on` is not counted: a machine that is off draws
    nothing.
    """
    on, total = sorted(on), Footprint()
    busy = list(overlaps(on, sorted(training)))
    for spans, is_training in ((list(_gaps(on, busy)), False), (busy, True)):
        watts = power.watts(training=is_training)
        for begin_s, end_s in spans:
            total += footprint(
                begin_s, end_s, watts=watts, training=is_training, carbon=carbon, price=price
            )
    return total


def overlaps(
    some: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]
) -> Iterator[tuple[float, float]]:
    """Where spans of `some` and of `others` are at once; both ascend and don't overlap among themselves."""
    i = j = 0
    while i < len(some) and j < len(others):
        begin_s, end_s = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if end_s > begin_s:
            yield begin_s, end_s
        if some[i][1] <= others[j][1]:
            i += 1
        else:
            j += 1


def _gaps(
    spans: Sequence[tuple[float, float]], parts: Sequence[tuple[float, float]]
) -> Iterator[tuple[float, float]]:
    """What `parts`, each inside a span, leave of `spans`."""
    left = iter([*parts, (math.inf, math.inf)])
    part = next(left)
    for begin_s, end_s in spans:
        while part[0] < end_s:
            yield begin_s, part[0]
            begin_s, part = part[1], next(left)
        yield begin_s, end_s
