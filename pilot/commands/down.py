"""`pilot down`: ends what `pilot up` and `pilot join` run on this machine."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from pilot.errors import PilotError


def add_down(commands: Any) -> None:
    command = commands.add_parser(
        "down",
        help="end what `pilot up` and `pilot join` run on this machine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "End `pilot up` and all `pilot join` of this machine in order, and wait for that: clients leave\n"
            "with their replies. Exit code 0 also if nothing runs."
        ),
    )
    command.add_argument(
        "--dir",
        type=Path,
        dest="directory",
        metavar="DIR",
        help="the fleet's, if it was started with one",
    )
    command.add_argument(
        "--within",
        type=float,
        metavar="SECONDS",
        help="wait no longer than this; what has not ended then makes the exit code 1",
    )
    command.add_argument(
        "--json", action="store_true", dest="as_json", help="print what ended as JSON"
    )
    command.set_defaults(function=down)


def down(arguments: argparse.Namespace) -> int:
    """`pilot down`."""
    from pilot.fleet.places import Places
    from pilot.fleet.presence import find

    if arguments.within is not None and arguments.within < 0:
        raise PilotError(f"--within is {arguments.within:g}: it must be 0 or more")
    until_s = None if arguments.within is None else time.monotonic() + arguments.within
    running = Places.of(arguments.directory).running
    ended, left = [], []
    for present in find(running):
        if not arguments.as_json:
            print(
                f"ending `pilot {present.what.replace('-', ' ', 1)}` (process {present.process.pid})"
            )
        if present.end(until=lambda: until_s is not None and time.monotonic() > until_s):
            ended.append(present.what)
        else:
            left.append(present.what)
    if arguments.as_json:
        print(json.dumps({"ended": ended, "still_running": left}))
    elif left:
        print(f"still running: {', '.join(left)}")
    elif not ended:
        print(f"nothing runs here ({running.parent})")
    return 1 if left else 0
