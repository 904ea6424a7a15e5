"""Everything that a run is between two rounds survives a snapshot, or the resume is refused."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pilot.config import RunConfig
from pilot.rules.ledger import Ledger
from pilot.rules.outer import Coded
from pilot.run.changes import ConfigChange, ResumeError
from pilot.run.snapshot import Snapshot, latest_snapshot, write_snapshot
from pilot.run.state import (
    Contribution,
    MergedReply,
    RoundRecord,
    RunState,
)
from pilot.segment import Segment
from pilot.wire.messages import Fence

CONFIG = RunConfig(run_name="r", num_shards=3, total_batch_size=4096, min_clients=1)


def order(_: int) -> list[int]:
    return [2, 0, 1]


def trained(config: RunConfig = CONFIG, **changes: Any) -> RunState:
    ledger = Ledger(num_shards=3, epochs=1, shard_order=order)
    lease = ledger.lease("a", 5)
    assert lease is not None
    ledger.commit(lease.lease_id, [Segment(0, 2, 0, 5)], {2: 9})
    values: dict[str, Any] = {
        "config": config,
        "weights": {"w": torch.arange(3.0)},
        "ledger": ledger,
        "total_tokens": 100_000,
        "outer": {"momentum.w": torch.ones(3)},
        "round_number": 4,
        "tokens": 40_960,
        "merged": [MergedReply("a", Fence("r", 2, 4, 7), 10_240, [Segment(0, 2, 0, 5)])],
        "merged_log": ['{"round":3}', '{"round":4}'],
        "last_merged": {"a": Fence("r", 2, 4, 7)},
        "config_changes": [ConfigChange(3, "lr", 0.01, 0.02)],
        "history": [RoundRecord(4, "min-duration", 2, 40_960, 1.5, 3.25, 1.75, 9)],
        "fingerprints": {"tokenizer": "ab"},
        "wandb_id": "w1",
    }
    return RunState(**(values | changes))


def test_run_is_the_same_after_a_snapshot(tmp_path: Path) -> None:
    state = trained()
    write_snapshot(tmp_path, state.to_snapshot(term=2), keep=1)
    snapshot = latest_snapshot(tmp_path, report=print)
    assert snapshot is not None and snapshot.state["term"] == 2
    resumed = RunState.from_snapshot(snapshot, CONFIG, shard_order=order)
    assert resumed.ledger.to_state() == state.ledger.to_state()
    for name in vars(state):
        if name in ("weights", "outer"):
            torch.testing.assert_close(getattr(resumed, name), getattr(state, name), rtol=0, atol=0)
        elif name != "ledger":
            assert getattr(resumed, name) == getattr(state, name), name


def through_json(state: RunState) -> Snapshot:
    snapshot = state.to_snapshot(term=1)
    return replace(snapshot, state=json.loads(json.dumps(snapshot.state)))


def test_configuration_that_trains_another_model_is_refused_by_key() -> None:
    snapshot = through_json(trained())
    other = replace(CONFIG, lr=0.1, depth=4, wandb_project="other")
    with pytest.raises(ResumeError) as caught:
        RunState.from_snapshot(snapshot, other, shard_order=order)
    message = str(caught.value)
    assert "lr (was 0.02, is 0.1)" in message and "depth (was 20, is 4)" in message
    assert "wandb" not in message and "another run-name" in message


def test_key_that_its_version_did_not_know_yet_was_as_by_default() -> None:
    snapshot = through_json(trained())
    del snapshot.state["config"]["fp8"]
    assert not RunState.from_snapshot(snapshot, CONFIG, shard_order=order).config.fp8
    with pytest.raises(ResumeError, match="fp8 "):
        RunState.from_snapshot(snapshot, replace(CONFIG, fp8=True), shard_order=order)


def test_changed_configuration_goes_on_if_one_insists_and_is_remembered_key_by_key() -> None:
    other = replace(CONFIG, lr=0.1, outer_optimizer="adam", resume_anyway=True)
    resumed = RunState.from_snapshot(through_json(trained()), other, shard_order=order)
    assert resumed.config is other
    assert resumed.config_changes == [
        ConfigChange(3, "lr", 0.01, 0.02),
        ConfigChange(4, "lr", 0.02, 0.1),
        ConfigChange(4, "outer-optimizer", "nesterov", "adam"),
    ]
    assert resumed.outer == {}, "the momenta of another optimizer mean something else"
    assert resumed.total_tokens == 100_000
    again = RunState.from_snapshot(through_json(resumed), other, shard_order=order)
    assert again.config_changes == resumed.config_changes


def test_run_begun_before_a_default_was_auto_keeps_its_own_numbers() -> None:
    of_then = replace(CONFIG, outer_lr=0.7, outer_momentum=0.9)
    resumed = RunState.from_snapshot(through_json(trained(of_then)), CONFIG, shard_order=order)
    assert (resumed.config.outer_lr, resumed.config.outer_momentum) == (0.7, 0.9)
    assert resumed.config == of_then and resumed.config_changes == trained().config_changes
    insisting = replace(CONFIG, resume_anyway=True)
    changed = RunState.from_snapshot(through_json(trained(of_then)), insisting, shard_order=order)
    assert changed.config.outer_momentum == "auto"
    assert ConfigChange(4, "outer-momentum", 0.9, "auto") in changed.config_changes


def test_numbers_that_were_never_the_default_are_not_forgotten() -> None:
    chosen = through_json(trained(replace(CONFIG, outer_momentum=0.8)))
    with pytest.raises(ResumeError, match=r"outer-momentum \(was 0.8, is 'auto'\)"):
        RunState.from_snapshot(chosen, CONFIG, shard_order=order)
    new = through_json(trained())
    with pytest.raises(ResumeError, match=r"outer-lr \(was 'auto', is 0.7\)"):
        RunState.from_snapshot(new, replace(CONFIG, outer_lr=0.7), shard_order=order)


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_a_run_from_before_a_key_was_renamed_is_the_same_run(form: str) -> None:
    snapshot = through_json(trained(replace(CONFIG, wire_up=form)))
    snapshot.state["config"]["wire-dtype"] = snapshot.state["config"].pop("wire-up")
    same = replace(CONFIG, wire_up=form)
    before = trained().config_changes
    resumed = RunState.from_snapshot(snapshot, same, shard_order=order)
    assert resumed.config_changes == before and resumed.config.wire_up == form
    with pytest.raises(ResumeError, match=f"wire-up \\(was '{form}', is 'int4'\\)"):
        RunState.from_snapshot(snapshot, replace(CONFIG, wire_up="int4"), shard_order=order)


def test_run_is_made_longer_if_one_insists() -> None:
    other = replace(CONFIG, total_tokens=409_600, resume_anyway=True)
    resumed = RunState.from_snapshot(through_json(trained()), other, shard_order=order)
    assert resumed.total_tokens == 409_600


@pytest.mark.parametrize(
    "change", [{"depth": 4}, {"sequence_len": 1024}, {"num_shards": 9}, {"packing": "stream"}]
)
def test_what_tensors_and_rows_depend_on_cant_be_changed_even_so(change: dict[str, Any]) -> None:
    other = replace(CONFIG, lr=0.1, resume_anyway=True, **change)
    with pytest.raises(ResumeError) as caught:
        RunState.from_snapshot(through_json(trained()), other, shard_order=order)
    key = next(iter(change)).replace("_", "-")
    assert f"{key} (was" in str(caught.value)
    assert "lr" not in str(caught.value) and "resume-anyway" not in str(caught.value)


def test_refusal_says_how_to_go_on_anyway() -> None:
    with pytest.raises(ResumeError, match="resume-anyway=true continues"):
        RunState.from_snapshot(through_json(trained()), replace(CONFIG, lr=0.1), shard_order=order)


def test_snapshot_says_which_versions_wrote_it_and_where_the_schedule_stands() -> None:
    state = through_json(trained()).state
    assert state["versions"].keys() == {"pilot", "python", "torch", "flwr"}
    assert state["versions"]["torch"] == torch.__version__
    assert state["schedule"]["step"] == 10.0
    assert 0 < state["schedule"]["lr_multiplier"] <= 1


def moved_to(state: RunState, value: float, coded: Coded | None) -> dict[str, torch.Tensor]:
    """An outer step, in place."""
    assert coded is None  # with `wire-down` full
    state.weights["w"].fill_(value)
    return {}


def test_a_round_is_absorbed_whole_its_replies_for_good_and_the_last_of_each_client() -> None:
    state = trained(merged=[], merged_log=[], last_merged={}, history=[])
    for number in (5, 6):
        contributions = []
        for name in "ab":
            lease = state.ledger.lease(name, 2)
            assert lease is not None
            used = replace(lease.segments[0], end_row=lease.segments[0].first_row + 2)
            fence = Fence("r", 2, number, lease.lease_id)
            reply = MergedReply(name, fence, 16, [used])
            contributions.append(Contribution(reply, {}, norm=float(number), steps=2.0))
        record = RoundRecord(number, "min-duration", 2, 32, 1.0, 2.0)
        state.absorb(record, contributions, functools.partial(moved_to, state, float(number)))
    merged = [one.reply for one in contributions]
    assert state.merged == merged
    assert state.last_merged == {reply.client: reply.fence for reply in merged}
    assert (state.round_number, state.tokens, len(state.history)) == (6, 40_960 + 64, 2)
    assert state.admission.norms == [5.0, 5.0, 6.0, 6.0] and not state.ledger.open
    assert state.ledger.rows_committed == 5 + 8 and float(state.weights["w"][0]) == 6.0
    log = [json.loads(line) for line in through_json(state).merged]
    assert [(one["round"], one["client"]) for one in log] == [
        (5, "a"),
        (5, "b"),
        (6, "a"),
        (6, "b"),
    ]
    assert log[-1] == {
        "round": 6,
        "term": 2,
        "lease": merged[-1].fence.lease_id,
        "client": "b",
        "tokens": 16,
        "consumed": [merged[-1].consumed[0].to_list()],
    }


def test_a_round_without_replies_leaves_the_model_and_is_counted() -> None:
    state = trained()
    state.absorb(RoundRecord(5, "nobody-left", 0, 0, 1.0, None), [], None)
    assert (state.round_number, state.tokens, state.merged) == (5, 40_960, [])
    assert torch.equal(state.weights["w"], torch.arange(3.0)) and state.history[-1].clients == 0


def test_what_doesnt_shape_the_training_may_change() -> None:
    other = replace(CONFIG, grace_max=1.0, redis_url="redis://elsewhere", client_processes=2)
    resumed = RunState.from_snapshot(through_json(trained()), other, shard_order=order)
    assert resumed.config is other


def test_a_run_from_before_there_was_a_key_continues_as_it_was() -> None:
    own = replace(CONFIG, batch_of="client")
    snapshot = through_json(trained(own))
    del snapshot.state["config"]["batch-of"]
    resumed = RunState.from_snapshot(snapshot, CONFIG, shard_order=order)
    assert CONFIG.batch_of == "federation" and resumed.config == own, (
        "nobody has asked for the default"
    )
    assert [change.key for change in resumed.config_changes] == ["lr"], "of before"


def test_snapshot_of_another_format_is_refused() -> None:
    snapshot = through_json(trained())
    snapshot.state["format"] = 99
    with pytest.raises(ResumeError, match="another version"):
        RunState.from_snapshot(snapshot, CONFIG, shard_order=order)


@pytest.mark.parametrize(
    ("changes", "finished"),
    [
        ({}, False),
        ({"tokens": 100_000}, True),
        ({"tokens": 99_999}, False),
        ({"config": replace(CONFIG, num_rounds=4)}, True),
        ({"config": replace(CONFIG, num_rounds=5)}, False),
    ],
)
def test_run_is_finished_by_tokens_or_rounds(changes: dict[str, Any], finished: bool) -> None:
    assert trained(**changes).finished is finished


def test_run_is_finished_when_every_row_is_committed() -> None:
    state = trained()
    lease = state.ledger.lease("a", 10_000)
    while lease is not None:
        counts = {segment.shard: 9 for segment in lease.segments}
        used = [replace(segment, end_row=9) for segment in lease.segments]
        state.ledger.commit(lease.lease_id, used, counts)
        lease = state.ledger.lease("a", 10_000)
    assert state.finished


def test_steps_are_those_of_the_tokens_committed() -> None:
    assert trained().steps == 10


def test_record_is_found_by_its_round() -> None:
    state = trained()
    assert state.record(4) is state.history[0] and state.record(5) is None
