"""How a client is started and stopped: a process of this machine, or commands of the user's.

A hook never blocks: what it begins runs beside the loop, and `look` says how far it is. What it starts
outlives this process, and carries a mark in its environment by which the next one finds it, so nothing is
started twice.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import psutil

from pilot.processes.ancestry import alive

MARK = "PILOT_PROVISIONED"  # in the environment of all that a hook starts
CLIENT, RUN = "PILOT_CLIENT", "PILOT_RUN"  # what a command is about
STATUS_EVERY_S = 30.0
_OPEN_MODE = 0o600  # of logs: what a command prints may be anything


class Condition(StrEnum):
    PENDING = "pending"  # a command is at work
    RUNNING = "running"
    GONE = "gone"
    UNKNOWN = "unknown"  # nothing can tell; what was asked for has been done
    FAILED = "failed"  # what was asked for has not been done


@dataclass(frozen=True)
class Look:
    condition: Condition
    why: str = ""


class Hook(Protocol):
    """A client's program, wherever it runs. `start` and `stop` may be repeated."""

    def start(self) -> None:
        """Begin to start the client."""

    def stop(self) -> None:
        """Begin to stop it; it has been drained."""

    def kill(self) -> None:
        """It did not stop in time."""

    def look(self) -> Look:
        """How far what was asked for last is."""

    def saved(self) -> dict[str, Any]:
        """What the next process needs to know."""


