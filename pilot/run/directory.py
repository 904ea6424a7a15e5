"""The directory of a run, `$NANOCHAT_BASE_DIR/runs/<run-name>/`, and what it says about the run.

lock            held by the one live server        snapshots/     round-000007/, …
term            how often the server has started   spool/         replies of the open round
events.jsonl    all that happened                  quarantine/    refused replies, if they are kept
final_model.pt  the run is finished
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

from nanochat.checkpoint_manager import FINAL_MODEL_NAME
from nanochat.common import get_base_dir
from nanochat.files import atomic_write_text, file_lock, fsync_dir, remove_strays
from pilot.errors import PilotError
from pilot.faults import fault_point

log = logging.getLogger("pilot")


class RunDirError(PilotError):
    """This run can't be led from here now."""


@contextlib.contextmanager
def open_run_dir(run_name: str, *, within_s: float = 0.0) -> Iterator[Path]:
    """The run's directory, ours alone until exit.

    Raises RunDirError if another live server still has it after `within_s` seconds (one whose SuperLink was
    killed takes a moment to end), or the run is finished.
    """
    directory = get_base_dir() / "runs" / run_name
    _make(directory)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(file_lock(directory / "lock", timeout_s=within_s))
        except Timeout as error:
            raise RunDirError(
                f"another server on this machine leads run {run_name}: stop it, "
                "or choose another run-name"
            ) from error
        if (directory / FINAL_MODEL_NAME).exists():
            raise RunDirError(
                f"run {run_name} is finished ({directory / FINAL_MODEL_NAME}): "
                "choose another run-name"
            )
        for where in (directory, directory / "snapshots"):
            for name in remove_strays(where):
                log.info("Removed %s, which a crash left half-written", where / name)
        yield directory


def _make(directory: Path) -> None:
    if directory.is_dir():
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fsync_dir(directory.parent)
    except OSError as error:
        raise RunDirError(f"cannot make {directory}: {error.strerror}") from error
    fault_point("run-dir.created")


def next_term(directory: Path) -> int:
    """Count this start of the server, durably, and return the count.

    Raises RunDirError if the count can't be read or written: without it, replies of an earlier start
    could not be distinguished from those of this one.
    """
    path = directory / "term"
    try:
        before = int(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        before = 0
    except ValueError as error:
        raise RunDirError(
            f"{path} does not hold a number: restore it or remove {directory}"
        ) from error
    try:
        fault_point("term.write")
        atomic_write_text(path, f"{before + 1}\n")
        fault_point("term.written")
    except OSError as error:
        raise RunDirError(f"cannot write {path}: {error.strerror}") from error
    return before + 1
