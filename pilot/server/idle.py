"""Where the time goes: in training, or in spans in which no client trains, one event per span, with its cause.

A federation's throughput is lost in those and nowhere else. `benchmarks.idle` adds the events up; what was
spent from commit to commit is part of a round's account (`time_books.py`). A file that is touched while the
server lives tells the next start how long there was none.
"""

import contextlib
import os
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from pilot.rules.rounds import Clock
from pilot.server.report import Report

_ALIVE_FILE = "server-alive"
_TOUCH_EVERY_S = 1.0


class Cause(StrEnum):
    """What a client that could train waits for; the word that events show."""

    SERVER_AWAY = "server-away"  # no server ran
    NO_CLIENT = "no-client"  # fewer than needed are there
    HELLO = "hello"  # a node has not said yet what it is
    MISSING_CLIENT = "missing-client"  # one that was there may come back
    DISPATCH = "dispatch"  # orders are being sent
    START = "start"  # orders are out and nobody has begun
    EVALUATION = "evaluation"  # the clients score the last merge
    PACKING = "packing"  # rows of the next step
    SILENCE = "silence"  # all that owe a reply are silent
    REPLIES = "replies"  # the round is over, and replies are to come
    MERGE = "merge"  # outer step
    SNAPSHOT = "snapshot"  # what is merged goes to disk


TRAINING = "training"  # a client trains, or may: the rest of the time


def gathering(there: int, wanted: int, *, asked: bool) -> Cause:
    """What keeps a round from opening with `there` clients; `asked`: a node has yet to say what it is."""
    if asked:
        return Cause.HELLO
    return Cause.NO_CLIENT if there < wanted else Cause.MISSING_CLIENT


class IdleTime:
    """Follows one server. `because` is called whenever the cause may have changed, and at least each second."""

    def __init__(
        self,
        report: Report,
        clock: Clock,
        run_dir: Path,
        *,
        wall_clock: Callable[[], float] = time.time,  # of the files, which outlive a process
    ) -> None:
        self._report, self._clock, self._wall_clock = report, clock, wall_clock
        self._alive = run_dir / _ALIVE_FILE
        self._cause: Cause | None = None
        self._since_s = self._counted_s = clock.now_s()
        self._spent_s: dict[str, float] = {}
        self._follows = False  # not before the first cause is known
        self.trained_until_s = float("-inf")  # when the last client stopped training
        self._touched_s = float("-inf")
        with contextlib.suppress(OSError):
            away_s = max(0.0, wall_clock() - self._alive.stat().st_mtime)
            report.idle(Cause.SERVER_AWAY, away_s)
            self._spent_s[Cause.SERVER_AWAY] = away_s
        self._touch()

    def because(self, cause: Cause | None, round_number: int | None = None) -> None:
        """From now on nobody trains because of `cause`; None: somebody does."""
        now_s = self._clock.now_s()
        if now_s - self._touched_s >= _TOUCH_EVERY_S:
            self._touch()
        self._count(now_s)
        if cause is self._cause:
            return
        if self._cause is not None and now_s > self._since_s:
            self._report.idle(self._cause, now_s - self._since_s, round_number)
        if self._cause is None and self._follows:
            self.trained_until_s = now_s
        self._cause, self._since_s, self._follows = cause, now_s, True

    @property
    def now(self) -> str:
        """What the federation does now: a cause, or TRAINING; "" at the start."""
        return str(self._cause or TRAINING) if self._follows else ""

    def take(self) -> dict[str, float]:
        """Seconds by cause since the last call, TRAINING among them: all the time that has passed."""
        self._count(self._clock.now_s())
        spent_s, self._spent_s = self._spent_s, {}
        return spent_s

    def _count(self, now_s: float) -> None:
        if self._follows and now_s > self._counted_s:
            what = self._cause or TRAINING
            self._spent_s[what] = self._spent_s.get(what, 0.0) + now_s - self._counted_s
        self._counted_s = now_s

    def stop(self, *, on_purpose: bool) -> None:
        """The server ends; if that is `on_purpose`, what follows is no time without one."""
        self.because(None)
        if on_purpose:
            with contextlib.suppress(OSError):
                self._alive.unlink(missing_ok=True)

    def _touch(self) -> None:
        self._touched_s = self._clock.now_s()
        with contextlib.suppress(OSError):
            self._alive.touch()
            os.utime(self._alive, (self._wall_clock(),) * 2)
