"""One stream of events -> the console, a JSONL file of the run, and W&B.

What happens in a run is said once, as an event; `events.jsonl` is the record that tests, tables and
plots read. Telemetry never ends a run: values of any type are written in some form, a full disk or a
W&B that fails costs one warning.
"""

import io
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanochat.files import write_all
from pilot.faults import fault_point
from pilot.run.events import EVENTS_FILE
from pilot.wire.jsonable import jsonable, redact

logger = logging.getLogger("pilot")

WANDB_MODES = ("auto", "online", "offline", "disabled")
WANDB_INIT_TIMEOUT_S = 60.0
WANDB_FINISH_TIMEOUT_S = 60.0  # an upload over a dead network would hold up the end of the run


class Telemetry:
    """The event stream of one run, written in `run_dir` (which must exist).

    `wandb_mode`: "auto" (online with WANDB_API_KEY in the environment, else offline), "online",
    "offline" or "disabled". `wandb_id` continues that W&B run; `.wandb_id` is the one in use, to be
    kept for a resume. Credentials in URLs are cut out of everything that is written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config_dict: Mapping[str, Any],
        wandb_mode: str,
        wandb_project: str,
        run_name: str,
        wandb_id: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.events_path = run_dir / EVENTS_FILE
        self.wandb_id = wandb_id or secrets.token_hex(4)
        self._clock = clock
        self._lock = threading.Lock()
        self._file_works = True
        self._close_torn_line()
        self._wandb: Any = None
        if wandb_mode == "auto":
            wandb_mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        if wandb_mode != "disabled":
            options = {
                "project": wandb_project,
                "name": run_name,
                "id": self.wandb_id,
                "dir": str(run_dir),
                "config": jsonable(config_dict),
            }
            self._start_wandb(wandb_mode, options)

    def event(self, kind: str, message: str | None = None, **fields: Any) -> None:
        """Record that `kind` happened, with its fields; `message` is its line on the console."""
        record: dict[str, Any] = {"time": self._clock(), "event": kind}
        if message is not None:
            message = redact(message)
            record["message"] = message
            logger.info("%s", message)
        for name, value in fields.items():
            record[f"{name}_" if name in record else name] = jsonable(value)
        self._append(record)

    def metrics(self, step: int, **numbers: Any) -> None:
        """Record numbers of one global step, as an event and in W&B."""
        self.event("metrics", step=step, **numbers)
        if self._wandb is not None:
            finite = {name: jsonable(value) for name, value in numbers.items()}
            finite = {name: value for name, value in finite.items() if value is not None}
            try:
                self._wandb.log(finite, step=step)
            except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run continues
                self._without_wandb(error)

    def close(self, *, exit_code: int = 0) -> None:
        """Finish the W&B run; events may still be recorded. Harmless when repeated."""
        run, self._wandb = self._wandb, None
        if run is None:
            return
        finish = threading.Thread(target=self._finish, args=(run, exit_code), daemon=True)
        finish.start()
        finish.join(WANDB_FINISH_TIMEOUT_S)
        if finish.is_alive():
            logger.warning(
                "W&B did not finish its upload; later: wandb sync %s",
                self.events_path.parent / "wandb",
            )

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def _close_torn_line(self) -> None:
        """A crash may have left half a line: what follows must not be glued to it."""
        try:
            with self.events_path.open("rb+") as file:
                if file.seek(0, os.SEEK_END) == 0:
                    return
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
        except FileNotFoundError:
            pass

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock:
            try:
                fault_point("event.write")
                with self.events_path.open("ab", buffering=0) as file:
                    _append_whole(file, line)
                self._file_works = True
            except OSError as error:
                if self._file_works:
                    logger.warning("events are not being recorded: %s", error)
                self._file_works = False

    def _start_wandb(self, mode: Any, options: dict[str, Any]) -> None:
        try:
            import wandb

            settings = wandb.Settings(
                silent=True,
                console="off",  # Flower's log stream already wraps the output
                disable_git=True,
                disable_code=True,
                init_timeout=WANDB_INIT_TIMEOUT_S,
            )
            resume: Any = "allow" if mode == "online" else None  # offline runs merge when synced
            try:
                self._wandb = wandb.init(mode=mode, resume=resume, settings=settings, **options)
            except Exception as error:
                if mode == "offline":
                    raise
                logger.warning("W&B cannot be reached, continuing offline: %s", redact(str(error)))
                self._wandb = wandb.init(mode="offline", settings=settings, **options)
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run continues
            self._without_wandb(error)

    def _without_wandb(self, error: Exception) -> None:
        self._wandb = None
        logger.warning("W&B failed, continuing without it: %s", redact(str(error)))

    @staticmethod
    def _finish(run: Any, exit_code: int) -> None:
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run has ended well
            logger.warning("W&B failed to finish: %s", redact(str(error)))


def _append_whole(file: io.FileIO, line: bytes) -> None:
    """Append `line`, or raise OSError and leave the file as it was: the next line must not be glued to half
    of this one."""
    end = file.seek(0, os.SEEK_END)
    try:
        write_all(file, line)
    except OSError:
        file.truncate(end)
        raise
