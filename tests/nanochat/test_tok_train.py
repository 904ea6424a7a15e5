"""`python -m scripts.tok_train`."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import tokenizer as tokenizer_module
from nanochat.common import run_command_line
from nanochat.errors import UserError
from nanochat.source import cropped, get_source
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from scripts import tok_train
from scripts.tok_train import Options

from .data_kit import texts, write_shard


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(3):
        write_shard(tmp_path / "mine", number, texts(200, seed=number))
    return tmp_path / "mine"


OPTIONS = Options(max_chars=10**9, doc_cap=10_000, vocab_size=400)


def trained_on(*seeds: int, vocab_size: int = 400) -> str:
    documents = [text for seed in seeds for text in texts(200, seed=seed)]
    return RustBPETokenizer.train_from_iterator(documents, vocab_size).fingerprint()


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["tok_train", *arguments])
    with pytest.raises(SystemExit) as exit:
        run_command_line(tok_train.main)
    return exit.value.code


def test_the_command_trains_on_the_training_shards(shards, base_dir):
    options = ["--max-chars=4000000000", "--vocab-size=400", f"--source={shards}", "--threads=2"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.tok_train", *options],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = trained_on(0, 1)
    assert get_tokenizer().fingerprint() == expected
    assert str(base_dir / "tokenizer") in done.stdout
    assert expected in done.stdout
    assert "reading" in done.stderr and "merging" in done.stderr  # the progress bar
    assert {path.name for path in (base_dir / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer.pkl",
        "token_bytes.pt",
        "training.json",
    }


def test_options_may_be_written_with_underscores(shards, monkeypatch, base_dir):
    assert run_main(monkeypatch, f"--source={shards}", "--vocab_size=300", "--max_chars=9999") == 0
    assert get_tokenizer().get_vocab_size() == 300


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
        ("--num-shards=-1", "at least 0"),
        ("--num-shards=3", "at most 2"),  # shard 2 is for validation
        ("--threads=-1", "from 0"),
        ("--threads=2000", "to 1024"),
        ("--vocab=400", "unrecognized"),
    ],
)
def test_a_bad_option_is_one_sentence(shards, monkeypatch, capsys, option, sentence):
    assert run_main(monkeypatch, f"--source={shards}", option) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error


def test_it_writes_where_it_is_told_the_same_on_any_number_of_threads(shards, tmp_path):
    source = get_source(shards)
    fingerprints = {
        tok_train.train(source, OPTIONS, tmp_path / f"tok{n}", num_threads=n).fingerprint()
        for n in (1, 3)
    }
    assert fingerprints == {get_tokenizer(tmp_path / "tok3").fingerprint()}


def test_a_vocabulary_that_the_text_cannot_fill_leaves_nothing_behind(shards, tmp_path):
    options = Options(max_chars=50, doc_cap=100, vocab_size=5000)
    with pytest.raises(UserError, match="fills a vocabulary"):
        tok_train.train(get_source(shards), options, tmp_path / "tok")
    assert not (tmp_path / "tok").exists()


@pytest.mark.parametrize("how", ["no parquet", "no text"])
def test_a_shard_that_cannot_be_used_is_one_sentence_and_leaves_nothing_behind(
    shards, tmp_path, monkeypatch, capsys, base_dir, how
):
    first = sorted(shards.iterdir())[0]
    if how == "no parquet":
        first.write_bytes(first.read_bytes()[:100])
    else:
        pq.write_table(pa.table({"words": ["a"]}), first)
    assert run_main(monkeypatch, "--vocab-size=400", f"--source={shards}") not in (0, None)
    error = capsys.readouterr().err
    assert f"{first} cannot be used" in error and "Traceback" not in error
    assert not (base_dir / "tokenizer").exists()


def test_the_tokenizer_of_another_program_is_not_overwritten(shards, monkeypatch, capsys, base_dir):
    theirs = base_dir / "tokenizer" / "tokenizer.pkl"  # all that upstream leaves
    theirs.parent.mkdir()
    theirs.write_bytes(b"upstream's")
    assert run_main(monkeypatch, "--vocab-size=400", f"--source={shards}") not in (0, None)
    assert "move it away" in capsys.readouterr().err
    assert theirs.read_bytes() == b"upstream's"


def test_a_relative_path_is_checked_where_it_is_written(
    shards, monkeypatch, capsys, base_dir, tmp_path
):
    theirs = base_dir / "tokenizer" / "tokenizer.pkl"
    theirs.parent.mkdir()
    theirs.write_bytes(b"upstream's")
    monkeypatch.chdir(tmp_path)
    options = ["--vocab-size=300", f"--source={shards}", "--tokenizer=./tokenizer"]
    assert run_main(monkeypatch, *options) == 0
    assert f"in {tmp_path / 'tokenizer'} after" in capsys.readouterr().out
    assert [path.name for path in theirs.parent.iterdir()] == ["tokenizer.pkl"]


def test_a_training_json_of_another_program_is_not_overwritten(shards, tmp_path):
    theirs = tmp_path / "tok" / "training.json"
    theirs.parent.mkdir()
    theirs.write_text('{"epochs": 3}')
    with pytest.raises(UserError, match=r"training\.json was not made by this program"):
        tok_train.train(get_source(shards), OPTIONS, theirs.parent)
    assert theirs.read_text() == '{"epochs": 3}'


def test_a_pickle_that_an_older_version_left_when_interrupted_is_replaced(shards, interrupted):
    (interrupted / "tokenizer.pkl").write_bytes(b"ours, of a half saved tokenizer")
    again = tok_train.train(get_source(shards), OPTIONS, interrupted)
    assert again.fingerprint() == trained_on(0, 1)


def test_num_shards_gives_the_same_tokenizer_whatever_else_is_there(shards, tmp_path):
    one = tok_train.train(get_source(shards), replace(OPTIONS, num_shards=1), tmp_path / "tok")
    assert one.fingerprint() == trained_on(0)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def interrupted(shards, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a training that Ctrl-C ended."""
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "train_and_save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tok_train.train(get_source(shards), OPTIONS, tmp_path / "tok")
    return tmp_path / "tok"


