"""What a run's directory says without loading the model."""

import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from pilot.run.facts import RunFacts, read_facts


def write_snapshot(run: Path, number: int, text: str) -> Path:
    directory = run / "snapshots" / f"round-{number:06d}"
    directory.mkdir(parents=True)
    (directory / "state.json").write_text(text)
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, directory / "model.safetensors")
    return directory


STATE = {"config": {"depth": 4}, "versions": {"pilot": "1"}, "total_tokens": 9}


def test_the_newest_snapshot_that_can_be_read_speaks(tmp_path: Path) -> None:
    write_snapshot(tmp_path, 1, json.dumps({**STATE, "config": {"depth": 1}}))
    write_snapshot(tmp_path, 2, json.dumps(STATE))
    write_snapshot(tmp_path, 3, '{"config": ')
    facts = read_facts(tmp_path)
    assert (facts.config, facts.versions, facts.total_tokens) == ({"depth": 4}, {"pilot": "1"}, 9)
    assert facts.parameters == 10


def test_a_broken_model_costs_its_size_only(tmp_path: Path) -> None:
    directory = write_snapshot(tmp_path, 1, json.dumps(STATE))
    (directory / "model.safetensors").write_bytes(b"\xff" * 20)
    facts = read_facts(tmp_path)
    assert (facts.config, facts.parameters) == ({"depth": 4}, None)


def test_a_directory_without_snapshots_says_nothing(tmp_path: Path) -> None:
    assert read_facts(tmp_path) == read_facts(tmp_path / "none") == RunFacts()


def test_a_run_lives_while_its_server_touches_its_file(tmp_path: Path) -> None:
    alive = tmp_path / "server-alive"
    alive.touch()
    assert read_facts(tmp_path).alive
    an_hour_ago = time.time() - 3600
    os.utime(alive, (an_hour_ago, an_hour_ago))
    assert not read_facts(tmp_path).alive
