"""What a provisioner tells, and what it hears: events of its own in the run's record, replies of the
server's."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanochat.files import write_all
from pilot.run.events import EVENTS_FILE
from pilot.wire.jsonable import jsonable, redact

_NEWLINE = b"\n"


class EventLog:
    """Events go to the run's `events.jsonl` while its directory is on this machine, else to a file of our
    own; `show` takes each as a line for people, or as JSON."""

    def __init__(
        self,
        run_directory: Path,
        own_directory: Path,
        *,
        now_s: Callable[[], float],
        show: Callable[[str], None],
        as_json: bool = False,
    ) -> None:
        self._run_directory, self._own = run_directory, own_directory / EVENTS_FILE
        self._now_s, self._show, self._as_json = now_s, show, as_json
        self._works = True

    def show(self, kind: str, message: str, **fields: Any) -> str:
        """Show that `kind` is so, without recording it; an empty `message` is not for people. Returns it
        as JSON."""
        record: dict[str, Any] = {"time": self._now_s(), "event": kind}
        if message:
            record["message"] = redact(message)
        record |= {name: jsonable(value) for name, value in fields.items()}
        line = json.dumps(record, allow_nan=False)
        if self._as_json:
            self._show(line)
        elif message:
            self._show(redact(message))
        return line

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Record that `kind` happened, and show it."""
        line = self.show(kind, message, **fields)
        try:
            self._append(line.encode() + _NEWLINE)
            self._works = True
        except OSError as error:
            if self._works:
                self._show(f"events are not being recorded: {error.strerror}")
            self._works = False

    def _append(self, line: bytes) -> None:
        """In one write at the end, since the server appends to the same file."""
        path = self._own
        if self._run_directory.is_dir():
            path = self._run_directory / EVENTS_FILE
            if self._own.exists():  # what happened before the run had a directory
                line = self._own.read_bytes() + line
        with path.open("ab", buffering=0) as file:
            write_all(file, (_NEWLINE if _torn(path) else b"") + line)
        if path != self._own:
            self._own.unlink(missing_ok=True)


def _torn(path: Path) -> bool:
    """Whether a crash left half a line at the end, to which nothing must be glued."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != _NEWLINE


class Follower:
    """Reads what the server appends to the run's events; `offset`: up to where it has read."""

    def __init__(self, run_directory: Path, offset: int | None) -> None:
        """None: from now on."""
        self._path = run_directory / EVENTS_FILE
        self.offset = self._size() if offset is None else offset

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Events that are new, whole lines only."""
        if self._size() <= self.offset:
            return
        with self._path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(_NEWLINE):
                    return  # being written
                self.offset += len(line)
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict):
                    yield record
