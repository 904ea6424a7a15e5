"""A scenario: sites with their machines, windows, power and prices, and the policies that are to be compared.

It is a TOML file (`configs/rehearsals/` has examples):

    about = "one sentence"
    hours = 168.0                  # how long is rehearsed at most
    day = 172                      # of the year on which it begins, at midnight UTC
    shard-rows = 25000
    series = {…}                   # name → what is drawn or read, see `_SERIES`
    [run-config]                   # as for `pilot run`
    [site]                         # what all sites have, unless they say otherwise
    [sites.NAME]                   # tokens-per-s, idle-w, training-w, pue, carbon, price, price-per, up, …
    [policies.NAME]                # sites = [names]; follow = "carbon", start-below, stop-above, least-s

`carbon` and `price` name a series, or are a number. `up` says when a site's machine is there: "always", or
{weibull = {…}}, {solar = {…}}, {maintenance = {…}} with the arguments of `draw.py`. Under a policy that follows
`carbon` or `price`, a site is up only while it is so, too.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pilot.config import Scalar
from pilot.errors import PilotError
from pilot.rehearse import draw, signals
from pilot.rehearse.machine import Machine
from pilot.rehearse.run import RESTART_S
from pilot.rehearse.trace import REDIS, SERVER, Happening, TraceError
from pilot.rules.energy import PowerModel, Price, Series, overlaps
from pilot.rules.thresholds import Thresholds

_HOUR_S = 3600.0
NOTICE_S = 60.0  # how long before it is drained a client of a policy hears of it
_MACHINE = {f.name.replace("_", "-"): f.name for f in fields(Machine) if f.name != "name"}
_SITE_KEYS = {"idle-w", "training-w", "pue", "carbon", "price", "price-per", "up", *_MACHINE}


class ScenarioError(PilotError):
    """A scenario that can't be rehearsed; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Site:
    """A client of a scenario: its machine, what that draws and costs, and what happens to it by itself."""

    machine: Machine
    power: PowerModel = field(default_factory=lambda: PowerModel(0.0, 0.0))
    carbon: Series | None = None
    price: Price | None = None
    trace: tuple[Happening, ...] = ()


@dataclass(frozen=True)
class Policy:
    """Which sites train (empty: all), and by which series each of them starts and stops ("": by none)."""

    sites: tuple[str, ...] = ()
    follow: str = ""
    start_below: float = 0.0
    stop_above: float = 0.0
    least_s: float = 600.0


@dataclass(frozen=True)
class Scenario:
    """What is rehearsed; `trace` is what happens to the server and Redis, and to sites besides their own."""

    name: str
    about: str
    hours: float
    sites: dict[str, Site]
    run_config: dict[str, Scalar] = field(default_factory=dict)
    policies: dict[str, Policy] = field(default_factory=lambda: {"": Policy()})
    shard_rows: int = 25_000
    trace: tuple[Happening, ...] = ()
    restart_s: float = RESTART_S  # of a server that was killed

    def under(self, policy: Policy) -> tuple[list[Site], list[Happening]]:
        """The sites that take part under `policy`, and all that happens, by time."""
        names = policy.sites or tuple(self.sites)
        sites = [self.sites[name] for name in names]
        trace = [one for one in self.trace if one.client in names or one.client not in self.sites]
        for site in sites:
            trace += self._of_site(site, policy)
        return sites, sorted(trace)

    def with_trace(self, trace: Sequence[Happening]) -> "Scenario":
        """The same sites, to which only this happens. Raises ScenarioError for a client that is none."""
        if unknown := {one.client for one in trace} - {*self.sites, SERVER, REDIS}:
            raise ScenarioError(
                f"the trace names {min(unknown)}, which is no site of {self.name}: {', '.join(self.sites)} are"
            )
        sites = {
            name: replace(site, trace=tuple(one for one in trace if one.client == name))
            for name, site in self.sites.items()
        }
        others = tuple(one for one in trace if one.client not in sites)
        return replace(self, sites=sites, trace=others)

    def _of_site(self, site: Site, policy: Policy) -> Sequence[Happening]:
        name = site.machine.name
        if not policy.follow:
            return site.trace
        price = None if site.price is None else site.price.series
        series = site.carbon if policy.follow == "carbon" else price
        if series is None:
            raise ScenarioError(
                f"a policy follows {policy.follow}, and site {name} has none: give it one"
            )
        thresholds = Thresholds(
            start=policy.start_below, drain=policy.stop_above, hold_s=0.0, min_on_s=policy.least_s
        )
        wanted = signals.windows(series, thresholds, hours=self.hours)
        there = _up_spans(site.trace, self.hours)
        others = [one for one in site.trace if one.event not in ("up", "down", "notice")]
        # nobody is drained because the rehearsal ends
        spans = [
            (first_h, end_h if end_h < self.hours else self.hours + 1.0)
            for first_h, end_h in overlaps(there, wanted)
        ]
        return [*others, *draw.windows(name, spans, notice_s=NOTICE_S)]


