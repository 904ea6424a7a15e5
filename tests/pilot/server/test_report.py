"""What people are told: of a changed configuration, and of each client's part of a round."""

import logging
from pathlib import Path

import pytest
import torch

from pilot.config import RunConfig
from pilot.rules.ledger import Ledger
from pilot.run.events import read_events
from pilot.run.state import ConfigChange, RunState
from pilot.server import report
from pilot.server.open_round import Work
from pilot.server.roster import Site
from pilot.server.telemetry import Telemetry
from pilot.wire.messages import Fence, HelloReply, TrainReply


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


def test_each_clients_bar_ends_with_its_loss_and_shard_though_no_heartbeat_was_due(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = Ledger(num_shards=4, epochs=1, shard_order=lambda _: range(4))
    ledger.row_counts[3] = 20
    config = RunConfig(run_name="r", num_shards=4)
    state = RunState(config, {"w": torch.zeros(1)}, ledger, total_tokens=1)
    fence = Fence("r", 1, 1, 0)
    work = Work("m", Site("client_7", 7, HelloReply()), fence, None)
    consumed = [[0, 2, 0, 9], [0, 3, 0, 5]]
    reply = TrainReply(
        fence=fence, client="client_7", tokens=640, loss_nats=1280.0, consumed=consumed
    )
    caplog.set_level(logging.INFO, logger="pilot")
    report.part_done(work, reply, state, elapsed_s=2.0)
    (line,) = caplog.messages
    assert line.startswith("client_7: 100%")
    assert "loss=2.0000 shard=3 shard_progress=25.0%" in line


def test_a_client_that_trained_nothing_has_no_line(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(num_shards=1, epochs=1, shard_order=lambda _: [0])
    config = RunConfig(run_name="r", num_shards=1)
    state = RunState(config, {"w": torch.zeros(1)}, ledger, total_tokens=1)
    fence = Fence("r", 1, 1, 0)
    caplog.set_level(logging.INFO, logger="pilot")
    work = Work("m", Site("a", 1, HelloReply()), fence, None)
    report.part_done(work, TrainReply(fence=fence, client="a"), state, elapsed_s=2.0)
    assert not caplog.messages
