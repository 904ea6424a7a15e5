"""Files are written whole or not at all: temporary name, fsync, rename.

A process may be killed between any two instructions. `os.replace` is atomic on POSIX file systems, but
only what was fsynced before it survives a power cut, and the new name itself only once its directory
is fsynced too; every writer of the project therefore goes through this module.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

_HASH_CHUNK_BYTES = 1 << 20
_SHA256_CHARS = 64
_TEMPORARY = ".tmp"  # how the names of files end that are not whole yet


def fsync_dir(directory: Path) -> None:
    """Make the names in `directory` durable (a rename is not, until this)."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_file(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on a clean exit it is fsynced and takes its name.

    On any exception the temporary file is removed and what was at `path` is untouched.
    Raises OSError when the disk is full or the directory is missing.
    """
    path = Path(path)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
    try:
        encoding = None if "b" in mode else "utf-8"
        with os.fdopen(fd, mode, encoding=encoding) as file:
            os.fchmod(file.fileno(), 0o644)
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    fsync_dir(path.parent)


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """`atomic_file` for writers that want a name, not a file: what they write there is fsynced and
    takes its place at `path`, or is removed on any exception."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    """Write all of `data` to an unbuffered file.

    One write may take only a part: a disk that fills up takes what fits and refuses the next.
    """
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    with atomic_file(path, "wb") as file:
        file.write(data)


def atomic_write_text(path: Path | str, text: str) -> None:
    with atomic_file(path, "w") as file:
        file.write(text)


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinities are refused (they are not JSON)."""
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def remove_strays(directory: Path) -> list[str]:
    """Remove what crashes left half-written in `directory`; the names. For its only user, at its start."""
    strays = sorted(directory.glob(f".*{_TEMPORARY}")) if directory.is_dir() else []
    for stray in strays:
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)
    return [stray.name for stray in strays]


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def remembered_sha256(path: Path, directory: Path) -> str:
    """`sha256_file`, kept in `directory` for as long as nothing has touched the file.

    A shard has some 100 MB: a resumed run would wait longer for its hash than for its rows.
    """
    stat = path.stat()
    # a change of content moves ctime, too, which no program can set back
    touched = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    name = hashlib.sha256(json.dumps([str(path.resolve()), *touched]).encode()).hexdigest()[:32]
    remembered = directory / f"{name}.sha256"
    with contextlib.suppress(OSError, ValueError):
        sha256 = remembered.read_text(encoding="ascii").strip()
        if len(sha256) == _SHA256_CHARS:
            return sha256
    sha256 = sha256_file(path)
    with contextlib.suppress(OSError):  # a full disk: it is hashed again next time
        atomic_write_text(remembered, sha256 + "\n")
    return sha256


@contextlib.contextmanager
def file_lock(path: Path | str, timeout_s: float = -1) -> Iterator[None]:
    """Hold an exclusive lock on `path` (kept by the kernel: it ends with its holder, however that dies).

    `timeout_s` < 0 waits without limit; otherwise `filelock.Timeout` is raised after it.
    """
    with FileLock(str(path), timeout=timeout_s):
        yield
