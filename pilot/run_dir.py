"""The directory of a run, `$NANOCHAT_BASE_DIR/runs/<run-name>/`, and what it says about the run.

lock            held by the one live server        snapshots/     round-000007/, …
term            how often the server has started   spool/         replies of the open round
events.jsonl    all that happened                  final_model.pt the run is finished
"""

import contextlib
import datetime
import secrets
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

from nanochat.checkpoint_manager import FINAL_MODEL_NAME
from nanochat.common import get_base_dir
from nanochat.files import atomic_write_text, file_lock
from pilot.config import PilotError


class RunDirError(PilotError):
    """This run can't be led from here now."""


def generated_name() -> str:
    """A name nobody has used: date, time and four random hex digits."""
    now = datetime.datetime.now().astimezone()
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@contextlib.contextmanager
def open_run_dir(run_name: str) -> Iterator[Path]:
    """The run's directory, ours alone until exit.

    Raises RunDirError if another live server has it, or the run is finished.
    """
    directory = get_base_dir() / "runs" / run_name
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(file_lock(directory / "lock", timeout_s=0))
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
        yield directory


def next_term(directory: Path) -> int:
    """Count this start of the server, durably, and return the count."""
    path = directory / "term"
    try:
        before = int(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        before = 0
    except ValueError as error:
        raise RunDirError(
            f"{path} does not hold a number: restore it or remove {directory}"
        ) from error
    atomic_write_text(path, f"{before + 1}\n")
    return before + 1
