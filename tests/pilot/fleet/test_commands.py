"""A mistake in `pilot up`, `join`, `token` and `down` is one sentence before anything starts."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from pilot import cli
from pilot.fleet.join import read_head_address, read_token
from pilot.fleet.places import Places
from pilot.fleet.tokens import NO_CA, Token
from pilot.launch.node import node_directory


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_mistakes_of_up(capsys: pytest.CaptureFixture[str], base_dir: Path) -> None:
    assert "--clients is -1" in refusal(capsys, "up", "--clients", "-1")
    assert "not together with --cpu" in refusal(capsys, "up", "--cpu", "--gpus-per-client", "1")
    assert "give --head as well" in refusal(capsys, "up", "--address", "head")
    assert "--insecure is for --head" in refusal(capsys, "up", "--insecure")
    assert "neither an IP address" in refusal(capsys, "up", "--head", "--address", "head:1")
    assert "must start with a letter" in refusal(capsys, "up", "--name", "../x")
    taken = node_directory("client-2")
    taken.mkdir(parents=True)
    with FileLock(taken / "lock"):
        assert "a client client-2 runs on this machine" in refusal(capsys, "up", "--cpu")
    assert not Places.of(None).fleet.exists()


def test_mistakes_of_join(
    capsys: pytest.CaptureFixture[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PILOT_JOIN_TOKEN", raising=False)
    assert '"head:x" is not a head' in refusal(capsys, "join", "head:x", "--name", "a")
    assert "the token is not one" in refusal(capsys, "join", "head", "--name", "a", "--token", "x")
    assert "has not joined a head yet" in refusal(capsys, "join", "head", "--name", "a")
    monkeypatch.setenv("PILOT_JOIN_TOKEN", str(Token(NO_CA, bytes(16))))
    assert "give --insecure here, too" in refusal(capsys, "join", "head", "--name", "a")
    monkeypatch.setenv("PILOT_JOIN_TOKEN", str(Token(bytes(range(32)), bytes(16))))
    assert "leave --insecure out" in refusal(capsys, "join", "h", "--name", "a", "--insecure")


def test_token_and_down_without_a_fleet(capsys: pytest.CaptureFixture[str], base_dir: Path) -> None:
    assert "this machine is no head yet" in refusal(capsys, "token")
    assert "--for" in refusal(capsys, "token", "--for", "..")
    assert "--within is -1" in refusal(capsys, "down", "--within", "-1")
    assert cli.main(["down"]) == 0
    assert f"nothing runs here ({base_dir / 'fleet'})" in capsys.readouterr().out
    assert cli.main(["down", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ended": [], "still_running": []}


def test_a_head_is_a_name_or_an_address_with_or_without_a_port() -> None:
    assert read_head_address("head.example.org") == ("head.example.org", 8001)
    assert read_head_address("192.0.2.1:9000") == ("192.0.2.1", 9000)
    assert read_head_address("[2001:db8::1]:9000") == ("2001:db8::1", 9000)
    assert read_head_address("2001:db8::1") == ("2001:db8::1", 8001)


def test_a_token_comes_from_where_ps_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILOT_JOIN_TOKEN", "of-the-environment")
    assert read_token("") == "of-the-environment"
    assert read_token("-", io.StringIO("of-stdin\nmore\n")) == "of-stdin"
    assert read_token("given") == "given"


def test_the_command_line_imports_nothing_heavy() -> None:
    program = "import sys, pilot.cli; print(*sorted({'torch', 'nanochat'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "")
