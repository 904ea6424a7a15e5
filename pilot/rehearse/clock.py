"""Time that passes only while the round loop sleeps, and what happens meanwhile."""

import heapq
import itertools
from collections.abc import Callable

Action = Callable[[], None]


class VirtualClock:
    """A `Clock` with an agenda.

    Where nothing happens the loop sleeps longer than it meant to: as long as nothing has happened already, up
    to `leap_s`. So what follows from a silence of some seconds is seen after little more than those.
    An action may raise: `sleep` then ends at its moment, with the rest of the agenda unchanged.
    """

    def __init__(self, leap_s: float = 0.0) -> None:
        self._now_s, self._leap_s, self._last_s = 0.0, leap_s, 0.0
        self._agenda: list[tuple[float, int, Action]] = []
        self._order = itertools.count()  # of actions at one moment: as they were planned

    def now_s(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass, or more if nothing is to happen in them."""
        until_s = self._now_s + seconds
        next_s = self._agenda[0][0] if self._agenda else float("inf")
        if next_s > until_s:
            leap_s = min(self._leap_s, self._now_s - self._last_s)
            until_s = max(until_s, min(next_s, self._now_s + leap_s))
        self.advance(until_s)

    def advance(self, until_s: float) -> None:
        """Let time pass until exactly `until_s`."""
        while self._agenda and self._agenda[0][0] <= until_s:
            due_s, _, action = heapq.heappop(self._agenda)
            self._now_s = self._last_s = max(self._now_s, due_s)
            action()
        self._now_s = max(self._now_s, until_s)

    def at(self, due_s: float, action: Action) -> None:
        """Plan `action`; what lies in the past happens at the next moment."""
        heapq.heappush(self._agenda, (due_s, next(self._order), action))

    def notice(self, due_s: float) -> None:
        """Nothing happens then, but the loop is to look."""
        self.at(due_s, lambda: None)

    def after(self, seconds: float, action: Action) -> None:
        self.at(self._now_s + seconds, action)
