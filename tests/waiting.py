"""Waiting for what other threads and processes do, and looking whether they are still there."""

import time
from collections.abc import Callable, Iterable

import psutil

LIMIT_S = 60.0  # nothing here takes as long, and a busy machine is no failure


def until(
    holds: Callable[[], object],
    limit_s: float = LIMIT_S,
    what: str = "it",
    *,
    every_s: float = 0.02,
) -> None:
    """Return once `holds()` is true; an AssertionError if that takes longer than `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come within {limit_s:.0f} s"
        time.sleep(every_s)


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def gone(processes: Iterable[psutil.Process]) -> bool:
    """Whether each of them has ended (and perhaps nobody has asked for its exit code yet)."""
    return not any(map(_lives, processes))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
