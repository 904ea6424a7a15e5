"""The largest resident memory of each process of a federation, by what the process is."""

import contextlib
import threading
from pathlib import Path

import psutil

from benchmarks.chaos.processes import marked_below
from benchmarks.chaos.topology import PROGRAMS, has_role

_EVERY_S = 0.5
_OTHERS = {
    "superexec": {"flower-superexec"},
    "redis": {"valkey-server", "redis-server"},
    "pilot run": {"pilot"},
    "flwr": {"flwr"},
    "template": {"pilot-template"},  # whose forks ClientApps are
}
_ROLES = ("worker", *PROGRAMS, *_OTHERS, "node")


class MemoryWatch:
    """Follows the processes marked below `directory`. Use as a context manager; `peaks` is the result.

    Linux itself keeps each process's highest resident set (VmHWM), so that a peak between two looks counts,
    too, except of a process that ends before the next look. Elsewhere what is resident at each look counts.
    """

    def __init__(self, directory: Path) -> None:
        self.peaks: dict[str, int] = {}  # role → bytes, of the largest process with that role
        self._prefix = f"{directory}/"
        self._known: dict[tuple[int, float], str] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_S):
            for process in marked_below(self._prefix):
                with contextlib.suppress(psutil.Error, OSError):
                    role = self._role(process)
                    self.peaks[role] = max(self.peaks.get(role, 0), _peak(process))

    def _role(self, process: psutil.Process) -> str:
        key = (process.pid, process.create_time())
        if key not in self._known:
            role = next((role for role in _ROLES if _has(process, role)), "")
            if not role:
                return "other"  # perhaps a fork that is not yet what it will be
            self._known[key] = role
        return self._known[key]


def _has(process: psutil.Process, role: str) -> bool:
    if role not in _OTHERS:
        return has_role(process, role)
    words = process.cmdline()[:3]
    names = {Path(word).name for word in words[:2]}
    return not names.isdisjoint(_OTHERS[role]) and "node" not in words[2:]


def _peak(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return int(process.memory_info().rss)
    high = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(high.split()[1]) * 1024 if high else int(process.memory_info().rss)
