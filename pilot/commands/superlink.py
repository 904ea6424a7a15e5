"""`pilot superlink`: the SuperLink of a deployment, started again when it dies."""

import argparse
from typing import Any

from pilot.launch import owner_only
from pilot.launch.kept_superlink import run_superlink
from pilot.launch.node import speaker


def add_superlink(commands: Any) -> None:
    command = commands.add_parser(
        "superlink",
        help="run the SuperLink of a deployment: start it again when it dies, and runs without delay",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Run flower-superlink, to which options that are not listed here are passed on. When it dies\n"
            "it is started again at once, without imports, and so are the servers of runs. Ctrl-C or\n"
            "SIGTERM ends it."
        ),
        epilog="example:\n  pilot superlink --insecure --disable-runtime-dependency-installation",
    )
    command.add_argument(
        "--owner-only",
        choices=(owner_only.COMMANDS, owner_only.ALL),
        default="",
        help="take commands (runs, registrations of nodes) only from this user on this machine; with "
        "`all`, let only this user's nodes on this machine take part, too",
    )
    command.set_defaults(function=superlink)


def superlink(arguments: argparse.Namespace) -> int:
    """`pilot superlink`."""
    options = [word for word in arguments.flower if word != "--"]
    return run_superlink(options, say=speaker("superlink"), owner_only=arguments.owner_only)
