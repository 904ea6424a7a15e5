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
        ({"num_threads": 0}, "num_threads must be from 1 to 1024"),
        ({"num_threads": 1_000_000}, "num_threads must be from 1 to 1024"),
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


@pytest.mark.parametrize("in_worker", [False, True])
def test_a_panic_is_a_runtime_error(in_worker: bool) -> None:
    with pytest.raises(RuntimeError, match="rustbpe failed inside"):
        rustbpe._panic(in_worker)  # type: ignore[attr-defined]  # not in the stub: for us only


NO_THREAD = """
import rustbpe
tokenizer = rustbpe.Tokenizer()
for call in (
    lambda: tokenizer.train_from_iterator(["some text"], 300, num_threads=2),
    lambda: tokenizer.batch_encode(["one", "two"], num_threads=2),
):
    try:
        call()
    except OSError as error:
        print(error)
"""


def test_a_system_that_gives_no_thread_is_an_os_error() -> None:
    # Stacks of 2^47 bytes: more than there are addresses.
    done = subprocess.run(
        [sys.executable, "-c", NO_THREAD],
        env=os.environ | {"RUST_MIN_STACK": str(2**47)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("the system gives no more threads")
        assert line.endswith("ask for fewer with num_threads")


def test_an_iterator_may_raise_in_its_first_and_in_its_last_step() -> None:
    def documents(at: int) -> Iterator[str]:
        for i in range(3):
            if i == at:
                raise ReadError(at)
            yield "text"
        raise ReadError(3)

    for at in range(4):
        with pytest.raises(ReadError, match=str(at)):
            rustbpe.Tokenizer().train_from_iterator(documents(at), 300, buffer_size=1)


INTERRUPTED = """
import random, signal, sys, rustbpe
tokenizer = rustbpe.Tokenizer()

def started(text, *, again=1):
    print("started", flush=True)
    return [text] * again

def endless():
    started("")
    while True:
        yield "some text that has no end"

def one_word_of_many_merges():
    yield "".join(random.Random(1).choices("abcdefghij", k=3_000_000))
    # The iterator is at its end, and counting takes milliseconds: this comes while merging.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    started("")

words = " abcdefghi" * 5_000_000
try:
    {call}
except KeyboardInterrupt:
    # An interrupt that is only seen after the work finds a trained tokenizer.
    sys.exit(42 if tokenizer.vocab_size == 256 else 1)
"""


@pytest.mark.parametrize(
    "call",
    [
        "tokenizer.train_from_iterator(endless(), 300)",
        "tokenizer.train_from_iterator(started(words * 4, again=200), 300)",
        "tokenizer.train_from_iterator(started(words, again=200), 300, pattern='.')",
        "tokenizer.train_from_iterator(one_word_of_many_merges(), 2_000_000)",
        "tokenizer.batch_encode(started(words, again=200))",
        "tokenizer.encode(started(words)[0])",
        "tokenizer.encode(started('ab' * 5_000_000)[0])",
    ],
)
def test_ctrl_c_ends_the_work_in_every_phase(call: str) -> None:
    code = INTERRUPTED.format(call=call)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        if "one_word" not in call:
            os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 42
