"""Which `pilot up` and `pilot join` run on this machine: a file each, found and ended by `pilot down`.

A file says which process it is, and when that was created: a pid that another process has got since is not it.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from pilot.errors import PilotError
from pilot.fleet.secret_file import write_secret
from pilot.processes.ancestry import alive

UP = "up"
_JOIN = "join-"
_POLL_S = 0.1
_CREATED_S = 0.1  # the kernel's clock ticks, and psutil computes with floats


@dataclass(frozen=True)
class Present:
    """A process of ours: "up", or "join-NAME"."""

    what: str
    process: psutil.Process

    def end(self, *, until: Callable[[], bool]) -> bool:
        """Ask it to end and wait for that; False if `until()` is true before."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.send_signal(signal.SIGTERM)
        while alive(self.process):
            if until():
                return False
            time.sleep(_POLL_S)
        return True


def join_of(name: str) -> str:
    return f"{_JOIN}{name}"


@contextmanager
def present(directory: Path, what: str) -> Iterator[None]:
    """Say in `directory` that this process is `what`. Raises PilotError if another one is."""
    lock = FileLock(directory / f"{what}.lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        command = "up" if what == UP else f"join --name {what.removeprefix(_JOIN)}"
        raise PilotError(
            f"`pilot {command}` runs here already ({directory.parent}): end it with `pilot down`, or choose "
            "another --dir"
        ) from None
    path = directory / f"{what}.json"
    with lock:
        process = psutil.Process()
        write_secret(path, json.dumps({"pid": process.pid, "created": process.create_time()}))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def find(directory: Path) -> list[Present]:
    """Those that live, in the order in which they are to end: sites before the server."""
    paths = sorted(directory.glob("*.json"), key=lambda path: (path.stem == UP, path.stem))
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
            said = json.loads(path.read_bytes())
            process = psutil.Process(int(said["pid"]))
            same = abs(process.create_time() - float(said["created"])) < _CREATED_S
            if same and process.uids().real == os.getuid() and alive(process):
                found.append(Present(path.stem, process))
    return found
