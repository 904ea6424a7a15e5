"""All signals as they were last read; that one is away, or back, is said once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pilot.provision.readings import Reading, SignalAway, Source
from pilot.provision.signals import SignalOptions


@dataclass
class Board:
    """`tell(signal, state, why)`: the state is "away", "old" or "back"."""

    sources: Mapping[str, Source]
    options: Mapping[str, SignalOptions]
    tell: Callable[[str, str, str], None]
    readings: dict[str, Reading] = field(default_factory=dict)  # also those that are too old
    trouble: dict[str, str] = field(default_factory=dict)  # signal → why it does not count now

    def read(self, now_s: float) -> None:
        for name, source in self.sources.items():
            state, why = "", ""
            try:
                self.readings[name] = reading = source.read(now_s)
                if (age_s := reading.age_s(now_s)) > self.options[name].max_age:
                    state, why = "old", f"its last reading, {reading}, is {age_s:.0f} s old"
            except SignalAway as error:
                state, why = "away", str(error)
            self._note(name, state, why)

    def _note(self, name: str, state: str, why: str) -> None:
        was = name in self.trouble
        if state:
            self.trouble[name] = why
            if not was:
                self.tell(name, state, f"{why}; its clients: {self.options[name].when_away}")
        elif was:
            del self.trouble[name]
            self.tell(name, "back", str(self.readings[name]))

    def current(self, name: str) -> Reading | None:
        """The reading that may decide; None while the signal is away or old."""
        return None if name in self.trouble else self.readings.get(name)

    def last(self, name: str) -> float | None:
        """The last value, however old: what accounts go by."""
        reading = self.readings.get(name)
        return None if reading is None else reading.value
