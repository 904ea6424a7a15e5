"""Where a worker group lives: a private directory with its socket, and who may speak to it.

A group of lifetime `round` gets a new directory, gone with it. A resident group waits in a directory that
the next ClientApp of the same site finds by its name, and a lock gives it to one at a time. The name holds
the SuperNode's process, so that a new SuperNode never finds the group of the one before it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import psutil

from pilot.processes.scratch import scratch_parent

_LOCK_NAME = "lock"
_ATTEMPTS = 3


def new_directory() -> Path:
    """A private directory for a group that ends with its ClientApp."""
    return Path(tempfile.mkdtemp(prefix="pilot-", dir=scratch_parent("pilot-xxxxxxxx/worker.sock")))


class Lodging:
    """The directory of a resident group, held by this process until `leave`."""

    def __init__(self, directory: Path, lock: int) -> None:
        self.directory, self._lock = directory, lock

    @staticmethod
    def take(employer: psutil.Process, *facts: str | int) -> "Lodging | None":
        """The lodging of the group that works for `employer` and is told apart by `facts`.

        None when another process holds it, or the directory isn't ours alone.
        """
        text = json.dumps([employer.pid, employer.create_time(), sys.executable, *facts])
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        name = f"pilot-{os.getuid()}-{name}"
        directory = scratch_parent(f"{name}/worker.sock") / name
        for _ in range(_ATTEMPTS):  # a group that ends removes it, perhaps just now
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
            with contextlib.suppress(FileNotFoundError):
                lock = _locked(directory) if _is_private(directory) else None
                if lock is None:
                    return None
                if _is_at(lock, directory / _LOCK_NAME):
                    return Lodging(directory, lock)
                os.close(lock)
        return None

    def leave(self) -> None:
        """Let the next one in."""
        os.close(self._lock)


def clear(directory: Path) -> None:
    """Remove the directory of a resident group that has ended, unless somebody is at its door."""
    with contextlib.suppress(OSError):
        if (lock := _locked(directory)) is not None:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)


def _is_private(directory: Path) -> bool:
    """Whether it is a directory that only we can enter: in a common /tmp another may have made it."""
    found = directory.lstat()
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return mine and not stat.S_IMODE(found.st_mode) & 0o077


def _locked(directory: Path) -> int | None:
    """A descriptor of the directory's lock, held; None if another holds it."""
    lock = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _is_at(lock: int, path: Path) -> bool:
    """Whether the file that we hold is still the one that others find."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock), path.stat())
    return False
