"""What the events of a run say of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pilot.page.measures import Measures, measure
from pilot.page.timeline import Timeline, timeline

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Past:
    """What the events say."""

    events: Sequence[Event]
    lanes: Timeline
    measures: Measures

    @staticmethod
    def of(events: Sequence[Event]) -> "Past | None":
        if not events:
            return None
        lanes = timeline(events)
        return Past(events, lanes, measure(events, lanes))

    def last(self, *kinds: str) -> Event:
        return next((e for e in reversed(self.events) if e.get("event") in kinds), {})
