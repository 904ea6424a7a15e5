"""A directory of one's own with three shards, and caches over it."""

from pathlib import Path

import pytest

from nanochat.rows.cache import RowCache
from nanochat.source import get_source
from nanochat.tokenizer import RustBPETokenizer

from ..data_kit import byte_tokenizer, texts, write_shard
from .cache_kit import T


@pytest.fixture
def tokenizer(base_dir: Path) -> RustBPETokenizer:
    return byte_tokenizer(base_dir / "tokenizer")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """One's own directory: training shards 0 and 1, validation shard 2."""
    for shard in range(3):
        write_shard(tmp_path / "mine", shard, texts(60, seed=shard))
    return tmp_path / "mine"


@pytest.fixture
def make_cache(mine: Path, tokenizer: RustBPETokenizer):
    """Makes caches over `mine`, closed at the end of the test."""
    caches: list[RowCache] = []

    def make(directory: Path = mine, packing: str = "stream", sequence_len: int = T) -> RowCache:
        source = get_source(directory)
        caches.append(RowCache(source, tokenizer, sequence_len=sequence_len, packing=packing))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()
