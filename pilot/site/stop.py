"""All stop sources → one decision.

A round ends for a worker by the durable key in Redis (found at the start, on a wake-up, or by polling),
by the seconds that its order gave it, or by its own work being done. A client *leaves*, whatever the round
does, by SIGTERM, by its own `stop:` key in Redis, or by a notice on its disk: its worker then stops as
well, gives up the evaluation too, and has `drain-deadline` seconds until it has to be done. A thread
watches all this and sends the heartbeats, so that the training loop only reads a flag.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pilot.coordination.coordinator import ClientCoordinator
from pilot.coordination.heartbeats import heartbeat_expiry_s
from pilot.site.notice import noticed
from pilot.wire.messages import Heartbeat, StopReason

_POLL_S = 0.5  # a wake-up may be lost: keys and files are polled at least this often
# Before its first step a worker evaluates and compiles, which must come to an end once: that many times longer
_FIRST_STEP_FACTOR = 3
# Reasons of which the training loop itself thought: what follows is saving what it has
_OWN_ENDS = {StopReason.LEASE_USED_UP, StopReason.STEPS_DONE, StopReason.NOTHING_LEASED}
LEAVE_EXPIRY_S = 60.0  # a client that is leaving renews its announcement while it does


@dataclass
class Progress:
    """How far a worker is: the training loop writes it, the watcher's thread reads and sends it."""

    heartbeat: Heartbeat = field(default_factory=lambda: Heartbeat(state="starting"))
    rows: int = 0

    def update(self, **changes: Any) -> None:
        """Change fields of the heartbeat, all at once for its readers."""
        self.heartbeat = replace(self.heartbeat, **changes)

    def step_done(self, *, rows: int, tokens: int) -> None:
        """One optimizer step on `rows` rows of `tokens` tokens in all."""
        self.rows += rows
        done = self.heartbeat
        self.update(step=done.step + 1, tokens=done.tokens + tokens)


class StopWatcher:
    """Decides when this worker stops; `reason` says why once it has. Use as a context manager.

    `coordinator` None (no Redis): the deadline, `notices` (files), `stop` and `drain` count. `watches`
    False (a rank that follows another): only the deadline, `stop` and `drain`, and no thread.
    `overdue` is called with a sentence when the client is leaving and `drain_deadline_s` has passed, or
    when there has been a reason to stop for `stuck_s` without a sign that the worker does.
    """

    def __init__(
        self,
        coordinator: ClientCoordinator | None,
        progress: Progress,
        *,
        seconds_left: float,
        heartbeat_s: float,
        notices: Sequence[Path] = (),
        drain_deadline_s: float = math.inf,
        stuck_s: float = math.inf,
        overdue: Callable[[str], None] = lambda sentence: None,
        watches: bool = True,
    ) -> None:
        self._reasons: list[tuple[str, float]] = []  # and when each was given, oldest first
        self._leaving: list[tuple[str, float]] = []
        self._coordinator, self._progress = coordinator, progress
        self._deadline_s = time.monotonic() + seconds_left
        self._heartbeat_s, self._notices = heartbeat_s, notices
        self._drain_deadline_s, self._stuck_s, self._overdue = drain_deadline_s, stuck_s, overdue
        self._watches = watches
        self._last_sign: tuple[tuple[str, str, int], float] = (("", "", 0), 0.0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pilot-stop", daemon=True)

    def __enter__(self) -> "StopWatcher":
        if self._watches:
            self._poll_stop_sources()  # before anything else: the end may have come before we existed
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._coordinator is not None:
            self._coordinator.close()

    @property
    def reason(self) -> str:
        """Why this worker stops: the first reason counts; "" while there is none."""
        first, since_s = self._reasons[0] if self._reasons else ("", time.monotonic())
        return StopReason.DEADLINE if since_s >= self._deadline_s else first

    @property
    def leaving(self) -> str:
        """Why this client is leaving; "" while it is not. It may come after another reason to stop."""
        return self._leaving[0][0] if self._leaving else ""

    def stop(self, reason: str) -> None:
        """Stop for `reason`. Safe to call from any thread and from a signal handler."""
        self._reasons.append((reason, time.monotonic()))

    def drain(self, reason: str) -> None:
        """Stop because this client is leaving; the drain deadline counts from the first call. As safe."""
        self._leaving.append((reason, time.monotonic()))
        self.stop(reason)

    def should_stop(self) -> bool:
        return bool(self.reason)

    def enter(self, state: str) -> None:
        """Enter `state`, and let the server know at once: what follows may take longer than a heartbeat."""
        self._progress.update(state=state)
        self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        if self._coordinator is not None:
            expiry_s = heartbeat_expiry_s(self._heartbeat_s)
            self._coordinator.send_heartbeat(self._progress.heartbeat, expiry_s=expiry_s)

    def _poll_stop_sources(self) -> None:
        """Look where a reason to stop or to leave may have appeared without a signal: files and keys."""
        if not self.leaving and (reason := noticed(self._notices)):
            self.drain(reason)
        if self._coordinator is None:
            return
        if not self.leaving and (reason := self._coordinator.told_to_leave() or ""):
            self.drain(reason)
        if not self.reason and (reason := self._coordinator.round_over() or ""):
            self.stop(reason)

    def _watch(self) -> None:
        next_heartbeat_s = time.monotonic()
        while not self._done.is_set():
            if time.monotonic() >= next_heartbeat_s:
                self._send_heartbeat()
                next_heartbeat_s = time.monotonic() + self._heartbeat_s
            self._poll_stop_sources()
            if self.leaving:
                self._leave()
            self._check_that_it_stops()
            self._wait(min(_POLL_S, max(0.0, next_heartbeat_s - time.monotonic())))

    def _leave(self) -> None:
        reason, since = self._leaving[0]
        if self._coordinator is not None:
            self._coordinator.announce_leave(reason, expiry_s=LEAVE_EXPIRY_S)
        if time.monotonic() - since >= self._drain_deadline_s:
            self._overdue(
                f"drain-deadline of {self._drain_deadline_s:g} s exceeded while "
                f"{self._progress.heartbeat.state} (leaving: {reason})"
            )

    def _check_that_it_stops(self) -> None:
        """A worker that hangs, such as in its device's driver, never sees that it should stop."""
        if not self.reason or self.reason in _OWN_ENDS or self.leaving:
            return  # what leaving may take is a matter of its own deadline
        # each change of state or step shows that it lives, and so is what was there when the reason came
        heartbeat = self._progress.heartbeat
        state = (self.reason, heartbeat.state, heartbeat.step)
        limit_s = self._stuck_s * (1 if heartbeat.step else _FIRST_STEP_FACTOR)
        if state != self._last_sign[0]:
            self._last_sign = (state, time.monotonic())
        elif time.monotonic() - self._last_sign[1] >= limit_s:
            self._overdue(
                f"the worker hangs while {heartbeat.state}: it should have stopped {limit_s:.0f} s ago "
                f"({self.reason})"
            )

    def _wait(self, timeout_s: float) -> None:
        if self._coordinator is not None:
            self._coordinator.wait(timeout_s)
        else:
            self._done.wait(_POLL_S)
