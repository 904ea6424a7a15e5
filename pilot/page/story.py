"""One run as the page tells it: its events, read and cleaned, with what follows from them."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pilot.errors import PilotError
from pilot.page.measures import Measures, Measuring
from pilot.page.timeline import Timeline, TimelineReader
from pilot.run.events import EVENTS_FILE, read_events
from pilot.run.facts import RunFacts, read_facts
from pilot.wire.jsonable import jsonable


class NoStory(PilotError):
    """There is no run here, or nothing is known of it."""


@dataclass(frozen=True)
class Story:
    """A run, without credentials."""

    name: str
    directory: Path
    timeline: Timeline
    measures: Measures
    facts: RunFacts

    @property
    def state(self) -> str:
        if self.measures.finished:
            return "finished"
        return "running" if self.facts.alive else "not finished"


def summary(story: Story) -> dict[str, Any]:
    """The figures of the page as JSON; durations in seconds, shares of 1, null where nothing is known."""
    found, lanes = story.measures, story.timeline
    last = found.points[-1] if found.points else None
    reasons = Counter(refusal.reason for refusal in lanes.refusals)
    return {
        "run": story.name,
        "state": story.state,
        "began": lanes.began,
        "seconds": lanes.end_s,
        "tokens": last.tokens if last else 0,
        "total_tokens": story.facts.total_tokens,
        "parameters": story.facts.parameters,
        "rounds": len(found.presences),
        "train_loss": last.train_loss if last else None,
        "val_bpb": next((p.bpb for p in reversed(found.points) if p.bpb is not None), None),
        "goodput": found.goodput,
        "training_share": found.training_share,
        "spent_s": found.spent,
        "bytes_down": sum(one.down for one in found.traffic) if found.traffic else None,
        "bytes_up": sum(one.up for one in found.traffic) if found.traffic else None,
        "replies": found.replies,
        "refused": dict(reasons.most_common()),
        "points": [asdict(point) for point in found.points],
        "clients": [
            asdict(client) | {"seconds_by_state": dict(lanes.seconds(client.client))}
            for client in found.clients
        ],
        "energy": {client: asdict(used) for client, used in found.energy.items()},
        "config": jsonable(story.facts.config),
        "versions": jsonable(story.facts.versions),
    }


class StoryReader:
    """Follows the events of the run in `directory`, oldest first; events are not kept."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.events = directory, 0
        self.starts = 0  # of a server
        self._name = directory.name
        self._named = False
        self._timeline, self._measuring = TimelineReader(), Measuring()

    def read(self, record: dict[str, Any]) -> None:
        """Take the next line of the file. Raises NoStory for an event that no version of pilot writes."""
        event = jsonable(record)
        if not (isinstance(event.get("event"), str) and type(event.get("time")) in (int, float)):
            return
        try:
            self._timeline.read(event)
            self._measuring.read(event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise NoStory(
                f"{self.directory / EVENTS_FILE} holds an event that no version of pilot writes "
                f"({type(error).__name__}: {error})"
            ) from error
        self.events += 1
        self.starts += event["event"] == "run_started"
        if not self._named and isinstance(event.get("run"), str):
            self._name, self._named = event["run"], True

    def story(self, facts: RunFacts) -> Story:
        """The run so far. Raises NoStory before the first event."""
        if not self.events:
            raise NoStory(f"{self.directory / EVENTS_FILE} holds no events yet")
        lanes = self._timeline.timeline()
        measures = self._measuring.measures(lanes)
        return Story(self._name, self.directory, lanes, measures, facts)


def read_story(directory: Path) -> Story:
    """The run of a directory. Raises NoStory if there is none, or nothing has happened in it yet."""
    if not directory.is_dir():
        raise NoStory(f"there is no run in {directory}: name a run, or its directory")
    if not (directory / EVENTS_FILE).exists():
        raise NoStory(f"{directory} is not the directory of a run: it has no {EVENTS_FILE}")
    reader = StoryReader(directory)
    try:
        for record in read_events(directory / EVENTS_FILE):
            reader.read(record)
    except OSError as error:
        raise NoStory(f"cannot read {directory / EVENTS_FILE}: {error.strerror}") from error
    return reader.story(read_facts(directory))
