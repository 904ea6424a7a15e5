"""`pilot up`: a whole fleet on this machine, or the head of one across machines."""

import argparse
from pathlib import Path
from typing import Any

from pilot.commands.first_look import first_look


def add_up(commands: Any) -> None:
    command = commands.add_parser(
        "up",
        help="start Redis, SuperLink and clients on this machine, and keep them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Start Redis, SuperLink and SuperNodes on this machine, and start again what dies, until\n"
            "Ctrl-C or SIGTERM ends all in order: clients leave with their replies, then SuperLink and\n"
            "Redis end. A second Ctrl-C does not wait. What all of them print is shown in one log, and\n"
            "kept in a file each below $NANOCHAT_BASE_DIR/fleet/logs. Runs are started in another\n"
            "terminal: pilot run local-deployment.\n\n"
            "Without --head nothing listens but on 127.0.0.1, and only this user may use it. With --head\n"
            "sites on other machines take part, once they have joined (pilot token, pilot join): over TLS,\n"
            "each with a key and a Redis user of its own. Runs are started by this user on this machine."
        ),
        epilog="examples:\n  pilot up --clients 2 --cpu\n  pilot up --head --address head.example.org",
    )
    _add_clients(command)
    head = command.add_argument_group("sites on other machines")
    head.add_argument("--head", action="store_true", help="let sites on other machines join")
    head.add_argument(
        "--address",
        action="append",
        default=[],
        metavar="NAME",
        help="name or IP address by which sites reach this machine, for the certificate; several times; "
        "the first one is in the line that joins a site (default: those that are found)",
    )
    head.add_argument(
        "--host",
        default="0.0.0.0",
        metavar="ADDRESS",
        help="where to listen (default: %(default)s)",
    )
    head.add_argument(
        "--join-port", type=int, metavar="PORT", help="where sites join (default: 8001)"
    )
    head.add_argument(
        "--insecure",
        action="store_true",
        help="no TLS and no keys of nodes: anybody who reaches the ports may take part",
    )
    command.set_defaults(function=up)


def _add_clients(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--clients",
        type=int,
        metavar="N",
        help="clients on this machine (default: one for each GPU, without GPUs 2; with --head none)",
    )
    command.add_argument(
        "--gpus-per-client", type=int, metavar="G", help="GPUs of each client (default: 1)"
    )
    command.add_argument("--cpu", action="store_true", help="train on CPUs, also where GPUs are")
    command.add_argument(
        "--name",
        default="client",
        help="clients are called NAME-1, NAME-2, … (default: %(default)s)",
    )
    command.add_argument(
        "--port", type=int, help="the SuperLink's (default: 8000, or one that is free)"
    )
    command.add_argument(
        "--redis-port", type=int, metavar="PORT", help="(default: 6379, or one that is free)"
    )
    command.add_argument(
        "--dir",
        type=Path,
        dest="directory",
        metavar="DIR",
        help="where this fleet keeps logs, keys and ports, for a second one on a machine "
        "(default: $NANOCHAT_BASE_DIR/fleet and …/keys)",
    )
    command.add_argument(
        "--json", action="store_true", dest="as_json", help="show the log as JSON, an object a line"
    )


def up(arguments: argparse.Namespace) -> int:
    """`pilot up`."""
    # here: `pilot superlink` is the same program, and forks servers of runs that need none of it
    from pilot.fleet.up import UpOptions, run_up

    first_look()
    return run_up(
        UpOptions(
            clients=arguments.clients,
            gpus_per_client=arguments.gpus_per_client,
            cpu=arguments.cpu,
            name=arguments.name,
            directory=arguments.directory,
            port=arguments.port,
            redis_port=arguments.redis_port,
            head=arguments.head,
            host=arguments.host,
            addresses=tuple(arguments.address),
            join_port=arguments.join_port,
            insecure=arguments.insecure,
            as_json=arguments.as_json,
        )
    )
