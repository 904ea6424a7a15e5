"""`flwr` commands that need not import Flower: each is a fork of one process that has.

`pilot run` needs three of them when a server is gone (how did it end, submit, stream the log), and each import
takes two seconds of a processor, in which nobody trains. The process is started with the first command, which
waits for it as it would have waited for its own imports. Linux only; elsewhere, and where it fails, a command
is a process of its own.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from pilot.launch.connection import flower_program
from pilot.processes.keeper import die_with_parent

_READY_S = 60.0  # for the imports, on a loaded machine
_MAX_MESSAGE = 1 << 16
_MAIN = f"from {__name__} import main; main()"


class Command(Protocol):
    """A command that runs; `stdout` gets its standard output, and its errors if they were asked for."""

    @property
    def stdout(self) -> IO[str] | None: ...
    def kill(self) -> None: ...
    def wait(self) -> object: ...


def spawn(words: Sequence[str], *, cwd: Path, env: Mapping[str, str], errors: bool) -> Command:
    """Start `flwr` with these words as a process of its own."""
    return subprocess.Popen(
        [flower_program("flwr"), *words],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is ours to answer
    )


class FlowerCommands:
    """Starts `flwr` commands, all in directory `cwd` and with the environment `env`."""

    def __init__(self, cwd: Path, env: Mapping[str, str]) -> None:
        self._cwd = cwd
        self._env = {**env, "PYTHONUNBUFFERED": "1", "COLUMNS": "1000"}  # whole lines, at once
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._template: subprocess.Popen[bytes] | None = None
        self._usable = sys.platform.startswith("linux") and hasattr(os, "pidfd_open")

    def start(self, words: Sequence[str], *, errors: bool) -> Command:
        """Start `flwr` with these words; `errors`: its standard error goes where its output goes."""
        with self._lock:
            if self._usable:
                try:
                    return self._fork(words, errors=errors)
                except (OSError, ValueError):
                    self._usable = False
        return spawn(words, cwd=self._cwd, env=self._env, errors=errors)

    def _fork(self, words: Sequence[str], *, errors: bool) -> Command:
        """Raises OSError or ValueError if there will be no such command."""
        read_end, write_end = os.pipe()
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            connection = self._connection or self._begin()
            message = json.dumps([*words]).encode()
            socket.send_fds(connection, [message], [write_end, write_end if errors else null])
            return _Fork(int(connection.recv(32)), read_end)
        except BaseException:  # a signal's as well
            self._usable = False  # an answer may still be on its way, and the command with it
            self._end_template()
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
            os.close(null)

    def _begin(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._template = subprocess.Popen(
                # -P: not the `pilot` of the app's directory, which need not be this one
                [sys.executable, "-P", "-c", _MAIN, str(theirs.fileno())],
                cwd=self._cwd,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        ours.settimeout(_READY_S)
        self._connection = ours
        return ours

    def close(self) -> None:
        """End the process; commands that still run are killed."""
        if self._connection is not None:
            self._connection.close()
        self._end_template()

    def _end_template(self) -> None:
        if self._template is not None:
            self._template.kill()
            self._template.wait()


class _Fork:
    """A command that is a fork, as `subprocess.Popen` shows one."""

    def __init__(self, pid: int, output: int) -> None:
        # its parent collects it with the next command at the earliest, so this is it, even if it has ended
        self._process = os.pidfd_open(pid)
        self.stdout = os.fdopen(output, errors="replace")

    def kill(self) -> None:
        if self._process >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def wait(self) -> None:
        if self._process >= 0:
            select.select([self._process], [], [])
            os.close(self._process)
            self._process = -1


def main() -> None:
    """Be the process that commands are forks of; the first word is the number of the connection's file."""
    die_with_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    from flwr.cli.app import app

    while True:
        message, files, _, _ = socket.recv_fds(connection, _MAX_MESSAGE, 2)
        if not message:
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if (pid := os.fork()) == 0:
            connection.close()
            _be_command(app, json.loads(message), files)
        connection.send(str(pid).encode())
        for file in files:
            os.close(file)


def _be_command(app: Callable[[], object], words: list[str], files: list[int]) -> None:
    """Run the command with standard output and error in `files`, and end this process."""
    die_with_parent()
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.setsid()
    sys.argv = [flower_program("flwr"), *words]
    code: object = 1
    try:
        code = app()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter would, had the command its own
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
