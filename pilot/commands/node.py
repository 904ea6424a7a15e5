"""`pilot node`: a site's SuperNode, restarted on exit and drained without losing a reply."""

import argparse
from typing import Any

from pilot.launch.node import NodeOptions, default_name, run_node, speaker


def add_node(commands: Any) -> None:
    command = commands.add_parser(
        "node",
        help="run a site's SuperNode: restart it on exit, and drain it without losing a reply",
        allow_abbrev=False,  # an option that is not ours is flower-supernode's
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Run flower-supernode and restart it when it exits; options that are not listed here are\n"
            "passed on to it. On SIGTERM, Ctrl-C or a preemption notice the client finishes its\n"
            "micro-step and replies. Once the server confirms through Redis (PILOT_REDIS_URL) that it\n"
            "has the reply on disk, the command exits with code 0. A second signal ends it at once."
        ),
        epilog=(
            "examples:\n  pilot node --name site-a --insecure --superlink 127.0.0.1:8000\n"
            "  pilot node --name site-b --watch aws --insecure --superlink 127.0.0.1:8000"
        ),
    )
    command.add_argument(
        "--name",
        default=default_name(),
        help="the client's name, such as site-a (default: this machine's)",
    )
    command.add_argument(
        "--preempt-file",
        default="",
        metavar="FILE",
        help="leave when this file appears (default: PILOT_PREEMPT_FILE, or the run's preempt-file)",
    )
    command.add_argument(
        "--watch",
        action="append",
        default=[],
        metavar="aws|gcp|azure|slurm|FILE",
        help="leave in time when the provider, the job's walltime or a file says that this machine will be "
        "taken away; may be given more than once. A FILE (with a slash) may hold the time, ISO 8601 or Unix",
    )
    command.add_argument(
        "--leave-within",
        type=float,
        metavar="SECONDS",
        help="wait at most this long for the server (default: the run's drain-deadline, and twice "
        "what the last reply took, at least 60 s)",
    )
    command.add_argument(
        "--device-batch-size",
        type=int,
        metavar="ROWS",
        help="rows per device and forward pass on this client; 0: what fits (default: the run's)",
    )
    command.set_defaults(function=node)


def node(arguments: argparse.Namespace) -> int:
    """`pilot node`."""
    options = NodeOptions(
        name=arguments.name,
        supernode=[word for word in arguments.flower if word != "--"],
        preempt_file=arguments.preempt_file,
        leave_within_s=arguments.leave_within,
        watch=arguments.watch,
        device_batch_size=arguments.device_batch_size,
    )
    return run_node(options, say=speaker(f"node {options.name}"))
