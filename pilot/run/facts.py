"""What the directory of a run says of it without loading the model: its snapshots' texts, and whether it lives.

Standard library only, since commands read it that must not import torch.
"""

import contextlib
import json
import math
import re
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SNAPSHOT = re.compile(r"round-(\d+)")
_ALIVE_FILE = (
    "server-alive"  # touched each second by the server that leads the run (server/idle.py)
)
_ALIVE_S = 30.0
_MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, by its format


@dataclass(frozen=True)
class RunFacts:
    """Of the newest snapshot that can be read; empty without one."""

    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    total_tokens: int | None = None  # that the run wants
    parameters: int | None = None
    alive: bool = False  # a server leads it now


def read_facts(directory: Path, now: Callable[[], float] = time.time) -> RunFacts:
    """The facts of the run in `directory`; nothing that is missing or broken is an error."""
    alive = is_led(directory, now)
    for snapshot in _newest_first(directory / "snapshots"):
        try:
            state = json.loads((snapshot / "state.json").read_bytes())
            return RunFacts(
                config=dict(state["config"]),
                versions=dict(state.get("versions", {})),
                fingerprints=dict(state.get("fingerprints", {})),
                total_tokens=int(state["total_tokens"]),
                parameters=_parameters(snapshot / "model.safetensors"),
                alive=alive,
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the one before it is as good
    return RunFacts(alive=alive)


def is_led(directory: Path, now: Callable[[], float] = time.time) -> bool:
    """Whether a server leads the run in `directory` now."""
    with contextlib.suppress(OSError):
        return now() - (directory / _ALIVE_FILE).stat().st_mtime < _ALIVE_S
    return False


def _newest_first(snapshots: Path) -> list[Path]:
    try:
        found = [path for path in snapshots.iterdir() if _SNAPSHOT.fullmatch(path.name)]
    except OSError:
        return []
    return sorted(found, key=lambda path: path.name, reverse=True)


def _parameters(path: Path) -> int | None:
    """How many numbers the tensors of a safetensors file have, by its header; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, _MAX_HEADER_BYTES)))
        return sum(
            math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
        )
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
