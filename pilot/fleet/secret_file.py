"""Files that hold secrets: written whole, for their owner alone. Standard library only."""

import contextlib
import os
import tempfile
from pathlib import Path

from pilot.errors import PilotError

_OTHERS = 0o077


def private_directory(path: Path) -> Path:
    """`path` as a directory of mode 0700, made if it is missing. Raises PilotError if others may enter it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_mode(path, "700")
    return path


def write_secret(path: Path, content: bytes | str) -> None:
    """Write a file of mode 0600, whole or not at all (temporary name, fsync, rename)."""
    data = content.encode() if isinstance(content, str) else content
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_secret(path: Path) -> bytes:
    """The content of a secret file. Raises PilotError if others may read it, or FileNotFoundError."""
    _check_mode(path, "600")
    return path.read_bytes()


def _check_mode(path: Path, wanted: str) -> None:
    status = path.stat()
    if status.st_mode & _OTHERS or status.st_uid != os.getuid():
        raise PilotError(
            f"{path} holds secrets, and others have access to it (mode {status.st_mode & 0o777:o}, "
            f"user id {status.st_uid}): give it to yourself alone, `chmod {wanted} {path}`"
        )
