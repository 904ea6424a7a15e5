"""The last steps of a run's global model, for clients that missed some: in memory for a round, then on disk.

Each is a file of its own in the snapshots that keep it, which share it by a hard link: a step is written once.
One that cannot be read costs clients that missed it the whole model, and nothing else.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nanochat.files import sha256_file
from pilot.wire.messages import Part

_NAME_CHARS = 16  # of a digest

log = logging.getLogger("pilot")


@dataclass
class Step:
    """What leads from the global model of digest `before` to that of digest `after`.

    `parts` None: they are in the file `path` only, whose hash is `sha256`.
    """

    before: str
    after: str
    parts: Sequence[Part] | None = None
    path: Path | None = None
    sha256: str = ""

    @property
    def file_name(self) -> str:
        return f"step-{self.after[:_NAME_CHARS]}.safetensors"

    def load(self) -> Sequence[Part]:
        """Its parts. Raises OSError or ValueError if its file is not what was written."""
        if self.parts is not None:
            return self.parts
        assert self.path is not None
        try:
            with safe_open(self.path, framework="np") as file:
                listed = json.loads((file.metadata() or {})["parts"])
                return [
                    Part(name, form, tuple(shape), file.get_tensor(name).tobytes())
                    for name, form, shape in listed
                ]
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error

    def put(self, directory: Path) -> None:
        """Have its file in `directory`, durable. Raises OSError where the disk does not take it.

        One that is gone from everywhere is left out, with a warning.
        """
        path = directory / self.file_name
        if self.path is not None and _share(self.path, path):
            return
        if self.parts is None:
            log.warning("%s is gone: clients that missed this step get the whole model", self.path)
            return
        self.sha256 = self._write(path)

    def _write(self, path: Path) -> str:
        """Write its parts as safetensors, hashed on the way, without a second copy of them: the SHA-256."""
        parts, end = self.parts or (), 0
        names = [[part.name, part.dtype, list(part.shape)] for part in parts]
        header: dict[str, Any] = {"__metadata__": {"parts": json.dumps(names)}}
        for part in parts:
            first, end = end, end + len(part.data)
            place = {"dtype": "U8", "shape": [end - first], "data_offsets": [first, end]}
            header[part.name] = place
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for piece in (struct.pack("<Q", len(text)), text, *(part.data for part in parts)):
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def moved(self, directory: Path, *, keep_parts: bool) -> None:
        """Its file is in `directory` now; its parts may be forgotten."""
        self.path = directory / self.file_name
        if not keep_parts:
            self.parts = None


def _share(old: Path, new: Path) -> bool:
    """Whether `new` is now the file `old`, which may be on a disk without links, or gone."""
    with contextlib.suppress(OSError):
        os.link(old, new)
        return True
    try:
        shutil.copyfile(old, new)
    except FileNotFoundError:
        return False
    with new.open("rb") as file:
        os.fsync(file.fileno())
    return True


def read_steps(
    directory: Path, listed: Sequence[Sequence[str]], sums: Mapping[str, str]
) -> tuple[list[Step], str]:
    """The steps in `directory`, oldest first, and a sentence if one is damaged: it and those before it are
    left out.

    `listed`: (before, after) of each; `sums`: file name -> SHA-256.
    """
    steps: list[Step] = []
    for before, after in reversed(listed):
        step = Step(before, after)
        step.path, step.sha256 = directory / step.file_name, sums.get(step.file_name, "")
        try:
            if sha256_file(step.path) != step.sha256:
                raise ValueError("it does not match its SHA-256")
        except (OSError, ValueError) as error:
            return steps[::-1], f"{step.path} cannot be used, so clients get more: {error}"
        steps.append(step)
    return steps[::-1], ""
