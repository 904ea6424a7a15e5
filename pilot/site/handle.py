"""The ClientApp's end of a worker group: find one or start one, ask it, keep it or stop it.

A worker group (`group.py`) is a supervisor process and one rank per device. It comes in two kinds:

- A *temporary* group serves one ClientApp: it is started on enter and has ended on exit.
- A *resident* group outlives the ClientApp that started it, and the next ClientApp of the same SuperNode
  finds it by the name of its directory (`group_directory.py`). Only one ClientApp at a time may use it. In a
  simulation it belongs to the actor that runs one ClientApp after the other, of whichever client.

No group may outlive the ClientApp while it works, nor the SuperNode at all: it would wait for ever and keep
the GPUs (docs/flower.md). Therefore
- the process that starts a group holds the write end of a pipe to it. A group whose pipe closes ends, unless
  it has read the byte STAY before: a ClientApp writes that when it exits in good order and the group is
  resident;
- a group whose connection closes while it works on an order ends;
- the group watches the SuperNode, and while we wait for the group we watch SuperExec and SuperNode, too.
"""

import contextlib
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import psutil

from pilot.processes.ancestry import alive, ancestors, owner_of
from pilot.processes.waiting import wait_until
from pilot.site.group_directory import GroupDirectory, new_directory
from pilot.wire.code_hashes import code_hashes
from pilot.wire.frames import WireError, receive_frame, send_frame
from pilot.wire.messages import Header, Part

SOCKET_NAME, ERROR_NAME = "worker.sock", "error.txt"
STAY = b"s"  # tells a resident group that its first ClientApp exits in good order
_POLL_S = 0.02
_STOP_WAIT_S = 5.0


class WorkerError(RuntimeError):
    """The worker group died or could not start; the message is the reason that it recorded."""


class SuperNodeGone(WorkerError):
    """Nobody is left to take this ClientApp's answer."""


class WorkerHandle:
    """A worker group of `processes` ranks, which belongs to us between enter and exit.

    `idle_s` 0 makes it temporary. Otherwise it is resident: after our exit it waits for `idle_s` seconds for
    the next ClientApp that the same SuperNode starts with the same `name`, `processes` and `device` (in a
    simulation: the same actor, whatever the name). It is temporary all the same if there is neither, or if
    another ClientApp is using the resident group. Raises WorkerError from `ask` if one of its processes
    dies; the exit then stops the rest as usual. A group that has not answered `limit_s` seconds from now
    hangs, and is killed. `environment` is added to ours for a group that is started.
    """

    def __init__(
        self,
        *,
        processes: int = 1,
        device: str = "auto",
        idle_s: float = 0.0,
        name: str = "",
        limit_s: float = math.inf,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._processes, self._device = processes, device
        self._idle_s, self._name = idle_s, name
        self._environment = dict(environment or {})
        self._until_s = time.monotonic() + limit_s
        self._parent = os.getppid()
        self._above = (ancestors(os.getpid()) or [])[
            1:
        ]  # SuperExec and SuperNode, if there are any
        self._group: subprocess.Popen[bytes] | None = None
        self._pid = 0  # of the group's supervisor
        self._resident: GroupDirectory | None = None
        self._connection: socket.socket | None = None

    def __enter__(self) -> "WorkerHandle":
        if self._idle_s:
            self._resident = self._acquire()
        if self._resident is None:
            self._dir = new_directory()
            self._start()
            return self
        self._dir = self._resident.directory
        if not self._find():
            (self._dir / ERROR_NAME).unlink(missing_ok=True)
            (self._dir / SOCKET_NAME).unlink(missing_ok=True)
            self._start()
        return self

    def _acquire(self) -> GroupDirectory | None:
        """The locked directory of our resident group, if we may have one."""
        processes = ancestors(os.getpid())
        with contextlib.suppress(psutil.Error):
            if processes and (owner := owner_of(processes)):
                # an actor works on one message at a time: one group is enough, however many clients it plays
                name = self._name if len(processes) > 1 else ""
                return GroupDirectory.acquire(owner, name, self._processes, self._device)
        return None

    def _start(self) -> None:
        command = [sys.executable, "-m", "pilot.site"]
        command += ["--dir", str(self._dir), "--processes", str(self._processes)]
        command += ["--device", self._device]
        if self._resident is not None:
            command += ["--idle", str(self._idle_s)]
        # The group has our working directory, since paths may be relative, but imports the installed package
        # only. It inherits a blocked SIGTERM: one that arrives before it can drain must not kill it.
        environment = os.environ | {"PYTHONSAFEPATH": "1"} | self._environment
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self._group = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._pid = self._group.pid

    def _find(self) -> bool:
        """Connect to the resident group; False if there is none that can take an order."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(self._dir / SOCKET_NAME))
            theirs = self._greet(connection)
        except (OSError, WorkerError):  # none, one that is ending, or one of another version
            connection.close()
            return False
        self._connection, self._pid = connection, int(theirs["supervisor"])
        return True

    def ask(self, header: Header, parts: Sequence[Part] = ()) -> tuple[Header, list[Part]]:
        """Send one order and wait for its answer. Raises WorkerError if there will be none.

        A list of `parts` is empty afterwards: the order's tensors need not wait here for the answer.
        """
        try:
            if self._connection is None:
                self._connection = self._connect()
            send_frame(self._connection, header, parts, drain=True)
            return receive_frame(self._connection, while_waiting=self._look)
        except WireError as error:
            raise WorkerError(self._recorded_failure(str(error))) from error

    def drain(self) -> None:
        """Make the group finish its micro-step and answer. Safe to call from a signal handler."""
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
                self._look()
                time.sleep(_POLL_S)
        self._greet(connection)
        return connection

    def _greet(self, connection: socket.socket) -> Header:
        """Exchange versions and learn the supervisor's pid. Raises WorkerError if the versions differ."""
        send_frame(connection, {"package": code_hashes()})
        theirs, _ = receive_frame(connection, while_waiting=self._look)
        if theirs.get("package") != code_hashes():
            raise WorkerError(
                "the pilot package installed on this site differs from the one that the run sent: "
                "install the same version on all sites and on the server"
            )
        return theirs

    def _look(self) -> None:
        if time.monotonic() >= self._until_s:
            if self._pid:  # else it has not even greeted, and who it is is not known
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)  # the kernel kills its ranks with it
            raise WorkerError("the worker hangs: it has not answered in all the time that it had")
        if os.getppid() != self._parent or not all(map(alive, self._above)):
            raise SuperNodeGone("the SuperNode of this client is gone")

    def _recorded_failure(self, default: str) -> str:
        """The reason that the failed group recorded, once it has had the time to do so."""
        wait_until(lambda: not self._group_lives(), timeout_s=_STOP_WAIT_S, poll_s=_POLL_S)
        try:
            return (self._dir / ERROR_NAME).read_text(encoding="utf-8").strip() or default
        except OSError:
            return default

    def _group_lives(self) -> bool:
        return alive(self._pid) if self._group is None else self._group.poll() is None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()  # a resident group that is still working ends now
        if self._group is not None:
            assert self._group.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                if self._resident is not None and kind is None:
                    self._group.stdin.write(STAY)
                self._group.stdin.close()  # a group that has not read STAY ends now
        if self._resident is not None:
            self._resident.release()
            return
        assert self._group is not None
        try:
            self._group.wait(_STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            self._group.kill()  # the kernel kills its ranks with it
            self._group.wait()
        shutil.rmtree(self._dir, ignore_errors=True)
