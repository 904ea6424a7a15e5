"""Crash-consistent snapshots: one directory a round, and the rename of it is the commit.

A snapshot holds the model, the state of the outer optimizer (fp32, safetensors), state.json (round,
term, tokens, ledger, merged fences, counters, W&B id, configuration, versions) and a manifest with the
SHA-256 of each. It is written under a temporary name, every file and the directory are fsynced, then
it is renamed: a crash leaves either the whole snapshot or none. A torn or corrupted one is reported
and the one before is used.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.files import atomic_write_json, fsync_dir, sha256_file
from pilot.config import PilotError

_MODEL, _OUTER, _STATE, _MANIFEST = (
    "model.safetensors",
    "outer.safetensors",
    "state.json",
    "manifest.json",
)
_PREFIX = "round-"


class SnapshotError(PilotError):
    """A snapshot can't be written or read; the message names the directory and the reason."""


@dataclass(frozen=True)
class Snapshot:
    """What a run resumes from. `state` is JSON: the strategy's books, see `strategy.py`."""

    round_number: int
    model: dict[str, Tensor]
    outer: dict[str, Tensor]
    state: dict[str, Any]


def write_snapshot(directory: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Commit `snapshot` as `directory`/round-000007 and remove all but the newest `keep`.

    Raises SnapshotError if the disk does not take it; older snapshots are intact then.
    """
    final = directory / f"{_PREFIX}{snapshot.round_number:06d}"
    temporary = directory / f".{final.name}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _save_tensors(temporary / _MODEL, snapshot.model)
        _save_tensors(temporary / _OUTER, snapshot.outer)
        atomic_write_json(temporary / _STATE, snapshot.state)
        sums = {name: sha256_file(temporary / name) for name in (_MODEL, _OUTER, _STATE)}
        atomic_write_json(temporary / _MANIFEST, sums)
        fsync_dir(temporary)
        if final.exists():  # left by a run that could not read it: this one replaces it
            shutil.rmtree(final)
        temporary.replace(final)
        fsync_dir(directory)
    except (OSError, ValueError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SnapshotError(f"cannot write snapshot {final}: {error}") from error
    for old in _snapshots(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def latest_snapshot(directory: Path, *, report: Callable[[str], None]) -> Snapshot | None:
    """The newest snapshot that is whole; None if there is none at all.

    Damaged ones are reported, one sentence each, and passed over. Raises SnapshotError if there are
    snapshots and none of them can be read: starting from nothing would silently lose a run.
    """
    found = _snapshots(directory)
    for path in reversed(found):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            report(f"snapshot {path} is damaged and is passed over: {error}")
    if found:
        raise SnapshotError(f"no snapshot in {directory} can be read; remove it to start anew")
    return None


def _snapshots(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{_PREFIX}*")) if directory.is_dir() else []


def _read(path: Path) -> Snapshot:
    manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    for name in (_MODEL, _OUTER, _STATE):
        if sha256_file(path / name) != manifest[name]:
            raise ValueError(f"{name} does not match its SHA-256")
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    return Snapshot(
        round_number=int(path.name.removeprefix(_PREFIX)),
        model=load_file(path / _MODEL),
        outer=load_file(path / _OUTER),
        state=state,
    )
