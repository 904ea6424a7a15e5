"""`pilot status`, `pilot runs` and `pilot logs`: what runs do now, and what was written about them."""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from pilot.coordination.operator import Operator
from pilot.errors import PilotError
from pilot.launch.connection import base_directory
from pilot.run.events import EVENTS_FILE
from pilot.status import logs as log_lines
from pilot.status import sources
from pilot.status.render import render, render_runs
from pilot.status.runs import run_lines
from pilot.status.tail import Growing

_EVERY_S = 1.0
_FOLLOW_S = 0.5
_LAST_LINES = 50


def add_status(commands: Any) -> None:
    command = commands.add_parser(
        "status",
        help="show a run: round, time left, clients, speeds, goodput, refused replies",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Show how a run is: from its directory on the server's machine, and from Redis\n"
            "(PILOT_REDIS_URL, or that of `pilot up` on this machine). Either is enough; what\n"
            "cannot be known is said. RUN is a name or a directory; without it, the run that is\n"
            "led now, else the last one here."
        ),
        epilog="examples:\n  pilot status\n  pilot status d20 --watch\n  pilot status d20 --json",
    )
    command.add_argument("run", nargs="?", metavar="RUN", help="a run's name, or its directory")
    command.add_argument("--watch", action="store_true", help="redraw every second until Ctrl-C")
    command.add_argument(
        "--json", action="store_true", help="one JSON object (docs/protocol.md), or one a second"
    )
    command.set_defaults(function=show_status)


def add_runs(commands: Any) -> None:
    command = commands.add_parser(
        "runs",
        help="list the runs that this machine and its Redis know",
        description="List runs, the one that was heard last first: state, round, tokens, where.",
    )
    command.add_argument("--json", action="store_true", help="a JSON array")
    command.set_defaults(function=show_runs)


def add_logs(commands: Any) -> None:
    command = commands.add_parser(
        "logs",
        help="show what the parts of the fleet and the run have written, by time",
        description=(
            "Show the logs of `pilot up` and `pilot join` on this machine and of a run (the last "
            "one, if none is named), as one stream in the order of time."
        ),
    )
    command.add_argument("run", nargs="?", metavar="RUN", help="a run's name, or its directory")
    command.add_argument("-f", "--follow", action="store_true", help="wait for what is new")
    command.add_argument("--client", metavar="NAME", help="only lines of a client, or that name it")
    command.add_argument(
        "-n",
        "--lines",
        type=int,
        default=_LAST_LINES,
        metavar="N",
        help=f"show the last N lines first (default: {_LAST_LINES})",
    )
    command.add_argument("--json", action="store_true", help="a JSON object a line")
    command.set_defaults(function=show_logs)


def show_status(arguments: argparse.Namespace) -> int:
    """`pilot status`; raises PilotError for a run that nobody knows."""
    with _operator() as (operator, why):
        run = arguments.run or sources.current_run(operator)
        directory = sources.run_directory(run)
        named = "" if "/" in run else run
        source = sources.Source(directory, operator, why, run=named)
        first = source.look(time.time())
        if arguments.json:
            _print(first.to_json())
            while arguments.watch:
                time.sleep(_EVERY_S)
                _print(source.look(time.time()).to_json())
        elif not arguments.watch:
            _console().print(render(first))
        else:
            with Live(render(first), console=_console(), auto_refresh=False, screen=False) as shown:
                while True:
                    time.sleep(_EVERY_S)
                    shown.update(render(source.look(time.time())), refresh=True)
    return 0


def show_runs(arguments: argparse.Namespace) -> int:
    """`pilot runs`."""
    with _operator() as (operator, why):
        try:
            live = {run: operator.look(run) for run in operator.runs()} if operator else {}
        except PilotError as error:
            live, why = {}, str(error)
    lines = run_lines(sources.run_directories(), live, time.time)
    if arguments.json:
        _print([line.to_json() for line in lines])
        return 0
    console = _console()
    if lines:
        console.print(render_runs(lines))
    else:
        console.print(f"There is no run in {base_directory() / 'runs'}.", soft_wrap=True)
    if why:
        console.print(f"Without those of Redis: {why}.", style="dim", markup=False, soft_wrap=True)
    return 0


def show_logs(arguments: argparse.Namespace) -> int:
    """`pilot logs`; raises PilotError where there is nothing to show."""
    if arguments.lines < 0:
        raise PilotError(f"--lines {arguments.lines}: it must be 0 or more")
    run: Path | None = sources.run_directory(arguments.run) if arguments.run else None
    if run is None:
        run = sources.latest(sources.run_directories())
    files = log_lines.log_files(sources.fleet_directory(), run)
    if run is not None and not (run / EVENTS_FILE).is_file():
        raise PilotError(f"there is no run in {run}: `pilot runs` lists those that are known")
    if not files:
        raise PilotError(
            f"there are no logs in {sources.fleet_directory() / 'logs'}, where `pilot up` writes them, and "
            "no run on this machine"
        )
    growing = [(file, Growing(file.path)) for file in files]
    past = [one for one in log_lines.history(growing) if _wanted(one, arguments.client)]
    for line in past[len(past) - min(len(past), arguments.lines) :]:
        _show(line, as_json=arguments.json)
    while arguments.follow:
        time.sleep(_FOLLOW_S)
        known = {file.path for file, _ in growing}
        new = [
            f for f in log_lines.log_files(sources.fleet_directory(), run) if f.path not in known
        ]
        growing += [(file, Growing(file.path)) for file in new]
        for line in log_lines.followed(growing):
            if _wanted(line, arguments.client):
                _show(line, as_json=arguments.json)
    return 0


def _wanted(line: log_lines.Line, client: str | None) -> bool:
    return client is None or log_lines.about(line, client)


def _show(line: log_lines.Line, *, as_json: bool) -> None:
    if as_json:
        _print(line.to_json())
        return
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.at_s))
    print(f"{at} {line.source:<12} | {line.text}", flush=True)


@contextlib.contextmanager
def _operator() -> Iterator[tuple[Operator | None, str]]:
    """Redis as it is known here; None, and why, where it is not known or does not answer."""
    try:
        operator = Operator(sources.redis_url())
    except PilotError as error:
        yield None, str(error)
        return
    with operator:
        yield operator, ""


def _print(value: Any) -> None:
    print(json.dumps(value, allow_nan=False), flush=True)


def _console() -> Console:
    """On a pipe as wide as the tables are: nothing is cut for programs."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 220
    return console
