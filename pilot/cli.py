"""The `pilot` command; each of its commands is a file of pilot/commands.

Exit codes to rely on: 0 completed, 1 failed or stopped, 2 a mistake that one sentence names, 130 and 143
interrupted.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from types import FrameType

from pilot.commands.dashboard import add_dashboard
from pilot.commands.doctor import add_doctor
from pilot.commands.down import add_down
from pilot.commands.join import add_join, join
from pilot.commands.node import add_node, node
from pilot.commands.provision import add_provision
from pilot.commands.rehearse import add_rehearse
from pilot.commands.report import add_report
from pilot.commands.run import add_run
from pilot.commands.status import add_logs, add_runs, add_status
from pilot.commands.superlink import add_superlink, superlink
from pilot.commands.token import add_token
from pilot.commands.up import add_up
from pilot.commands.wishes import add_drain, add_stop, add_undrain
from pilot.errors import PilotError
from pilot.processes.signals import end_signals_handled_by

COMMANDS = (
    add_up,
    add_join,
    add_token,
    add_down,
    add_doctor,
    add_status,
    add_runs,
    add_logs,
    add_stop,
    add_drain,
    add_undrain,
    add_run,
    add_node,
    add_superlink,
    add_provision,
    add_rehearse,
    add_report,
    add_dashboard,
)


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.function in (node, superlink, join):
        arguments.flower = rest  # options of Flower's own program
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with _signals_as_exceptions():
            code: int = arguments.function(arguments)
            return code
    except PilotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return interrupt.exit_code if isinstance(interrupt, Interrupted) else 130


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP raise Interrupted, so that every exit runs `finally` blocks."""

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        raise Interrupted(signum)

    with end_signals_handled_by(interrupt):
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pilot", description="Federated pretraining of GPTs.")
    parser.add_argument("--version", action="version", version=f"pilot {version('pilot')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
