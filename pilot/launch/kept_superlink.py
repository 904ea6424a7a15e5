"""`pilot superlink`: a SuperLink that is started again at once when it dies, and ServerApps without imports.

Between the death of a server and the next round's first step stand the imports of a SuperLink (3 CPU seconds),
of its SuperExec (3) and of a ServerApp (6, most of it torch), while every site waits. This process has made
them all before anybody needs them: the SuperLink is a fork of it, and SuperExec and ServerApp are forks of
forks (`warm.py`).

A run's own code is not among what is imported: neither `pilot`, which comes with the run, nor `nanochat`, which
may have been updated since.
"""

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from pilot.launch import owner_only as only_owner
from pilot.launch import warm
from pilot.launch.connection import flower_environment
from pilot.processes.keeper import die_with_parent
from pilot.processes.signals import END_SIGNALS, end_signals_handled_by

PROGRAM = "flower-superlink"
_MODULE = "flwr.superlink.cli.flower_superlink"
_PRELOADED = (
    *(_MODULE, "flwr.superlink.main", "flwr.superlink.cli.flwr_serverapp", "flwr.serverapp"),
    *("torch", "safetensors.torch", "filelock"),
)
_POLL_S = 0.05
_ENDING_S = 6.0  # for a SuperLink that was asked to end
_STEADY_S = (
    10.0  # one that ends by itself before it has lived for this long won't live the next time
)
_MAX_PAUSE_S = 10.0
_KILLED = 128
STARTING_AGAIN = "starting it again"  # how the line ends that says so, for those who read it


def run_superlink(
    options: Sequence[str], *, say: Callable[[str], None], owner_only: str = ""
) -> int:
    """Run `flower-superlink` with its own `options` until a signal ends it; returns the exit code.

    `owner_only`: what of it only its owner may use (`owner_only.py`); "": nothing.

    One that ends by itself is started again, unless it has only just been started: its options are wrong then,
    or its port is taken.
    """
    os.environ.update(flower_environment())
    warm.preload(_PRELOADED)
    signals: list[int] = []
    pause_s = 0.0
    with end_signals_handled_by(lambda signum, _frame: signals.append(signum)):
        while True:
            began_s = time.monotonic()
            code = _wait(_fork(options, owner_only), signals)
            lived_s = time.monotonic() - began_s
            if signals:  # uvicorn ends in good order, and then by the signal all the same
                return 0 if code in (_KILLED + signal.SIGTERM, _KILLED + signal.SIGINT) else code
            if lived_s < _STEADY_S and code < _KILLED:
                return code
            pause_s = 0.0 if lived_s >= _STEADY_S else min(_MAX_PAUSE_S, 2 * pause_s + 1)
            say(f"it exited with code {code} after {lived_s:.0f} s; {STARTING_AGAIN}")
            time.sleep(pause_s)  # a signal ends the next one


def _wait(pid: int, signals: Sequence[int]) -> int:
    """The exit code of a child, as a shell tells it; a signal to us is passed on to it."""
    asked_at_s = None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else _KILLED - code
        if signals and asked_at_s is None:
            asked_at_s = time.monotonic()
            os.kill(pid, signal.SIGTERM)
        if asked_at_s is not None and time.monotonic() - asked_at_s > _ENDING_S:
            os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _fork(options: Sequence[str], owner_only: str) -> int:
    """The pid of a new SuperLink."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code: object = 1
    try:
        die_with_parent()
        os.setsid()  # Ctrl-C is for the process above
        for signum in END_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _be_superlink(options, owner_only)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter would at the end of a program
        sys.excepthook(*sys.exc_info())
    finally:
        _end(code)


def _be_superlink(options: Sequence[str], owner_only: str) -> None:
    """Be the SuperLink; in forks of its template, a SuperExec; in forks of that one's, a ServerApp."""
    sys.argv = [PROGRAM, *options]
    with contextlib.suppress(OSError, ValueError, IndexError):
        warm.show_as([sys.executable, *sys.argv])
    module = importlib.import_module(_MODULE)
    if sys.platform.startswith("linux"):
        template = warm.Template.fork()
        if isinstance(template, list):
            warm.be_superexec(template)
            return
        template.starts(warm.PROGRAM, of=module)
    if owner_only:
        only_owner.install(owner_only)
    module.flower_superlink()


def _end(code: object) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
