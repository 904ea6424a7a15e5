"""A worker group: one process (a rank) per device, and a supervisor that imports no torch.

The supervisor, `main` here, starts the ranks (`serve.py`), passes SIGTERM on to rank 0, and waits. The group
ends, and with it every rank, as soon as
- rank 0 exits: its order is answered and no other is to come;
- any other rank exits with an error, or is killed;
- the ClientApp that started the group goes: the pipe on standard input closes without having carried STAY;
- a process that the group depends on is gone: the ClientApp (until STAY was read), its SuperExec, its
  SuperNode; in a simulation, the actor. These are watched one by one since a SuperExec and a ClientApp live
  on when their SuperNode is killed;
- the supervisor dies: the ranks asked the kernel to be killed with it.

Without `--idle` the group is temporary: rank 0 serves one connection and exits. With `--idle` it is resident:
after STAY it outlives the ClientApp that started it, and serves the next ones of the same SuperNode until
none has come for that many seconds. docs/architecture.md draws its states.
"""

import argparse
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pilot.processes import keeper
from pilot.processes.ancestry import alive, ancestors
from pilot.site.group_directory import clear
from pilot.site.handle import ERROR_NAME, SOCKET_NAME, STAY

_POLL_S = 0.2
_TERMINATE_S = 3.0
_PARENT_GONE = 2  # an exit code


def main() -> None:
    """Run a worker group until it ends; exits with 0 if no rank failed."""
    parser = argparse.ArgumentParser(prog="python -m pilot.site", description=main.__doc__)
    parser.add_argument(
        "--dir", type=Path, required=True, help="directory for the socket and errors"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument(
        "--idle",
        type=float,
        default=0.0,
        help="seconds to wait for the next order; 0: take only one",
    )
    arguments = parser.parse_args()
    os.environ["PILOT_DEVICE"] = arguments.device
    os.environ["PILOT_IDLE_S"] = str(arguments.idle)
    sys.exit(_supervise(arguments.dir, arguments.processes, resident=arguments.idle > 0))


def _supervise(directory: Path, processes: int, *, resident: bool) -> int:
    # SIGTERM stays blocked until its handler is there. The ranks inherit that, and unblock it once they
    # know what to finish. A terminal sends SIGINT to all processes: what it means is for the ClientApp to
    # decide.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # renamed once it listens: a socket that can be found must accept connections
    listener.bind(str(directory / "binding"))
    listener.listen(1)
    (directory / "binding").rename(directory / SOCKET_NAME)
    ranks = [_start_rank(rank, processes, directory, listener) for rank in range(processes)]
    listener.close()
    signal.signal(signal.SIGTERM, lambda *_: _signal(ranks[:1], signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        code = _watch(ranks, directory)
    finally:
        _end(ranks)
    if code == _PARENT_GONE:
        shutil.rmtree(directory, ignore_errors=True)  # no ClientApp is left to do it
    elif resident and code == 0:
        clear(directory)
    return code


def _start_rank(
    rank: int, world_size: int, directory: Path, listener: socket.socket
) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment |= {"PILOT_RANK": str(rank), "PILOT_WORLD_SIZE": str(world_size)}
    environment["PILOT_SUPERVISOR"] = str(os.getpid())
    inherited: tuple[int, ...] = ()
    if rank == 0:
        environment["PILOT_LISTENER"] = str(listener.fileno())
        inherited = (listener.fileno(),)
    # before torch, which takes seconds to import: the supervisor may die meanwhile
    code = (
        "from pilot.site.group import die_with_supervisor; die_with_supervisor(); "
        "from pilot.site.serve import main; main()"
    )
    command = [sys.executable, "-c", code, str(directory)]
    return subprocess.Popen(command, env=environment, pass_fds=inherited, stdin=subprocess.DEVNULL)


def _watch(ranks: list[subprocess.Popen[bytes]], directory: Path) -> int:
    """Wait until rank 0 is done, a rank has failed, or a process that we depend on is gone."""
    watched, resident = ancestors(os.getppid()), False
    while True:
        codes = [rank.poll() for rank in ranks]
        if failed := [(code, number) for number, code in enumerate(codes) if code]:
            _record_failed_rank(
                directory, *min(failed)
            )  # a killed one first: the others fail as a result
            return 1
        if codes[0] == 0:
            return _wait_for_the_others(ranks)
        if resident:
            time.sleep(_POLL_S)
        elif select.select([sys.stdin.buffer], [], [], _POLL_S)[0]:
            if os.read(sys.stdin.fileno(), 1) != STAY:
                return _PARENT_GONE
            resident = True
            if (
                watched and len(watched) > 1
            ):  # a simulation's ClientApp runs in the group's owner itself
                watched = watched[1:]  # all but the ClientApp, which may go now
        if not watched or not all(map(alive, watched)):
            return _PARENT_GONE


def _wait_for_the_others(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Let the other ranks exit by themselves: rank 0 has, so the answer is given."""
    for rank in ranks[1:]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(_TERMINATE_S)
    return 0


def record_failure(directory: Path, sentence: str) -> None:
    """Leave the reason for the group's end for the handle. Only the first one counts: it caused the others."""
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        with open(directory / ERROR_NAME, "x", encoding="utf-8") as file:
            file.write(sentence)


def _record_failed_rank(directory: Path, code: int, number: int) -> None:
    if code > 0:
        record_failure(directory, f"worker process {number} exited with code {code}")
        return
    # what other ranks recorded is only that they lost their connection to this one
    (directory / ERROR_NAME).unlink(missing_ok=True)
    cause = " (possibly out of memory)" if code == -signal.SIGKILL else ""
    record_failure(directory, f"worker process {number} was killed by signal {-code}{cause}")


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.send_signal(number)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(_TERMINATE_S)


def die_with_supervisor() -> None:
    """Let this rank be killed when its supervisor dies. Raises SystemExit if that has happened already."""
    keeper.die_with_parent()
    if os.getppid() != int(os.environ["PILOT_SUPERVISOR"]):
        sys.exit("the worker group is gone")
