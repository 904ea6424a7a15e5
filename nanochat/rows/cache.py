"""Rows for training: each shard is packed once and served from a memory-mapped file.

Training never tokenizes. The first reader of a shard starts one background process that packs it
(`nanochat.rows.packer`); all readers, in any process of the machine, read the rows that are there and
wait for the next ones. If the packer dies, one of its readers starts another, which continues.
"""

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np

import nanochat
from nanochat.common import get_base_dir
from nanochat.errors import UserError
from nanochat.files import file_lock, remembered_sha256
from nanochat.rows.packer import PackJob, PackStats
from nanochat.rows.packing import PACKING_VERSION, PACKINGS, row_dtype
from nanochat.source import Source, repaired_rows
from nanochat.tokenizer import RustBPETokenizer

_LOG = logging.getLogger(__name__)
_POLL_S = 0.05
_PACKER_DEATHS = 3  # then it is not bad luck
_USER_ERROR_CODE = 2  # of run_command_line

StopCheck = Callable[[], bool]


class RowCache:
    """The rows of a source's shards for one tokenizer, T and packing.

    Cache files are named by content, in `$NANOCHAT_BASE_DIR/rows/` unless `directory` says otherwise:
    runs and processes share them. Packers that it started end with it (`close`, or the process's end).
    """

    def __init__(
        self,
        source: Source,
        tokenizer: RustBPETokenizer,
        *,
        sequence_len: int,
        packing: str,
        directory: Path | None = None,
    ) -> None:
        if packing not in PACKINGS:
            raise UserError(f"unknown packing {packing!r}: choose one of {', '.join(PACKINGS)}")
        if sequence_len < 1:
            raise UserError(f"a sequence length of {sequence_len} is too short: choose at least 1")
        if tokenizer.directory is None:
            raise ValueError("save the tokenizer first: packers load it from its directory")
        self.source = source
        self.sequence_len = sequence_len
        self.packing = packing
        self.directory = directory or get_base_dir() / "rows"
        self._tokenizer_dir = str(tokenizer.directory.resolve())
        self._tokenizer_sha256 = tokenizer.fingerprint()
        self._vocab_size = tokenizer.get_vocab_size()
        self._shards: dict[int, ShardRows] = {}

    def fingerprint(self) -> str:
        """Equal on sites that make the same rows from the same shard."""
        rules = [self._tokenizer_sha256, self.sequence_len, self.packing, PACKING_VERSION]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    def rows(self, shard: int) -> "ShardRows":
        """The rows of `shard`; starts packing them if they are not packed. UserError without the shard."""
        if shard not in self._shards:
            self.source.ensure([shard])
            path = self.source.shard_path(shard)
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                names = f"{remembered_sha256(path, self.directory)} {self.fingerprint()}"
            except OSError as error:
                raise UserError(
                    f"{path} cannot be read ({error.strerror}): make it readable, or get it again"
                ) from error
            job = PackJob(
                shard_path=str(path.resolve()),
                tokenizer_dir=self._tokenizer_dir,
                tokenizer_sha256=self._tokenizer_sha256,
                vocab_size=self._vocab_size,
                sequence_len=self.sequence_len,
                packing=self.packing,
                directory=str(self.directory.resolve()),
                key=hashlib.sha256(names.encode()).hexdigest()[:32],
            )
            self._shards[shard] = ShardRows(job)
        return self._shards[shard]

    def wait_packed(self, shard: int, *, should_stop: StopCheck | None = None) -> int | None:
        """The number of rows of `shard`, once all are packed; None if `should_stop()` came first.

        Raises as `ShardRows.read` does.
        """
        rows = self.rows(shard)
        while not rows.keep_packing():
            if should_stop is not None and should_stop():
                return None
            time.sleep(_POLL_S)
        return rows.num_rows

    @property
    def dtype(self) -> np.dtype:
        """Of the rows: uint16 where all ids fit, else uint32."""
        return row_dtype(self._vocab_size)

    @property
    def known_rows(self) -> dict[int, int]:
        """Number of rows of the shards that were opened here and are packed."""
        counts = {shard: rows.num_rows for shard, rows in self._shards.items()}
        return {shard: count for shard, count in counts.items() if count is not None}

    def close(self) -> None:
        """End the packers that this cache started; what they packed stays, for the next one."""
        for rows in self._shards.values():
            rows.close()
        self._shards.clear()


