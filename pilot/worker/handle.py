"""The ClientApp's end of a worker group: start it, ask it, stop it. Standard library only.

A group must not outlive the ClientApp, nor the ClientApp the SuperNode that sent it (it would block in a
wait and keep the GPUs: FLOWER.md). So the group holds the read end of a pipe whose write end is ours,
and while we wait we look whether our own parent is still the one we started with.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from pilot.messages import Header, Part, package_hash
from pilot.worker.wire import WireError, receive_frame, send_frame

SOCKET_NAME, ERROR_NAME = "worker.sock", "error.txt"
_STOP_WAIT_S = 5.0


class WorkerError(RuntimeError):
    """The worker group died or could not start; the message is what it last said."""


class WorkerHandle:
    """A worker group of `processes` processes, alive between enter and exit.

    Raises WorkerError from `ask` when any of its processes dies; it is stopped then as always.
    """

    def __init__(self, *, processes: int = 1, device: str = "auto") -> None:
        self._processes, self._device = processes, device
        self._parent = os.getppid()

    def __enter__(self) -> "WorkerHandle":
        # short: the path of a Unix socket has at most 107 bytes
        scratch = os.environ.get("PILOT_SCRATCH_DIR")  # of `pilot run`, gone with it
        self._dir = Path(tempfile.mkdtemp(prefix="pilot-", dir=scratch))
        command = [sys.executable, "-m", "pilot.worker"]
        command += ["--dir", str(self._dir), "--processes", str(self._processes)]
        command += ["--device", self._device]
        # The group imports the installed package, not the bundle that Flower put first on our path.
        # It is born with SIGTERM held back: one that comes before it can drain must not kill it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self._group = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=self._dir)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._connection: socket.socket | None = None
        return self

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
        self._group.send_signal(signal.SIGTERM)

    def _connect(self) -> socket.socket:
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
        send_frame(connection, {"package": package_hash()})
        theirs, _ = receive_frame(connection, while_waiting=self._look_at_parent)
        if theirs.get("package") != package_hash():
            raise WorkerError(
                "the pilot package installed on this site is not the one that the run sent: "
                "install the same version on all sites and on the server"
            )
        return connection

    def _look_at_parent(self) -> None:
        if os.getppid() != self._parent:
            raise WorkerError("the SuperNode of this client is gone")

    def _last_words(self, default: str) -> str:
        """What the group wrote when it failed; it has a moment to finish that."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # busy machine: the words may be there
            self._group.wait(_STOP_WAIT_S)
        try:
            return (self._dir / ERROR_NAME).read_text(encoding="utf-8").strip() or default
        except OSError:
            return default

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._connection is not None:
            self._connection.close()
        assert self._group.stdin is not None
        self._group.stdin.close()  # the group sees its parent go, and ends
        try:
            self._group.wait(_STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            self._group.kill()  # its processes die with it
            self._group.wait()
        shutil.rmtree(self._dir, ignore_errors=True)
