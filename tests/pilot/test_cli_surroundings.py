"""`pilot run` where it is started: its help, a shell that hangs up, a path that a library can't take."""

import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from pilot import cli
from pilot.config import RunConfig
from pilot.errors import PilotError
from pilot.launch.connection import Connection, find_flwr_home

ROOT = Path(__file__).parents[2]


def test_examples_of_the_help_are_configurations_that_exist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    examples = re.findall(r"--run-config (.+)", capsys.readouterr().out)
    words = [word for line in examples[-3:] for word in shlex.split(line)]
    keys = [pair.split("=")[0] for word in words for pair in word.split() if "=" in pair]
    assert keys and set(keys) <= set(RunConfig.from_mapping({}).to_mapping())


def test_hang_up_is_ignored_where_it_was_ignored_before() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with cli._signals_as_exceptions():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_simulation_in_a_directory_with_spaces_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = str(ROOT / "configs" / "tiny.toml")
    command = ["run", "local-simulation", "--app", str(ROOT), "--run-config", tiny]
    monkeypatch.setenv("FLWR_HOME", str(ROOT / ".flwr"))
    monkeypatch.setattr("sys.executable", "/home/me/my project/.venv/bin/python")
    assert cli.main(command) == 2
    assert "without spaces" in capsys.readouterr().err


def test_number_of_clients_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    connection = Connection("sim", {"options": {"num-supernodes": "two"}}, tmp_path)
    with pytest.raises(PilotError, match='num-supernodes of sim is "two"'):
        _ = connection.clients


def test_empty_flwr_home_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", "")
    assert find_flwr_home(ROOT) == ROOT / ".flwr"
