"""`pilot join HEAD`: a site of a fleet whose head is another machine."""

import argparse
from pathlib import Path
from typing import Any

from pilot.commands.first_look import first_look
from pilot.launch.node import default_name


def add_join(commands: Any) -> None:
    command = commands.add_parser(
        "join",
        help="join the head of a fleet on another machine, and run this site of it",
        allow_abbrev=False,  # an option that is not ours is `pilot node`'s
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Join a head (pilot up --head) and run this machine's site until Ctrl-C or SIGTERM, with\n"
            "which it leaves as `pilot node` does. Options that are not listed here are passed on to\n"
            "`pilot node`.\n\n"
            "The first time this takes a token, which `pilot token` prints on the head. It admits one\n"
            "site, once, within a day; afterwards this site has a key. On a command line a token shows\n"
            "in `ps` and in the shell's history: `--token -` reads it from standard input,\n"
            "PILOT_JOIN_TOKEN from the environment."
        ),
        epilog=(
            "examples:\n"
            "  pilot join head.example.org --name site-a --token - < token\n"
            "  pilot join head.example.org --name site-a --device-batch-size 16"
        ),
    )
    command.add_argument("head", metavar="HEAD", help="its name or address; :PORT if not 8001")
    command.add_argument(
        "--name", default=default_name(), help="the client's name (default: this machine's)"
    )
    command.add_argument(
        "--token", default="", help="the first time: a token; -: it is on standard input"
    )
    command.add_argument(
        "--insecure", action="store_true", help="join a head that was started with --insecure"
    )
    command.add_argument(
        "--dir",
        type=Path,
        dest="directory",
        metavar="DIR",
        help="where logs and keys are (default: $NANOCHAT_BASE_DIR/fleet and …/keys)",
    )
    command.add_argument(
        "--json", action="store_true", dest="as_json", help="show the log as JSON, an object a line"
    )
    command.set_defaults(function=join)


def join(arguments: argparse.Namespace) -> int:
    """`pilot join`."""
    from pilot.fleet.join import JoinOptions, read_token, run_join

    first_look()
    return run_join(
        JoinOptions(
            head=arguments.head,
            name=arguments.name,
            token=read_token(arguments.token),
            insecure=arguments.insecure,
            directory=arguments.directory,
            as_json=arguments.as_json,
            node=[word for word in arguments.flower if word != "--"],
        )
    )
