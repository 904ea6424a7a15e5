"""`pilot stop`, `pilot drain` and `pilot undrain`: what an operator asks of a run, through its Redis."""

import argparse
import getpass
import json
import socket
import time
from collections.abc import Callable
from typing import Any

from pilot.config import check_name
from pilot.coordination.operator import Live, Operator
from pilot.errors import PilotError
from pilot.status.sources import redis_url

_POLL_S = 0.5
# State of a run without a server → what is said of it
_ENDS = {
    "finished": "is finished",
    "interrupted": "was stopped; the same command resumes it",
    "": "has lost its server; the next one ends at once, within an hour from now",
}
_WITHIN_S = 900.0


def add_stop(commands: Any) -> None:
    command = commands.add_parser(
        "stop",
        help="end a run after what its clients have is merged; the same command resumes it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Ask a run to end: its open round is ended, the clients reply, their work is merged and\n"
            "written as a snapshot, and `pilot run` reports that the run was stopped (exit code 1).\n"
            "The same `pilot run` with the same run-name resumes it. Waits until the run has ended."
        ),
        epilog="example:\n  pilot stop d20 --reason 'maintenance at 18:00'",
    )
    command.add_argument("run", metavar="RUN", help="the run's name")
    command.add_argument("--reason", default="", help="shown in logs, events and status")
    command.add_argument(
        "--within",
        type=float,
        default=_WITHIN_S,
        metavar="SECONDS",
        help=f"wait at most this long for the end; 0: not at all (default: {_WITHIN_S:.0f})",
    )
    command.add_argument("--json", action="store_true", help="a JSON object at the end")
    command.set_defaults(function=stop)


def add_drain(commands: Any) -> None:
    command = commands.add_parser(
        "drain",
        help="let a client finish its micro-step and reply, and give it no more work",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Ask a client to reply with what it has and give it no further work, in the runs that\n"
            "are led now, until `pilot undrain`. Its `pilot node` stays up; the others train its rows."
        ),
        epilog="example:\n  pilot drain site-a --reason 'new disks'",
    )
    _add_client(command)
    command.add_argument("--reason", default="", help="shown in logs, events and status")
    command.set_defaults(function=drain)


def add_undrain(commands: Any) -> None:
    command = commands.add_parser(
        "undrain",
        help="give a drained client work again",
        description="Take back `pilot drain`: the client gets work again, in the open round if it can.",
    )
    _add_client(command)
    command.set_defaults(function=undrain)


def _add_client(command: argparse.ArgumentParser) -> None:
    command.add_argument("client", metavar="CLIENT", help="the client's name, such as site-a")
    command.add_argument(
        "--run", default="", metavar="RUN", help="only in this run (default: all that are led now)"
    )
    command.add_argument("--json", action="store_true", help="a JSON object")


def stop(arguments: argparse.Namespace) -> int:
    """`pilot stop`; raises PilotError if nobody leads the run. 1: it has not ended in time."""
    check_name(arguments.run, "RUN")
    with Operator(redis_url()) as operator:
        _led(operator, arguments.run)
        operator.stop(arguments.run, arguments.reason or _who())
        ended = None
        if arguments.within:
            _say(arguments, f"Asked run {arguments.run} to stop; waiting until its work is on disk")
            ended = _wait(lambda: operator.look(arguments.run), arguments.within)
    state = ended.state if ended else "stopping"
    if arguments.json:
        print(json.dumps({"run": arguments.run, "state": state}))
    elif ended:
        print(f"Run {arguments.run} {_ENDS.get(state, _ENDS[''])}")
    elif arguments.within:
        print(
            f"Run {arguments.run} has not ended within {arguments.within:g} s: see `pilot status`"
        )
    else:
        print(f"Asked run {arguments.run} to stop")
    ended_well = ended is not None and state in _ENDS
    return 0 if ended_well or not arguments.within else 1


def _wait(look: Callable[[], Live], within_s: float) -> Live | None:
    """The run once no server leads it; None if that takes longer."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        found = look()
        if not found.leader:
            return found
        time.sleep(_POLL_S)
    return None


def drain(arguments: argparse.Namespace) -> int:
    """`pilot drain`; raises PilotError for a client that no run knows."""
    check_name(arguments.client, "CLIENT")
    with Operator(redis_url()) as operator:
        runs = _runs(operator, arguments)
        knows = [run for run in runs if _knows(operator.look(run), arguments.client)]
        if not knows:
            there = sorted({name for run in runs for name in _clients(operator.look(run))})
            raise PilotError(
                f"no client of {' or '.join(runs)} is called {arguments.client}; there are: "
                f"{', '.join(there) or 'none'}"
            )
        for run in knows:
            operator.drain(run, arguments.client, arguments.reason or _who())
    _tell(arguments, knows, "drained", "is drained: it replies with what it has, and gets no more")
    return 0


def undrain(arguments: argparse.Namespace) -> int:
    """`pilot undrain`; exit code 1 where the client is to leave for another reason."""
    check_name(arguments.client, "CLIENT")
    others = {}
    with Operator(redis_url()) as operator:
        runs = _runs(operator, arguments)
        for run in runs:
            if other := operator.undrain(run, arguments.client):
                others[run] = other
    if others:
        for run, why in others.items():
            _say(arguments, f"Client {arguments.client} still leaves run {run}: {why}")
        if arguments.json:
            print(json.dumps({"client": arguments.client, "leaving": others}))
        return 1
    _tell(arguments, runs, "undrained", "gets work again")
    return 0


def _runs(operator: Operator, arguments: argparse.Namespace) -> list[str]:
    if arguments.run:
        check_name(arguments.run, "--run")
        _led(operator, arguments.run)
        return [arguments.run]
    led = [run for run in operator.runs() if operator.look(run).leader]
    if not led:
        raise PilotError("no run is led now: start one, or name one with --run")
    return led


def _led(operator: Operator, run: str) -> None:
    found = operator.look(run)
    if not found.known:
        raise PilotError(f"Redis knows of no run {run}: `pilot runs` lists those that are known")
    if not found.leader:
        what = {"finished": "is finished", "interrupted": "was stopped"}.get(
            found.state, "has no server"
        )
        raise PilotError(f"run {run} {what}: nobody leads it now")


def _clients(found: Live) -> list[str]:
    said = found.progress.get("clients")
    return [*(said if isinstance(said, dict) else {}), *found.beats]


def _knows(found: Live, client: str) -> bool:
    return client in _clients(found) or client in found.leaving


def _tell(arguments: argparse.Namespace, runs: list[str], word: str, text: str) -> None:
    if arguments.json:
        print(json.dumps({"client": arguments.client, "state": word, "runs": runs}))
    else:
        print(f"Client {arguments.client} of {', '.join(runs)} {text}")


def _say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.json:
        print(text, flush=True)


def _who() -> str:
    """The reason of those who give none."""
    try:
        return f"by {getpass.getuser()} on {socket.gethostname()}"
    except (OSError, KeyError):
        return "by an operator"
