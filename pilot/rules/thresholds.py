"""When a client that follows a signal runs: what `pilot provision` does, and a rehearsal of it, too."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """A client is to run once its signal was at most `start` for `hold_s`, and to leave once it was above
    `drain` for `hold_s`; between the two it stays as it is. `rising`: the other way round, for surplus,
    where more is better. `min_window_s`: a window that is known to be shorter is not begun; `min_on_s`:
    no signal ends it sooner."""

    start: float
    drain: float
    rising: bool = False
    hold_s: float = 600.0
    min_window_s: float = 0.0
    min_on_s: float = 0.0

    def good(self, value: float) -> bool:
        return value >= self.start if self.rising else value <= self.start

    def bad(self, value: float) -> bool:
        return value < self.drain if self.rising else value > self.drain

    @property
    def range(self) -> tuple[float, float]:
        """(lowest, highest) value that lets a client stay."""
        return (self.drain, math.inf) if self.rising else (-math.inf, self.drain)

    def rank(self, value: float) -> float:
        """The smaller, the better: how far from `start`, relative to it."""
        distance = (value - self.start) / (abs(self.start) or 1.0)
        return -distance if self.rising else distance