def test_after_an_interruption_more_than_ten_shards_are_read_in_the_same_order(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    for number in range(13):
        write_shard(tmp_path / "mine", number, texts(20, seed=number))
    source = get_source(tmp_path / "mine")
    three = sum(len(text) for seed in range(3) for text in texts(20, seed=seed))
    options = Options(max_chars=three, doc_cap=0, vocab_size=400)  # the text of shards 0, 1, 2
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "train_and_save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tok_train.train(source, options, tmp_path / "tok")
    again = tok_train.train(source, options, tmp_path / "tok")
    documents = [text for seed in range(3) for text in texts(20, seed=seed)]
    expected = RustBPETokenizer.train_from_iterator(documents, 400)
    assert again.fingerprint() == expected.fingerprint()


def test_an_interrupted_training_goes_on_with_the_shards_it_chose(shards, interrupted, capsys):
    write_shard(shards, 3, texts(200, seed=3))  # now 2 is a training shard, and 3 for validation
    again = tok_train.train(get_source(shards), OPTIONS, interrupted)
    assert "continuing with the 2 shards" in capsys.readouterr().out
    assert again.fingerprint() == trained_on(0, 1)
    entry = json.loads((interrupted / "training.json").read_text())
    assert entry["result"]["fingerprint"] == again.fingerprint()
    assert list(entry["shard_bytes"]) == ["0", "1"]


def test_a_finished_training_chooses_anew(shards, tmp_path):
    tok_train.train(get_source(shards), OPTIONS, tmp_path / "tok")
    write_shard(shards, 3, texts(200, seed=3))
    again = tok_train.train(get_source(shards), OPTIONS, tmp_path / "tok")
    assert again.fingerprint() == trained_on(0, 1, 2)


def test_other_options_choose_anew(shards, interrupted):
    write_shard(shards, 3, texts(200, seed=3))
    options = replace(OPTIONS, vocab_size=401)
    again = tok_train.train(get_source(shards), options, interrupted)
    assert again.fingerprint() == trained_on(0, 1, 2, vocab_size=401)


def test_chosen_shards_that_changed_are_refused(shards, interrupted):
    write_shard(shards, 1, texts(100, seed=1))
    with pytest.raises(UserError, match=r"does not hold the shards that .*training\.json names"):
        tok_train.train(get_source(shards), OPTIONS, interrupted)


def test_a_damaged_choice_is_made_anew(shards, interrupted):
    (interrupted / "training.json").write_text("{")
    again = tok_train.train(get_source(shards), OPTIONS, interrupted)
    assert again.fingerprint() == trained_on(0, 1)
