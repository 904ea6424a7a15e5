"""What a fleet tells the other commands of its machine: `fleet/environment` and a Flower connection.

The file has KEY=VALUE lines that a shell reads as well (`set -a; . FILE`). What is set in the environment wins.
"""

import contextlib
import os
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from pilot.errors import PilotError
from pilot.fleet.places import CONNECTION, Places
from pilot.fleet.presence import find
from pilot.fleet.secret_file import read_secret, write_secret
from pilot.launch.connection import find_flwr_home

FLOWER_HOME, REDIS = "FLWR_HOME", "PILOT_REDIS_URL"


def write_environment(path: Path, values: Mapping[str, str]) -> None:
    """Write the file, mode 0600."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    write_secret(path, "\n".join(lines) + "\n")


def read_environment(path: Path) -> dict[str, str]:
    """The variables of such a file; none if it is missing. Raises PilotError if others may read it."""
    try:
        text = read_secret(path).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition("=")
        with contextlib.suppress(ValueError):  # a quotation mark without its other
            words = shlex.split(value)
            if name and len(words) == 1:
                found[name] = words[0]
    return found


def of_running_fleet(directory: Path | None = None) -> dict[str, str]:
    """The variables of the fleet of this machine while it runs, as far as they are not set here."""
    places = Places.of(directory)
    if not places.running.is_dir() or not find(places.running):
        return {}
    found = read_environment(places.environment)
    return {name: value for name, value in found.items() if not os.environ.get(name)}


def write_connection(places: Places, host: str, port: int, ca: Path | None) -> None:
    """Write Flower's configuration: the connections that this directory has, and the fleet's among them."""
    superlinks: dict[str, Any] = {}
    known = find_flwr_home(Path.cwd()) / "config.toml"
    if known != places.flower_home / "config.toml":
        try:
            superlinks = dict(tomllib.loads(known.read_text(encoding="utf-8")).get("superlink", {}))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise PilotError(f"cannot read the Flower configuration {known}: {error}") from error
    shown = f"[{host}]" if ":" in host else host
    table: dict[str, Any] = {"address": f"{shown}:{port}"}
    table |= {"root-certificates": str(ca)} if ca else {"insecure": True}
    superlinks |= {"default": CONNECTION, CONNECTION: table}
    write_secret(places.flower_home / "config.toml", tomli_w.dumps({"superlink": superlinks}))
