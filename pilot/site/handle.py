"""The ClientApp's end of a worker group: start it or find it, ask it, leave it or stop it.

A group must not outlive the ClientApp whose order it works on, nor the ClientApp the SuperNode that sent it
(it would block in a wait and keep the GPUs: docs/flower.md). So a group holds the read end of a pipe whose
write end belongs to the process that started it, a resident one also ends when a connection closes while it
works, both look at the SuperNode, and while we wait we check that our own parent is still the one we started
with.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from pilot.processes.ancestry import employers
from pilot.site.group_directory import Lodging, new_directory
from pilot.wire.frames import WireError, receive_frame, send_frame
from pilot.wire.messages import Header, Part, package_hash

SOCKET_NAME, ERROR_NAME = "worker.sock", "error.txt"
STAY = b"s"  # to a resident group: its first ClientApp ends in good order
_STOP_WAIT_S = 5.0


class WorkerError(RuntimeError):
    """The worker group died or could not start; the message is what it last said."""


class WorkerHandle:
    """A worker group of `processes` processes, ours between enter and exit.

    With `idle_s` it is resident: it waits so long for the next ClientApp that this site's SuperNode starts
    with the same `name`, and is used by that one. Where no SuperNode stands behind us (a simulation), or
    somebody speaks with the resident group, it is a new one that ends with the exit.
    Raises WorkerError from `ask` when any of its processes dies; it is stopped then as always.
    """

    def __init__(
        self, *, processes: int = 1, device: str = "auto", idle_s: float = 0.0, name: str = ""
    ) -> None:
        self._processes, self._device = processes, device
        self._idle_s, self._name = idle_s, name
        self._parent = os.getppid()
        self._group: subprocess.Popen[bytes] | None = None
        self._pid = 0  # of the group's supervisor
        self._lodging: Lodging | None = None
        self._connection: socket.socket | None = None

    def __enter__(self) -> "WorkerHandle":
        if self._idle_s:
            above = employers(os.getpid()) or []
            if len(above) > 1:
                facts = (self._name, self._processes, self._device)
                self._lodging = Lodging.take(above[-1], *facts)
        if self._lodging is None:
            self._dir = new_directory()
            self._start()
            return self
        self._dir = self._lodging.directory
        if not self._find():
            (self._dir / ERROR_NAME).unlink(missing_ok=True)
            (self._dir / SOCKET_NAME).unlink(missing_ok=True)
            self._start()
        return self

    def _start(self) -> None:
        command = [sys.executable, "-m", "pilot.site"]
        command += ["--dir", str(self._dir), "--processes", str(self._processes)]
        command += ["--device", self._device]
        if self._lodging is not None:
            command += ["--idle", str(self._idle_s)]
        # The group works where we do, since paths may be relative, but imports the installed package only.
        # It is born with SIGTERM held back: one that comes before it can drain must not kill it.
        environment = os.environ | {"PYTHONSAFEPATH": "1"}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self._group = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._pid = self._group.pid

    def _find(self) -> bool:
        """Whether the resident group is there, fit for work, and ours now."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(self._dir / SOCKET_NAME))
            theirs = self._greet(connection)
        except (OSError, WorkerError):  # none; one that is about to end; one of another version
            connection.close()
            return False
        self._connection, self._pid = connection, int(theirs["supervisor"])
        return True

    def ask(self, header: Header, parts: Sequence[Part] = ()) -> tuple[Header, list[Part]]:
        """Send one message and wait for its answer. Raises WorkerError if there will be none."""
        try:
            if self._connection is None:
                self._connection = self._connect()
            send_frame(self._connection, header, parts)
            return receive_frame(self._connection, while_waiting=self._look_at_parent)
        except WireError as error:
            raise WorkerError(self._last_words(str(error))) from error

    def drain(self) -> None:
        """Make the group finish its micro-step and answer what it was asked. For signal handlers, too."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)

    def _connect(self) -> socket.socket:
        assert self._group is not None
        path = self._dir / SOCKET_NAME
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while True:
            try:
                connection.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if self._group.poll() is not None:
                    raise WireError("the worker group ended before it listened") from None
                self._look_at_parent()
                time.sleep(0.02)
        self._greet(connection)
        return connection

    def _greet(self, connection: socket.socket) -> Header:
        """What the group says of itself. Raises WorkerError if it is of another version than we are."""
        send_frame(connection, {"package": package_hash()})
        theirs, _ = receive_frame(connection, while_waiting=self._look_at_parent)
        if theirs.get("package") != package_hash():
            raise WorkerError(
                "the pilot package installed on this site is not the one that the run sent: "
                "install the same version on all sites and on the server"
            )
        return theirs

    def _look_at_parent(self) -> None:
        if os.getppid() != self._parent:
            raise WorkerError("the SuperNode of this client is gone")

    def _last_words(self, default: str) -> str:
        """What the group wrote when it failed; it has a moment to finish that."""
        until = time.monotonic() + _STOP_WAIT_S  # busy machine: the words may be there
        while time.monotonic() < until and self._group_lives():
            time.sleep(0.02)
        try:
            return (self._dir / ERROR_NAME).read_text(encoding="utf-8").strip() or default
        except OSError:
            return default

    def _group_lives(self) -> bool:
        if self._group is not None:
            return self._group.poll() is None
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._connection is not None:
            self._connection.close()  # a resident group that still works ends of that
        if self._group is not None:
            assert self._group.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                if self._lodging is not None and error is None:
                    self._group.stdin.write(STAY)
                self._group.stdin.close()  # a group that was not told to stay ends
        if self._lodging is not None:
            self._lodging.leave()
            return
        assert self._group is not None
        try:
            self._group.wait(_STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            self._group.kill()  # its processes die with it
            self._group.wait()
        shutil.rmtree(self._dir, ignore_errors=True)
