"""The ends of files that grow: of events, and of the logs of a fleet."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_END_BYTES = 1 << 18  # of a file whose last lines are wanted


def last_events(path: Path, most_bytes: int = _END_BYTES) -> list[dict[str, Any]]:
    """The events in the last bytes of a file, oldest first; none if it cannot be read."""
    found = []
    for line in Growing(path).last_lines(most_bytes):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


@dataclass
class Growing:
    """A file from which only new lines are read; one that is replaced or cut begins again."""

    path: Path
    _at: int = 0
    _inode: int = 0
    _rest: bytes = b""

    def last_lines(self, most_bytes: int = _END_BYTES) -> list[str]:
        """The whole lines in its last bytes, after which come the new ones; none if it cannot be read."""
        try:
            with self.path.open("rb") as file:
                self._inode = os.fstat(file.fileno()).st_ino
                size = file.seek(0, os.SEEK_END)
                start = file.seek(max(0, size - most_bytes))
                data = file.read(most_bytes)
        except OSError:
            return []
        self._at = start + len(data)
        *lines, self._rest = data.split(b"\n")
        return [line.decode("utf-8", "replace") for line in (lines[1:] if start else lines)]

    def new_lines(self) -> list[str]:
        """Whole lines since the last call; none while the file cannot be read."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._at:
                    self._at, self._inode, self._rest = 0, found.st_ino, b""
                file.seek(self._at)
                data = file.read(1 << 24)
        except OSError:
            return []
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]
