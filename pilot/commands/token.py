"""`pilot token`: lets the next site join a head."""

import argparse
import json
from pathlib import Path
from typing import Any

from pilot.config import check_name


def add_token(commands: Any) -> None:
    command = commands.add_parser(
        "token",
        help="on a head: print the line with which a site joins",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Print the `pilot join` line for a site, with a new token. It admits one site, once, within a\n"
            "day. With --for NAME it admits only that site, also in place of one that had the name before."
        ),
    )
    command.add_argument(
        "--for", dest="client", default="", metavar="NAME", help="the site that it is for"
    )
    command.add_argument(
        "--dir",
        type=Path,
        dest="directory",
        metavar="DIR",
        help="the fleet's, if it was started with one",
    )
    command.add_argument("--json", action="store_true", dest="as_json", help="print it as JSON")
    command.set_defaults(function=token)


def token(arguments: argparse.Namespace) -> int:
    """`pilot token`."""
    from pilot.fleet.head import join_line
    from pilot.fleet.places import Places

    if arguments.client:
        check_name(arguments.client, "--for")
    line = join_line(Places.of(arguments.directory).head, arguments.client)
    print(
        json.dumps({"command": line, "token": line.rpartition(" ")[2]})
        if arguments.as_json
        else line
    )
    return 0
