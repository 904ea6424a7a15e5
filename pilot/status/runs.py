"""The runs that this machine and its Redis know, a line each."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pilot.coordination.operator import Live
from pilot.run.events import EVENTS_FILE
from pilot.run.facts import RunFacts, read_facts
from pilot.status.tail import last_events

FINAL_MODEL = "final_model.pt"


@dataclass(frozen=True)
class RunLine:
    """A run. `state` as in `Status`; `last_s`: since it was last heard of; `where`: here, Redis, or both."""

    run: str
    state: str
    round_number: int | None
    tokens: int | None
    total_tokens: int | None
    last_s: float | None
    where: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Here:
    """What the directory of a run says, without reading all of its events."""

    finished: bool
    facts: RunFacts
    last: Mapping[str, Any]  # of its events
    stopping: bool
    commit: Mapping[str, Any]


def run_lines(
    directories: list[Path], live: Mapping[str, Live], now: Callable[[], float]
) -> list[RunLine]:
    """All runs, the one that was heard last first."""
    here = {path.name: _here(path, now) for path in directories}
    names = sorted(here.keys() | live.keys())
    lines = [_line(name, here.get(name), live.get(name), now()) for name in names]
    return sorted(lines, key=lambda line: float("inf") if line.last_s is None else line.last_s)


def _here(directory: Path, now: Callable[[], float]) -> _Here:
    events = last_events(directory / EVENTS_FILE)
    commits = [one for one in events if one.get("event") == "round_committed"]
    started = [i for i, one in enumerate(events) if one.get("event") == "run_started"]
    since = events[started[-1] :] if started else events
    return _Here(
        (directory / FINAL_MODEL).exists() or any(e.get("event") == "run_finished" for e in events),
        read_facts(directory, now),
        events[-1] if events else {},
        any(one.get("event") == "run_stopping" for one in since),
        commits[-1] if commits else {},
    )


def _line(run: str, here: _Here | None, live: Live | None, now_s: float) -> RunLine:
    commit = here.commit if here else {}
    said = live.progress if live else {}
    number = live.round_number if live and live.round_number else commit.get("round_number")
    last = here.last.get("time") if here else None
    last_s = max(0.0, now_s - last) if isinstance(last, int | float) else None
    if live and live.leader:
        last_s = 0.0  # its lock is renewed every second
    where = " and ".join([w for w, there in (("here", here), ("Redis", live)) if there])
    tokens = said.get("tokens", commit.get("total_tokens"))
    total = said.get("total_tokens") or (here.facts.total_tokens if here else None)
    return RunLine(run, _state(here, live), number, tokens, total, last_s, where)


def _state(here: _Here | None, live: Live | None) -> str:
    if (here and here.finished) or (live and live.state == "finished"):
        return "finished"
    if live and live.leader:
        return "stopping" if live.stop else "running"
    if live and live.state == "interrupted":
        return "stopped"
    if here and here.facts.alive:
        return "running"
    return "stopped" if here and here.stopping else "lost"
