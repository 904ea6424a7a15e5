"""Data without a network: a tokenizer of bytes and pairs of bytes, and shards of generated text."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.files import atomic_path, file_lock
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

TRAIN_SHARDS = 4
_SYLLABLES = [a + b for a in "bdklm" for b in "aeiou"]


def check(setup: Setup, verdict: Verdict) -> None:
    """Make both; later checks use them."""
    began = time.monotonic()
    tokenizer, shards = make(setup)
    verdict.that(tokenizer.get_vocab_size() == vocab_size(setup), "the vocabulary's size is wrong")
    verdict.note("vocab_size", tokenizer.get_vocab_size())
    verdict.note("shards", len(list(shards.glob("*.parquet"))))
    verdict.note("made_in_s", time.monotonic() - began)


def vocab_size(setup: Setup) -> int:
    return setup.size(65536, 512)


def tokenizer_dir(setup: Setup) -> Path:
    return setup.directory / "tokenizer"


def shard_dir(setup: Setup) -> Path:
    return setup.directory / "shards"


def make(setup: Setup) -> tuple[RustBPETokenizer, Path]:
    """The tokenizer and the directory of shards; made if missing, by one of the checks that run beside it."""
    directory, shards = tokenizer_dir(setup), shard_dir(setup)
    with file_lock(setup.directory / "data.lock"):
        if not (directory / "tokenizer.json").is_file():
            byte_pairs(vocab_size(setup)).save(directory)
        for number in range(TRAIN_SHARDS + 1):
            path = shards / f"shard_{number:05d}.parquet"
            if not path.is_file():
                shards.mkdir(parents=True, exist_ok=True)
                write_shard(path, number, setup.size(8_000_000, 100_000))
    return RustBPETokenizer.from_directory(directory), shards


def write_shard(path: Path, number: int, characters: int) -> None:
    """A shard of about that many `characters` of text, which `number` decides on."""
    table = pa.table({"text": pa.array(_documents(number, characters), type=pa.string())})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, row_group_size=500, write_page_checksum=True)


def byte_pairs(vocab: int) -> RustBPETokenizer:
    """The 256 bytes, then as many pairs of bytes as the vocabulary has room for, then special tokens.

    Pairs of what text is made of come first, so that a small vocabulary has those.
    """
    order = sorted(range(256), key=lambda value: (not 97 <= value < 123, value))
    pairs = (bytes((a, b)) for a in order for b in order)
    ranks = {bytes([value]): value for value in range(256)}
    for rank in range(256, vocab - len(SPECIAL_TOKENS)):
        ranks[next(pairs)] = rank
    encoding = tiktoken.Encoding(
        name="byte-pairs",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)},
    )
    return RustBPETokenizer(encoding)


def _documents(seed: int, characters: int) -> list[str]:
    """Sentences of a language of 2,000 words, where each word is followed by one of eight."""
    words = list(_words())
    rng = random.Random(seed)
    documents, total = [], 0
    while total < characters:
        word, chosen = rng.randrange(len(words)), []
        for _ in range(rng.randint(50, 2000)):
            chosen.append(words[word])
            word = (word * 31 + 7 * int(8 * rng.random() ** 2) + 1) % len(words)
        documents.append(" ".join(chosen))
        total += len(documents[-1])
    return documents


def _words() -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(2000):
        yield "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4)))
