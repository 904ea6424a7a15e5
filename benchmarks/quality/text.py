"""Rows of a directory of text, with a tokenizer of its own; kept on disk, since they take a minute to make."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

import rustbpe
from nanochat.errors import UserError

_TOKENIZER_BYTES = 8 << 20
_VALIDATION_ROWS = 512


@dataclass(frozen=True)
class Corpus:
    """`rows` and `validation`: (n, T+1) token ids; `token_bytes` (vocabulary,): bytes of each token."""

    rows: np.ndarray
    validation: np.ndarray
    token_bytes: Tensor


def corpus(text: Path, cache: Path, *, vocab_size: int, sequence_len: int, tokens: int) -> Corpus:
    """Rows of `tokens` tokens of the shards in `text`, and validation rows of its last shard.

    Raises UserError if there is too little text.
    """
    path = cache / f"rows-{vocab_size}-{sequence_len}-{tokens}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        made = _make(text, vocab_size, sequence_len, tokens)
        unfinished = path.with_suffix(".unfinished.npz")
        np.savez(unfinished, **made)  # type: ignore[arg-type]
        unfinished.rename(path)
    with np.load(path) as found:
        token_bytes = torch.from_numpy(found["token_bytes"])
        return Corpus(found["rows"], found["validation"], token_bytes)


def _make(text: Path, vocab_size: int, sequence_len: int, tokens: int) -> dict[str, np.ndarray]:
    shards = sorted(text.glob("*.parquet"))
    if len(shards) < 2:
        raise UserError(
            f"{text} holds {len(shards)} shards: two are needed, the last for validation"
        )
    head = beginning(shards[0], _TOKENIZER_BYTES)
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(head), vocab_size=vocab_size - 1)
    bos = vocab_size - 1
    wanted, ids, have = tokens + sequence_len + 1, [], 0
    for shard in shards[:-1]:
        for encoded in tokenizer.batch_encode(_documents(shard)):
            ids.append(np.array([bos, *encoded], dtype=np.uint16))
            have += len(ids[-1])
        if have >= wanted:
            break
    else:
        raise UserError(f"{text} holds {have:,} tokens for training, {wanted:,} are needed")
    held_out = [np.array([bos, *e]) for e in tokenizer.batch_encode(_documents(shards[-1]))]
    token_bytes = np.zeros(vocab_size, dtype=np.int64)
    for token, content in tokenizer.get_mergeable_ranks():
        token_bytes[content] = len(bytes(token))
    return {
        "rows": cut_rows(np.concatenate(ids), sequence_len)[: tokens // sequence_len],
        "validation": cut_rows(np.concatenate(held_out), sequence_len)[:_VALIDATION_ROWS],
        "token_bytes": token_bytes,
    }


def beginning(shard: Path, size: int) -> list[str]:
    """The first documents of a shard, at least `size` characters of them, or all."""
    documents, have = [], 0
    for document in _documents(shard):
        documents.append(document)
        have += len(document)
        if have >= size:
            break
    return documents


def _documents(shard: Path) -> list[str]:
    documents: list[str] = pq.read_table(shard, columns=["text"])["text"].to_pylist()
    return documents


def cut_rows(ids: np.ndarray, sequence_len: int) -> np.ndarray:
    """(n, T+1) ids: consecutive rows, of which each begins with the last token of the one before."""
    count = (len(ids) - 1) // sequence_len
    starts = np.arange(count)[:, None] * sequence_len
    return ids[starts + np.arange(sequence_len + 1)].astype(np.uint16)
