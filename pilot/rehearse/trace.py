"""What happens to the machines of a rehearsal, and when, as a file.

A trace is a CSV of `time,client,event,seconds`, in seconds since the run began, with or without that head.

    of a client    up, down              its machine starts; is killed
                   notice                it is to leave within `seconds`
                   freeze, cut, slow     for `seconds`: stands still; has no Redis; its line is at a tenth
                   late                  its next reply takes `seconds` longer
                   crash                 its worker: what it does is lost
                   break                 it is killed at one of its next messages, and back after `seconds`
                   lie, stale, double    its next update is not finite; its next reply is to the order before;
                                         arrives twice
                   speed                 from now on it trains `seconds` tokens per second
    of "server"    kill                  it is back after `seconds`
                   crash                 the same, at one of its next writes to disk or messages
                   freeze, jump          it stands still for `seconds`; its wall clock is put that far
    of "redis"     away                  for `seconds`
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pilot.errors import PilotError

SERVER, REDIS = "server", "redis"
_OF_CLIENTS = (
    "up",
    "down",
    "notice",
    "freeze",
    "cut",
    "slow",
    "late",
    "crash",
    "break",
    "lie",
    "stale",
    "double",
    "speed",
)
_OF_OTHERS = {SERVER: ("kill", "crash", "freeze", "jump"), REDIS: ("away",)}
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
