"""Small shards and tokenizers for the tests of the data path, and a disk that is full."""

import contextlib
import random
import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
import torch

from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

_SYLLABLES = ["the", "a", "mod", "el", "row", "to", "ken", "of", "re", "pack", "slow", "4", "7"]


def texts(count: int, *, seed: int, words: int = 40) -> list[str]:
    """Documents of up to `words` words, no two alike."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3)))

    return [
        f"{seed}/{number} " + " ".join(word() for _ in range(rng.randint(0, words)))
        for number in range(count)
    ]


def write_shard(directory: Path, number: int, documents: Sequence[str | None]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"shard_{number:05d}.parquet"
    table = pa.table({"text": pa.array(list(documents), type=pa.string())})
    pq.write_table(
        table,
        path,
        row_group_size=100,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,  # so that any damage is noticed
    )
    return path


def byte_tokenizer(directory: Path, *, num_pairs: int = 0) -> RustBPETokenizer:
    """A saved tokenizer whose tokens are the 256 bytes and the first pairs of bytes."""
    ranks = {bytes([value]): value for value in range(256)}
    ranks |= {bytes(divmod(pair, 256)): 256 + pair for pair in range(num_pairs)}
    encoding = tiktoken.Encoding(
        name="bytes",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)},
    )
    tokenizer = RustBPETokenizer(encoding)
    tokenizer.save(directory)
    return tokenizer


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Assert that nested containers of tensors are equal to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_equal(one, other, f"{where}[{i}]")
    else:
        assert a == b, where


@contextlib.contextmanager
def full_disk(limit_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond that, here and in processes started here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
