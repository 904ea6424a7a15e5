"""`hf:` sources: any text dataset becomes shards, which a kill neither damages nor changes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.data_spec import count_train_shards
from nanochat.errors import UserError
from nanochat.hf_name import VAL_SHARD, HfName
from nanochat.hf_shards import Sizes, make_shards
from nanochat.source import Source, get_source, iter_texts

from .data_kit import texts

DOCUMENTS = texts(600, seed=4)
SIZES = Sizes(head=50, head_chars=20_000, shard_chars=20_000, row_group=10)
# The dataset's own loop, slowed down where a test wants to kill it between two documents
_MAKE = """
import sys, time
from pathlib import Path
from nanochat import hf_shards
from nanochat.hf_name import HfName
write = hf_shards._Maker._write
def slowly(self, shard, texts):
    def slowed():
        for text in texts:
            time.sleep(0.002)
            yield text
    write(self, shard, slowed())
hf_shards._Maker._write = slowly
sizes = hf_shards.Sizes(head=50, head_chars=20_000, shard_chars=20_000, row_group=10)
hf_shards.make_shards(HfName(sys.argv[1]), sizes=sizes)
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "base"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A dataset directory of three JSON-lines files."""
    directory = tmp_path / "stories"
    directory.mkdir()
    for part in range(3):
        lines = [
            json.dumps({"id": number, "text": text})
            for number, text in enumerate(DOCUMENTS)
            if number * 3 // len(DOCUMENTS) == part
        ]
        (directory / f"part{part}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def documents(source: Source, shard: int) -> Iterator[str | None]:
    for batch in iter_texts(source.shard_path(shard)):
        yield from batch


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.parquet"))}


def test_every_document_is_in_one_shard_and_the_first_ones_validate(
    base: Path, local: Path
) -> None:
    source = make_shards(HfName(str(local)), sizes=SIZES)
    shards = source.present_train()
    assert len(shards) > 3 and source.val_shard == VAL_SHARD in source.present()
    validation = list(documents(source, VAL_SHARD))
    assert validation == [text for text in DOCUMENTS[:50] if text][:5]
    train = [text for shard in shards for text in documents(source, shard)]
    assert validation + train == [text for text in DOCUMENTS if text]
    assert source.directory.parent == base / "base_data_hf"
    assert source.num_train_shards == len(shards)


def test_a_killed_command_continues_to_the_same_bits(
    base: Path, local: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = HfName(str(local))
    process = subprocess.Popen([sys.executable, "-c", _MAKE, str(local)])
    kept = name.directory / "shard_00001.parquet"
    while not (kept.exists() and len(name.manifest().get("shards", [])) >= 2):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = kept.stat()
    assert get_source(str(name)).train_shards is None, "it was done before it could be killed"
    resumed = make_shards(name, sizes=SIZES)
    after = kept.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    whole = make_shards(name, sizes=SIZES)
    assert resumed.directory != whole.directory
    assert content(resumed.directory) == content(whole.directory)
    assert not list(resumed.directory.glob(".shard_*")), "the killed command's file is left"
    assert resumed.num_train_shards == whole.num_train_shards


def test_n_limits_the_training_shards_and_a_larger_one_continues(base: Path, local: Path) -> None:
    name = HfName(str(local))
    few = make_shards(name, 2, sizes=SIZES)
    assert few.present() == [0, 1, VAL_SHARD] and few.train_shards is None
    before = content(few.directory)
    more = make_shards(name, 4, sizes=SIZES)
    assert more.present() == [0, 1, 2, 3, VAL_SHARD]
    assert before.items() <= content(more.directory).items()
    whole = make_shards(name, sizes=SIZES)
    train = [text for shard in whole.present_train() for text in documents(whole, shard)]
    assert train == [text for text in DOCUMENTS if text][5:]


def test_the_command_makes_a_source_that_everything_takes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some: poems.parquet"
    pq.write_table(pa.table({"poem": DOCUMENTS[:40], "n": list(range(40))}), path)
    spec = f"hf:{path}"
    with pytest.raises(UserError, match=r"run `python -m nanochat.dataset -n 1 --source hf:"):
        count_train_shards(get_source(spec), None)
    monkeypatch.setattr(sys, "argv", ["dataset", "--source", spec])
    with pytest.raises(UserError, match="has no column 'text', only poem, n"):
        dataset.main()
    path = path.rename(tmp_path / "poems.parquet")
    spec = f"hf:{path}:train:poem"
    monkeypatch.setattr(sys, "argv", ["dataset", "--source", spec])
    dataset.main()
    assert (
        "1 training shards, the whole dataset and validation shard 99999" in capsys.readouterr().out
    )
    assert count_train_shards(get_source(spec), None) == 1
    with pytest.raises(UserError, match="has 1 training shards: choose 1 to 1, not 2"):
        count_train_shards(get_source(spec), 2)


@pytest.mark.parametrize(
    ("files", "spec", "sentence"),
    [
        ({"a.jsonl": '{"text": 3}\n' * 30}, "", "holds int, not text"),
        ({"a.jsonl": ""}, "", "is empty|has no text|cannot be loaded"),
        ({"a.jsonl": '{"text": ""}\n' * 30}, "", "has no text"),
        ({"a.jsonl": '{"text": "one"}\n'}, "", "has one document"),
        ({"a.jsonl": '{"text": "one"}\n' * 30}, ":nosplit", "cannot be loaded"),
        ({"a.jsonl": '{"text": "one"}\n{"text": tw'}, "", "failed|cannot be loaded"),
        ({}, "", "no dataset|cannot be loaded"),
        ({"a.jsonl": "{}"}, ":a:b:c", r"is not hf:NAME\[:SPLIT\[:COLUMN\]\]"),
    ],
)
def test_mistakes_are_sentences(
    base: Path, tmp_path: Path, files: dict[str, str], spec: str, sentence: str
) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        make_shards(HfName.parse(f"hf:{directory}{spec}"), sizes=SIZES)


def test_without_the_hub_and_without_such_a_directory_one_line_says_so(base: Path) -> None:
    command = [sys.executable, "-m", "nanochat.dataset", "-n", "1", "--source", "hf:nobody/nothing"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "nobody/nothing" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_relative_path_means_the_same_from_anywhere(
    base: Path, local: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(local.parent)
    names = [
        str(HfName.parse(f"hf:{spelling}"))
        for spelling in (f"./{local.name}", local.name, str(local), f"{local.name}:train:text")
    ]
    assert names == [f"hf:{local}"] * 4
    made = HfName(local.name).directory  # as an older version spelled it
    made.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert HfName.parse(names[0]).directory == made
    assert made.parent == base / "base_data_hf"


def test_names_are_as_short_as_they_can_be() -> None:
    assert str(HfName.parse("hf:a/b:train:text")) == "hf:a/b"
    assert str(HfName.parse("hf:a/b:test")) == "hf:a/b:test"
    assert str(HfName.parse("hf:a/b:train:story")) == "hf:a/b:train:story"
    assert HfName("a/b").directory != HfName("a/b", "test").directory
    for wrong in ("hf:", "hf:a/b:", "hf:a/b:train:text:more"):
        with pytest.raises(UserError, match=r"is not hf:NAME\[:SPLIT\[:COLUMN\]\]"):
            HfName.parse(wrong)
