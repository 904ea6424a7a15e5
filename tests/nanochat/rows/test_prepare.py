"""`python -m nanochat.dataset --prepare`: rows are there before a run asks for them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanochat import dataset
from nanochat.common import run_command_line
from nanochat.rows.cache import RowCache
from nanochat.source import get_source
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

from ..data_kit import byte_tokenizer, texts, write_shard


@pytest.fixture
def tokenizer(base_dir: Path) -> RustBPETokenizer:
    return byte_tokenizer(base_dir / "tokenizer")


@pytest.fixture
def mine(tmp_path: Path, tokenizer: RustBPETokenizer) -> Path:
    for shard in range(4):
        write_shard(tmp_path / "mine", shard, texts(60, seed=shard))
    return tmp_path / "mine"


def _call(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["dataset", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command_line(dataset.main)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def _cache(directory: Path) -> RowCache:
    return RowCache(get_source(directory), get_tokenizer(), sequence_len=31, packing="bestfit")


def test_prepared_shards_need_no_packer(
    mine: Path,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--source", str(mine), "--prepare", "--max-seq-len", "31", "-n", "2"]
    assert _call(*options, monkeypatch=monkeypatch) == 0
    output = capsys.readouterr()
    assert "rows of 31 tokens of 2 training shards and the validation shard" in output.out
    assert "3/3" in output.err and "discarded=" in output.err  # progress
    monkeypatch.setattr(sys, "executable", "/bin/false")  # no packer can start
    cache = _cache(mine)
    assert all(len(cache.rows(shard).read(0, 5)) == 5 for shard in (0, 1, 3))
    cache.close()
    assert len(list((base_dir / "rows").glob("*.rows"))) == 3  # shard 2 was not asked for


def test_a_damaged_shard_is_a_line_and_the_others_are_packed(
    mine: Path,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = mine / "shard_00001.parquet"
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)  # the footer is whole: only reading shows it
    path.write_bytes(bytes(data))
    options = ["--source", str(mine), "--prepare", "--max-seq-len", "31"]
    assert _call(*options, monkeypatch=monkeypatch) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 2 and "shard 1: " in errors[0] and "is damaged" in errors[0]
    assert "1 shards of" in errors[1]
    assert len(list((base_dir / "rows").glob("*.rows"))) == 3


def test_ctrl_c_leaves_no_packer_and_the_next_one_goes_on(mine: Path, base_dir: Path) -> None:
    many = texts(6000, seed=8)
    write_shard(mine, 0, many)
    command = [sys.executable, "-m", "nanochat.dataset", "--source", str(mine), "--prepare"]
    command += ["--max-seq-len", "31", "-n", "1"]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    )
    rows = base_dir / "rows"
    while not any(path.stat().st_size for path in rows.glob("*.partial")):
        assert run.poll() is None
        time.sleep(0.002)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=30)
    assert run.returncode == 130, output
    assert "Traceback" not in output
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cache = _cache(mine)
    packed = cache.rows(0)
    assert packed.stats is not None and packed.stats.documents == len(many)
    assert len(np.unique(packed.read(0, 10**9), axis=0)) == packed.num_rows  # no row twice
    cache.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokenizer", "nowhere"], "there is no tokenizer in"),
        (["--packing", "tetris"], "unknown packing 'tetris'"),
        (["--max-seq-len", "0"], "too short"),
        (["--source", "climbmix"], "dataset -n 1 --source climbmix"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    said: str,
    mine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--source", str(mine), "--prepare", *arguments]
    assert _call(*options, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
