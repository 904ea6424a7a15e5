"""Signals of this machine (traces, files, calendars, its GPUs' power), and the options that all signals
share."""

import csv
import json
import math
import subprocess
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pilot.errors import ConfigError
from pilot.provision.readings import Reading, SignalAway, at_path, number, wall_s
from pilot.provision.tables import key
from pilot.provision.windows import Calendar, read_calendar

Fallback = Literal["keep", "start", "drain"]
FALLBACKS = ("keep", "start", "drain")
OPEN = "open"  # the unit of a calendar: 1 in a window, 0 outside
_SMI_S = 10.0
NVML_EVERY_S = 10.0
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class SignalOptions:
    """Of every signal. `scale` turns its values into `unit`; `max_age` seconds make a reading too old,
    and then `when_away` says what becomes of the clients that follow it."""

    kind: str
    unit: str = key("")
    scale: float = key(1.0)
    max_age: float = key(3600.0, above=0)
    when_away: str = key("keep", choices=FALLBACKS)


@dataclass(frozen=True, kw_only=True)
class TraceOptions(SignalOptions):
    """A CSV of times and values. `start`: the time in it that stands for the provisioner's first start
    (the column's own first time if the times are plain seconds; without it, dates are what they say).
    `speed`: seconds of it that pass in one of ours. `repeat`: it begins again at its end."""

    file: str
    column: str = key("")
    start: str = key("")
    speed: float = key(1.0, above=0)
    repeat: bool = key(False)


@dataclass(frozen=True, kw_only=True)
class FileOptions(SignalOptions):
    """A file that another program writes: JSON (then `path`, and `time-path` if it says when), or lines
    whose last is `value` or `time,value`."""

    file: str
    path: str = key("")
    time_path: str = key("")


@dataclass(frozen=True, kw_only=True)
class CalendarOptions(SignalOptions):
    """Windows of local time; 1 inside, 0 outside."""

    windows: tuple[str, ...]
    timezone: str = key("UTC")
    unit: str = key(OPEN, choices=(OPEN,))


@dataclass(frozen=True, kw_only=True)
class NvmlOptions(SignalOptions):
    """Watts that GPUs of this machine draw, by NVIDIA's own program; `gpus`: their numbers (all if none)."""

    gpus: tuple[str, ...] = key(())
    unit: str = key("W")


class Trace:
    """A step function of a file's times and values, from its first time on; the last value holds for
    `max_age`."""

    def __init__(self, options: TraceOptions, first_start_s: float, where: str) -> None:
        self._options = options
        times, self._values = _read_trace(Path(options.file), options.column, where)
        dated = times[0] >= _DATES_S
        self._times = times
        self._shift_s = 0.0
        if options.start or not dated or options.speed != 1.0 or options.repeat:
            anchor_s = _anchor_s(options.start, where) if options.start else times[0]
            self._anchor_s, self._begin_s = anchor_s, first_start_s
        else:
            self._anchor_s = self._begin_s = 0.0

    def _inner_s(self, now_s: float) -> float:
        """The trace's own time."""
        return self._anchor_s + (now_s - self._begin_s) * self._options.speed

    def _outer_s(self, time_s: float) -> float:
        return self._begin_s + (time_s - self._anchor_s) / self._options.speed

    @property
    def _length_s(self) -> float:
        """Of one turn: the last value lasts as long as the one before it."""
        times = self._times
        return times[-1] - times[0] + (times[-1] - times[-2] if len(times) > 1 else 1.0)

    def _place(self, now_s: float) -> tuple[int, float]:
        """(index of the value that holds, the trace's time at which its turn began). Raises SignalAway."""
        inner_s, begin_s = self._inner_s(now_s), self._times[0]
        if inner_s < begin_s:
            raise SignalAway("the trace has not begun")
        if self._options.repeat:
            begin_s += (inner_s - begin_s) // self._length_s * self._length_s
        return bisect_right(self._times, self._times[0] + inner_s - begin_s) - 1, begin_s

    def read(self, now_s: float) -> Reading:
        """A value that a later one follows is never old; after the last one the trace ages."""
        index, _ = self._place(now_s)
        last = index == len(self._times) - 1 and not self._options.repeat
        time_s = self._outer_s(self._times[-1]) if last else now_s
        return Reading(self._values[index] * self._options.scale, self._options.unit, time_s)

    def holds_until_s(self, now_s: float, low: float, high: float) -> float | None:
        index, begin_s = self._place(now_s)
        turns = 2 if self._options.repeat else 1
        for later in range(index + 1, turns * len(self._times)):
            turn, place = divmod(later, len(self._times))
            if not low <= self._values[place] * self._options.scale <= high:
                time_s = begin_s + turn * self._length_s + self._times[place] - self._times[0]
                return self._outer_s(time_s)
        return math.inf if self._options.repeat else None


