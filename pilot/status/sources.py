"""Where a status comes from: the directory of a run on this machine, and Redis."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilot.coordination.link import URL_VARIABLE, CoordinatorError
from pilot.coordination.operator import Live, Operator
from pilot.errors import PilotError
from pilot.fleet.environment import read_environment
from pilot.fleet.places import Places
from pilot.launch.connection import base_directory
from pilot.redis_url import check_redis_url
from pilot.run.events import EVENTS_FILE, read_events
from pilot.run.facts import RunFacts, read_facts
from pilot.status.now import status
from pilot.status.value import Status
from pilot.wire.jsonable import jsonable


class NoRedis(PilotError):
    """No Redis is known here."""


def fleet_directory() -> Path:
    """What `pilot up` and `pilot join` leave on this machine."""
    return Places.of(None).fleet


def redis_url() -> str:
    """`PILOT_REDIS_URL` of the environment, else that of the fleet on this machine. Raises NoRedis
    without, PilotError if others may read the fleet's."""
    url, where = os.environ.get(URL_VARIABLE, ""), URL_VARIABLE
    if not url:
        path = Places.of(None).environment
        where, url = str(path), read_environment(path).get(URL_VARIABLE, "")
    if not url:
        raise NoRedis(
            f"no Redis is known here: set {URL_VARIABLE} to the run's Redis, or run this where `pilot up` runs"
        )
    check_redis_url(url, where)
    return url


def run_directory(run: str) -> Path:
    """The directory of a run that is named, or given by its path."""
    path, named = Path(run).expanduser(), base_directory() / "runs" / run
    if "/" in run or (path.is_dir() and not named.is_dir() and (path / EVENTS_FILE).exists()):
        return path.resolve()
    return named


@dataclass
class Source:
    """One run, looked at again and again: events are read only when there are new ones."""

    directory: Path
    operator: Operator | None = None
    why_no_redis: str = ""
    run: str = ""
    _size: int = -1
    _events: list[dict[str, Any]] = field(default_factory=list)
    _facts: RunFacts = field(default_factory=RunFacts)

    def look(self, now_s: float) -> Status:
        """The status now. Raises PilotError if neither source knows the run."""
        self._read()
        named = [e["run"] for e in self._events if isinstance(e.get("run"), str)]
        run = self.run or (named[0] if named else self.directory.name)
        live, unknown = self._live(run)
        if not self._events and not (live and live.known):
            raise PilotError(
                f"there is no run {run}, neither in {self.directory} nor in Redis"
                + (f" ({self.why_no_redis})" if self.why_no_redis else "")
                + ": `pilot runs` lists those that are known"
            )
        return status(run, self._events, self._facts, live, now_s=now_s, unknown=unknown)

    def _live(self, run: str) -> tuple[Live | None, list[str]]:
        unknown = []
        if not self._events:
            unknown.append(
                f"{self.directory} holds no events of it: history, merged rounds and times of refusals are on "
                "the server's machine"
            )
        live = None
        if self.operator is None:
            unknown.append(
                f"{self.why_no_redis or 'Redis was not asked'}: heartbeats, speeds and the time left of the "
                "round are not known"
            )
        else:
            try:
                live = self.operator.look(run)
            except PilotError as error:
                unknown.append(f"{error}: heartbeats, speeds and the time left are not known")
        return live, unknown

    def _read(self) -> None:
        path = self.directory / EVENTS_FILE
        try:
            size = path.stat().st_size
        except OSError:
            self._events, self._facts = [], RunFacts()
            return
        self._facts = read_facts(self.directory)
        if size != self._size:
            try:
                found = [jsonable(event) for event in read_events(path)]
            except OSError as error:
                raise PilotError(f"cannot read {path}: {error.strerror}") from error
            self._events = [e for e in found if isinstance(e.get("event"), str) and _is_time(e)]
            self._size = size


def _is_time(event: dict[str, Any]) -> bool:
    return type(event.get("time")) in (int, float)


def current_run(operator: Operator | None) -> str:
    """The run that is meant where none is named: the one that is led now, else the last on this machine.

    Raises PilotError where there are several, or none.
    """
    led: list[str] = []
    if operator is not None:
        with contextlib.suppress(CoordinatorError):  # a login that may not see all of them
            led = [run for run in operator.runs() if operator.look(run).leader]
    if len(led) > 1:
        raise PilotError(f"several runs are led now: name one of {', '.join(led)}")
    if led:
        return led[0]
    found = run_directories()
    if not found:
        raise PilotError(
            f"there is no run in {base_directory() / 'runs'}, and none is led in Redis"
        )
    return max(found, key=lambda path: (path / EVENTS_FILE).stat().st_mtime).name


def run_directories() -> list[Path]:
    """The directories of runs on this machine that hold events."""
    try:
        found = sorted((base_directory() / "runs").iterdir())
    except OSError:
        return []
    return [path for path in found if (path / EVENTS_FILE).is_file()]


def latest(directories: list[Path]) -> Path | None:
    """The one in which something happened last."""
    return max(directories, key=lambda path: (path / EVENTS_FILE).stat().st_mtime, default=None)
