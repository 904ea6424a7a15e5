"""A worker group: one process a device, and a supervisor that imports no torch.

The supervisor starts the ranks, passes SIGTERM on to rank 0, and ends all of them when one fails or
when its parent goes (the pipe on its standard input closes). It looks further up as well: when a
SuperNode is killed, its SuperExec and the ClientApp live on, busy with reaching it. The ranks ask the
kernel to be killed with the supervisor.

Lifetimes: of `round`, rank 0 serves one connection, then the group ends. `--idle` makes it resident: told
to stay, it outlives the ClientApp that started it and serves the next ones of the same SuperNode, until
none has come for that many seconds.
"""

import argparse
import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pilot.processes.ancestry import alive, employers
from pilot.site.group_directory import clear
from pilot.site.handle import ERROR_NAME, SOCKET_NAME, STAY

_POLL_S = 0.2
_TERMINATE_S = 3.0
_PR_SET_PDEATHSIG = 1
_PARENT_GONE = 2  # an exit code


def main() -> None:
    """Run a group until its round is done; the exit code is that of the first rank that failed."""
    parser = argparse.ArgumentParser(prog="python -m pilot.site", description=main.__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="directory of socket and errors")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument(
        "--idle", type=float, default=0.0, help="seconds to wait for another order; 0: one only"
    )
    arguments = parser.parse_args()
    os.environ["PILOT_DEVICE"] = arguments.device
    os.environ["PILOT_IDLE_S"] = str(arguments.idle)
    sys.exit(_supervise(arguments.dir, arguments.processes, resident=arguments.idle > 0))


def _supervise(directory: Path, processes: int, *, resident: bool) -> int:
    # Held back until somebody can act on it; the ranks inherit that, and let it through once they
    # know what to finish. SIGINT goes to a terminal's whole group: there the ClientApp decides.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # bound under another name first: who finds the socket can connect to it
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
        shutil.rmtree(directory, ignore_errors=True)  # nobody else will
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
    # torch takes seconds to import: a supervisor that dies meanwhile must be noticed too
    code = (
        "from pilot.site.group import die_with_parent; die_with_parent(); "
        "from pilot.site.serve import main; main()"
    )
    command = [sys.executable, "-c", code, str(directory)]
    return subprocess.Popen(command, env=environment, pass_fds=inherited, stdin=subprocess.DEVNULL)


def _watch(ranks: list[subprocess.Popen[bytes]], directory: Path) -> int:
    """Wait until rank 0 is done, a rank fails, or whom we work for is gone."""
    bosses, stays = employers(os.getppid()), False
    while True:
        codes = [rank.poll() for rank in ranks]
        if failed := [(code, number) for number, code in enumerate(codes) if code]:
            _tell(directory, *min(failed))  # one that was killed first: the others fail of that
            return 1
        if codes[0] == 0:
            return _wait_for_the_others(ranks)
        if stays:
            time.sleep(_POLL_S)
        elif select.select([sys.stdin.buffer], [], [], _POLL_S)[0]:
            if os.read(sys.stdin.fileno(), 1) != STAY:
                return _PARENT_GONE
            bosses, stays = (bosses or [])[1:], True  # the ClientApp may go now
        if not bosses or not all(alive(boss) for boss in bosses):
            return _PARENT_GONE


def _wait_for_the_others(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Rank 0 ends last of what is worth waiting for: its answer is given."""
    for rank in ranks[1:]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(_TERMINATE_S)
    return 0


def last_words(directory: Path, sentence: str) -> None:
    """Leave a sentence for the handle. The first one counts: what follows is its consequence."""
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        with open(directory / ERROR_NAME, "x", encoding="utf-8") as file:
            file.write(sentence)


def _tell(directory: Path, code: int, number: int) -> None:
    if code > 0:
        last_words(directory, f"worker process {number} ended with code {code}")
        return
    (directory / ERROR_NAME).unlink(missing_ok=True)  # others, who lost their connection to it
    remedy = (
        " (which is what a machine without memory left does)" if code == -signal.SIGKILL else ""
    )
    last_words(directory, f"worker process {number} was killed by signal {-code}{remedy}")


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


def die_with_parent() -> None:
    """Ask the kernel to kill this rank when its supervisor dies (Linux; elsewhere only checked now).

    Raises SystemExit if the supervisor is already gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["PILOT_SUPERVISOR"]):
        sys.exit("the worker group is gone")
