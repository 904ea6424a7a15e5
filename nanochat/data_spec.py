"""What a model is trained and validated on: how a checkpoint names it, and how it is opened again."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat.builtin import open_source
from nanochat.errors import UserError
from nanochat.rows.cache import RowCache
from nanochat.source import Source, check_shard, number_ranges
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """`meta["data"]` of a checkpoint: all that decides on which rows its bpb was measured."""

    source: str
    tokenizer: str  # a directory's name under the base directory, or an absolute path
    tokenizer_sha256: str
    sequence_len: int
    packing: str
    eval_rows: int
    val_shard: int

    @staticmethod
    def from_meta(meta: dict[str, Any]) -> "DataSpec":
        """The spec in a checkpoint's meta data; UserError if that names none, or another form."""
        try:
            return DataSpec(**meta["data"])
        except (KeyError, TypeError) as error:
            raise UserError(
                "this checkpoint does not say on which rows it was validated: it was not written by "
                "this version of the program"
            ) from error

    def to_meta(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def open(self) -> tuple[RowCache, RustBPETokenizer]:
        """The rows and the tokenizer on this machine; UserError if they are not the same ones."""
        source = open_source(self.source)
        if source.val_shard != self.val_shard:
            raise UserError(
                f"{source.name} has validation shard {source.val_shard} here and "
                f"{self.val_shard} in the checkpoint: use the directory that it was trained on"
            )
        source.ensure([self.val_shard])
        tokenizer = get_tokenizer(self.tokenizer)
        if tokenizer.fingerprint() != self.tokenizer_sha256:
            raise UserError(
                f"the tokenizer {self.tokenizer} is not the one that the model was trained with: "
                "put that one in its place"
            )
        cache = RowCache(source, tokenizer, sequence_len=self.sequence_len, packing=self.packing)
        return cache, tokenizer


def count_train_shards(source: Source, num_shards: int | None) -> int:
    """How many training shards to use: `num_shards`, or None for all of 0, 1, 2 … on this disk.

    Raises UserError, with the command that repairs it, if one of them or the validation shard is
    missing. For None that is also a number below the last one here: nobody who lost a shard wants to
    train on those before it only, without knowing.
    """
    if num_shards is None:
        source.ensure([0, source.val_shard])
        present = source.present_train()
        here = set(present)
        num_shards = next(n for n in range(len(present) + 1) if n not in here)
        if num_shards < len(present):
            missing = sorted(set(range(present[-1])) - here)
            raise UserError(
                f"shards {number_ranges(present)} of {source.name} are in {source.directory}, and "
                f"{number_ranges(missing)} not: {source.repair(present)}, or say --num-shards "
                f"{num_shards} to train on those before it only"
            )
    elif not 1 <= num_shards <= source.num_train_shards:
        raise UserError(
            f"{source.name} has {source.num_train_shards} training shards: "
            f"choose 1 to {source.num_train_shards}, not {num_shards}"
        )
    source.ensure([*range(num_shards), source.val_shard])
    return num_shards


def check_footers(source: Source, shards: Iterable[int]) -> None:
    """Raise UserError for the first of these shards that is no parquet file with a column of text.

    Days into a run is too late for that.
    """
    for shard in shards:
        path = source.shard_path(shard)
        try:
            check_shard(path)
        except ValueError as error:
            raise UserError(f"{path} cannot be used: {error}") from error


def validation_rows(cache: RowCache, num_rows: int) -> np.ndarray:
    """The first rows of the validation shard, (m, T+1), m <= num_rows; waits until they are packed."""
    rows = cache.rows(cache.source.val_shard).read(0, num_rows)
    if not len(rows):
        raise UserError(
            f"the validation shard of {cache.source.name} holds no row of {cache.sequence_len} "
            "tokens: choose a shorter sequence length"
        )
    return rows
