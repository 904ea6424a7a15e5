"""What `hf:NAME[:SPLIT[:COLUMN]]` names: a dataset of the `datasets` library, and its shards here."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import get_base_dir, user_path
from nanochat.errors import UserError

PREFIX = "hf:"
# The validation shard of every such source. The length of a stream is not known, so the last number of the
# collection is fixed instead: more training shards can follow later without moving it.
VAL_SHARD = 99_999
_DIRECTORY = "base_data_hf"
_MANIFEST = "hf_dataset.json"


@dataclass(frozen=True)
class HfName:
    """A dataset's name on the hub or its absolute path here, the split, and the column with the text."""

    name: str
    split: str = "train"
    column: str = "text"

    @staticmethod
    def parse(text: str) -> "HfName":
        """From `hf:NAME[:SPLIT[:COLUMN]]`; UserError for any other form."""
        rest = text.removeprefix(PREFIX)
        if rest and user_path(rest).exists():  # a path may hold colons
            return HfName(str(user_path(rest)))
        parts = rest.split(":")
        if len(parts) > 3 or not all(parts):
            raise UserError(
                f"{text!r} is not hf:NAME[:SPLIT[:COLUMN]]: name a dataset of the hub, or the path of "
                "a local one"
            )
        if user_path(parts[0]).exists():
            parts[0] = str(user_path(parts[0]))
        return HfName(*parts)

    def __str__(self) -> str:
        """The shortest spelling: equal datasets have equal ones."""
        parts = [self.name, self.split, self.column]
        defaults = ["", "train", "text"]
        while parts[-1] == defaults[len(parts) - 1]:
            parts.pop()
        return PREFIX + ":".join(parts)

    @property
    def local_path(self) -> Path | None:
        """Where the dataset is, if it is on this machine."""
        path = user_path(self.name)
        return path.resolve() if path.exists() else None

    @property
    def directory(self) -> Path:
        """Where its shards go."""
        identity = [str(self.local_path or self.name), self.split, self.column]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        parent = get_base_dir() / _DIRECTORY
        for made in sorted(parent.glob(f"*-{digest}")):  # by another spelling of the same path
            return made
        safe = re.sub(r"[^\w.-]+", "_", self.name).strip("_.") or "dataset"
        return parent / f"{safe[-60:]}-{digest}"

    @property
    def manifest_path(self) -> Path:
        return self.directory / _MANIFEST

    def manifest(self) -> dict[str, Any]:
        """What was made so far; empty if nothing was, or if the file is damaged."""
        try:
            entry = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return entry if isinstance(entry, dict) else {}

    def num_train_shards(self) -> int | None:
        """Training shards of the whole dataset; None until its end was reached here."""
        manifest = self.manifest()
        return len(manifest["shards"]) if manifest.get("complete") else None
