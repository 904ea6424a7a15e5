"""The built-in corpus as a source, and the tokenizer that is trained on it: no network, no preparation."""

import itertools
from pathlib import Path

from nanochat import builtin_corpus
from nanochat.errors import UserError
from nanochat.files import file_lock
from nanochat.source import Source, get_source, parquets_iter_batched
from nanochat.tokenizer import (
    TOKENIZER_FILE,
    RustBPETokenizer,
    check_overwritable,
    tokenizer_dir,
    train_and_save,
)


def prepare_builtin() -> Source:
    """Make the built-in corpus if it is missing (seconds, once per base directory)."""
    source = get_source("builtin")
    builtin_corpus.prepare(source.directory)
    return source


def open_source(name_or_dir: str) -> Source:
    """The source of that name or directory; makes the built-in corpus if it is missing."""
    return prepare_builtin() if name_or_dir == "builtin" else get_source(name_or_dir)


def ensure_builtin_tokenizer(directory: str | Path, vocab_size: int) -> RustBPETokenizer:
    """The tokenizer in `directory`; if there is none, one trained on the built-in corpus.

    Two processes at once: one trains, the other waits. Raises UserError if the one there has
    another vocabulary size, or was made by another program.
    """
    path = tokenizer_dir(directory)
    check_overwritable(path)
    path.mkdir(parents=True, exist_ok=True)
    with file_lock(path / ".lock"):
        if (path / TOKENIZER_FILE).exists():
            tokenizer = RustBPETokenizer.from_directory(path)
        else:
            source = prepare_builtin()
            batches = parquets_iter_batched("train", source=source)
            texts = itertools.chain.from_iterable(batches)
            tokenizer = train_and_save(texts, vocab_size, path)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"the tokenizer in {path} has {tokenizer.get_vocab_size()} tokens, not {vocab_size}: "
            "name another directory, or set the vocabulary size to its size"
        )
    return tokenizer
