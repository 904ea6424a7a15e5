"""What people are told of a run that goes on with another configuration."""

from pathlib import Path

import torch

from pilot import report
from pilot.config import RunConfig
from pilot.ledger import Ledger
from pilot.run_state import ConfigChange, RunState
from pilot.telemetry import Telemetry, read_events


def test_changed_keys_are_told_one_by_one_when_they_begin_to_hold_and_not_again(
    tmp_path: Path,
) -> None:
    ledger = Ledger(num_shards=1, epochs=1, shard_order=lambda _: [0])
    config = RunConfig(run_name="r", num_shards=1)
    state = RunState(config, {"w": torch.zeros(1)}, ledger, total_tokens=1, round_number=4)
    state.config_changes = [
        ConfigChange(2, "lr", 0.1, 0.2),
        ConfigChange(4, "lr", 0.2, 0.3),
        ConfigChange(4, "quorum", 2, 1),
    ]
    with Telemetry(
        tmp_path, config_dict={}, wandb_mode="disabled", wandb_project="", run_name="r"
    ) as telemetry:
        report.run_started(state, 3, telemetry)
    started, *changes = read_events(tmp_path / "events.jsonl")
    assert (started["event"], started["term"], started["round"]) == ("run_started", 3, 4)
    assert [(e["event"], e["key"]) for e in changes] == [
        ("config_changed", "lr"),
        ("config_changed", "quorum"),
    ]
    assert "lr was 0.2, is 0.3 from round 5 on" in changes[0]["message"]
