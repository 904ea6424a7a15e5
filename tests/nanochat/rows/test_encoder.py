"""Packing's encoder gives the ids of the tokenizer, whatever the text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from nanochat.rows.encoder import BatchEncoder
from nanochat.rows.packing import row_dtype
from nanochat.text import has_long_space
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

from ..data_kit import byte_tokenizer, texts

TEXTS = [
    "",
    "It's 1234567 crêpes, WE'RE told!!\n\n  and\xa0more…",
    "你好世界 😀😀👩‍👩‍👧 नमस्ते <|bos|>",
    "a" * 5000,
    " " * 110_000 + "x" + "\n" * 101_000,  # more than tiktoken's engine takes in one piece
    "\x00\x07 \u0378\U000e0fff",  # control characters, unassigned ones
]


@pytest.fixture(scope="module")
def trained() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator([*texts(400, seed=1), *TEXTS[1:3]], 600)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_ids_are_those_of_the_tokenizer(trained: RustBPETokenizer, num_threads: int) -> None:
    documents = TEXTS + texts(50, seed=2)
    encoder = BatchEncoder(trained, dtype=np.dtype("<u2"), num_threads=num_threads)
    for _ in range(2):  # the second time from memory
        encoded = encoder.encode(documents)
        assert [ids.tolist() for ids in encoded] == trained.encode(documents)
        assert {ids.dtype for ids in encoded} == {np.dtype("<u2")}
    assert [has_long_space(text) for text in TEXTS] == [False] * 4 + [True, False]


def test_halves_of_surrogate_pairs_are_the_same_everywhere(trained: RustBPETokenizer) -> None:
    lone = ["a\ud800b", "\udfff", "whole \ud83d\ude00 pair", "plain é"]
    replaced = ["a\ufffdb", "\ufffd", "whole 😀 pair", "plain é"]
    encoder = BatchEncoder(trained, dtype=np.dtype("<u2"))
    expected = trained.encode(replaced)
    assert [ids.tolist() for ids in encoder.encode(lone)] == expected
    assert trained.encode(lone) == expected and trained.encode(lone[0]) == expected[0]
    tokenizers = [RustBPETokenizer.train_from_iterator(each * 50, 270) for each in (lone, replaced)]
    assert tokenizers[0].fingerprint() == tokenizers[1].fingerprint()


def test_one_str_is_no_list_of_documents(trained: RustBPETokenizer) -> None:
    with pytest.raises(TypeError, match="not one str: put it in a list"):
        RustBPETokenizer.train_from_iterator("one document", 270)
    with pytest.raises(TypeError, match="not one str"):
        BatchEncoder(trained, dtype=np.dtype("<u2")).encode("one document")
    with pytest.raises(TypeError, match="got bytes"):
        RustBPETokenizer.train_from_iterator([b"bytes"], 270)  # type: ignore[list-item]


def test_ids_beyond_16_bits_are_whole(tmp_path: Path) -> None:
    ranks = byte_tokenizer(tmp_path, num_pairs=1 << 16).enc._mergeable_ranks
    encoding = tiktoken.Encoding(
        name="large",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks={**ranks, b"word": len(ranks)},
        special_tokens={name: len(ranks) + 1 + i for i, name in enumerate(SPECIAL_TOKENS)},
    )
    tokenizer = RustBPETokenizer(encoding)
    dtype = row_dtype(tokenizer.get_vocab_size())
    assert dtype == np.dtype("<u4")
    (ids,) = BatchEncoder(tokenizer, dtype=dtype).encode(["word wort"])
    assert ids.tolist() == tokenizer.encode("word wort") and ids[0] == 256 + (1 << 16)
    with pytest.raises(ValueError, match="do not fit 2 bytes"):
        BatchEncoder(tokenizer, dtype=np.dtype("<u2")).encode(["a"])


def test_fingerprint_tells_encoders_apart_by_what_they_do(trained: RustBPETokenizer) -> None:
    wide, narrow = (BatchEncoder(trained, dtype=np.dtype(kind)) for kind in ("<u4", "<u2"))
    assert wide.fingerprint() == narrow.fingerprint()
    digests = {wide.fingerprint()}

    class OtherUnicode(BatchEncoder):
        """As an extension with newer tables would: one letter is none."""

        def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
            return super().encode([text.replace("ß", "?") for text in texts])

    digests.add(OtherUnicode(trained, dtype=np.dtype("<u2")).fingerprint())
    assert len(digests) == 2
