"""`base_checkpoints/<tag>` belongs to one run, and while that trains to one process.

Its lock lies beside it. What an earlier run left there is never mixed with a new one's steps: it is
moved to `replaced-<n>` within, where `--checkpoint <tag>/replaced-<n>` still finds it.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

from nanochat.errors import UserError
from nanochat.files import file_lock, fsync_dir, remove_strays

_FILE_NAME = re.compile(r"(?:meta_(\d+)\.json|model_(\d+)\.pt|optim_(\d+)_rank\d+\.pt)")
_ASIDE = "replaced-"


@contextlib.contextmanager
def own(directory: Path) -> Iterator[list[str]]:
    """Hold the directory's lock; the names of what killed saves had left there, which is removed.

    The directory itself is made by the first save. Raises UserError while another process holds it.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            lock = directory.with_name(f".{directory.name}.lock")
            held.enter_context(file_lock(lock, timeout_s=0))
            removed = remove_strays(directory) + _remove_orphans(directory)
            lasting = held.pop_all()
    except Timeout as error:
        raise UserError(
            f"another process trains into {directory}: wait for its end, or choose another --run"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write to {directory} ({error.strerror}): make that possible"
        ) from error
    with lasting:
        yield removed


def steps_after(directory: Path, step: int) -> list[int]:
    """The steps later than `step` of which any file is there, ascending."""
    return sorted(number for number in _files(directory) if number > step)


def set_aside(directory: Path, *, after: int) -> Path | None:
    """Move the files of all steps later than `after` away; where to, or None if there are none.

    Meta files go first: killed in between, no step looks whole that isn't.
    """
    found = _files(directory)
    later = [path for step in steps_after(directory, after) for path in found[step]]
    if not later:
        return None
    number = 1
    while (target := directory / f"{_ASIDE}{number}").exists():
        number += 1
    target.mkdir()
    for path in sorted(later, key=lambda path: not path.name.startswith("meta_")):
        path.replace(target / path.name)
    fsync_dir(target)
    fsync_dir(directory)
    return target


def remove_step(directory: Path, step: int) -> None:
    """Remove the files of a step, the meta file first."""
    paths = _files(directory).get(step, [])
    for path in sorted(paths, key=lambda path: not path.name.startswith("meta_")):
        path.unlink(missing_ok=True)


def prune(directory: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` steps (0: none). Raises OSError."""
    for step in sorted(_files(directory))[:-keep] if keep else []:
        remove_step(directory, step)


def check_room(directory: Path, needed_bytes: int) -> None:
    """Raise UserError unless the disk has room for a checkpoint of that size."""
    free_bytes = shutil.disk_usage(directory if directory.exists() else directory.parent).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"a checkpoint of this run takes {needed_bytes / 1e9:,.2f} GB and the disk of {directory} "
            f"has {free_bytes / 1e9:,.2f} GB left: make room there"
        )


def _files(directory: Path) -> dict[int, list[Path]]:
    """All files of checkpoints by their step."""
    found: dict[int, list[Path]] = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        if match := _FILE_NAME.fullmatch(path.name):
            found.setdefault(int(next(filter(None, match.groups()))), []).append(path)
    return found


def _remove_orphans(directory: Path) -> list[str]:
    """Remove optimizer shards of steps that have nothing else: a save was killed before the weights."""
    removed = []
    for step, paths in _files(directory).items():
        if all(path.name.startswith("optim_") for path in paths):
            remove_step(directory, step)
            removed += [path.name for path in paths]
    return sorted(removed)
