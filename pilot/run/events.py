"""The readers of `events.jsonl`, the record of all that happened in a run; docs/events.md is its format."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"
EVENTS_VERSION = 2  # of docs/events.md; `run_started` names it since 2


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file of any version, oldest first; lines torn by a crash are left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if (record := _record(line)) is not None:
                yield record


class NewEvents:
    """The events of a file that grows, each once: a read begins where the last one ended.

    `most_bytes` of one read; the rest is for the next. A line that is longer is left out.
    """

    def __init__(self, path: Path, *, most_bytes: int = 16 << 20) -> None:
        self._path, self._most_bytes = path, most_bytes
        self._inode = 0
        self._skipping = False
        self.offset = 0  # bytes that have been read
        self.size = 0  # of the file, at the last read
        self.files = 0  # another file than before, or a shorter one, begins from its first event

    def read(self) -> list[dict[str, Any]]:
        """The events since the last read; a line that is not whole yet is left for later. Raises OSError."""
        with self._path.open("rb") as file:
            found = file.seek(0, 2)
            inode = self._path.stat().st_ino
            if inode != self._inode or found < self.offset:
                self._inode, self.offset, self._skipping = inode, 0, False
                self.files += 1
            self.size = found
            file.seek(self.offset)
            block = file.read(self._most_bytes)
        whole, newline, _ = block.rpartition(b"\n")
        if not newline:
            if len(block) < self._most_bytes:
                return []
            self.offset += len(block)
            self._skipping = True
            return []
        self.offset += len(whole) + 1
        lines = whole.split(b"\n")
        if self._skipping:
            lines, self._skipping = lines[1:], False
        return [record for line in lines if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