@dataclass(frozen=True)
class Place:
    """Where a hook's programs write, and how they are marked."""

    directory: Path
    run: str
    client: str

    def log(self) -> Path:
        return self.directory / f"{self.client}.log"

    def environment(self, what: str, more: Mapping[str, str]) -> dict[str, str]:
        mark = {MARK: self.mark(what), CLIENT: self.client, RUN: self.run}
        return {**os.environ, **more, **mark}

    def mark(self, what: str) -> str:
        return f"{self.directory}/{self.client}/{what}"

    def filled(self, command: Sequence[str]) -> list[str]:
        """The command with its placeholders filled in; `pilot` is this installation's."""
        words = [
            word.replace("{client}", self.client).replace("{run}", self.run) for word in command
        ]
        ours = Path(sys.executable).parent / "pilot"
        return [str(ours), *words[1:]] if words[0] == "pilot" and ours.exists() else words

    def begin(
        self, command: Sequence[str], what: str, more: Mapping[str, str]
    ) -> "subprocess.Popen[bytes]":
        """Start a program in a session of its own. Raises OSError."""
        descriptor = os.open(self.log(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, _OPEN_MODE)
        with open(descriptor, "wb") as output:
            return subprocess.Popen(
                self.filled(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment(what, more),
                start_new_session=True,
            )

    def find(self, what: str) -> psutil.Process | None:
        """The program that an earlier process began: the leader of its session."""
        mark = self.mark(what)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                leads = os.getsid(process.pid) == process.pid
                if leads and process.environ().get(MARK) == mark and alive(process):
                    return process
        return None


class SubprocessHook:
    """`pilot join …` or `pilot node …` on this machine, which SIGTERM lets leave without losing a reply."""

    def __init__(
        self,
        place: Place,
        command: Sequence[str],
        environment: Mapping[str, str],
        saved: Mapping[str, Any],
    ) -> None:
        self._place, self._command, self._environment = place, command, environment
        self._child: subprocess.Popen[bytes] | None = None
        self._process = _remembered(saved) or place.find("client")
        self._asked = bool(self._process is not None and saved.get("asked"))
        self._why = "its process is not there"

    def start(self) -> None:
        if self._running():
            return
        try:
            self._child = self._place.begin(self._command, "client", self._environment)
            self._process, self._asked = psutil.Process(self._child.pid), False
        except (OSError, psutil.Error) as error:
            self._why = f"cannot start {self._command[0]}: {error}"

    def stop(self) -> None:
        """Once: a second signal ends a `pilot node` without waiting for the server."""
        if self._running() and self._process is not None and not self._asked:
            self._asked = True
            with contextlib.suppress(psutil.Error):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """All of its session at once; a `pilot node` keeps nothing that outlives it."""
        if self._running() and self._process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def look(self) -> Look:
        return Look(Condition.RUNNING) if self._running() else Look(Condition.GONE, self._why)

    def _running(self) -> bool:
        if self._child is not None and (code := self._child.poll()) is not None:
            self._why = f"its process ended with code {code}; see {self._place.log()}"
            self._child = self._process = None
        return self._process is not None and alive(self._process)

    def saved(self) -> dict[str, Any]:
        if self._process is None:
            return {}
        with contextlib.suppress(psutil.Error):
            created = self._process.create_time()
            return {"pid": self._process.pid, "created": created, "asked": self._asked}
        return {}


def _remembered(saved: Mapping[str, Any]) -> psutil.Process | None:
    """The process that a saved state names, if it is still the same one."""
    with contextlib.suppress(psutil.Error, TypeError, ValueError, KeyError):
        process = psutil.Process(int(saved["pid"]))
        if process.create_time() == float(saved["created"]) and alive(process):
            return process
    return None


@dataclass(frozen=True)
class Commands:
    """What the user says: `status` exits with 0 while the client's machine runs, with 1 when it does not."""

    start: Sequence[str]
    stop: Sequence[str]
    status: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    start_within_s: float = 1800.0
    stop_within_s: float = 300.0


class CommandHook:
    """Commands such as `sky launch`, `sbatch`, `kubectl scale`, `ssh`: anything that starts a client
    elsewhere."""

    def __init__(
        self,
        place: Place,
        commands: Commands,
        *,
        started: bool,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`started`: an earlier process saw that the start command had succeeded."""
        self._place, self._commands, self._now_s = place, commands, now_s
        self._action: _Action | None = None
        self._asking: _Action | None = None
        self._next_status_s = float("-inf")
        self._last = Look(Condition.UNKNOWN if started else Condition.GONE, "it was not started")
        for what, limit_s in (
            ("start", commands.start_within_s),
            ("stop", commands.stop_within_s),
        ):
            if (process := place.find(what)) is not None:  # of an earlier provisioner
                self._action = _Action(what, None, process, now_s() + limit_s)

    def start(self) -> None:
        self._act("start", self._commands.start, self._commands.start_within_s)

    def stop(self) -> None:
        self._act("stop", self._commands.stop, self._commands.stop_within_s)

    def kill(self) -> None:
        """The stop command had its time: try again later."""
        self._end_action()

    def saved(self) -> dict[str, Any]:
        return {}

    def _act(self, what: str, command: Sequence[str], within_s: float) -> None:
        if self._action is not None and self._action.what == what:
            return
        self._end_action()
        self._asking = None
        self._action = self._begin(what, command, within_s)

    def _begin(self, what: str, command: Sequence[str], within_s: float) -> "_Action | None":
        try:
            child = self._place.begin(command, what, dict(self._commands.environment))
        except OSError as error:
            self._last = Look(Condition.FAILED, f"cannot run {command[0]}: {error.strerror}")
            return None
        return _Action(what, child, None, self._now_s() + within_s)

    def _end_action(self) -> None:
        if self._action is not None:
            self._action.kill()
            self._action = None

    def look(self) -> Look:
        if self._action is not None:
            if (found := self._action.outcome(self._now_s(), self._place.log())) is None:
                return Look(Condition.PENDING)
            self._action, self._last = None, found
            self._next_status_s = self._now_s() + STATUS_EVERY_S
        if self._commands.status and self._last.condition != Condition.FAILED:
            self._ask()
        return self._last

    def _ask(self) -> None:
        now_s = self._now_s()
        if self._asking is None and now_s >= self._next_status_s:
            self._next_status_s = now_s + STATUS_EVERY_S
            self._asking = self._begin("status", self._commands.status, STATUS_EVERY_S)
        if self._asking is None:
            return
        code = self._asking.code()
        if code is None and now_s < self._asking.until_s:
            return
        if code is None:
            self._asking.kill()
        self._asking = None
        if code in (0, 1):
            gone = Look(Condition.GONE, "its status command says that it does not run")
            self._last = Look(Condition.RUNNING) if code == 0 else gone


@dataclass
class _Action:
    """A command at work: our child, or one of an earlier provisioner, whose exit code nobody will learn."""

    what: str
    child: "subprocess.Popen[bytes] | None"
    process: psutil.Process | None
    until_s: float

    def code(self) -> int | None:
        if self.child is not None:
            return self.child.poll()
        return None if self.process is not None and alive(self.process) else -1

    def outcome(self, now_s: float, log: Path) -> Look | None:
        """What came of it; None while it is at work."""
        code = self.code()
        if code is None and now_s < self.until_s:
            return None
        if code is None:
            self.kill()
            return Look(Condition.FAILED, f"its {self.what} command did not end in time; see {log}")
        if code == 0:
            done = Condition.UNKNOWN if self.what == "start" else Condition.GONE
            return Look(done, f"its {self.what} command has ended")
        if self.child is None:
            why = f"its {self.what} command was at work when an earlier provisioner ended"
            return Look(Condition.FAILED, why)
        return Look(Condition.FAILED, f"its {self.what} command ended with code {code}; see {log}")

    def kill(self) -> None:
        """The command and what it started, its session."""
        pid = self.child.pid if self.child is not None else None
        if self.process is not None and alive(self.process):
            pid = self.process.pid
        if pid is not None and self.code() is None:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        if self.child is not None:
            self.child.wait()
