"""A base directory in which small runs train, and a way to call the scripts there."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat.common import run_command_line

from .bundle_kit import make_bundle
from .data_kit import byte_tokenizer, texts, write_shard
from .run_kit import Call


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with two training shards, whose rows are packed once for all tests."""
    directory = tmp_path_factory.mktemp("saving")
    for number in range(3):
        write_shard(directory / "shards", number, texts(24, seed=number, words=20))
    byte_tokenizer(directory / "tokenizer")
    make_bundle(directory / "eval_bundle")
    return directory


@pytest.fixture
def call(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call a script in that base directory: (exit code, stdout, stderr)."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))

    def called(main: Callable[[], None], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        with pytest.raises(SystemExit) as stop:
            run_command_line(main)
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capsys.readouterr()

    return called