class ShardRows:
    """The rows of one shard, (T+1,) each, uint16 or uint32."""

    def __init__(self, job: PackJob) -> None:
        self.job = job
        self._stats: PackStats | None = None
        self._mapped: np.ndarray | None = None
        self._packer: _PackerProcess | None = None
        self._deaths = 0
        self._stats = job.complete()  # packed before: nothing to log
        if self._stats is None:
            self._keep_packing()

    @property
    def stats(self) -> PackStats | None:
        """Rows, documents, tokens and the share discarded; None while it is being packed."""
        if self._stats is None:
            self._stats = self.job.complete()
            if self._stats is not None:
                _LOG.info(
                    "%s packed (%s, T = %d): %d rows, %.1f %% of %d tokens discarded",
                    Path(self.job.shard_path).name,
                    self.job.packing,
                    self.job.sequence_len,
                    self._stats.rows,
                    100 * self._stats.discarded_share,
                    self._stats.tokens,
                )
                if count := self._stats.repaired_documents:
                    path = Path(self.job.shard_path)
                    _LOG.warning("%s", repaired_rows(path, count, self._stats.first_repaired))
        return self._stats

    @property
    def num_rows(self) -> int | None:
        """None while the tail is still being packed."""
        return None if self.stats is None else self.stats.rows

    @property
    def rows_so_far(self) -> int:
        """Rows that are packed by now."""
        return self.job.partial_rows() if self.stats is None else self.stats.rows

    def keep_packing(self) -> bool:
        """Make sure that a packer works on this shard; returns whether it is packed. Raises as `read` does."""
        if self.stats is None:
            self._keep_packing()
        return self.stats is not None

    def read(
        self, first_row: int, end_row: int, *, should_stop: StopCheck | None = None
    ) -> np.ndarray:
        """Rows first_row..end_row-1, (n, T+1), a copy; waits until they are packed.

        Fewer only where the shard ends, or, while waiting, once `should_stop()` is true. Raises
        UserError if the shard cannot be packed; never waits for a packer that does not run.
        """
        if not 0 <= first_row <= end_row:
            raise ValueError(f"no such rows: {first_row}..{end_row}")
        while self.stats is None and first_row < end_row:
            if self.job.partial_rows() >= end_row:
                rows = self._read_partial(first_row, end_row)
                if rows is not None:
                    return rows
            if should_stop is not None and should_stop():
                return self._no_rows()
            self._keep_packing()
            time.sleep(_POLL_S)
        if self.stats is None:
            return self._no_rows()
        return np.array(self._all_rows()[first_row:end_row])

    def close(self) -> None:
        if self._packer is not None:
            self._packer.end()
            self._packer = None

    def _no_rows(self) -> np.ndarray:
        return np.empty((0, self.job.sequence_len + 1), dtype=self.job.dtype)

    def _all_rows(self) -> np.ndarray:
        if self._mapped is None:
            assert self._stats is not None
            if self._stats.rows:
                shape = (self._stats.rows, self.job.sequence_len + 1)
                self._mapped = np.memmap(
                    self.job.path("rows"), dtype=self.job.dtype, mode="r", shape=shape
                )
            else:  # a shard shorter than a row; an empty file cannot be mapped
                self._mapped = self._no_rows()
            self.close()
        return self._mapped

    def _read_partial(self, first_row: int, end_row: int) -> np.ndarray | None:
        """Rows of the growing file; None if they have gone (renamed, or truncated by a new packer).

        Read, not mapped: a mapping of a file that gets shorter is a SIGBUS.
        """
        size_bytes = (end_row - first_row) * self.job.row_bytes
        try:
            with open(self.job.path("partial"), "rb") as file:
                data = os.pread(file.fileno(), size_bytes, first_row * self.job.row_bytes)
        except FileNotFoundError:
            return None
        if len(data) < size_bytes:
            return None
        return np.frombuffer(bytearray(data), dtype=self.job.dtype).reshape(
            end_row - first_row, self.job.sequence_len + 1
        )

    def _keep_packing(self) -> None:
        """Make sure that a packer works on this shard, ours or another process's.

        Raises UserError when ours says that the shard cannot be packed, or has died too often.
        """
        if self._packer is not None:
            code = self._packer.exit_code()
            if code is None:
                return
            message = self._packer.last_words()
            self.close()
            if code == _USER_ERROR_CODE:
                raise UserError(message.removeprefix("error: "))
            if code:
                self._deaths += 1
            if self._deaths >= _PACKER_DEATHS:
                raise UserError(
                    f"packing {self.job.shard_path} died {self._deaths} times, "
                    f"the last time with exit code {code} ({message or 'no message'}): "
                    "check free memory and disk space, and start again"
                )
        if self.stats is None and _is_free(self.job.path("lock")):
            self._packer = _PackerProcess(self.job)


class _PackerProcess:
    """A packer that ends with this object or this process, whichever is first."""

    def __init__(self, job: PackJob) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        argument = json.dumps({**dataclasses.asdict(job), "parent_pid": os.getpid()})
        root = str(Path(nanochat.__file__).resolve().parent.parent)
        inherited = os.environ.get("PYTHONPATH")
        path = f"{root}{os.pathsep}{inherited}" if inherited else root
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nanochat.rows.packer", argument],
            stdin=subprocess.PIPE,  # never written to: its end is our end
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._finalizer = weakref.finalize(self, _end_process, self._process)

    def exit_code(self) -> int | None:
        return self._process.poll()

    def last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    def end(self) -> None:
        self._finalizer()
        self._errors.close()


def _end_process(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    if process.poll() is None:
        process.kill()  # safe at any instruction
    process.wait()


def _is_free(lock: Path) -> bool:
    """Whether no packer holds `lock` right now."""
    try:
        with file_lock(lock, timeout_s=0):
            return True
    except filelock.Timeout:
        return False
