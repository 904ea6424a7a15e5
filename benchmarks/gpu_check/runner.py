"""Runs checks as processes of their own: each with a limit, and none stops the next."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_check.plan import Check
from benchmarks.gpu_check.verdict import Setup

CHILD = ["-m", "benchmarks.gpu_check.child"]
_POLL_S = 0.1
_LOG_TAIL = 12  # lines of a failed check's output that the report shows
_SLOW_CPU = 4.0  # of a tiny run's limits: CI machines are slow and shared


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`failures` say why it did not pass; `skipped` why it did not run."""

    check: str
    passed: bool
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    def line(self) -> str:
        values = {"check": self.check, "pass": self.passed, "seconds": round(self.seconds, 1)}
        extra = {"figures": self.figures, "failures": self.failures, "skipped": self.skipped}
        return json.dumps(values | {name: value for name, value in extra.items() if value})


def run_all(
    checks: list[Check], setup: Setup, *, seconds: float, tell: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run `checks` in order, those of a group together, until `seconds` are over."""
    ends_at = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for group in _groups(checks):
        running: list[_Running] = []
        for check in group:
            left = ends_at - time.monotonic()
            if left < min(check.cost_s, check.limit_s) and not setup.tiny:
                outcome = Outcome(
                    check=check.name, passed=False, seconds=0.0, skipped="no time was left"
                )
                outcomes.append(outcome)
                tell(outcome)
            else:
                limit = check.limit_s * (_SLOW_CPU if setup.tiny else 1.0)
                running.append(_Running(check, setup, limit_s=min(limit, max(left, 1.0))))
        for outcome in _finished(running):
            outcomes.append(outcome)
            tell(outcome)
    return outcomes


def _finished(running: list["_Running"]) -> Iterator[Outcome]:
    """Each one's outcome when it ends; none is left when the caller gives up."""
    try:
        while running:
            for one in list(running):
                if (done := one.poll()) is not None:
                    running.remove(one)
                    yield done
            time.sleep(_POLL_S)
    finally:
        for one in running:
            one.end()


def _groups(checks: list[Check]) -> Iterator[list[Check]]:
    """Neighbours of one group together, everything else alone."""
    group: list[Check] = []
    for check in checks:
        if group and (not check.group or check.group != group[-1].group):
            yield group
            group = []
        group.append(check)
    if group:
        yield group


class _Running:
    """One check's process; its output goes to a file, its verdict to another."""

    def __init__(self, check: Check, setup: Setup, *, limit_s: float) -> None:
        self._check, self._limit_s = check, limit_s
        name = "".join(c if c.isalnum() else "-" for c in check.name)
        (setup.directory / "logs").mkdir(parents=True, exist_ok=True)
        self._log = setup.directory / "logs" / f"{name}.log"
        self._verdict = setup.directory / "logs" / f"{name}.json"
        self._verdict.unlink(missing_ok=True)
        order = {
            "function": check.function,
            "device": setup.device,
            "tiny": setup.tiny,
            "directory": str(setup.directory),
            "options": check.options,
            "verdict": str(self._verdict),
        }
        with self._log.open("wb") as log:
            self._process = start_child([*CHILD, json.dumps(order)], log, setup.directory)
        self._began = time.monotonic()

    def poll(self) -> Outcome | None:
        seconds = time.monotonic() - self._began
        code, late = self._process.poll(), seconds > self._limit_s
        if code is None and not late:
            return None
        self.end()
        said = self._said()
        failures = list(said["failures"])
        if late and code is None:
            failures += [f"it was ended after {self._limit_s:.0f} s", *self._tail()]
        elif not said["over"]:
            failures += [f"it ended with code {code} and no verdict", *self._tail()]
        elif said["raised"]:
            failures += self._tail()
        return Outcome(
            check=self._check.name,
            passed=not failures,
            seconds=seconds,
            figures=said["figures"],
            failures=failures,
        )

    def _said(self) -> dict[str, Any]:
        """The verdict as far as it got."""
        with contextlib.suppress(OSError, ValueError):
            said: dict[str, Any] = json.loads(self._verdict.read_text(encoding="utf-8"))
            return said
        return {"figures": {}, "failures": [], "raised": False, "over": False}

    def end(self) -> None:
        """The check and all that it has left running in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _tail(self) -> list[str]:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line[:300] for line in lines[-_LOG_TAIL:]]


def start_child(arguments: list[str], log: IO[bytes], directory: Path) -> "subprocess.Popen[bytes]":
    """A Python process with `arguments`, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment(directory),
        start_new_session=True,
    )


def environment(directory: Path) -> dict[str, str]:
    """Of every check: a base directory of its own, and one compile cache for all."""
    root = str(Path(__file__).resolve().parents[2])
    above = os.environ.get("PYTHONPATH", "")
    return os.environ | {
        "NANOCHAT_BASE_DIR": str(directory / "base"),
        "PYTHONPATH": f"{root}:{above}" if above else root,
        "PYTHONUNBUFFERED": "1",
        "WANDB_MODE": "disabled",
        "FLWR_TELEMETRY_ENABLED": "0",
    }
