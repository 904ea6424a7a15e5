"""All stop sources → one decision.

A round ends for a worker by the durable key in Redis (found at the start, on a wake-up, or by polling),
by the seconds that its order gave it, by SIGTERM, or by its own work being done. A thread watches
Redis and sends the heartbeats, so that the training loop only reads a flag.
"""

import threading
import time
from dataclasses import asdict, dataclass

from pilot.coordinator import ClientCoordinator

_EXPIRY_HEARTBEATS = 10.0
_LOOK_S = 0.5  # a wake-up may be lost: the durable key is read at least so often


@dataclass
class Progress:
    """How far a worker is; the loop writes it, the watcher's thread sends it."""

    state: str = "starting"  # starting | evaluating | training | sending
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

    `coordinator` None (no Redis): only the deadline and `stop` count.
    """

    def __init__(
        self,
        coordinator: ClientCoordinator | None,
        progress: Progress,
        *,
        seconds_left: float,
        heartbeat_s: float,
    ) -> None:
        self._reasons: list[str] = []
        self._coordinator, self._progress = coordinator, progress
        self._deadline = time.monotonic() + seconds_left
        self._heartbeat_s = heartbeat_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pilot-stop", daemon=True)

    def __enter__(self) -> "StopWatcher":
        if self._coordinator is not None:
            # before anything else: the end may have come before we existed
            if reason := self._coordinator.round_over():
                self.stop(reason)
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

    def stop(self, reason: str) -> None:
        """Stop for `reason`. Safe to call from any thread and from a signal handler."""
        self._reasons.append(reason)

    def should_stop(self) -> bool:
        if not self.reason and time.monotonic() >= self._deadline:
            self.stop("deadline")
        return bool(self.reason)

    def _watch(self) -> None:
        assert self._coordinator is not None
        expiry_s = max(10.0, _EXPIRY_HEARTBEATS * self._heartbeat_s)
        beat_at = time.monotonic()
        while not self._done.is_set():
            if time.monotonic() >= beat_at:
                self._coordinator.beat(asdict(self._progress), expiry_s=expiry_s)
                beat_at = time.monotonic() + self._heartbeat_s
            if not self.reason and (reason := self._coordinator.round_over()):
                self.stop(reason)
            self._coordinator.wait(min(_LOOK_S, max(0.0, beat_at - time.monotonic())))
