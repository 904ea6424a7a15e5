"""Flower's connections: what is configured, what each asks for, and the environment that Flower runs in."""

import contextlib
import os
import shutil
import socket
import subprocess
import sysconfig
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from pilot.errors import PilotError

LOCAL_ADDRESSES = (":local:", ":local-in-memory:")
CONNECT_TIMEOUT_S, _CONNECT_AGAIN_S = 5.0, 0.25

_BASE_DIR = "NANOCHAT_BASE_DIR"
# What Flower's processes are started with, unless the environment has other values; `flower.env` has the same
# for those started by hand. A round waits for SuperExec's look for a task. Two objects of 5 MiB at a time,
# Flower's default, fill a line of 80 ms of round trip to 70 MB/s, so there are more; of those that are sent,
# fewer: all of them share a slow line, and each has 30 s for its answer (docs/flower.md, *Distance*).
FLOWER_SETTINGS: Mapping[str, str] = {
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "4",
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS": "8",
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(5 << 20),
}


@dataclass(frozen=True)
class Connection:
    """A `[superlink.NAME]` table of a Flower configuration."""

    name: str
    table: Mapping[str, Any]
    flwr_home: Path

    @property
    def address(self) -> str:
        return str(self.table.get("address", LOCAL_ADDRESSES[0]))

    @property
    def is_local(self) -> bool:
        return self.address in LOCAL_ADDRESSES

    @property
    def clients(self) -> int:
        number = self.table.get("options", {}).get("num-supernodes", 2)
        try:
            return int(number)
        except (TypeError, ValueError):
            raise PilotError(
                f'options.num-supernodes of {self.name} is "{number}": it must be a whole number'
            ) from None

    def resource(self, name: str, default: float) -> float:
        """What each simulated client asks for: "num-cpus" or "num-gpus"."""
        backend = self.table.get("options", {}).get("backend", {})
        return float(backend.get("client-resources", {}).get(name, default))


def base_directory() -> Path:
    """That of `nanochat.common`, which the command line must not import (a test compares)."""
    return Path(os.environ.get(_BASE_DIR) or "~/.cache/nanochat").expanduser().absolute()


def find_flwr_home(app: Path) -> Path:
    """$FLWR_HOME, else the project's `.flwr`, else Flower's own default."""
    if home := os.environ.get("FLWR_HOME"):
        return Path(home).expanduser().absolute()
    if (app / ".flwr" / "config.toml").exists():
        return app / ".flwr"
    return Path.home() / ".flwr"


def read_connection(name: str | None, flwr_home: Path) -> Connection:
    """The connection of that name, or the default one. Raises PilotError, which lists the known ones."""
    path = flwr_home / "config.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
    except FileNotFoundError:
        raise PilotError(
            f"there is no Flower configuration {path}: run this in the project's directory, or"
            " set FLWR_HOME to the directory that holds config.toml"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PilotError(f"cannot read the Flower configuration {path}: {error}") from error
    known = sorted(key for key, table in tables.items() if isinstance(table, dict))
    name = name or tables.get("default")
    if name not in known:
        asked = f'no connection "{name}"' if name else "no default connection"
        raise PilotError(f"there is {asked} in {path}; it has: {', '.join(known) or 'none'}")
    return Connection(name, tables[name], flwr_home)


def check_resources(connection: Connection, gpus_here: int) -> None:
    """Raise PilotError if a simulation asks for more GPUs than this machine has (`gpus_here`).

    All clients of a round train at the same time, so they need all of their GPUs at once.
    """
    each = connection.resource("num-gpus", 0)
    wanted = each * connection.clients
    if connection.is_local and wanted > gpus_here + 1e-9:
        have = {0: "no GPU", 1: "1 GPU"}.get(gpus_here, f"{gpus_here} GPUs")
        raise PilotError(
            f'connection "{connection.name}" asks for {wanted:g} GPUs ({connection.clients} clients'
            f" with {each:g} each), but this machine has {have}: choose another connection, or change"
            f" options.backend.client-resources.num-gpus in {connection.flwr_home / 'config.toml'}"
        )


def count_gpus() -> int:
    """The number of CUDA devices that processes started here can be given, without importing torch.

    Slices of a GPU (MIG) count where CUDA_VISIBLE_DEVICES names them, as only there anybody hands them out.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (not visible.strip() or visible.strip().startswith("-")):
        return 0
    program = shutil.which("nvidia-smi")
    if program is not None:
        listing = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
        kinds = ("GPU ", "MIG ") if "MIG-" in (visible or "") else ("GPU ",)
        present = sum(line.strip().startswith(kinds) for line in listing.stdout.splitlines())
    else:
        present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return present if visible is None else min(present, len(visible.split(",")))


def check_reachable(connection: Connection, *, within_s: float = 0.0) -> None:
    """Raise PilotError if nothing answers at a deployment's address, nor does `within_s` seconds from now."""
    deadline = time.monotonic() + within_s
    while within_s:
        with contextlib.suppress(PilotError):
            check_reachable(connection)
            return
        if time.monotonic() >= deadline:
            break
        time.sleep(_CONNECT_AGAIN_S)
    host, _, port = connection.address.removeprefix("https://").rpartition(":")
    if not port.isdigit():
        return  # Flower's own hosted service
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise PilotError(
            f"no SuperLink answers at {connection.address} ({error.strerror or error}): start one"
            " with `pilot up` (docs/deployment.md), or correct the address of connection"
            f' "{connection.name}" in {connection.flwr_home / "config.toml"}'
        ) from error


def flower_environment() -> dict[str, str]:
    """This environment, with the programs of this Python's installation on the PATH.

    `FLOWER_SETTINGS` hold where it says nothing else.
    A relative base directory is made absolute: some of Flower's processes have another working directory.
    """
    programs = sysconfig.get_path("scripts")
    path = os.environ.get("PATH", os.defpath)
    base = {}
    if configured := os.environ.get(_BASE_DIR):
        base[_BASE_DIR] = str(Path(configured).expanduser().absolute())
    return {
        **FLOWER_SETTINGS,
        **os.environ,
        **base,
        "PATH": os.pathsep.join((programs, path)),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def flower_program(name: str) -> str:
    """The path of a console script of this Python's installation."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Write a TOML file, such as `flwr run --run-config` or $FLWR_HOME/config.toml."""
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
