"""Processes of a fleet that are started again when they die, and ended in order.

Each runs under a keeper (`processes/keeper.py`), so nothing of it outlives this process, however that ends.
What it prints goes line by line into the journal.
"""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from pilot.fleet.journal import Journal
from pilot.processes import keeper

FIRST_DELAY_S, LAST_DELAY_S, STEADY_S = 1.0, 30.0, 60.0
AT_ONCE_S = 20.0  # for a process that was asked twice to end
_POLL_S = 0.1
_LINE_BYTES = 1 << 16


class ServiceFailed(Exception):
    """A process does not even start; the message says which, and why."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A process to keep. `grace_s`: what it needs to end once asked to; `final`: exit codes with which it has
    left for good, and is not started again; `mistakes`: those after which another start makes no sense."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    grace_s: float
    final: frozenset[int] = frozenset()
    mistakes: frozenset[int] = frozenset()
    heard: Callable[[str], None] = lambda line: None


@dataclass
class Kept:
    """A service and the process that it is now, if any."""

    service: Service
    process: "subprocess.Popen[bytes] | None" = None
    began_s: float = 0.0
    failures: int = 0  # in a row, of processes that lived for less than STEADY_S
    due_s: float = 0.0  # when it is started again
    left: bool = False
    pump: threading.Thread | None = field(default=None, repr=False)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Supervisor:
    """Keeps services; all methods are called by one thread."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._kept: list[Kept] = []

    def start(self, service: Service) -> Kept:
        """Start a service, which is kept from then on by calls of `look`."""
        kept = Kept(service)
        self._kept.append(kept)
        self._start(kept)
        return kept

    def look(self) -> None:
        """Start again what has died and is due. Raises ServiceFailed after a mistake."""
        now_s = time.monotonic()
        for kept in self._kept:
            if kept.left:
                continue
            if kept.process is None:
                if now_s >= kept.due_s:
                    self._start(kept)
            elif (code := kept.process.poll()) is not None:
                self._ended(kept, code, now_s)

    def stop(self, group: Sequence[Kept], *, at_once: Callable[[], bool]) -> None:
        """Ask these to end and wait until nothing of them is left; while `at_once()`, not for long."""
        for kept in group:
            kept.left = True
            if kept.process is not None and kept.process.stdin is not None:
                kept.process.stdin.close()  # the keeper's sign that it is over
        again_s: float | None = None
        while running := [kept for kept in group if kept.running]:
            if at_once() and again_s is None:
                again_s = time.monotonic()
                for kept in running:
                    _ask_again(kept)
            if again_s is not None and time.monotonic() - again_s > AT_ONCE_S:
                for kept in running:
                    _kill(kept)
            time.sleep(_POLL_S)
        for kept in group:
            if kept.pump is not None:
                kept.pump.join(timeout=5.0)

    def stop_all(self) -> None:
        """End whatever still runs, the last started first."""
        for kept in reversed(self._kept):
            self.stop([kept], at_once=lambda: False)

    def _start(self, kept: Kept) -> None:
        service = kept.service
        reading, writing = os.pipe()
        try:
            kept.process = keeper.start(
                service.command, env=dict(service.env), output=writing, grace_s=service.grace_s
            )
        finally:
            os.close(writing)
        kept.began_s = time.monotonic()
        kept.pump = threading.Thread(target=self._pump, args=(service, reading), daemon=True)
        kept.pump.start()

    def _pump(self, service: Service, reading: int) -> None:
        with os.fdopen(reading, "rb") as lines:
            while line := lines.readline(_LINE_BYTES):
                text = line.decode("utf-8", errors="replace")
                self._journal.line(service.name, text)
                service.heard(text)

    def _ended(self, kept: Kept, code: int, now_s: float) -> None:
        service, lived_s = kept.service, now_s - kept.began_s
        kept.process = None
        if kept.pump is not None:
            kept.pump.join(timeout=2.0)  # its last words come before ours
        if code in service.final:
            kept.left = True
            self._journal.say(f"{service.name} has left (exit code {code})")
            return
        if code in service.mistakes:
            kept.left = True
            raise ServiceFailed(
                f"{service.name} ended with exit code {code}: {self._last(service)}"
            )
        kept.failures = 0 if lived_s >= STEADY_S else kept.failures + 1
        delay_s = min(LAST_DELAY_S, FIRST_DELAY_S * 2.0 ** max(0, kept.failures - 1))
        kept.due_s = now_s + delay_s
        self._journal.say(
            f"{service.name} ended with exit code {code} after {lived_s:.0f} s; starting it again in "
            f"{delay_s:g} s"
        )

    def _last(self, service: Service) -> str:
        return self._journal.last(service.name) or "it printed nothing"


def _ask_again(kept: Kept) -> None:
    """SIGTERM once more, for the command itself: a second signal ends `pilot node` at once."""
    with contextlib.suppress(psutil.Error):
        assert kept.process is not None
        # its keeper has adopted others since, but started this one first
        children = psutil.Process(kept.process.pid).children()
        for child in sorted(children, key=lambda child: child.create_time())[:1]:
            child.terminate()


def _kill(kept: Kept) -> None:
    with contextlib.suppress(psutil.Error):
        assert kept.process is not None
        for child in psutil.Process(kept.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
