"""Keep a command alive exactly as long as its parent, and leave nothing of it behind.

    python keeper.py --parent PID [--grace SECONDS] [--remove DIR] -- COMMAND ...

The keeper ends the command and everything that the command ever started, and removes DIR, as soon as
- its parent ends in any way, kill -9 included: its standard input, a pipe that only the parent holds, closes
  (or its parent's pid changes, should a fork have kept that pipe open);
- it gets SIGTERM, SIGINT or SIGHUP;
- the command itself ends.

Why a process between the two: PR_SET_PDEATHSIG alone fires when the *thread* that forked ends (in a
Flower simulation the ServerApp is a thread), it does not reach grandchildren, and Flower and Ray
leave orphans in sessions of their own (Ray's dashboard agent lived on for more than 40 s). On Linux
the keeper is the subreaper of its descendants, so orphans become its children and are found; elsewhere it
finds only those descendants whose parents still live when the end begins.

Standard library only, and nothing of pilot: it runs by path, from a checkout or a Flower bundle.
"""

import argparse
import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

POLL_S = 0.1
KILL_S = 4.0  # for how long descendants that still fork are killed again and again
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def start(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    output: int | None = subprocess.DEVNULL,
    remove: Path | None = None,
    grace_s: float = 2.0,
) -> "subprocess.Popen[bytes]":
    """Start `command` under a keeper that ends with this process; its exit code is the command's.

    `output` takes both output streams (None: they are inherited); `remove` is a directory to delete at the
    end; `grace_s` seconds pass between SIGTERM to the command and SIGKILL to all of its descendants.
    """
    options = ["--parent", str(os.getpid()), "--grace", str(grace_s)]
    if remove is not None:
        options += ["--remove", str(remove)]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).resolve()), *options, "--", *command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        cwd=cwd,
        env=env,
        start_new_session=True,  # a Ctrl-C in the terminal is the parent's business
    )


def stop(keeper: "subprocess.Popen[bytes]", *, timeout_s: float = 20.0) -> int:
    """End a keeper's command, wait until nothing of it is left, and return the exit code."""
    if keeper.stdin is not None:
        keeper.stdin.close()
    try:
        return keeper.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        keeper.kill()
        return keeper.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--grace", type=float, default=2.0)
    parser.add_argument("--remove", type=Path)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()

    ended: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda number, _frame: ended.append(number))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        command = subprocess.Popen(
            args.command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_keeper
        )
    except OSError as error:
        print(f"cannot start {args.command[0]}: {error.strerror}", file=sys.stderr)
        _remove(args.remove)
        return 127
    family = _Family(command.pid)
    while family.status is None and not ended and not _parent_gone(args.parent):
        family.reap()
    if family.status is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(command.pid, signal.SIGTERM)
        family.wait(args.grace)
    family.kill()
    _remove(args.remove)
    if family.status is None or family.status < 0:  # ended by a signal: a shell's convention
        return 128 - (family.status or -signal.SIGTERM)
    return family.status


class _Family:
    """The command and all of its descendants."""

    def __init__(self, command: int) -> None:
        self.status: int | None = None  # the command's exit code, minus the signal if one ended it
        self._command = command

    def reap(self) -> bool:
        """Collect those that have ended; False when nothing is left.

        The kernel decides, not the process table: while that is read, a parent may end, and its child then
        seems to have none.
        """
        while True:
            try:
                pid, raw = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return bool(_descendants(os.getpid()))  # only where there is no subreaper
            if pid == 0:
                return True
            if pid == self._command:
                self.status = os.waitstatus_to_exitcode(raw)

    def wait(self, timeout_s: float) -> None:
        """Wait until all have ended by themselves, for at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.reap() and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def kill(self) -> None:
        """Kill all of them, and those that they start meanwhile."""
        deadline = time.monotonic() + KILL_S
        while self.reap() and time.monotonic() < deadline:
            for pid in _descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S / 5)


def _parent_gone(parent: int) -> bool:
    """Wait up to POLL_S for the end of standard input; True when the parent is gone."""
    readable, _, _ = select.select([0], [], [], POLL_S)
    return bool(readable and not os.read(0, 1024)) or os.getppid() != parent


def _descendants(root: int) -> list[int]:
    """All living descendants of `root`, nearest first; zombies don't count."""
    children: dict[int, list[int]] = {}
    for pid, parent, state in _process_table():
        if not state.startswith("Z"):
            children.setdefault(parent, []).append(pid)
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def _process_table() -> list[tuple[int, int, str]]:
    """(pid, parent's pid, state) of all processes."""
    if not sys.platform.startswith("linux"):
        listing = subprocess.Popen(
            ["ps", "-A", "-o", "pid=,ppid=,stat="], stdout=subprocess.PIPE, text=True
        )
        rows = [line.split(None, 2) for line in listing.communicate()[0].splitlines()]
        own = str(listing.pid)
        return [(int(pid), int(parent), state) for pid, parent, state in rows if pid != own]
    table = []
    for entry in os.listdir("/proc"):  # noqa: PTH208 - ten times a second: no Path for each process
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    # the name in brackets may hold anything, brackets too
                    fields = file.read().rsplit(b")", 1)[1].split()
            except (OSError, IndexError):
                continue  # it has just ended
            table.append((int(entry), int(fields[1]), fields[0].decode()))
    return table


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere it does nothing).

    A parent that died before this call goes unnoticed: compare `os.getppid()` afterwards.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def become_subreaper() -> None:
    """Be the parent of those descendants whose own parent ends (Linux; elsewhere it does nothing)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _die_with_keeper() -> None:
    die_with_parent()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the keeper does without."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _remove(directory: Path | None) -> None:
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
