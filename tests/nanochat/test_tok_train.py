"""`python -m scripts.tok_train`."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import UserError, run_command_line
from nanochat.dataset import get_source
from nanochat.tokenizer import RustBPETokenizer, cropped, get_tokenizer
from scripts import tok_train

from .data_kit import texts, write_shard


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(3):
        write_shard(tmp_path / "mine", number, texts(200, seed=number))
    return tmp_path / "mine"


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["tok_train", *arguments])
    with pytest.raises(SystemExit) as exit:
        run_command_line(tok_train.main)
    return exit.value.code


@pytest.mark.parametrize("dash", ["-", "_"])
def test_command_with_dashes_or_underscores_trains_on_the_training_shards(shards, base_dir, dash):
    options = [f"--max{dash}chars=4000000000", f"--vocab{dash}size=400", f"--source={shards}"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.tok_train", *options],
        capture_output=True,
        text=True,
        check=True,
    )
    train = texts(200, seed=0) + texts(200, seed=1)
    expected = RustBPETokenizer.train_from_iterator(train, 400)
    assert get_tokenizer().fingerprint() == expected.fingerprint()
    assert str(base_dir / "tokenizer") in done.stdout
    assert expected.fingerprint() in done.stdout
    assert {path.name for path in (base_dir / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer.pkl",
        "token_bytes.pt",
    }


def test_documents_are_cropped_and_reading_ends_at_the_limit():
    batches = [["abcdef", "gh"], ["ijklmnop"], ["never"]]
    assert list(cropped(batches, max_chars=9, doc_cap=4)) == ["abcd", "gh", "ijkl"]
    assert list(cropped(batches, max_chars=7, doc_cap=0)) == ["abcdef", "gh"]


def test_missing_shards_are_said_before_any_work(monkeypatch, capsys, base_dir):
    assert run_main(monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "python -m nanochat.dataset -n 1" in error
    assert not (base_dir / "tokenizer").exists()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--vocab-size=100", "at least 265"),
        ("--max-chars=0", "at least 1"),
        ("--doc-cap=-1", "at least 0"),
        ("--vocab=400", "unrecognized"),
    ],
)
def test_a_bad_option_is_one_sentence(shards, monkeypatch, capsys, option, sentence):
    assert run_main(monkeypatch, f"--source={shards}", option) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error


def test_it_writes_where_it_is_told(shards, tmp_path):
    source = get_source(shards)
    directory = tmp_path / "elsewhere" / "tok"
    tok_train.train(source, max_chars=10_000, doc_cap=100, vocab_size=300, directory=directory)
    assert get_tokenizer(directory).get_vocab_size() == 300


def test_a_vocabulary_that_the_text_cannot_fill_leaves_nothing_behind(shards, tmp_path):
    source = get_source(shards)
    directory = tmp_path / "tok"
    with pytest.raises(UserError, match="fills a vocabulary"):
        tok_train.train(source, max_chars=50, doc_cap=100, vocab_size=5000, directory=directory)
    assert not directory.exists()
