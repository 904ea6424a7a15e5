"""SuperExec, ClientApps and ServerApps that need not import Flower: they are forks of a process that has.

Flower starts a process per message, which imports all of Flower: seconds of a processor, once per client and
round (docs/flower.md). Here a ClientApp is a fork of a *template*, a child of the SuperExec that was forked
before there was any thread or connection; and the SuperExec is such a fork of a child of the SuperNode
(`supernode.py`). Where that is not to be had, `pilot node` puts a program named `flower-superexec`
(`install`) in front of the PATH of its SuperNode, which starts it by that name.

What is forked is forked twice, so that the kernel hands it to the process above, its *subreaper*: above it
stand the same processes as ever. Where anything of this is not to be had (another system, the template killed,
another Flower), things happen as Flower has them.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from pilot.processes.ancestry import alive
from pilot.processes.keeper import become_subreaper, die_with_parent
from pilot.site.notice import NODE_VARIABLE
from pilot.wire import transfer

PROGRAM = "flower-superexec"
LAST_CLIENTAPP = "clientapp.pid"  # in a node's directory
# What they import in the end; not `pilot`, which is the run's own and not this installation's.
_PRELOADED = (
    "flwr.supercore.cli.flower_superexec",
    "flwr.supernode.cli.flwr_clientapp",
    *("flwr.clientapp", "numpy", "psutil", "redis"),
)
_TEMPLATE = "pilot-template"  # as `ps` shows it
_REPLY_S = 10.0  # for a fork; Flower's own way is taken after that


def install(directory: Path) -> Path:
    """Write the program below `directory`. Returns what is to be the first directory of a SuperNode's PATH."""
    script = write_program(directory / PROGRAM, f"from {__name__} import main\n\nmain()\n")
    command = shlex.join([sys.executable, str(script)])
    # by way of a shell: the path of an interpreter in a script's first line may not be long, nor hold a space
    return write_program(directory / "bin" / PROGRAM, f'#!/bin/sh\nexec {command} "$@"\n').parent


def write_program(path: Path, text: str) -> Path:
    """Write an executable file whole."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.chmod(0o700)
    unfinished.rename(path)
    return path


def main() -> None:
    """Be `flower-superexec`, with its own command line."""
    sys.argv[0] = PROGRAM
    preload()
    _be_superexec()


def preload(more: Sequence[str] = ()) -> None:
    """Import what all forks need, and `more`, and let them take messages as `wire/transfer.py` does."""
    for module in (*_PRELOADED, *more):
        with contextlib.suppress(ImportError):  # of a Flower that is built otherwise
            importlib.import_module(module)
    transfer.install()


def be_superexec(words: Sequence[str]) -> None:
    """Be `flower-superexec` in a fork of a process that has imported all."""
    _appear_as(words)
    _be_superexec()


def _be_superexec() -> None:
    if sys.platform.startswith("linux"):
        template = Template.fork()
        if isinstance(template, list):
            _be_app(template)
            return
        with contextlib.suppress(ImportError, AttributeError, KeyError):  # another Flower
            from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
            from flwr.supercore.superexec.executor import subprocess_executor

            node = os.environ.get(NODE_VARIABLE)
            last = Path(node) / LAST_CLIENTAPP if node else None
            template.starts(
                TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP], of=subprocess_executor, tell=last
            )
            template.starts(TASK_TYPE_TO_COMMAND[TaskType.SERVER_APP], of=subprocess_executor)
    from flwr.supercore.cli.flower_superexec import flower_superexec

    flower_superexec()


class Template:
    """The process that others are forks of, as the process sees it that starts them."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_REPLY_S)
        self._connection = connection

    @staticmethod
    def fork() -> "Template | list[str]":
        """A template that is a copy of this process, which must have one thread only.

        Returns in each of its forks, too: there, the words with which that was started.
        """
        become_subreaper()
        ours, theirs = socket.socketpair()
        gc.freeze()  # what is there stays, and is shared: a collection would copy its pages
        if os.fork() == 0:
            ours.close()
            return _serve(theirs)
        theirs.close()
        return Template(ours)

    def starts(self, program: str, *, of: ModuleType, tell: Path | None = None) -> None:
        """Let a module of Flower's, which may only end what it starts, start `program` by a fork.

        The pid of the last one stands in the file `tell`.
        """
        before = vars(of)["subprocess"]

        def start(words: Sequence[str], **options: Any) -> object:
            quiet = [options.get(name) for name in ("stdout", "stderr")] == [subprocess.DEVNULL] * 2
            # a SuperLink asks for a new session, and is itself in one (`kept_superlink.py`)
            others = (
                options.keys() - {"start_new_session"} - ({"stdout", "stderr"} if quiet else set())
            )
            if words[0] == program and not others:
                with contextlib.suppress(OSError, ValueError):
                    pid = self.start(words, quiet=quiet)
                    if pid and tell is not None:
                        with contextlib.suppress(OSError):  # a full disk: its death is seen later
                            tell.write_text(str(pid), encoding="utf-8")
                    return Started(pid)
            return before.Popen(words, **options)

        vars(of)["subprocess"] = SimpleNamespace(**{**vars(subprocess), "Popen": start})

    def start(self, words: Sequence[str], *, quiet: bool = False) -> int:
        """The pid of a new fork with these words, 0 if it is not there yet; a `quiet` one has no output.

        Raises OSError or ValueError if there will be none.
        """
        with contextlib.suppress(
            ChildProcessError
        ):  # earlier forks, and what these have left behind
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        self._connection.sendall(json.dumps([quiet, *words]).encode() + b"\n")
        try:
            return int(self._connection.recv(32))
        except (
            TimeoutError
        ):  # the words are with the template: a second start would spoil the first one's task
            return 0


