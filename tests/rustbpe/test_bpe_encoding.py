"""Encoding is tiktoken's with the same pattern and ranks."""

import functools
import itertools
import unicodedata

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat import builtin_corpus

TEXT = (
    "It's the naïve baker's fourth café; they'll've sold 1234567 crêpes, WE'RE told!!\n"
    "Über ΑΒΓ, привет мир, 你好世界, नमस्ते, 😀😀👩‍👩‍👧  \t trailing   spaces \r\n\r\n  and\xa0more…\n"
) * 3


def tiktoken_of(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "test",
        pat_str=tokenizer.get_pattern(),
        mergeable_ranks=dict(tokenizer.get_mergeable_ranks()),
        special_tokens={},
    )


@functools.cache
def both(pattern: str | None) -> tuple[rustbpe.Tokenizer, tiktoken.Encoding]:
    tokenizer = rustbpe.Tokenizer()
    documents = [TEXT, "abababab aaaaaa ab'a 11 1 a\n a" * 9]
    tokenizer.train_from_iterator(documents, 512, pattern=pattern)
    return tokenizer, tiktoken_of(tokenizer)


patterns = st.sampled_from([None, r"\w+|\W+", "[a-z]+"])
# Without unassigned characters: their class depends on the year of a library's Unicode tables.
characters = st.characters(exclude_categories=["Cs", "Cn"])
texts = st.text(alphabet="ab' \n1sté", max_size=200) | st.text(alphabet=characters, max_size=60)


@pytest.mark.filterwarnings("ignore:the text supports only")
@settings(max_examples=150, deadline=None)
@given(texts, patterns)
def test_ids_are_those_of_tiktoken(text: str, pattern: str | None) -> None:
    ours, theirs = both(pattern)
    assert ours.encode(text) == theirs.encode_ordinary(text)


@settings(max_examples=50, deadline=None)
@given(st.lists(texts, max_size=9), st.integers(1, 4))
def test_a_batch_gives_what_each_text_gives(batch: list[str], num_threads: int) -> None:
    ours, _ = both(None)
    ids = ours.batch_encode(batch, num_threads=num_threads)
    assert ids == [ours.encode(text) for text in batch]
    assert [ours.decode(each) for each in ids] == batch


@pytest.mark.parametrize("text", ["a" * 100_000, "ab" * 50_000, " " * 2_000_000 + "a", TEXT * 500])
def test_long_pieces_and_texts_encode(text: str) -> None:
    ours, theirs = both(None)
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    if len(text) < 1_000_000:  # tiktoken's engine gives up on millions of spaces
        assert ids == theirs.encode_ordinary(text)


def test_ten_megabytes_encode_as_with_tiktoken() -> None:
    texts = builtin_corpus.texts()
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, 8192)
    # The corpus has about 5 MB: a second time with every document turned around, so that it has
    # words that were never trained on.
    texts = texts + [text[::-1] for text in texts]
    assert sum(len(text.encode()) for text in texts) > 10_000_000
    ids = tokenizer.batch_encode(texts)
    assert ids == tiktoken_of(tokenizer).encode_ordinary_batch(texts)
    assert ids[0] == tokenizer.encode(texts[0])


def test_every_character_encodes_as_with_tiktoken() -> None:
    ours, theirs = both(None)
    for code in range(0, 0x110000, 256):
        block = [chr(c) for c in range(code, code + 256)]
        assigned = [char for char in block if unicodedata.category(char) not in ("Cs", "Cn")]
        text = "".join(f"a{char}b '{char} {char}{char}\n" for char in assigned)
        assert ours.encode(text) == theirs.encode_ordinary(text)


@pytest.mark.parametrize("length", range(1, 35))
def test_words_around_the_width_of_a_register(length: int) -> None:
    ours, theirs = both(None)
    word = ("sixteenbytesareread" * 2)[:length]
    contexts = itertools.product(["", " ", "'", "é", "1", "\n"], ["", " ", "é", "1", "'s", "\n"])
    for before, after in contexts:
        text = f"{before}{word}{after}{word}"
        assert ours.encode(text) == theirs.encode_ordinary(text)


def test_a_part_of_a_character_decodes_to_the_replacement_character() -> None:
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.decode([0x61, 0xE2, 0x82, 0x61]) == "a\ufffda"
    assert tokenizer.decode([]) == ""


def test_an_untrained_tokenizer_encodes_to_bytes() -> None:
    assert rustbpe.Tokenizer().encode("aé") == list("aé".encode())
