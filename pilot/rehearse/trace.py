"""What happens to the machines of a rehearsal, and when: read from a file, or drawn from a distribution.

A trace is a CSV of `time,client,event,seconds`, in seconds since the run began, with or without that head.
Events of a client: `up` and `down` (its machine starts; is killed), `notice` (it is to leave within `seconds`),
`freeze`, `cut` (without Redis) and `slow` (its line at a tenth) for `seconds`, `lie` (its next update is not
finite). Of `server`: `kill` (back after `seconds`), `crash` (the same, at one of its next writes to disk). Of
`redis`: `away` for `seconds`.
"""

import csv
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pilot.errors import PilotError

SERVER, REDIS = "server", "redis"
_OF_CLIENTS = ("up", "down", "notice", "freeze", "cut", "slow", "lie")
_OF_OTHERS = {SERVER: ("kill", "crash"), REDIS: ("away",)}
_HEAD = ["time", "client", "event", "seconds"]


class TraceError(PilotError):
    """A trace that can't be followed; the message names file and line."""


@dataclass(frozen=True, order=True)
class Happening:
    """At `time_s`, `event` happens to `client`, "server" or "redis", for `seconds` where it lasts."""

    time_s: float
    client: str
    event: str
    seconds: float = 0.0


def read_trace(path: Path) -> list[Happening]:
    """The happenings of a CSV file, by time. Raises TraceError, with one sentence."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        fields = [field.strip() for field in line]
        if not any(fields) or fields[0].startswith("#") or (number == 1 and fields == _HEAD):
            continue
        try:
            found.append(_happening(fields))
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: {error}") from error
    return sorted(found)


def write_trace(path: Path, happenings: Iterable[Happening]) -> None:
    """The inverse of `read_trace`."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_HEAD)
        for one in happenings:
            writer.writerow([f"{one.time_s:.3f}", one.client, one.event, f"{one.seconds:g}"])


def _happening(fields: Sequence[str]) -> Happening:
    if not 3 <= len(fields) <= 4:
        raise ValueError(f"needs time, client, event and perhaps seconds, not {len(fields)} fields")
    time_s, seconds = (
        _seconds(fields[0], "time"),
        _seconds(fields[3] if fields[3:] else "", "seconds"),
    )
    client, event = fields[1], fields[2]
    if not client:
        raise ValueError("names no client")
    known = _OF_OTHERS.get(client, _OF_CLIENTS)
    if event not in known:
        raise ValueError(f"{event!r} does not happen to {client}: one of {', '.join(known)} does")
    return Happening(time_s, client, event, seconds)


def _seconds(text: str, what: str) -> float:
    try:
        value = float(text or 0.0)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"its {what} is {text!r}, not a number of seconds")
    return value


# -- drawn -------------------------------------------------------------------------------------------


def weibull(
    clients: Sequence[str],
    *,
    hours: float,
    up_h: float,
    down_h: float,
    seed: int,
    shape: float = 1.0,
    notice_s: float = 0.0,
) -> list[Happening]:
    """Machines that come and go: Weibull up and down times with these means, in hours, and this shape.

    `shape` 1: exponential, as where losses know nothing of one another; below 1: many short ones, as spot
    capacity has them. `notice_s`: how long before its end a machine hears of it (0: never).
    """
    rng, scale = random.Random(seed), math.gamma(1 + 1 / shape)
    found = []
    for client in clients:
        # at a random moment of its life: it is up with the share of time that it is up
        up, at_h = rng.random() < up_h / (up_h + down_h), 0.0
        while at_h < hours:
            found.append((at_h, client, up))
            at_h += rng.weibullvariate((up_h if up else down_h) / scale, shape)
            up = not up
    return sorted(_ups_and_downs(found, notice_s))


def windows(
    client: str, times_h: Iterable[tuple[float, float]], *, notice_s: float = 0.0
) -> list[Happening]:
    """A machine that is up from `first` to `end`, in hours, of each of `times_h`."""
    spans = [
        (at_h, client, up) for pair in times_h for at_h, up in zip(pair, (True, False), strict=True)
    ]
    return sorted(_ups_and_downs(spans, notice_s))


def solar(days: float, *, noon_h: float = 12.0, hours: float = 8.0) -> list[tuple[float, float]]:
    """The windows in which the sun is high enough: `hours` around `noon_h` (UTC), each day."""
    return [
        (max(0.0, 24 * day + noon_h - hours / 2), 24 * day + noon_h + hours / 2)
        for day in range(math.ceil(days))
    ]


def _ups_and_downs(
    spans: Iterable[tuple[float, str, bool]], notice_s: float
) -> Iterator[Happening]:
    for at_h, client, up in spans:
        at_s = 3600 * at_h
        if not up and notice_s > 0 and at_s > notice_s:
            yield Happening(at_s - notice_s, client, "notice", notice_s)
        if up or at_s > 0:
            yield Happening(at_s, client, "up" if up else "down")


def faults(
    clients: Sequence[str], *, seconds: float, every_s: float, seed: int, server: bool = True
) -> list[Happening]:
    """Something goes wrong every `every_s` seconds in the mean: every kind of it, to anybody, for any time.

    What was killed comes back. At the end all are up.
    """
    rng = random.Random(seed)
    found = [Happening(rng.uniform(0, 5), client, "up") for client in clients]
    at_s = 0.0
    kinds = [
        "down",
        "notice",
        "freeze",
        "cut",
        "slow",
        "lie",
        "away",
        *(["kill", "crash"] if server else []),
    ]
    while (at_s := at_s + rng.expovariate(1 / every_s)) < seconds:
        kind, client, lasts_s = (
            rng.choice(kinds),
            rng.choice(list(clients)),
            rng.expovariate(1 / 20),
        )
        if kind in ("away", "kill", "crash"):
            found.append(Happening(at_s, REDIS if kind == "away" else SERVER, kind, lasts_s))
        elif kind in ("down", "notice"):
            found.append(Happening(at_s, client, kind, lasts_s))
            found.append(Happening(at_s + lasts_s + rng.uniform(0, 90), client, "up"))
        else:
            found.append(Happening(at_s, client, kind, lasts_s))
    found += [Happening(seconds, client, "up") for client in clients]
    return sorted(found)
