"""One stream of events -> the console, a JSONL file of the run, W&B, TensorBoard, Prometheus, and alerts.

What happens in a run is said once, as an event; `events.jsonl` is the record that tests, tables and
plots read. Telemetry never ends a run and never delays a round: values of any type are written in some form,
a full disk or a W&B that fails costs one warning, and what is slow or away is served by a thread.
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
from pilot.server.alerts import Alerts
from pilot.server.prometheus import Prometheus
from pilot.server.sinks import Sink, Sinks, TensorBoard
from pilot.wire.jsonable import jsonable, redact

logger = logging.getLogger("pilot")

WANDB_FINISH_TIMEOUT_S = FINISH_TIMEOUT_S


class Telemetry:
    """The event stream of one run, written in `run_dir` (which must exist).

    `wandb_mode`: "auto" (online with WANDB_API_KEY in the environment, else offline), "online",
    "offline" or "disabled". `wandb_id` continues that W&B run; `.wandb_id` is the one in use, to be
    kept for a resume. `tensorboard`: write scalars to `run_dir`/tensorboard. Credentials in URLs are cut
    out of everything that is written.
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
        tensorboard: bool = False,
        prometheus: Prometheus | None = None,
        alerts: Alerts | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.events_path = run_dir / EVENTS_FILE
        self.wandb_id = wandb_id or secrets.token_hex(4)
        self._clock = clock
        self._lock = threading.Lock()
        self._file_works = True
        self._close_torn_line()
        self._prometheus, self._alerts = prometheus, alerts
        config = jsonable(config_dict)
        opening: list[Callable[[], Sink]] = []
        if wandb_mode != "disabled":
            opening.append(
                lambda: WandbRun(
                    mode=wandb_mode,
                    project=wandb_project,
                    name=run_name,
                    run_id=self.wandb_id,
                    directory=run_dir,
                    config=config,
                    warn=lambda text: logger.warning("%s", redact(text)),
                    quiet=True,  # Flower's log stream already wraps the output
                )
            )
        if tensorboard:
            opening.append(lambda: TensorBoard(run_dir / "tensorboard"))
        self._sinks = Sinks(opening)

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
        self._follow(record)

    def metrics(self, step: int, **numbers: Any) -> None:
        """Record numbers of one global step, as an event and in all sinks."""
        self.event("metrics", step=step, **numbers)
        finite = {name: jsonable(value) for name, value in numbers.items()}
        finite = {name: value for name, value in finite.items() if value is not None}
        self._sinks.log(finite, step=step)
        if self._prometheus is not None:
            self._prometheus.metrics(finite)

    def close(self, *, exit_code: int = 0) -> None:
        """Finish sinks and alerts; events may still be recorded. Harmless when repeated."""
        if self._alerts is not None:
            self._alerts.close(exit_code=exit_code, now=self._clock())
            self._alerts = None
        self._sinks.finish(exit_code=exit_code, timeout_s=WANDB_FINISH_TIMEOUT_S)
        if self._prometheus is not None:
            self._prometheus.close()
            self._prometheus = None

    def _follow(self, record: Mapping[str, Any]) -> None:
        for follower in (self._prometheus, self._alerts):
            try:
                if follower is not None:
                    follower.event(record)
            except Exception as error:  # noqa: BLE001 - an odd event ends no run
                logger.debug("%s: %s", type(follower).__name__, redact(str(error)))

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