class Started:
    """What `Popen` returns, as far as Flower asks for it; pid 0: it is not there yet."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def terminate(self) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)

    def wait(self, timeout: float = 1.0) -> int:
        """Raises subprocess.TimeoutExpired, as Popen does."""
        until_s = time.monotonic() + timeout
        while self._pid and alive(self._pid):
            if time.monotonic() >= until_s:
                raise subprocess.TimeoutExpired(PROGRAM, timeout)
            time.sleep(0.02)
        return 0


def _serve(connection: socket.socket) -> list[str]:
    """In the template: a fork for each line of words, until the connection closes. Returns in forks only."""
    die_with_parent()
    with contextlib.suppress(OSError, ValueError, IndexError):
        show_as([sys.executable, _TEMPLATE])  # it is not the program that it was forked of
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for the SuperExec
    with connection, connection.makefile("r") as lines:
        for line in lines:
            between = os.fork()
            if between == 0:
                _fork_again(connection)
                quiet, *words = json.loads(line)
                if quiet:
                    _be_quiet()
                return [str(word) for word in words]
            os.waitpid(between, 0)
    os._exit(0)


def _fork_again(connection: socket.socket) -> None:
    """Return in a fork whose parent, the process between, has sent its pid and is gone."""
    between, pid = os.getpid(), os.fork()
    if pid:
        connection.sendall(str(pid).encode())
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.001)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _be_quiet() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)


def _be_app(words: list[str]) -> None:
    """Be `flwr-clientapp` or `flwr-serverapp`, whose `pilot` is the run's own."""
    _appear_as(words)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pilot"]:
        del sys.modules[name]
    if words[0] == "flwr-serverapp":
        from flwr.superlink.cli import flwr_serverapp

        flwr_serverapp()
        return
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    flwr_clientapp()


def _appear_as(words: Sequence[str]) -> None:
    """Take a command line: what this process reads, and what others see of it."""
    sys.argv = list(words)
    parent = words.index("--parent-pid") if "--parent-pid" in words else len(words)
    with contextlib.suppress(OSError, ValueError, IndexError):
        show_as([sys.executable, words[0], *words[parent : parent + 2]])


def show_as(words: Sequence[str]) -> None:
    """Let `ps` and /proc show `words` as this process's command, as far as there is room. Linux only.

    The ClientApp's group finds the processes above it there (pilot/processes/ancestry.py).
    """
    # fields 48 and 49, of which the second one may hold spaces and is in parentheses (proc(5))
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"".join(word.encode() + b"\0" for word in words)
    if not 0 < len(text) <= end - start:
        raise ValueError(f"{len(text)} bytes do not fit into {end - start}")
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))
