"""Crash-consistent snapshots: one directory a round, and the rename of it is the commit.

A snapshot holds the model, the state of the outer optimizer (fp32, safetensors), state.json (round,
term, tokens, ledger, merged replies, counters, W&B id, configuration, versions), merged.jsonl (every reply
that the run has merged so far, a line each), the last steps of the model as clients get them (`history.py`)
and a manifest with the SHA-256 of each. It is written under a temporary name, every file and the directory
are fsynced, then it is renamed: a crash leaves either the whole snapshot or none. A torn or corrupted one is
reported and the one before is used.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nanochat.files import atomic_write_json, atomic_write_text, fsync_dir, sha256_file
from pilot.errors import PilotError
from pilot.faults import fault_point
from pilot.run.history import Step, read_steps
from pilot.tensor_file import TensorFile, write_tensors

_MODEL, _OUTER, _MERGED, _STATE, _MANIFEST = (
    "model.safetensors",
    "outer.safetensors",
    "merged.jsonl",
    "state.json",
    "manifest.json",
)
_PREFIX = "round-"
# What a crash may leave has this ending: snapshots that were not yet whole, or being removed.
_TEMPORARY = ".tmp"

log = logging.getLogger("pilot")


class SnapshotError(PilotError):
    """A snapshot can't be written or read; the message names the directory and the reason."""


@dataclass(frozen=True)
class Snapshot:
    """What a run resumes from. `state` and the lines of `merged` are JSON: see `state.py`.

    `outer` is a file where it was read from one, or written by the outer step.
    """

    round_number: int
    model: dict[str, Tensor]
    outer: Mapping[str, Tensor]
    state: dict[str, Any]
    merged: Sequence[str] = ()
    steps: Sequence[Step] = ()


def write_snapshot(
    directory: Path, snapshot: Snapshot, *, keep: int, keep_every: int = 0, also: int = -1
) -> Path:
    """Commit `snapshot` as `directory`/round-000007, then remove the old ones.

    Kept are the newest `keep`, every `keep_every`-th round (0: none) and the round `also`. Snapshots of
    later rounds can only be damaged ones that a resume skipped: they go before the new one is in place,
    since one that became readable again would shadow the round that was done again.

    A file of the outer state that lies in no snapshot is moved into this one. Raises SnapshotError if the disk
    does not take it; older snapshots are intact then.
    """
    final = directory / f"{_PREFIX}{snapshot.round_number:06d}"
    temporary = directory / f".{final.name}{_TEMPORARY}"
    try:
        fault_point("snapshot.create")
        _make_directory(directory)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _fill(temporary, snapshot)
        for abandoned in _snapshots(directory):
            if _number(abandoned) >= snapshot.round_number:
                _remove(abandoned)  # or fail: it would shadow this one
        fault_point("snapshot.rename")
        temporary.replace(final)
        fault_point("snapshot.renamed")
        fsync_dir(directory)
        fault_point("snapshot.durable")
    except (OSError, ValueError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SnapshotError(
            f"cannot write snapshot {final}: {error}; fix this and rerun the same command to resume"
        ) from error
    _prune(directory, keep=keep, keep_every=keep_every, also=also)
    return final


def _make_directory(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(parents=True)
        fsync_dir(directory.parent)


def _fill(directory: Path, snapshot: Snapshot) -> None:
    """Write the files of a snapshot, the manifest last, all of them durable."""
    sums = {}
    fault_point("snapshot.model")
    sums[_MODEL] = write_tensors(directory / _MODEL, snapshot.model)
    fault_point("snapshot.outer")
    sums[_OUTER] = _place(snapshot.outer, directory / _OUTER)
    fault_point("snapshot.steps")
    for step in snapshot.steps:
        step.put(directory)
    fault_point("snapshot.merged")
    atomic_write_text(directory / _MERGED, "".join(f"{line}\n" for line in snapshot.merged))
    fault_point("snapshot.state")
    # without indentation, which Python's encoder in C does not know: six times as long with many shards
    state = json.dumps(snapshot.state, sort_keys=True, allow_nan=False)
    atomic_write_text(directory / _STATE, f"{state}\n")
    fault_point("snapshot.manifest")
    sums |= {name: sha256_file(directory / name) for name in (_MERGED, _STATE)}
    sums |= {step.file_name: step.sha256 for step in snapshot.steps}
    atomic_write_json(directory / _MANIFEST, sums)
    fault_point("snapshot.manifest-written")
    fsync_dir(directory)


def _place(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Make a durable file of `tensors` at `path`; its SHA-256. A new file is moved: it has been hashed."""
    is_new = isinstance(tensors, TensorFile) and bool(tensors.sha256)
    if not isinstance(tensors, TensorFile) or not is_new:
        return write_tensors(path, tensors)
    sha256, tensors.sha256 = tensors.sha256, ""  # from now on it is a snapshot's
    tensors.path.replace(path)
    tensors.path = path
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256


def _prune(directory: Path, *, keep: int, keep_every: int, also: int) -> None:
    for old in _snapshots(directory)[:-keep]:
        if not (keep_every and _number(old) % keep_every == 0) and _number(old) != also:
            try:
                _remove(old)
            except OSError as error:  # it costs space and nothing else
                log.warning("cannot remove the old snapshot %s: %s", old, error)


def _remove(path: Path) -> None:
    """Remove a snapshot: gone in one rename, so that a crash leaves no half of one that looks damaged."""
    doomed = path.with_name(f".{path.name}.removed{_TEMPORARY}")
    fault_point("prune.rename")
    shutil.rmtree(doomed, ignore_errors=True)
    path.replace(doomed)
    fault_point("prune.remove")
    shutil.rmtree(doomed)
    fault_point("prune.removed")


def latest_snapshot(directory: Path, *, report: Callable[[str], None]) -> Snapshot | None:
    """The newest snapshot that is whole; None if there is none at all.

    Damaged ones are reported, one sentence each, and skipped. Raises SnapshotError if there are
    snapshots and none of them can be read: starting from nothing would silently lose a run.
    """
    found = _snapshots(directory)
    for path in reversed(found):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            report(f"snapshot {path} is damaged; skipping it: {error}")
    if found:
        raise SnapshotError(
            f"no snapshot in {directory} can be read; remove it to start from scratch"
        )
    return None


def read_snapshot(directory: Path, round_number: int) -> Snapshot:
    """The snapshot after that round; raises SnapshotError if there is none, or it is damaged."""
    path = directory / f"{_PREFIX}{round_number:06d}"
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"snapshot {path} can't be read: {error}") from error


def _snapshots(directory: Path) -> list[Path]:
    """Those of `directory`, oldest round first; other names are somebody else's."""
    found = [path for path in directory.glob(f"{_PREFIX}*") if _number(path) >= 0]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if digits.isdecimal() else -1


def _read(path: Path) -> Snapshot:
    manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    for name in (_MODEL, _OUTER, _MERGED, _STATE):
        if sha256_file(path / name) != manifest[name]:
            raise ValueError(f"{name} does not match its SHA-256")
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    steps, trouble = read_steps(path, state.get("steps", []), manifest)
    if trouble:
        log.warning("%s", trouble)
    return Snapshot(
        round_number=_number(path),
        model=dict(TensorFile(path / _MODEL)),
        outer=TensorFile(path / _OUTER),
        state=state,
        merged=(path / _MERGED).read_text(encoding="utf-8").splitlines(),
        steps=steps,
    )
