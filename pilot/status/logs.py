"""What all parts of a fleet have written, as one stream: the files of `pilot up`, and what happened in a run.

A line of a fleet's file begins with its time (`2026-11-28 16:11:31,123 | …`); one without belongs to the line
before it. Of events those have a line that the server has written to its log.
"""

import datetime
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pilot.run.events import EVENTS_FILE
from pilot.status.tail import Growing
from pilot.wire.jsonable import redact
from pilot.wire.messages import plain

_STAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d{1,6}))?\S*(?: \| | )?(.*)", re.DOTALL
)
_MAX_CHARS = 4000  # of a line


@dataclass(frozen=True)
class Line:
    """What `source` wrote at the Unix time `at_s`; `client`: whom it is about, if anybody."""

    at_s: float
    source: str
    text: str
    client: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "time": self.at_s,
            "from": self.source,
            "client": self.client or None,
            "line": self.text,
        }


@dataclass
class LogFile:
    """One file of the fleet, or the events of a run."""

    path: Path
    source: str
    _before: Line | None = None

    def parse(self, lines: Iterable[str]) -> list[Line]:
        """The lines with their times, those without a time at that of the line before."""
        events = self.path.name == EVENTS_FILE
        found = []
        for text in lines:
            line = self._event(text) if events else self._line(text)
            if line is not None:
                found.append(line)
        return found

    def _event(self, text: str) -> Line | None:
        try:
            event = json.loads(text)
            message, at_s = str(event["message"]), float(event["time"])
        except (ValueError, TypeError, KeyError):
            return None
        return Line(at_s, self.source, _safe(message), str(event.get("client") or ""))

    def _line(self, text: str) -> Line | None:
        found = _STAMP.match(text)
        if found is None:
            if self._before is None or not text.strip():
                return None
            return replace(self._before, text=_safe(text))
        day, time, fraction, rest = found.groups()
        try:  # in the local time of this machine, as logging writes it
            at = datetime.datetime.fromisoformat(f"{day} {time}").astimezone()
        except ValueError:
            return None
        at_s = at.timestamp() + float(f"0.{fraction or 0}")
        self._before = Line(at_s, self.source, _safe(rest), _client_of(self.source))
        return self._before


def log_files(fleet: Path, run: Path | None) -> list[LogFile]:
    """The files of the fleet in `fleet/logs`, and the events of a run."""
    found = [LogFile(path, path.stem) for path in sorted((fleet / "logs").glob("*.log"))]
    if run is not None and (run / EVENTS_FILE).is_file():
        found.append(LogFile(run / EVENTS_FILE, run.name))
    return found


def history(files: Sequence[tuple[LogFile, Growing]]) -> list[Line]:
    """What is in their last bytes, by time; of the same time in the order of the files."""
    return sorted((line for f, g in files for line in f.parse(g.last_lines())), key=_time)


def followed(files: Sequence[tuple[LogFile, Growing]]) -> Iterator[Line]:
    """What is new since the last call, by time."""
    yield from sorted((line for f, g in files for line in f.parse(g.new_lines())), key=_time)


def about(line: Line, client: str) -> bool:
    """Whether a line is of a client, or names it as a word."""
    if client in (line.client, line.source):
        return True
    return re.search(rf"(?<![\w.-]){re.escape(client)}(?![\w-])", line.text) is not None


def _time(line: Line) -> float:
    return line.at_s


def _client_of(source: str) -> str:
    """`pilot up` calls a client's file after it, with or without `node-` before its name."""
    return source.removeprefix("node-")


def _safe(text: str) -> str:
    return redact(plain(text.rstrip(), _MAX_CHARS))
