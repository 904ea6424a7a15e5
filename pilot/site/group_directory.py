"""Where a worker group lives: a private directory with its socket, and a lock on it.

A temporary group gets a new directory, which its ClientApp removes. A resident group lives in a directory
with a name that the next ClientApp of the same client computes again, and the lock on it admits one ClientApp
at a time. The name depends on the process of its owner (a SuperNode, or a simulation's actor), so a new
SuperNode never finds the group of the one before it.
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
    """A private directory for a temporary group."""
    return Path(tempfile.mkdtemp(prefix="pilot-", dir=scratch_parent("pilot-xxxxxxxx/worker.sock")))


class GroupDirectory:
    """The directory of a resident group, locked by this process until `release`."""

    def __init__(self, directory: Path, lock: int) -> None:
        self.directory, self._lock = directory, lock

    @staticmethod
    def acquire(owner: psutil.Process, *facts: str | int) -> "GroupDirectory | None":
        """Lock the directory of the group that belongs to `owner` and has these `facts`; made if missing.

        None if another process holds it, or if others may enter the directory.
        """
        text = json.dumps([owner.pid, owner.create_time(), sys.executable, *facts])
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        name = f"pilot-{os.getuid()}-{name}"
        directory = scratch_parent(f"{name}/worker.sock") / name
        for _ in range(_ATTEMPTS):  # a group that is ending may remove it meanwhile
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
            with contextlib.suppress(FileNotFoundError):
                lock = _locked(directory) if _is_private(directory) else None
                if lock is None:
                    return None
                if _is_at(lock, directory / _LOCK_NAME):
                    return GroupDirectory(directory, lock)
                os.close(lock)
        return None

    def release(self) -> None:
        """Admit the next ClientApp."""
        os.close(self._lock)


def clear(directory: Path) -> None:
    """Remove the directory of a resident group that has ended, unless a ClientApp has locked it meanwhile.

    That ClientApp starts the next group in it.
    """
    with contextlib.suppress(OSError):
        if (lock := _locked(directory)) is not None:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)


def _is_private(directory: Path) -> bool:
    """Whether only we can enter `directory`: in a shared /tmp another user may have made it."""
    found = directory.lstat()
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return mine and not stat.S_IMODE(found.st_mode) & 0o077


def _locked(directory: Path) -> int | None:
    """A file descriptor that holds the directory's lock; None if another process holds it."""
    lock = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _is_at(lock: int, path: Path) -> bool:
    """Whether the file that we have locked is still the one at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock), path.stat())
    return False
