"""A run in Weights & Biases that never ends the training: the one rule for all programs here.

Online only with a key, since nobody is asked for one; out of reach: offline, with a sentence; whatever
else W&B raises: without it, with a sentence.
"""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WANDB_MODES = ("auto", "online", "offline", "disabled")
INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 60.0  # an upload over a dead network would hold up the end of the run


class WandbRun:
    """The W&B run `run_id`: new, or the one of that id continued.

    mode: one of WANDB_MODES. warn: gets each sentence for people. quiet: W&B itself prints nothing.
    """

    def __init__(
        self,
        *,
        mode: str,
        project: str,
        name: str,
        run_id: str,
        directory: Path,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
        quiet: bool,
    ) -> None:
        self._warn, self._directory = warn, directory
        self._run: Any = None
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        if mode == "disabled":
            return
        options = {
            "project": project,
            "name": name,
            "id": run_id,
            "dir": str(directory),
            "config": config,
        }
        try:
            self._start(mode, options, quiet=quiet)
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run continues
            self._without(error)

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        """Record finite numbers of one global step."""
        if self._run is None:
            return
        try:
            self._run.log(values, step=step)
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run continues
            self._without(error)

    def finish(self, *, exit_code: int = 0, timeout_s: float = FINISH_TIMEOUT_S) -> None:
        """End the W&B run, waiting at most `timeout_s`; harmless when repeated."""
        run, self._run = self._run, None
        if run is None:
            return
        thread = threading.Thread(target=self._finish, args=(run, exit_code), daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            where = self._directory / "wandb"
            self._warn(f"W&B did not finish its upload; later: wandb sync {where}")

    def _start(self, mode: Any, options: dict[str, Any], *, quiet: bool) -> None:
        import wandb  # slow to import, and not needed when disabled

        settings = wandb.Settings(
            silent=quiet,
            console="off",  # the program's own lines are kept elsewhere
            disable_git=True,
            disable_code=True,
            init_timeout=INIT_TIMEOUT_S,
        )
        resume: Any = "allow" if mode == "online" else None  # offline runs merge when synced
        try:
            self._run = wandb.init(mode=mode, resume=resume, settings=settings, **options)
        except Exception as error:
            if mode == "offline":
                raise
            self._warn(f"W&B cannot be reached, continuing offline: {error}")
            self._run = wandb.init(mode="offline", settings=settings, **options)

    def _without(self, error: Exception) -> None:
        self._run = None
        self._warn(f"W&B failed, continuing without it: {error}")

    def _finish(self, run: Any, exit_code: int) -> None:
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run has ended well
            self._warn(f"W&B failed to finish: {error}")
