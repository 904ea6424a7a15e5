"""One reading of a signal: a value, its unit, and when it held. And how such readings are written
elsewhere."""

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from pilot.errors import PilotError

LB_PER_MWH = 0.45359237  # g/kWh: a pound has 453.59237 g, a MWh 1,000 kWh


class SignalAway(PilotError):
    """A signal has no reading now; the message is a clause that says why."""


@dataclass(frozen=True)
class Reading:
    """`time_s`: when the value held, in seconds of the wall clock."""

    value: float
    unit: str
    time_s: float

    def age_s(self, now_s: float) -> float:
        return max(0.0, now_s - self.time_s)

    def __str__(self) -> str:
        return f"{self.value:.4g} {self.unit}".rstrip()


class Source(Protocol):
    """Where readings come from. Times are seconds of the wall clock."""

    def read(self, now_s: float) -> Reading:
        """The reading that holds now. Raises SignalAway."""

    def holds_until_s(self, now_s: float, low: float, high: float) -> float | None:
        """When the value will next leave [low, high]: `inf` if never, None if the future is not known."""


def number(value: object) -> float:
    """A finite number, also one in a string, as AWS writes prices. Raises SignalAway."""
    try:
        if isinstance(value, bool) or value is None:
            raise ValueError
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise SignalAway(f"{str(value)[:60]!r} is no number") from None
    if not math.isfinite(found):
        raise SignalAway(f"{found} is no finite number")
    return found


def wall_s(value: object) -> float:
    """A time as ISO 8601 (UTC unless it says otherwise) or as seconds since 1970. Raises SignalAway."""
    if isinstance(value, str):
        try:
            time = datetime.fromisoformat(value.strip())
        except ValueError:
            pass
        else:
            return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    return number(value)


def at_path(document: Any, path: str) -> Any:
    """What stands at `path`, such as `grid_signals.mci`, `data[0].value`. Raises SignalAway."""
    found = document
    for word in re.findall(r"[^.\[\]]+", path):
        try:
            found = found[int(word)] if isinstance(found, list) else found[word]
        except (KeyError, IndexError, TypeError, ValueError):
            raise SignalAway(f"the answer has nothing at {path}") from None
    return found
