"""The corpus that needs no network: same bytes everywhere, made once, nothing shared with validation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat import builtin_corpus
from nanochat.errors import UserError

_MAKE = """
import sys
from pathlib import Path
from nanochat import builtin_corpus
builtin_corpus.prepare(Path(sys.argv[1]))
print(builtin_corpus.manifest_sha256(Path(sys.argv[1])), "torch" in sys.modules)
"""


def normal(text: str) -> str:
    return " ".join(text.lower().split())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The real corpus, asked for by two processes at once; (directory, what they printed)."""
    directory = tmp_path_factory.mktemp("corpus")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _MAKE, str(directory)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return directory, outputs


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the walk over all sources, which takes seconds."""
    documents = [f"text number {'i' * n} " + "of words and more words " * 12 for n in range(50)]
    monkeypatch.setattr(builtin_corpus, "_all_texts", lambda: iter(documents))
    return documents


def shard_texts(directory: Path, shard: int) -> list[str]:
    return pq.read_table(directory / f"shard_{shard:05d}.parquet")["text"].to_pylist()


def test_two_processes_at_once_make_one_corpus_and_import_nothing_of_it(made):
    directory, outputs = made
    assert outputs[0] == outputs[1] == f"{builtin_corpus.manifest_sha256(directory)} False\n"


def test_the_same_versions_give_the_same_bytes(made, tmp_path):
    directory, _ = made
    builtin_corpus.prepare(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == (directory / "manifest.json").read_bytes()


def test_it_is_a_few_megabytes_of_english(made):
    directory, _ = made
    documents = [text for shard in range(9) for text in shard_texts(directory, shard)]
    assert 3e6 < sum(map(len, documents)) < 20e6
    assert sum(" the " in text for text in documents) > 0.7 * len(documents)
    assert any(text.startswith('The "assert" statement') for text in documents)  # pydoc_data


def test_no_document_is_in_two_shards(made):
    directory, _ = made
    documents = [normal(text) for shard in range(9) for text in shard_texts(directory, shard)]
    assert len(set(documents)) == len(documents)


def test_a_second_call_makes_nothing(few_texts, tmp_path, monkeypatch):
    builtin_corpus.prepare(tmp_path)
    monkeypatch.setattr(builtin_corpus, "texts", lambda: pytest.fail("made again"))
    builtin_corpus.prepare(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "manifest is no JSON"])
def test_a_damaged_corpus_is_made_anew_with_the_same_bytes(few_texts, tmp_path, damage):
    builtin_corpus.prepare(tmp_path)
    before = builtin_corpus.manifest_sha256(tmp_path)
    shard, manifest = tmp_path / "shard_00003.parquet", tmp_path / "manifest.json"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("{")
    builtin_corpus.prepare(tmp_path)
    assert builtin_corpus.is_intact(tmp_path)
    assert builtin_corpus.manifest_sha256(tmp_path) == before


def test_the_manifest_is_written_last(few_texts, tmp_path, monkeypatch):
    def crash(path: Path, value: object) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(builtin_corpus, "atomic_write_json", crash)
        with pytest.raises(RuntimeError):
            builtin_corpus.prepare(tmp_path)
    assert not builtin_corpus.is_intact(tmp_path)
    with pytest.raises(UserError, match="--source builtin"):
        builtin_corpus.manifest_sha256(tmp_path)
    builtin_corpus.prepare(tmp_path)
    assert builtin_corpus.is_intact(tmp_path)


def test_other_texts_have_another_hash(few_texts, tmp_path):
    builtin_corpus.prepare(tmp_path / "a")
    few_texts[7] += "one word more"
    builtin_corpus.prepare(tmp_path / "b")
    hashes = [builtin_corpus.manifest_sha256(tmp_path / name) for name in "ab"]
    assert hashes[0] != hashes[1]
    versions = json.loads((tmp_path / "a" / "manifest.json").read_text())["versions"]
    assert set(versions) == {"python", "numpy", "torch", "pyarrow"}


def test_short_texts_tables_and_repetitions_are_left_out(monkeypatch):
    text = "a sentence that goes on and on " * 10
    raw = ["short", text, text.upper(), "1234 5678 | " * 40, text + "\ud800", "x" * 60_000]
    monkeypatch.setattr(builtin_corpus, "_all_texts", lambda: iter(raw))
    assert builtin_corpus.texts() == [text]
