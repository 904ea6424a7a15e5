"""What people are told: of a changed configuration, and of each client's part of a round."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pilot.config import RunConfig
from pilot.rules.ledger import Ledger
from pilot.run.changes import ConfigChange
from pilot.run.events import read_events
from pilot.run.state import (
    RoundRecord,
    RunState,
)
from pilot.segment import Segment
from pilot.server.bars import speeds
from pilot.server.report import Report
from pilot.server.tables import round_table
from pilot.server.telemetry import Telemetry
from pilot.wire.messages import Fence, Heartbeat, TrainReply


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
        Report(telemetry).run_started(state, 3)
    started, *changes = read_events(tmp_path / "events.jsonl")
    assert (started["event"], started["term"], started["round"]) == ("run_started", 3, 4)
    assert [(e["event"], e["key"]) for e in changes] == [
        ("config_changed", "lr"),
        ("config_changed", "quorum"),
    ]
    assert "lr was 0.2, is 0.3 from round 5 on" in changes[0]["message"]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(
        Telemetry(tmp_path, config_dict={}, wandb_mode="disabled", wandb_project="", run_name="r")
    )


def test_each_clients_bar_ends_with_its_loss_and_shard_though_no_heartbeat_was_due(
    report: Report,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = Ledger(num_shards=4, epochs=1, shard_order=lambda _: range(4))
    ledger.row_counts[3] = 20
    config = RunConfig(run_name="r", num_shards=4)
    state = RunState(config, {"w": torch.zeros(1)}, ledger, total_tokens=1)
    fence = Fence("r", 1, 1, 0)
    consumed = [Segment(0, 2, 0, 9), Segment(0, 3, 0, 5)]
    reply = TrainReply(
        fence=fence, client="client_7", tokens=640, loss_nats=1280.0, consumed=consumed
    )
    caplog.set_level(logging.INFO, logger="pilot")
    report.reply_accepted("client_7", reply, state, trained=True, elapsed_s=2.0)
    batches, line = caplog.messages
    assert batches == "Client 7: 0 batches"
    assert line.startswith("client_7: 100%")
    assert "loss=2.0000 shard=3 shard_progress=25.0%" in line


def test_rate_and_mfu_of_each_client_are_in_its_line_and_in_the_events_of_the_round(
    report: Report, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(num_shards=4, epochs=1, shard_order=lambda _: range(4))
    config = RunConfig(run_name="r", num_shards=4)
    state = RunState(config, {"w": torch.zeros(1)}, ledger, total_tokens=1)
    rows = [Segment(0, 2, 0, 9)]
    fast = TrainReply(
        fence=Fence("r", 1, 1, 0),
        client="a",
        tokens=600_000,
        train_s=4.0,
        mfu=0.5,
        consumed=rows,
    )
    slow = replace(fast, fence=Fence("r", 1, 1, 1), tokens=100_000, train_s=1.0, mfu=0.3)
    cpu = TrainReply(fence=Fence("r", 1, 1, 2), client="b", tokens=500, train_s=2.0, consumed=rows)
    caplog.set_level(logging.INFO, logger="pilot")
    beat = Heartbeat(state="training", step=1, tokens=50, tokens_per_s=150e3, mfu=0.531)
    report.progress({"a": beat, "b": replace(beat, mfu=0.0)}, tokens=100, elapsed_s=9.0)
    told_a, told_b = caplog.messages
    assert "150ktok/s" in told_a and told_a.endswith("mfu=53.1%]") and "mfu" not in told_b
    for reply in (fast, slow, cpu):
        report.reply_accepted(reply.client, reply, state, trained=True, elapsed_s=60.0)
    lines = [line for line in caplog.messages[2:] if "tok/s" in line]
    assert "150ktok/s" in lines[0] and "mfu=50.0%" in lines[0]
    assert "250tok/s" in lines[2] and "mfu" not in lines[2]
    record = RoundRecord(1, "all-replied", 2, 700_500, 61.0, 3.0)
    found = speeds((reply.client, reply) for reply in (fast, slow, cpu))
    report.round_committed(record, state, speeds=found)
    assert " tokens_per_s=140,250 (61.0 s)" in caplog.messages[-1]
    events = {e["event"]: e for e in read_events(tmp_path / "events.jsonl")}
    assert events["round_committed"]["speeds"] == {
        "a": {"tokens_per_s": 140_000.0, "mfu": pytest.approx(0.46)},
        "b": {"tokens_per_s": 250.0, "mfu": None},
    }
    assert (events["reply"]["tokens_per_s"], events["reply"]["mfu"]) == (250.0, None)
    assert events["metrics"]["tokens_per_s"] == 140_250.0


def test_a_client_that_only_evaluated_has_no_line(
    report: Report, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(num_shards=1, epochs=1, shard_order=lambda _: [0])
    config = RunConfig(run_name="r", num_shards=1)
    state = RunState(config, {"w": torch.zeros(1)}, ledger, total_tokens=1)
    fence = Fence("r", 1, 1, 0)
    caplog.set_level(logging.INFO, logger="pilot")
    reply = TrainReply(fence=fence, client="a")
    report.reply_accepted("a", reply, state, trained=False, elapsed_s=2.0)
    assert not caplog.messages


def test_figure_of_a_part_of_the_rows_is_marked_wherever_it_appears(
    report: Report, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged: list[dict[str, Any]] = []

    class Wandb:
        def log(self, numbers: dict[str, Any], step: int) -> None:
            logged.append(numbers | {"step": step})

    report.telemetry._sinks = Wandb()  # type: ignore[assignment]
    caplog.set_level(logging.INFO, logger="pilot")
    report.validation(3, val_bpb=2.2377, eval_rows=8, wanted=16)
    report.validation(4, val_bpb=2.4488, eval_rows=16, wanted=16)
    assert caplog.messages == [
        "round=3 val_bpb=2.2377 (partial: 8 of 16 rows)",
        "round=4 val_bpb=2.4488",
    ]
    assert logged == [
        {"val_bpb_partial": 2.2377, "val_rows": 8, "step": 3},
        {"val_bpb": 2.4488, "val_rows": 16, "step": 4},
    ]
    told = [e for e in read_events(tmp_path / "events.jsonl") if e["event"] == "validation"]
    assert [(e["complete"], e["eval_rows"]) for e in told] == [(False, 8), (True, 16)]


def test_table_says_which_figures_are_partial_and_which_merges_were_taken_back() -> None:
    config = RunConfig(run_name="r", num_shards=1, eval_rows=16)
    ledger = Ledger(num_shards=1, epochs=1, shard_order=lambda _: [0])
    state = RunState(config, {}, ledger, total_tokens=1)
    state.history = [
        RoundRecord(1, "all-replied", 2, 64, 1.0, 3.0, val_bpb=2.2377, eval_rows=8),
        RoundRecord(2, "all-replied", 2, 64, 1.0, 3.0, 9.5, 16, refused=1, taken_back=True),
        RoundRecord(3, "taken-back", 0, 0, 1.0, None, val_bpb=2.2, eval_rows=16),
    ]
    lines = [line.split("  ")[-1] for line in round_table(state).splitlines()[1:]]
    assert lines == [
        "all-replied (val bpb of 8 of 16 rows only)",
        "all-replied (1 refused, taken back)",
        "taken-back",
    ]


def test_a_run_whose_events_cannot_be_read_still_says_where_its_model_is(
    report: Report, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(num_shards=1, epochs=1, shard_order=lambda _: [0])
    config = RunConfig(run_name="r", num_shards=1)
    state = RunState(config, {"w": torch.zeros(1)}, ledger, total_tokens=1)
    report.telemetry.events_path.unlink(missing_ok=True)
    report.telemetry.events_path.mkdir()  # reading it is an OSError, for root as well
    with caplog.at_level(logging.INFO, "pilot"):
        report.run_finished(state, final_model="f.pt", checkpoint="c")
    assert "Final model: f.pt" in [record.getMessage() for record in caplog.records]
