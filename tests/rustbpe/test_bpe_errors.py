"""Whatever goes wrong is an ordinary exception, and leaves the tokenizer as it was."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import rustbpe


class ReadError(Exception):
    pass


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"vocab_size": 255}, "vocab_size must be from 256"),
        ({"vocab_size": -1}, "vocab_size must be from 256"),
        ({"vocab_size": 2**40}, "vocab_size must be from 256"),
        ({"pattern": "("}, "not a valid regular expression"),
        ({"buffer_size": 0}, "buffer_size must be at least 1"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
    ],
)
def test_bad_arguments_are_value_errors(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        rustbpe.Tokenizer().train_from_iterator(["a"], **{"vocab_size": 300, **arguments})


def test_an_error_of_the_iterator_reaches_the_caller_and_changes_nothing() -> None:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(["aa"], 257)

    def documents() -> Iterator[str]:
        yield from ["some text"] * 5000
        raise ReadError("disk gone")

    with pytest.raises(ReadError, match="disk gone"):
        tokenizer.train_from_iterator(documents(), 300, buffer_size=100, num_threads=2)
    assert tokenizer.get_mergeable_ranks()[256:] == [(b"aa", 256)]


@pytest.mark.parametrize("documents", ["one string", [b"bytes"], ["text", None], 5])
def test_documents_that_are_not_texts_are_type_errors(documents: Any) -> None:
    with pytest.raises(TypeError):
        rustbpe.Tokenizer().train_from_iterator(documents, 300)


def test_lone_surrogates_are_refused() -> None:
    tokenizer = rustbpe.Tokenizer()
    with pytest.raises(UnicodeEncodeError):
        tokenizer.train_from_iterator(["\ud800"], 300)
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")


def test_a_pattern_that_backtracks_for_ever_is_a_value_error() -> None:
    pattern = r"(x+x+)+(?!y)\1z"
    with pytest.raises(ValueError, match="gave up on a text of 60 bytes"):
        rustbpe.Tokenizer().train_from_iterator(["x" * 60], 300, pattern=pattern)


def test_ids_outside_the_vocabulary_are_value_errors() -> None:
    with pytest.raises(ValueError, match="there is no token 256 in a vocabulary of 256"):
        rustbpe.Tokenizer().decode([97, 256])


@pytest.mark.filterwarnings("error:the text supports only")
def test_a_warning_that_is_an_error_still_leaves_a_trained_tokenizer() -> None:
    tokenizer = rustbpe.Tokenizer()
    with pytest.raises(UserWarning, match="the text supports only 257 tokens"):
        tokenizer.train_from_iterator(["aa"], 300)
    assert tokenizer.vocab_size == 257


INTERRUPTED = """
import sys, rustbpe
tokenizer = rustbpe.Tokenizer()
def endless():
    print("training", flush=True)
    while True:
        yield "some text that has no end"
def giant():
    text = " abcdefghi" * 10_000_000
    print("training", flush=True)
    yield text
try:
    {call}
except KeyboardInterrupt:
    sys.exit(42)
"""


@pytest.mark.parametrize(
    "call",
    [
        "tokenizer.train_from_iterator(endless(), 300)",
        "tokenizer.train_from_iterator(giant(), 300, pattern='.')",
        "tokenizer.batch_encode([next(giant())] * 4)",
        "tokenizer.encode(next(giant()))",
    ],
)
def test_ctrl_c_ends_the_work(call: str) -> None:
    code = INTERRUPTED.format(call=call)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 42
