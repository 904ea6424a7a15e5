"""A run of Flower's, followed to its end whatever `flwr` and the SuperLink say."""

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from pilot.errors import PilotError
from pilot.launch import connection, flower_commands, flower_run
from pilot.launch.connection import Connection
from pilot.launch.flower_commands import FlowerCommands
from pilot.launch.flower_run import FlowerRun
from pilot.processes.scratch import free_port

from ...waiting import LIMIT_S


def fake_flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> FlowerRun:
    """A run whose `flwr` is a shell script: $1 is the command."""
    script = tmp_path / "flwr"
    script.write_text(f"#!/bin/sh\ncd {tmp_path}\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(flower_commands, "flower_program", lambda name: str(tmp_path / name))
    commands = FlowerCommands(tmp_path, os.environ)
    monkeypatch.setattr(commands, "_usable", False)
    return FlowerRun("dep", tmp_path, commands)


def test_a_broken_log_stream_is_taken_up_where_it_broke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
case $1 in
  run) echo "Successfully started run 7"; printf 'one\\n\\n' ;;
  log) echo "Using SuperLink: dep (x)"; printf 'one\\n\\ntwo\\n'; touch ended ;;
  ls) if [ -e ended ]; then s=finished:completed; else s=running; fi
      echo '{"runs": [{"status": "'$s'", "status-details": "N/A"}]}' ;;
esac"""
    run = fake_flwr(tmp_path, monkeypatch, body)
    lines: list[str] = []
    run.submit(None)
    outcome = run.follow(lines.append)
    assert lines == ["one", "", "two"]
    assert outcome.succeeded
    assert outcome.details == ""


def test_a_killed_server_is_noticed_although_flower_says_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_run, "DEAD_SERVER_S", 0.2)
    body = """
case $1 in
  run) echo "Successfully started run 7"; echo one; exec sleep 600 ;;
  ls) echo '{"runs": [{"status": "running", "status-details": "N/A"}]}' ;;
esac"""
    run = fake_flwr(tmp_path, monkeypatch, body)
    lines: list[str] = []
    run.submit(None)
    outcome = run.follow(lines.append, lambda: "it was killed" if lines else None)
    assert (outcome.status, outcome.details) == ("finished:failed", "it was killed")


def test_flower_is_not_asked_how_a_run_ended_whose_server_is_known_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
case $1 in
  run) echo "Successfully started run 7"; echo one ;;
  ls) touch asked; sleep 600 ;;
esac"""
    run = fake_flwr(tmp_path, monkeypatch, body)
    run.submit(None)
    outcome = run.follow(lambda line: None, lambda: "it was killed", ends_within_s=0.0)
    assert (outcome.status, outcome.details) == ("finished:failed", "it was killed")
    assert not (tmp_path / "asked").exists()


def test_a_superlink_that_is_starting_is_waited_for() -> None:
    port = free_port()
    there = Connection("dep", {"address": f"127.0.0.1:{port}"}, Path())
    with pytest.raises(PilotError, match="no SuperLink answers"):
        connection.check_reachable(there, within_s=0.1)
    with socket.socket() as listener:

        def start() -> None:
            listener.bind(("127.0.0.1", port))
            listener.listen()

        starts = threading.Timer(0.5, start)
        starts.start()
        connection.check_reachable(there, within_s=LIMIT_S)
        starts.join()


def test_a_run_that_its_restarted_superlink_does_not_know_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = json.dumps({"success": False, "error-message": "Run ID 7 not found"})
    body = f"""
case $1 in
  run) echo "Successfully started run 7"; echo one ;;
  ls) echo '{said}'; exit 1 ;;
esac"""
    run = fake_flwr(tmp_path, monkeypatch, body)
    run.submit(None)
    outcome = run.follow(lambda line: None)
    assert outcome.status == "finished:failed" and "does not know it" in outcome.details


def test_a_refused_run_says_why_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "echo '╭─ Error ───╮'; echo '│ Certificate is │'; echo '│ wrong. │'; exit 1"
    with pytest.raises(PilotError, match=r"^Flower refused the run: Certificate is wrong\.$"):
        fake_flwr(tmp_path, monkeypatch, body).submit(None)