_DATES_S = 1e8  # times of a trace above this are dates, below it seconds since its begin


def _anchor_s(text: str, where: str) -> float:
    try:
        return wall_s(text)
    except SignalAway:
        raise ConfigError(f'{where}: start is "{text}", neither a date nor seconds') from None


def _read_trace(path: Path, column: str, where: str) -> tuple[list[float], list[float]]:
    """Times (seconds) and values of a CSV file, with or without a head. Raises ConfigError."""
    lines = [line for line in csv.reader(_text(path, where).splitlines()) if any(line)]
    lines = [line for line in lines if not line[0].lstrip().startswith("#")]
    head = [name.strip() for name in lines[0]] if lines else []
    place = 1
    try:
        wall_s(head[0] if head else None)
    except SignalAway:
        lines = lines[1:]
        if column and column not in head:
            raise ConfigError(
                f'{where}: {path} has no column "{column}", only {", ".join(head)}'
            ) from None
        place = head.index(column) if column else 1
    else:
        if column:
            raise ConfigError(f'{where}: {path} has no head that names the column "{column}"')
    times: list[float] = []
    values: list[float] = []
    for number_of, line in enumerate(lines, start=1):
        try:
            time_s, value = wall_s(line[0]), number(line[place])
        except (SignalAway, IndexError) as error:
            raise ConfigError(f"{where}: {path}, row {number_of}: {error}") from error
        if times and time_s <= times[-1]:
            raise ConfigError(f"{where}: {path}, row {number_of}: its time is not after the last")
        times.append(time_s)
        values.append(value)
    if not times:
        raise ConfigError(f"{where}: {path} has no rows of time,value")
    return times, values


def _text(path: Path, where: str) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{where}: {path} has more than {_MOST_BYTES >> 20} MB")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"{where}: cannot read {path}: {why}") from error


@dataclass
class WatchedFile:
    """A file whose content changes; without a time in it, its own time is that of the reading."""

    options: FileOptions

    def read(self, now_s: float) -> Reading:
        path = Path(self.options.file)
        try:
            text, time_s = _text(path, "signal"), path.stat().st_mtime
        except (ConfigError, OSError) as error:
            raise SignalAway(f"cannot read {path}") from error
        if self.options.path:
            try:
                document = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise SignalAway(f"{path} is not JSON") from error
            value = number(at_path(document, self.options.path))
            if self.options.time_path:
                time_s = wall_s(at_path(document, self.options.time_path))
        else:
            value, time_s = self._last_line(text, time_s)
        return Reading(value * self.options.scale, self.options.unit, time_s)

    @staticmethod
    def _last_line(text: str, time_s: float) -> tuple[float, float]:
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise SignalAway("the file is empty")
        fields = [field.strip() for field in lines[-1].split(",")]
        if len(fields) > 1:
            time_s = wall_s(fields[0])
        return number(fields[-1]), time_s

    def holds_until_s(self, now_s: float, low: float, high: float) -> float | None:
        return None


@dataclass
class CalendarSource:
    """1 while a window is open, else 0."""

    calendar: Calendar

    def read(self, now_s: float) -> Reading:
        is_open = self.calendar.open_until_s(now_s) is not None
        return Reading(1.0 if is_open else 0.0, OPEN, now_s)

    def holds_until_s(self, now_s: float, low: float, high: float) -> float | None:
        until_s = self.calendar.open_until_s(now_s)
        if until_s is None:
            until_s = self.calendar.opens_s(now_s)
        value = self.read(now_s).value
        other = 1.0 - value
        return until_s if not low <= other <= high and until_s is not None else math.inf


def calendar_source(options: CalendarOptions, where: str) -> CalendarSource:
    return CalendarSource(read_calendar(options.windows, options.timezone, where))


def _smi(command: Sequence[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=_SMI_S, check=True
    ).stdout


@dataclass
class Nvml:
    """The GPUs' power as NVML measures it, read through `nvidia-smi`, which comes with the driver."""

    options: NvmlOptions
    run: Callable[[Sequence[str]], str] = field(default=_smi)

    def read(self, now_s: float) -> Reading:
        command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        if self.options.gpus:
            command.append(f"--id={','.join(self.options.gpus)}")
        try:
            lines = self.run(command).split()
        except (OSError, subprocess.SubprocessError) as error:
            raise SignalAway("nvidia-smi cannot be asked for the GPUs' power") from error
        if not lines:
            raise SignalAway("nvidia-smi names no GPU")
        watts = sum(number(line) for line in lines)  # "[N/A]" is no number
        return Reading(watts * self.options.scale, self.options.unit, now_s)

    def holds_until_s(self, now_s: float, low: float, high: float) -> float | None:
        return None