def _up_spans(trace: Sequence[Happening], hours: float) -> list[tuple[float, float]]:
    """When a machine is up by its trace, in hours."""
    spans, since_h = [], None
    for one in trace:
        at_h = one.time_s / _HOUR_S
        if one.event == "up" and since_h is None:
            since_h = at_h
        elif one.event == "down" and since_h is not None:
            spans.append((since_h, at_h))
            since_h = None
    if since_h is not None and since_h < hours:
        spans.append((since_h, hours))
    return spans


def of_trace(name: str, trace: Sequence[Happening], *, tokens_per_s: float) -> Scenario:
    """Sites that are alike, to which `trace` happens, until an hour after its last line."""
    names = sorted({one.client for one in trace} - {SERVER, REDIS})
    if not any(one.event == "up" for one in trace):
        raise ScenarioError(f"nobody is ever up in the trace {name}: nothing can be rehearsed")
    sites = {one: Site(Machine(name=one, tokens_per_s=tokens_per_s)) for one in names}
    hours = trace[-1].time_s / _HOUR_S + 1.0
    return Scenario(name, "", hours, sites).with_trace(trace)


# -- from a file -------------------------------------------------------------------------------------


def read_scenario(path: Path, *, seed: int = 0) -> Scenario:
    """Raises ScenarioError with one sentence for a file that is none."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(f"cannot read the scenario {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScenarioError(f"the scenario {path} is not TOML: {error}") from error
    try:
        return _scenario(path, table, seed)
    except TraceError:
        raise
    except (ScenarioError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ScenarioError(f"scenario {path}: {what}") from error


def _scenario(path: Path, table: Mapping[str, Any], seed: int) -> Scenario:
    known = {
        "about",
        "hours",
        "day",
        "shard-rows",
        "series",
        "run-config",
        "site",
        "sites",
        "policies",
    }
    _check_keys("", table, known)
    hours = float(table["hours"])
    if not 0 < hours <= 24 * 366:
        raise ScenarioError(f"hours is {hours:g}: rehearse more than none and at most a year")
    day = table.get("day", 172)
    series = {
        name: _series(path, name, spec, hours, day, seed)
        for name, spec in table.get("series", {}).items()
    }
    if not table.get("sites"):
        raise ScenarioError("it has no [sites.NAME]")
    sites = {
        name: _site(name, {**table.get("site", {}), **own}, series, hours, seed)
        for name, own in table["sites"].items()
    }
    policies = {name: _policy(name, p, sites) for name, p in table.get("policies", {}).items()}
    return Scenario(
        path.stem,
        table.get("about", ""),
        hours,
        sites,
        table.get("run-config", {}),
        policies or {"": Policy()},
        int(table.get("shard-rows", 25_000)),
    )


def _check_keys(where: str, table: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(table) - known):
        place = f"{where} has" if where else "it has"
        raise ScenarioError(
            f"{place} {', '.join(unknown)}, which nothing reads: {', '.join(sorted(known))} are read"
        )


def _site(
    name: str, own: Mapping[str, Any], series: Mapping[str, Series], hours: float, seed: int
) -> Site:
    _check_keys(f"site {name}", own, _SITE_KEYS)
    machine = Machine(name=name, **{_MACHINE[key]: own[key] for key in own if key in _MACHINE})
    power = PowerModel(own.get("idle-w", 0.0), own.get("training-w", 0.0), own.get("pue", 1.0))
    price = _named(series, own.get("price"))
    return Site(
        machine,
        power,
        _named(series, own.get("carbon")),
        None if price is None else Price(price, own.get("price-per", "kwh")),
        tuple(_up(name, own.get("up", "always"), hours, seed)),
    )


def _named(series: Mapping[str, Series], value: str | float | None) -> Series | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value not in series:
            raise ScenarioError(f"there is no series {value}: {', '.join(series) or 'none'} are")
        return series[value]
    return Series.constant(float(value))


def _up(name: str, spec: Any, hours: float, seed: int) -> list[Happening]:
    if spec == "always":
        return [Happening(0.0, name, "up")]
    [(kind, given)] = spec.items()
    values = {key.replace("-", "_"): value for key, value in given.items()}
    if kind == "weibull":
        return draw.weibull([name], hours=hours, seed=f"{seed} {name}", **values)
    if kind == "maintenance":
        return draw.maintenance(name, hours=hours, **values)
    if kind == "solar":
        notice_s = values.pop("notice_s", NOTICE_S)
        return draw.windows(name, draw.solar(hours / 24, **values), notice_s=notice_s)
    raise ScenarioError(f"up is {kind!r}: always, weibull, maintenance or solar are known")


_SERIES: Mapping[str, Callable[..., Series]] = {
    "sun": signals.sun,
    "wind": signals.wind,
    "spot": signals.spot_price,
}


def _series(path: Path, name: str, spec: Any, hours: float, day: int, seed: int) -> Series:
    """A number; {file = "…"}; or {sun | wind | spot = {…}, base = …, covers = …} (`signals.less`)."""
    if isinstance(spec, (int, float)):
        return Series.constant(float(spec))
    given = dict(spec)
    if "file" in given:
        return signals.read_series(path.parent / given["file"])
    base, covers = given.pop("base", None), given.pop("covers", 1.0)
    [(kind, values)] = given.items()
    if kind not in _SERIES:
        raise ScenarioError(f"series {name} is of {kind}: file, {', '.join(_SERIES)} are known")
    arguments = {key.replace("-", "_"): value for key, value in values.items()}
    if kind == "sun":
        arguments.setdefault("day", day)
    drawn = _SERIES[kind](hours, seed=f"{seed} {name}", **arguments)
    return drawn if base is None else signals.less(drawn, base=base, covers=covers)


def _policy(name: str, values: Mapping[str, Any], sites: Mapping[str, Site]) -> Policy:
    known = {f.name.replace("_", "-"): f.name for f in fields(Policy)}
    _check_keys(f"policy {name}", values, set(known))
    policy = Policy(**{known[key]: value for key, value in values.items()} | {"sites": ()})
    chosen = tuple(values.get("sites", ()))
    if unknown := [one for one in chosen if one not in sites]:
        raise ScenarioError(f"policy {name} names {', '.join(unknown)}, which is no site")
    if policy.follow not in ("", "carbon", "price"):
        raise ScenarioError(
            f"policy {name} follows {policy.follow!r}: carbon or price can be followed"
        )
    if policy.start_below > policy.stop_above:
        raise ScenarioError(
            f"policy {name} starts below {policy.start_below:g} and stops above less"
        )
    return Policy(chosen, *(getattr(policy, f.name) for f in fields(Policy)[1:]))
