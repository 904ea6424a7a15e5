"""What a checkpoint says of its data, and the endless stream of training rows."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from nanochat.checkpoint_manager import checkpoint_tokenizer
from nanochat.data_spec import DataSpec, count_train_shards, validation_rows
from nanochat.errors import UserError
from nanochat.gpt_config import config_for_depth
from nanochat.rows.cache import RowCache
from nanochat.rows.stream import EpochStream, shard_order
from nanochat.source import get_source
from nanochat.tokenizer import tokenizer_name

from .data_kit import byte_tokenizer, texts, write_shard


@pytest.fixture
def spec(base_dir: Path) -> DataSpec:
    for number in range(3):
        write_shard(base_dir / "shards", number, texts(12, seed=number))
    tokenizer = byte_tokenizer(base_dir / "tokenizer")
    return DataSpec(
        source=str(base_dir / "shards"),
        tokenizer="tokenizer",
        tokenizer_sha256=tokenizer.fingerprint(),
        sequence_len=32,
        packing="stream",
        eval_rows=5,
        val_shard=2,
    )


def _rows(cache: RowCache, shard: int) -> np.ndarray:
    return cache.rows(shard).read(0, 10_000)


def test_rows_go_on_from_epoch_to_epoch_in_seeded_order_of_shards(spec: DataSpec) -> None:
    cache, _ = spec.open()
    expected = np.concatenate(
        [_rows(cache, shard) for epoch in range(3) for shard in shard_order(2, epoch, 7)]
    )
    stream = EpochStream(cache, num_shards=2, seed=7)
    reads = []
    while sum(map(len, reads)) < len(expected) - 50:
        reads.append(stream.read(50))
        assert len(reads[-1]) == 50  # however the epochs end
    rows = np.concatenate(reads)
    assert np.array_equal(rows, expected[: len(rows)])
    assert stream.position[0] == 2
    cache.close()


def test_a_relative_tokenizer_of_a_run_is_found_from_another_working_directory(
    spec: DataSpec, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    named = dataclasses.replace(spec, tokenizer=tokenizer_name("./mine"))
    monkeypatch.chdir(base_dir)
    cache, tokenizer = DataSpec.from_meta({"data": named.to_meta()}).open()
    cache.close()
    assert tokenizer.directory == tmp_path / "mine"
    config = config_for_depth(1, vocab_size=tokenizer.get_vocab_size(), sequence_len=32)
    assert checkpoint_tokenizer({"data": named.to_meta()}, config).directory == tmp_path / "mine"


def test_validation_rows_are_the_first_of_the_validation_shard(spec: DataSpec) -> None:
    cache, _ = spec.open()
    assert np.array_equal(validation_rows(cache, 5), _rows(cache, 2)[:5])
    assert np.array_equal(validation_rows(cache, 10_000), _rows(cache, 2))
    cache.close()


def test_shards_without_a_row_are_a_user_error(spec: DataSpec) -> None:
    long = DataSpec(**{**spec.to_meta(), "sequence_len": 100_000})
    cache, _ = long.open()
    with pytest.raises(UserError, match="shorter sequence length"):
        EpochStream(cache, num_shards=2, seed=0).read(1)
    with pytest.raises(UserError, match="shorter sequence length"):
        validation_rows(cache, 1)
    cache.close()


def test_what_a_checkpoint_says_opens_the_same_rows(spec: DataSpec) -> None:
    cache, tokenizer = DataSpec.from_meta({"data": spec.to_meta()}).open()
    assert tokenizer.fingerprint() == spec.tokenizer_sha256
    assert (cache.sequence_len, cache.packing) == (32, "stream")
    for meta in ({}, {"data": {"source": "builtin"}}):
        with pytest.raises(UserError, match="does not say"):
            DataSpec.from_meta(meta)


def test_other_data_than_the_checkpoints_is_refused(spec: DataSpec, base_dir: Path) -> None:
    values = spec.to_meta()
    with pytest.raises(UserError, match="not the one"):
        DataSpec(**{**values, "tokenizer_sha256": "0" * 64}).open()
    with pytest.raises(UserError, match="validation shard 2 here and 9"):
        DataSpec(**{**values, "val_shard": 9}).open()


def test_a_gap_in_the_training_shards_is_said_and_all_below_it_are_used_on_demand(
    base_dir: Path,
) -> None:
    directory = base_dir / "gap"
    for number in (0, 1, 3, 6):
        write_shard(directory, number, texts(2, seed=number))
    source = get_source(directory)
    with pytest.raises(
        UserError,
        match=r"shards 0\.\.1, 3 of .* and 2 not: put it there, or say --num-shards 2 to train",
    ):
        count_train_shards(source, None)
    assert count_train_shards(source, 2) == 2
    assert count_train_shards(source, 1) == 1
    with pytest.raises(UserError, match="shard 2"):
        count_train_shards(source, 4)
    (directory / "shard_00003.parquet").unlink()
    assert count_train_shards(source, None) == 2  # nothing is behind the gap but validation
    (directory / "shard_00000.parquet").unlink()
    with pytest.raises(UserError, match="shard 0"):
        count_train_shards(source, None)
