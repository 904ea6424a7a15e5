"""All stop sources → one decision.

A round ends for a worker by the durable key in Redis (found at the start, on a wake-up, or by polling),
by the seconds that its order gave it, or by its own work being done. A site *leaves*, whatever the round
does, by SIGTERM, by its own `stop:` key in Redis, or by a notice on its disk: its worker then stops as
well, gives up the evaluation too, and has `drain-deadline` seconds until it has to be done. A thread
watches all this and sends the heartbeats, so that the training loop only reads a flag.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pilot.coordination.coordinator import ClientCoordinator
from pilot.site.notice import noticed

_EXPIRY_HEARTBEATS = 10.0
_LOOK_S = 0.5  # a wake-up may be lost: keys and files are looked at at least so often
LEAVE_EXPIRY_S = 60.0  # a site that leaves says so again as long as it does


@dataclass
class Progress:
    """How far a worker is; the loop writes it, the watcher's thread sends it."""

    state: str = "starting"  # starting | evaluating | packing | training | sending
    step: int = 0
    tokens: int = 0
    rows: int = 0
    loss: float = 0.0  # nats a token, smoothed
    tokens_per_s: float = 0.0
    shard: int = -1
    shard_row: int = 0
    shard_rows: int = 0  # 0: not known yet


class StopWatcher:
    """Decides when this worker stops; `reason` says why once it has. Use as a context manager.

    `coordinator` None (no Redis): the deadline, `notices` (files), `stop` and `drain` count. `watches`
    False (a rank that is told by another): only the deadline, `stop` and `drain`, and no thread.
    `overdue` is called with a sentence when the site was to leave and `drain_deadline_s` has passed.
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
        overdue: Callable[[str], None] = lambda sentence: None,
        watches: bool = True,
    ) -> None:
        self._reasons: list[str] = []
        self._leaving: list[tuple[str, float]] = []
        self._coordinator, self._progress = coordinator, progress
        self._deadline = time.monotonic() + seconds_left
        self._heartbeat_s, self._notices = heartbeat_s, notices
        self._drain_deadline_s, self._overdue = drain_deadline_s, overdue
        self._watches = watches
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pilot-stop", daemon=True)

    def __enter__(self) -> "StopWatcher":
        if self._watches:
            self._look()  # before anything else: the end may have come before we existed
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
        """Why this worker stops: the first reason counts; "" while it goes on."""
        return self._reasons[0] if self._reasons else ""

    @property
    def leaving(self) -> str:
        """Why this site is to leave; "" while it is not. It may come after another reason to stop."""
        return self._leaving[0][0] if self._leaving else ""

    def stop(self, reason: str) -> None:
        """Stop for `reason`. Safe to call from any thread and from a signal handler."""
        self._reasons.append(reason)

    def drain(self, reason: str) -> None:
        """Stop because this site is to leave; the drain deadline counts from the first call. As safe."""
        self._leaving.append((reason, time.monotonic()))
        self._reasons.append(reason)

    def should_stop(self) -> bool:
        if not self.reason and time.monotonic() >= self._deadline:
            self.stop("deadline")
        return bool(self.reason)

    def tell(self, state: str) -> None:
        """Enter `state`, and let the server know at once: what follows may take longer than a heartbeat."""
        self._progress.state = state
        self._beat()

    def _beat(self) -> None:
        if self._coordinator is not None:
            expiry_s = max(10.0, _EXPIRY_HEARTBEATS * self._heartbeat_s)
            values = asdict(self._progress) | {"leaving": self.leaving}
            self._coordinator.beat(values, expiry_s=expiry_s)

    def _look(self) -> None:
        """Look at all sources that nobody tells us of."""
        if not self.leaving and (reason := noticed(self._notices)):
            self.drain(reason)
        if self._coordinator is None:
            return
        if not self.leaving and (reason := self._coordinator.told_to_leave() or ""):
            self.drain(reason)
        if not self.reason and (reason := self._coordinator.round_over() or ""):
            self.stop(reason)

    def _watch(self) -> None:
        beat_at = time.monotonic()
        while not self._done.is_set():
            if time.monotonic() >= beat_at:
                self._beat()
                beat_at = time.monotonic() + self._heartbeat_s
            self._look()
            if self.leaving:
                self._leave()
            self._wait(min(_LOOK_S, max(0.0, beat_at - time.monotonic())))

    def _leave(self) -> None:
        reason, since = self._leaving[0]
        if self._coordinator is not None:
            self._coordinator.announce_leave(reason, expiry_s=LEAVE_EXPIRY_S)
        if time.monotonic() - since >= self._drain_deadline_s:
            self._overdue(
                f"this site is to leave ({reason}) and was not done after "
                f"{self._drain_deadline_s:g} s of drain-deadline, while {self._progress.state}"
            )

    def _wait(self, timeout_s: float) -> None:
        if self._coordinator is not None:
            self._coordinator.wait(timeout_s)
        else:
            self._done.wait(_LOOK_S)
