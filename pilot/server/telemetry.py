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
from nanochat.wandb_run import FINISH_TIMEOUT_S, WandbRun
from pilot.faults import fault_point
from pilot.run.events import EVENTS_FILE
from pilot.wire.jsonable import jsonable, redact

logger = logging.getLogger("pilot")

WANDB_FINISH_TIMEOUT_S = FINISH_TIMEOUT_S


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
        self._wandb = WandbRun(
            mode=wandb_mode,
            project=wandb_project,
            name=run_name,
            run_id=self.wandb_id,
            directory=run_dir,
            config=jsonable(config_dict),
            warn=lambda text: logger.warning("%s", redact(text)),
            quiet=True,  # Flower's log stream already wraps the output
        )

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
        finite = {name: jsonable(value) for name, value in numbers.items()}
        finite = {name: value for name, value in finite.items() if value is not None}
        self._wandb.log(finite, step=step)

    def close(self, *, exit_code: int = 0) -> None:
        """Finish the W&B run; events may still be recorded. Harmless when repeated."""
        self._wandb.finish(exit_code=exit_code, timeout_s=WANDB_FINISH_TIMEOUT_S)

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


def _append_whole(file: io.FileIO, line: bytes) -> None:
    """Append `line`, or raise OSError and leave the file as it was: the next line must not be glued to half
    of this one."""
    end = file.seek(0, os.SEEK_END)
    try:
        write_all(file, line)
    except OSError:
        file.truncate(end)
        raise
