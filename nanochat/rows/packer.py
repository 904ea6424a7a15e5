"""The process that packs one shard into a file of rows, and the files that it leaves.

Under the rows directory, by the job's key (a hash of the shard's bytes, the tokenizer, T, the packing
and its version):

    <key>.partial   rows so far, readable while it grows: its size says how many there are
    <key>.state     a recent `PackState`; the rows before it are durable
    <key>.stats     `PackStats`, written when the last row is durable
    <key>.rows      the partial file's name once it is complete
    <key>.lock      held by the one packer

A packer that dies at any instruction leaves files from which the next one continues to the same rows.
It runs as `python -m nanochat.rows.packer JOB` and ends when its parent does: it holds the read end of
a pipe that only the parent writes to, and looks at its parent's id (a fork of the parent may keep the
pipe open).
"""

import contextlib
import dataclasses
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from nanochat.common import run_command_line
from nanochat.errors import UserError
from nanochat.files import atomic_write_json, file_lock, fsync_dir, write_all
from nanochat.rows.encoder import BatchEncoder
from nanochat.rows.packing import Document, PackState, make_packer, row_dtype
from nanochat.source import iter_texts
from nanochat.tokenizer import RustBPETokenizer

_STATE_EVERY_ROWS = 4096  # 16 MB at T = 2048: at most a second or two of work is done again
_LOCK_WAIT_S = 0.5  # readers probe the lock for an instant; a packer holds it for its life
_ORPHAN_CHECK_S = 1.0
_ORPHANED = 3  # exit code


@dataclass(frozen=True, kw_only=True)
class PackStats:
    """What became of a shard; `discarded_share` of its tokens is in no row."""

    rows: int
    documents: int
    tokens: int
    discarded_tokens: int
    repaired_documents: int = 0  # whose bytes were not UTF-8
    first_repaired: int = 0  # the row of the first of them

    @property
    def discarded_share(self) -> float:
        return self.discarded_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """One shard to pack: what goes in and where the rows go."""

    shard_path: str
    tokenizer_dir: str
    tokenizer_sha256: str
    vocab_size: int
    sequence_len: int
    packing: str
    directory: str
    key: str

    @property
    def dtype(self) -> np.dtype:
        return row_dtype(self.vocab_size)

    @property
    def row_bytes(self) -> int:
        return (self.sequence_len + 1) * self.dtype.itemsize

    def path(self, suffix: str) -> Path:
        """`suffix`: "rows", "partial", "state", "stats" or "lock"."""
        return Path(self.directory) / f"{self.key}.{suffix}"

    def partial_rows(self) -> int:
        """Rows that the partial file holds by now; 0 without one."""
        with contextlib.suppress(FileNotFoundError):
            return self.path("partial").stat().st_size // self.row_bytes
        return 0

    def complete(self) -> PackStats | None:
        """The statistics if the rows are all there; None if they are to be packed (again)."""
        try:
            size_bytes = self.path("rows").stat().st_size
            stats = PackStats(**json.loads(self.path("stats").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return stats if size_bytes == stats.rows * self.row_bytes else None


def pack(job: PackJob, *, num_threads: int = 1) -> PackStats:
    """Pack the shard, continuing where an earlier packer stopped. The caller holds the lock.

    Raises UserError for a shard that cannot be read and for another tokenizer than the job's.
    """
    tokenizer = RustBPETokenizer.from_directory(job.tokenizer_dir)
    if tokenizer.fingerprint() != job.tokenizer_sha256:
        raise UserError(
            f"the tokenizer in {job.tokenizer_dir} was replaced while it was in use: start again"
        )
    state = _saved_state(job)
    packer = make_packer(
        job.packing,
        sequence_len=job.sequence_len,
        bos=tokenizer.get_bos_token_id(),
        dtype=job.dtype,
        state=state,
    )
    encoder = BatchEncoder(tokenizer, dtype=job.dtype, num_threads=num_threads)
    repaired: list[int] = []
    documents = _documents(job, encoder, state, repaired)
    partial = job.path("partial")
    with open(partial, "r+b" if state.rows else "wb", buffering=0) as file:
        file.truncate(state.rows * job.row_bytes)
        file.seek(0, os.SEEK_END)
        for row in packer.rows(documents):
            write_all(file, row.data)
            if packer.num_rows % _STATE_EVERY_ROWS == 0:
                os.fsync(file.fileno())
                atomic_write_json(job.path("state"), dataclasses.asdict(packer.state()))
        os.fsync(file.fileno())
    stats = PackStats(
        rows=packer.num_rows,
        documents=packer.documents,
        tokens=packer.tokens,
        discarded_tokens=packer.discarded_tokens,
        repaired_documents=len(repaired),
        first_repaired=repaired[0] if repaired else 0,
    )
    entry = dataclasses.asdict(stats)
    if not repaired:  # in the form that older versions read
        del entry["repaired_documents"], entry["first_repaired"]
    atomic_write_json(job.path("stats"), entry)
    job.path("state").unlink(missing_ok=True)  # first: readers end us once the rows are there
    partial.replace(job.path("rows"))
    fsync_dir(partial.parent)
    return stats


def _saved_state(job: PackJob) -> PackState:
    """The state to continue from; the start of the shard if nothing usable was saved."""
    try:
        entry = json.loads(job.path("state").read_text(encoding="utf-8"))
        state = PackState(**{**entry, "held": tuple(entry["held"])})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return PackState()
    return state if job.partial_rows() >= state.rows else PackState()


def _documents(
    job: PackJob, encoder: BatchEncoder, state: PackState, repaired: list[int]
) -> Iterator[Document]:
    """The documents that `state` wants, tokenized; one without text has no tokens.

    `repaired` gets the numbers of all that were not UTF-8.
    """
    number = 0
    for batch in iter_texts(Path(job.shard_path), repaired=repaired):
        numbered = [(number + i, text or "") for i, text in enumerate(batch)]
        number += len(batch)
        wanted = [(n, text) for n, text in numbered if state.wants(n)]
        ids = encoder.encode([text for _, text in wanted])
        for (n, _), tokens in zip(wanted, ids, strict=True):
            yield n, tokens


def _end_with_parent(parent_pid: int) -> None:
    """End this process, without any cleaning up, within about a second of its parent's death."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            readable, _, _ = select.select([sys.stdin.fileno()], [], [], _ORPHAN_CHECK_S)
            if readable and not os.read(sys.stdin.fileno(), 1):
                break
        os._exit(_ORPHANED)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    entry = json.loads(sys.argv[1])
    _end_with_parent(entry.pop("parent_pid"))
    job = PackJob(**entry)
    try:
        with file_lock(job.path("lock"), timeout_s=_LOCK_WAIT_S):
            if job.complete() is None:
                # Half of the cores: the other half trains meanwhile.
                pack(job, num_threads=max(1, min(8, (os.cpu_count() or 1) // 2)))
    except filelock.Timeout:  # another one packs it
        return
    except OSError as error:
        raise UserError(
            f"cannot write rows to {job.directory} ({error.strerror}): make room there"
        ) from error


if __name__ == "__main__":
    run_command_line(main)
