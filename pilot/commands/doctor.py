"""`pilot doctor`: whether this machine is ready, and what to do where it is not."""

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

from pilot.config import RunConfig
from pilot.doctor import Level, examine
from pilot.doctor.examine import ROLES
from pilot.errors import PilotError
from pilot.overrides import load_run_config


def add_doctor(commands: Any) -> None:
    command = commands.add_parser(
        "doctor",
        help="check this machine: torch, GPUs, Redis, clock, data, disk, memory, Flower",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Check this machine, each subject within seconds: Python, torch, driver, devices, NCCL,\n"
            "Flower and its connection, ports, Redis, the clock against the server's, write\n"
            "permissions, disk and memory; with --for-config also what that run needs of disk and\n"
            "memory, and data and tokenizer against those of the run. Each line is ok, or says what\n"
            "to do. Exit code 0: nothing is to be done, 1: something is."
        ),
        epilog="examples:\n  pilot doctor\n  pilot doctor --for-config configs/d20.toml --as site",
    )
    command.add_argument(
        "--for-config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE|'KEY=VALUE …'",
        help="the run that this machine is to take part in, as of pilot run --run-config",
    )
    command.add_argument(
        "--as",
        dest="role",
        choices=ROLES,
        help="what this machine is to be, for disk and memory (default: both)",
    )
    command.add_argument(
        "--connection", metavar="NAME", help="Flower's connection (default: the configured one)"
    )
    command.add_argument(
        "--app",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="directory of the Flower app (default: the current one)",
    )
    command.add_argument("--json", action="store_true", help="a JSON array")
    command.set_defaults(function=doctor)


def doctor(arguments: argparse.Namespace) -> int:
    """`pilot doctor`; raises PilotError for a configuration that is none."""
    app = arguments.app.expanduser().resolve()
    config = _config(app, arguments.for_config) if arguments.for_config else None
    roles = (arguments.role,) if arguments.role else ROLES
    found = []
    for finding in examine(config, app=app, connection=arguments.connection, roles=roles):
        found.append(finding)
        if not arguments.json:
            print(finding.line(), flush=True)
    if arguments.json:
        print(json.dumps([finding.to_json() for finding in found]))
    return int(any(finding.level is Level.FIX for finding in found))


def _config(app: Path, texts: list[str]) -> RunConfig:
    """The run's configuration over the defaults of the app, if there is one."""
    defaults: dict[str, Any] = {}
    try:
        project = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
        if project.get("project", {}).get("name") == "pilot":
            defaults = project["tool"]["flwr"]["app"]["config"]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError):
        pass  # those of `pilot/config.py` are the same
    try:
        return RunConfig.from_mapping({**defaults, **load_run_config(texts)})
    except ValueError as error:
        raise PilotError(str(error)) from error
