"""The reader of `events.jsonl`, the record of all that happened in a run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, oldest first; lines torn by a crash are left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
