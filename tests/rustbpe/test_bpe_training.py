"""Training against the algorithm written down in the plainest way."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe

Ranks = list[tuple[bytes, int]]


def join(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out: list[int] = []
    for token in word:  # out[-1] is never a fresh `new` that takes part: new is not in pair
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return out


def naive_ranks(texts: list[str], vocab_size: int, pattern: str) -> Ranks:
    """Count all pairs, join the most frequent one (ties: the smallest pair of ids), repeat."""
    counts = Counter(piece for text in texts for piece in regex.findall(pattern, text))
    words = [(list(piece.encode()), count) for piece, count in counts.items()]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in words:
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = [(join(word, best, len(tokens)), count) for word, count in words]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return [(token, rank) for rank, token in enumerate(tokens)]


def trained(texts: list[str], vocab_size: int, **options: Any) -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    return tokenizer


# Few letters make many merges, runs and ties; unassigned characters are left out because the class of
# such a one depends on the year of a library's Unicode tables.
few_letters = st.text(alphabet="ab é'\n1", max_size=40)
any_letters = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=20)


@pytest.mark.filterwarnings("ignore:the text supports only")
@settings(max_examples=80, deadline=None)
@given(
    st.lists(few_letters | any_letters, max_size=12),
    st.integers(256, 330),
    st.sampled_from([None, r"\S+|\s+", ".+"]),
)
def test_merges_are_those_of_the_naive_algorithm(
    texts: list[str], vocab_size: int, pattern: str | None
) -> None:
    tokenizer = trained(texts, vocab_size, pattern=pattern)
    want = naive_ranks(texts, vocab_size, pattern or rustbpe.DEFAULT_PATTERN)
    assert tokenizer.get_mergeable_ranks() == want
    assert tokenizer.vocab_size == len(want)


def prose(seed: int, documents: int) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeioué lrst'", k=draw.randint(2, 9))) for _ in range(300)]
    marks = [" ", " ", ", ", "\n\n", "  ", "'s ", "2026 "]
    return [
        "".join(draw.choice(words) + draw.choice(marks) for _ in range(draw.randint(0, 40)))
        for _ in range(documents)
    ]


def test_result_does_not_depend_on_threads_or_buffers() -> None:
    texts = prose(seed=1, documents=2000)
    want = naive_ranks(texts, 500, rustbpe.DEFAULT_PATTERN)
    for num_threads, buffer_size in [(1, 8192), (1, 1), (2, 7), (3, 8192), (8, 100)]:
        tokenizer = trained(texts, 500, num_threads=num_threads, buffer_size=buffer_size)
        assert tokenizer.get_mergeable_ranks() == want


def test_ties_go_to_the_smaller_pair_of_ids() -> None:
    ranks = trained(["zy", "bz", "ba"], 259, pattern=".+").get_mergeable_ranks()
    assert [token for token, _ in ranks[256:]] == [b"ba", b"bz", b"zy"]


def test_first_ranks_are_the_single_bytes() -> None:
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.get_mergeable_ranks() == [(bytes([i]), i) for i in range(256)]
    assert tokenizer.vocab_size == 256
    assert tokenizer.get_pattern() == rustbpe.DEFAULT_PATTERN


def test_pattern_is_that_of_nanochat() -> None:
    assert rustbpe.DEFAULT_PATTERN == (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    assert trained(["a"], 256, pattern="a+").get_pattern() == "a+"


def test_a_small_text_gives_fewer_merges_and_a_warning() -> None:
    with pytest.warns(UserWarning, match="supports only 258 tokens, not the 1000 asked for"):
        tokenizer = trained(["abc"], 1000)
    assert tokenizer.vocab_size == 258


@pytest.mark.parametrize("texts", [[], [""], ["", "", "a", ""]])
def test_text_without_pairs_gives_the_bytes_alone(texts: list[str]) -> None:
    with pytest.warns(UserWarning, match="supports only 256 tokens"):
        assert trained(texts, 300).vocab_size == 256


def test_one_giant_document_gives_what_many_small_ones_give() -> None:
    texts = prose(seed=2, documents=300)
    texts = [text.strip(" \n") + ".\n" for text in texts]  # no piece crosses from one to the next
    many = trained(texts * 300, 600)
    assert trained(["".join(texts) * 300], 600).get_mergeable_ranks() == many.get_mergeable_ranks()


def test_more_distinct_words_than_a_threads_table_holds() -> None:
    # 300,000 numbers in letters, each once: the tables are given away and filled again.
    digits = str.maketrans("0123456789", "abcdefghij")
    words = [str(number).translate(digits) for number in range(100_000, 400_000)]
    one = trained([" ".join(words)], 400, num_threads=1)
    assert one.training_stats["distinct_words"] == 300_000
    split = [" " + " ".join(words[start::7]) for start in range(7)]
    more = trained([text[1:] for text in split[:1]] + split[1:], 400, num_threads=3)
    assert more.get_mergeable_ranks() == one.get_mergeable_ranks()


def test_figures_of_the_last_training() -> None:
    assert rustbpe.Tokenizer().training_stats == {}
    stats = trained(["one two one", " two"], 260).training_stats
    assert stats["distinct_words"] == 3  # "one", " two", " one"
    assert stats["counting_s"] > 0 and stats["merging_s"] > 0


def test_all_of_unicode_can_be_trained_on() -> None:
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    tokenizer = trained([text], 2000)
    assert tokenizer.vocab_size == 2000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_one_giant_word_is_merged_without_rescanning_it() -> None:
    # 3,744 merges over a word of 2 M letters: rescanning it for each one would take minutes.
    word = "".join(random.Random(1).choices("abcdefgh", k=2_000_000))
    assert trained([word, word], 4000).vocab_size == 4000


def test_documents_may_come_from_a_generator_that_uses_the_tokenizer() -> None:
    tokenizer = rustbpe.Tokenizer()

    def documents() -> Iterator[str]:
        for _ in range(3):
            yield "aa" * len(tokenizer.encode("abc"))

    tokenizer.train_from_iterator(documents(), 257)
    assert tokenizer.get_mergeable_ranks()[256] == (b"aa", 256)
