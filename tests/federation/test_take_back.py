"""A merge that spoils the model is taken back: model, books and data are those of before it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from pilot.rules.validation import bpb
from pilot.run.snapshot import latest_snapshot, read_snapshot
from pilot.segment import Score
from pilot.server.commit import MAX_TAKEN_BACK, NoProgress
from pilot.wire.codec import decode
from pilot.wire.messages import TrainOrder, TrainReply
from pilot.wire.records import from_records

from .books import check_rows, rows_in
from .scripted import ROW_TOKENS, ScriptedSite, Server, events

VALUES = {"max_update_norm_ratio": 0.0, "num_rounds": 5, "epochs": 9}


class SeeingSite(ScriptedSite):
    """Its validation figure is a function of the model that it is sent: more for one that is far away from the
    first. `lie` is a factor on it."""

    lie = 1.0
    model: dict[str, torch.Tensor]

    def __call__(self, kind: str, content: RecordDict) -> RecordDict:
        if kind == "train":
            self.model = decode(from_records(content)[1])
        return super().__call__(kind, content)

    def _train(self, order: TrainOrder) -> tuple[TrainReply, dict[str, torch.Tensor]]:
        reply, update = super()._train(order)
        far = max(float(tensor.abs().max()) for tensor in self.model.values())
        nats = 1.4 * self.lie * (1 + far / 100)
        scores = [Score(f, e, nats * (e - f), 2 * (e - f)) for f, e in order.eval_pieces]
        return replace(reply, scores=scores), update


def spoil(*rounds: int, factor: float = 1e4) -> Any:
    """A reaction: in those rounds (none: in all), its update is that much too long."""

    def react(order: TrainOrder, reply: TrainReply, update: dict[str, torch.Tensor]) -> None:
        if not rounds or order.fence.round_number in rounds:
            for tensor in update.values():
                tensor.mul_(factor)

    return react


def check_books(run: Server) -> list[int]:
    """The newest snapshot proves which rows its model has seen; the rounds whose replies it stands on."""
    snapshot = latest_snapshot(run.run_dir / "snapshots", report=pytest.fail)
    assert snapshot is not None
    merged: list[dict[str, Any]] = []
    for line in map(json.loads, snapshot.merged):
        if "takes_back" in line:
            first, last = line["takes_back"]
            merged = [one for one in merged if not first <= one["round"] <= last]
        else:
            merged.append(line)
    state = snapshot.state
    check_rows(merged, rows_in(state), tokens=state["tokens"], row_tokens=ROW_TOKENS)
    return sorted({one["round"] for one in merged})


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("bad_round", [1, 2])
def test_spoilt_merge_is_undone_and_the_next_round_goes_on_from_the_version_before(
    server: Any, bad_round: int, keep: int
) -> None:
    sites = [SeeingSite("a"), SeeingSite("b", react=spoil(bad_round)), SeeingSite("c")]
    run = server(sites, **VALUES, snapshot_keep=keep, snapshot_keep_every=1)
    state = run.run()
    assert [r.taken_back for r in state.history] == [n == bad_round for n in range(1, 6)]
    assert [r.reason == "taken-back" for r in state.history] == [
        n == bad_round + 1 for n in range(1, 6)
    ]
    assert check_books(run) == [n for n in range(1, 6) if n not in (bad_round, bad_round + 1)]
    (told,) = events(run, "merge_taken_back")
    assert told["taken_back"] == [bad_round, bad_round] and told["clients"] == ["a", "b", "c"]
    assert told["val_bpb"] > 1.25 * told["val_bpb_before"]
    after = read_snapshot(run.run_dir / "snapshots", bad_round + 1)
    before = run.state.weights if bad_round == 1 else None
    if bad_round == 1:
        before = {"w": torch.zeros(5), "b": torch.ones(2, 3)}
    else:
        before = read_snapshot(run.run_dir / "snapshots", bad_round - 1).model
    for name, tensor in before.items():
        assert torch.equal(after.model[name], tensor)
    assert (after.state["merged"], after.state["tokens"]) == ([], 96 * (bad_round - 1))
    assert max(float(t.abs().max()) for t in state.weights.values()) < 20
    leases = [order.fence.lease_id for site in sites for order in site.orders if order.segments]
    assert len(leases) == len(set(leases)), "no fence is given twice"
    ledger = state.ledger
    assert ledger.rows_leased == ledger.rows_committed + ledger.rows_returned


def test_rows_of_a_merge_that_is_taken_back_are_trained_on_again(server: Any) -> None:
    sites = [SeeingSite("a"), SeeingSite("b", react=spoil(2))]
    run = server(sites, **VALUES | {"num_rounds": 4})
    run.run()

    def rows(number: int) -> set[tuple[int, ...]]:
        orders = [o for site in sites for o in site.orders if o.fence.round_number == number]
        return {(s.epoch, s.shard, s.first_row) for o in orders for s in o.segments}

    assert rows(4) <= rows(2) | rows(3) and rows(2) & rows(4)
    fences = [o.last_merged_fence for o in sites[0].orders if o.fence.round_number == 4]
    assert [fence.round_number for fence in fences if fence] == [1], "its optimizer goes back too"


def test_client_that_spoils_every_merge_is_found_and_the_others_finish(server: Any) -> None:
    sites = [SeeingSite(name) for name in "abc"]
    sites[1].react = spoil()
    run = server(sites, **VALUES | {"num_rounds": 12, "cooling_time": 1e6})
    state = run.run()
    assert {event["culprit"] for event in events(run, "merge_taken_back")} == {None, "b"}
    assert "b" not in {json.loads(line).get("client") for line in state.merged_log[-4:]}
    assert max(float(t.abs().max()) for t in state.weights.values()) < 20
    assert len(check_books(run)) >= 6


def test_last_merge_is_taken_back_too(server: Any) -> None:
    sites = [SeeingSite("a"), SeeingSite("b", react=spoil(2))]
    run = server(sites, **VALUES | {"num_rounds": 2})
    state = run.run()
    assert [record.reason for record in state.history][2:] == ["taken-back"]
    assert check_books(run) == [1] and state.round_number == 3
    assert bpb(state.guard.versions[-1]) == pytest.approx(state.history[0].val_bpb)


@pytest.mark.parametrize("liar", [0, 1])
def test_one_of_two_that_lies_in_the_last_evaluation_costs_a_merge_and_not_the_run(
    server: Any, liar: int
) -> None:
    sites = [SeeingSite(name) for name in "ab"]
    sites[liar].react = lambda order, *_: setattr(
        sites[liar], "lie", 5.0 if order.run_is_over else 1.0
    )
    run = server(sites, **VALUES | {"num_rounds": 0, "total_tokens": 24 * ROW_TOKENS})
    state = run.run()
    assert len(events(run, "merge_taken_back")) <= 1
    assert state.finished and not any(e["culprit"] for e in events(run, "merge_taken_back"))
    assert check_books(run)


@pytest.mark.parametrize("factor", [5.0, 0.5, 0.0])
def test_one_of_three_that_lies_about_its_figure_takes_nothing_back(
    server: Any, factor: float
) -> None:
    sites = [SeeingSite(name) for name in "abc"]
    run = server(sites, **VALUES, eval_rows=96)
    sites[0].react = lambda order, *_: setattr(sites[0], "lie", factor)
    state = run.run()
    assert not events(run, "merge_taken_back")
    assert all("a " in event["reason"] for event in events(run, "validation_doubted"))
    for record in state.history:
        assert record.val_bpb == pytest.approx(1.05, rel=0.1)
    figures = events(run, "validation")[1:]
    assert all(not one["complete"] and 60 <= one["eval_rows"] < 96 for one in figures)


def test_spoilt_replies_are_kept_for_people_with_quarantine(server: Any) -> None:
    sites = [SeeingSite("a"), SeeingSite("b", react=spoil(2))]
    run = server(sites, **VALUES, quarantine=True)
    run.run()
    kept = sorted(path.name for path in (run.run_dir / "quarantine").iterdir())
    assert [name[:14] for name in kept] == ["round-000002-a"] * 2 + ["round-000002-b"] * 2
    facts = json.loads((run.run_dir / "quarantine" / kept[0]).read_text())
    assert "round 3 took it back" in facts["reason"] and facts["reply"]["tokens"] == 32
    assert not (run.run_dir / "spool-merged").exists()


def test_guard_that_is_off_keeps_what_it_is_given(server: Any) -> None:
    sites = [SeeingSite("a"), SeeingSite("b", react=spoil(2))]
    run = server(sites, **VALUES, take_back_ratio=0.0)
    run.run()
    assert check_books(run) == [1, 2, 3, 4, 5] and not events(run, "merge_taken_back")


def test_run_whose_every_merge_spoils_the_model_ends_with_a_sentence(server: Any) -> None:
    sites = [SeeingSite(name, react=spoil()) for name in "ab"]
    run = server(sites, **VALUES | {"num_rounds": 99, "cooling_time": 0.0})
    with pytest.raises(NoProgress, match="lower lr or outer-lr"):
        run.run()
    assert len(events(run, "merge_taken_back")) == MAX_TAKEN_BACK
    assert check_books(run) == []


def test_version_that_is_gone_is_told_and_the_run_goes_on(server: Any, tmp_path: Path) -> None:
    sites = [SeeingSite("a"), SeeingSite("b", react=spoil(3))]
    run = server(sites, **VALUES, outer_optimizer="fedavg")  # momentum would go on to spoil it

    def gone(order: TrainOrder, *_: Any) -> None:
        if order.fence.round_number == 4:
            for path in (run.run_dir / "snapshots" / "round-000002").iterdir():
                path.write_bytes(b"rotten")

    sites[0].react = gone
    run.run()
    (told,) = events(run, "merge_kept")
    assert told["round"] == 3 and "round-000002 can't be read" in told["reason"]
    assert check_books(run) == [1, 2, 3, 4, 5]


def test_first_round_is_judged_by_what_steps_can_move(server: Any) -> None:
    """Without earlier norms, and with two clients of which nobody knows which one is right."""

    class Movement:
        def limit(self, weights: Any, *, steps: int, share: float) -> float:
            return 10.0 * steps

    sites = [SeeingSite("a"), SeeingSite("b", react=spoil(1))]
    run = server(sites, **VALUES | {"max_update_norm_ratio": 4.0})
    run.state.movement = Movement()  # type: ignore[assignment]
    state = run.run()
    assert [record.refused for record in state.history] == [1, 0, 0, 0, 0]
    (told,) = events(run, "reply_refused")
    assert "more than 1 optimizer steps at this run's learning rates can move" in told["reason"]


def test_client_that_the_others_contradict_is_turned_away_at_the_close(server: Any) -> None:
    sites = [SeeingSite(name) for name in "abcd"]
    sites[2].react = spoil(1, 2, 3, factor=1e3)
    run = server(
        sites, **VALUES | {"max_update_norm_ratio": 1e9, "cooling_time": 1e6}, quarantine=True
    )
    state = run.run()
    assert [record.refused for record in state.history] == [1, 1, 1, 0, 0]
    assert [record.clients for record in state.history] == [3] * 5
    assert [event["client"] for event in events(run, "client_cooling")] == ["c"]
    assert all("the other 3 clients" in event["reason"] for event in events(run, "reply_refused"))
    assert check_books(run) == [1, 2, 3, 4, 5] and not events(run, "merge_taken_back")
    kept = [p for p in (run.run_dir / "quarantine").iterdir() if p.suffix == ".safetensors"]
    assert len(kept) == 3
