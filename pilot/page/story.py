"""One run as the page tells it: its events, read and cleaned, with what follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilot.errors import PilotError
from pilot.page.measures import Measures, measure
from pilot.page.timeline import Timeline, timeline
from pilot.run.events import EVENTS_FILE, read_events
from pilot.run.facts import RunFacts, read_facts
from pilot.wire.jsonable import jsonable


class NoStory(PilotError):
    """There is no run here, or nothing is known of it."""


@dataclass(frozen=True)
class Story:
    """A run: `events` oldest first, without credentials."""

    name: str
    directory: Path
    events: Sequence[dict[str, Any]]
    timeline: Timeline
    measures: Measures
    facts: RunFacts

    @property
    def state(self) -> str:
        if self.measures.finished:
            return "finished"
        return "running" if self.facts.alive else "not finished"


def read_story(directory: Path) -> Story:
    """The run of a directory. Raises NoStory if there is none, or nothing has happened in it yet."""
    if not directory.is_dir():
        raise NoStory(f"there is no run in {directory}: name a run, or its directory")
    if not (directory / EVENTS_FILE).exists():
        raise NoStory(f"{directory} is not the directory of a run: it has no {EVENTS_FILE}")
    try:
        events = [jsonable(event) for event in read_events(directory / EVENTS_FILE)]
    except OSError as error:
        raise NoStory(f"cannot read {directory / EVENTS_FILE}: {error.strerror}") from error
    events = [event for event in events if _is_event(event)]
    if not events:
        raise NoStory(f"{directory / EVENTS_FILE} holds no events yet")
    try:
        lanes = timeline(events)
        measures = measure(events, lanes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NoStory(
            f"{directory / EVENTS_FILE} holds an event that no version of pilot writes "
            f"({type(error).__name__}: {error})"
        ) from error
    named = next((e["run"] for e in events if isinstance(e.get("run"), str)), directory.name)
    return Story(named, directory, events, lanes, measures, read_facts(directory))


def _is_event(event: dict[str, Any]) -> bool:
    when = event.get("time")
    return isinstance(event.get("event"), str) and type(when) in (int, float)
