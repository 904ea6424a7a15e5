"""The round loop against sites that fail, lie, are late or leave: real Redis, real messages."""

import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pilot.run.snapshot import latest_snapshot
from pilot.segment import Segment
from pilot.server.failures import RunFailed
from pilot.wire.messages import TrainOrder, to_header

from .scripted import ROW_TOKENS, FastClock, ScriptedSite, events


def in_round(number: int, react: Any) -> Any:
    """`react`, in that round only."""

    def only(order: Any, reply: Any, update: Any) -> Any:
        return react(order, reply, update) if order.fence.round_number == number else None

    return only


def fail(*_: Any) -> None:
    raise RuntimeError("out of memory")


def test_a_round_without_replies_leaves_the_model_as_it_was_and_the_next_one_runs(
    server: Any,
) -> None:
    sites = [ScriptedSite(name, react=in_round(1, fail)) for name in ("a", "b")]
    run = server(sites, num_rounds=1)
    state = run.run()
    assert torch.equal(state.weights["w"], torch.zeros(5))
    assert torch.equal(state.weights["b"], torch.ones(2, 3))
    assert [record.clients for record in state.history] == [0]
    assert (state.tokens, state.ledger.rows_committed) == (0, 0)
    state = server(sites, num_rounds=2, run_name="again").run()
    assert not torch.equal(state.weights["w"], torch.zeros(5))
    assert [record.clients for record in state.history] == [0, 2]


def test_each_round_accounts_for_all_the_time_since_the_last_and_for_all_bytes(server: Any) -> None:
    run = server([ScriptedSite(name, delay_s=0.05) for name in ("a", "b")], num_rounds=3)
    clock = FastClock()
    run.run(clock)
    whole_s = clock.now_s()
    told = events(run, "round_time")
    assert [(one["round"], sorted(one["clients"])) for one in told] == [
        (number, ["a", "b"]) for number in (1, 2, 3, 4)
    ]
    assert told[3]["goodput"] is None, "that one only evaluates"
    spent = {}
    for one in told:
        assert one["round_s"] == pytest.approx(sum(one["phases"].values()), abs=0.01)
        for phase, seconds in one["phases"].items():
            spent[phase] = spent.get(phase, 0.0) + seconds
    # the rest of the whole: making the loop and leaving it
    assert sum(spent.values()) == pytest.approx(whole_s, rel=0.5)
    assert sum(spent.values()) <= whole_s
    assert {"dispatch", "merge", "snapshot"} <= spent.keys()
    model_bytes = 4 * (5 + 6)
    assert [one["bytes_down"] for one in told] == [2 * model_bytes] * 4
    assert [one["bytes_up"] for one in told] == [2 * model_bytes] * 3 + [0]


def test_only_errors_for_some_rounds_end_the_run_with_their_reason(server: Any) -> None:
    run = server([ScriptedSite("a", react=fail), ScriptedSite("b", react=fail)], num_rounds=9)
    with pytest.raises(RunFailed, match=r"3 rounds in a row gave only errors.*out of memory"):
        run.run()


def test_odd_metrics_cost_no_reply(server: Any) -> None:
    def odd(order: Any, reply: Any, update: Any) -> dict[str, Any]:
        return to_header(reply) | {
            "note": None,
            "device": "H100",
            "tensor": torch.tensor(1.5),
            "vector": torch.ones(3),
            "scalar": np.float32(2.5),
            "nan": float("nan"),
            "huge": 2**80,
            "thing": object(),
        }

    state = server([ScriptedSite("a", react=odd), ScriptedSite("b", react=odd)]).run()
    assert [record.clients for record in state.history] == [2, 2, 2]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda o, r, u: u.update(w=torch.tensor([1.0, 2, 3, 4, float("nan")])), "w is not finite"),
        (lambda o, r, u: u.update(w=torch.zeros(6)), r"w has shape \(6,\), not \(5,\)"),
        (lambda o, r, u: u.update(extra=torch.zeros(6)), "tensors are not the model's"),
        (lambda o, r, u: replace(r, tokens=r.tokens + 1), "tokens for 4 rows"),
        (lambda o, r, u: replace(r, error="no GPU"), "no GPU"),
        (lambda o, r, u: replace(r, fence=replace(r.fence, term=99)), "its fence is"),
        (lambda o, r, u: replace(r, fence=replace(r.fence, run="other")), "its fence is"),
        (
            lambda o, r, u: replace(r, consumed=[Segment(0, 3, 0, 4)]),
            "does not start as the leased",
        ),
        (lambda o, r, u: replace(r, tokens="many"), "tokens is a str"),
        (lambda o, r, u: {"kind": "Nonsense"}, "not a Pilot message"),
    ],
)
def test_a_bad_reply_is_refused_with_its_reason_and_its_rows_go_back(
    server: Any, spoil: Any, reason: str
) -> None:
    bad = ScriptedSite("bad", react=in_round(1, spoil))
    run = server([ScriptedSite("good"), bad], num_rounds=1)
    state = run.run()
    assert state.history[0].clients == 1
    assert state.ledger.rows_committed == 4
    assert not state.ledger.open
    (refused,) = events(run, "reply_refused")
    assert refused["client"] == "bad"
    assert re.search(reason, refused["reason"])


def test_a_late_reply_is_refused_and_its_rows_go_back(server: Any) -> None:
    late = ScriptedSite("late", react=in_round(1, lambda *_: None), delay_s=1.0)
    early = ScriptedSite("early", delay_s=0.15)  # nobody waits for the other one, which takes 1 s
    run = server([early, late], num_rounds=9, grace_max=5, round_max_duration=5)
    state = run.run(FastClock(speed=20))
    assert state.history[0].clients == 1
    reasons = [event["reason"] for event in events(run, "reply_refused")]
    assert "no reply within the 5 s of grace" in reasons
    assert "it answers a round that is over" in reasons
    assert state.ledger.rows_committed == state.tokens // ROW_TOKENS


def test_a_site_that_has_become_slow_is_waited_for_longer_each_time(server: Any) -> None:
    def slow(order: TrainOrder, *_: Any) -> None:
        time.sleep(0.7 if order.fence.round_number == 1 else 2.3)  # 2 and 18 s after the end

    only = ScriptedSite("only", react=slow)
    run = server([only], num_rounds=4, min_clients=1, grace_max=600, round_max_duration=5)
    state = run.run(FastClock(speed=10))
    clients = [record.clients for record in state.history]
    assert clients[0] == 1 and sum(clients[2:]) >= 1, "three times what it took once is too little"


def test_a_site_that_leaves_for_good_does_not_hold_the_round(server: Any) -> None:
    leaver = ScriptedSite("leaver", delay_s=30.0)
    run = server([ScriptedSite("stays"), leaver], num_rounds=2)
    leave = in_round(1, lambda *_: run.grid.online.discard(101))
    run.sites[0].react = leave
    state = run.run(FastClock(speed=40))
    assert [record.clients for record in state.history] == [1, 1]
    assert events(run, "reply_refused")[0]["reason"] == "its node is gone"


def test_a_site_that_comes_while_a_round_runs_trains_in_it(server: Any) -> None:
    run = server([ScriptedSite("first", delay_s=1.5)], num_rounds=1, min_clients=1)
    late = ScriptedSite("second")
    run.sites[0].react = lambda *_: None
    original = run.sites[0].__call__

    def call(kind: str, content: Any) -> Any:
        if kind == "train":
            run.grid.add(200, late)
        return original(kind, content)

    run.grid.add(100, call)
    state = run.run(FastClock(speed=1))
    assert state.history[0].clients == 2
    assert late.orders[0].eval_end_row == 0


def test_a_newer_node_of_the_same_name_supersedes_the_older(server: Any) -> None:
    older, newer = ScriptedSite("same"), ScriptedSite("same")
    run = server([ScriptedSite("other"), older], num_rounds=2, min_clients=2)
    run.sites[0].react = in_round(1, lambda *_: run.grid.add(300, newer))
    state = run.run()
    assert len(older.orders) >= 1
    assert newer.orders
    assert len(state.history) == 2


def test_impostor_on_another_machine_takes_no_name_and_stops_no_run(server: Any) -> None:
    real, impostor = ScriptedSite("same"), ScriptedSite("same", host="elsewhere")
    run = server([ScriptedSite("other"), real], num_rounds=3)
    run.sites[0].react = in_round(1, lambda *_: run.grid.add(300, impostor))
    state = run.run()
    assert [record.clients for record in state.history] == [2, 2, 2]
    assert not impostor.orders
    (told,) = events(run, "name_contested")
    assert (told["client"], told["holder"], told["other"]) == ("same", "here", "elsewhere")
    assert any("also says that it is same" in order.note for order in real.orders)


def test_sites_that_disagree_are_refused_with_a_sentence(server: Any) -> None:
    other = ScriptedSite("c", fingerprints={"tokenizer": "another", "validation rows": "v"})
    sites = [ScriptedSite("a"), ScriptedSite("b"), other]
    state = server(sites, num_rounds=2).run()
    assert [record.clients for record in state.history] == [2, 2]
    assert not other.orders


def test_a_simulation_whose_sites_lack_data_fails_at_once_with_the_remedy(server: Any) -> None:
    sentence = "shard 0 is missing: run `python -m nanochat.dataset -n 4`"
    run = server([ScriptedSite("a", error=sentence), ScriptedSite("b", error=sentence)])
    run.closed = True
    with pytest.raises(RunFailed, match=r"run `python -m nanochat\.dataset -n 4`"):
        run.run()


def test_who_replies_first_does_not_change_the_model(server: Any) -> None:
    first = server([ScriptedSite("a", delay_s=0.4), ScriptedSite("b")]).run()
    second = server([ScriptedSite("a"), ScriptedSite("b", delay_s=0.4)], run_name="other").run()
    for name, weight in first.weights.items():
        assert torch.equal(weight, second.weights[name])


def test_a_server_that_resumes_goes_on_as_one_that_never_stopped(server: Any) -> None:
    sites = [ScriptedSite("a"), ScriptedSite("b")]
    whole = server(sites, num_rounds=4, run_name="whole").run()
    run = server(sites, num_rounds=4, run_name="broken")
    # interrupted in round 3: rounds 1 and 2 are on disk
    sites[0].react = in_round(3, lambda *_: run.stopped.set())
    with pytest.raises(Exception, match="the same command resumes it"):
        run.run()
    assert latest_snapshot(run.run_dir / "snapshots", report=print).round_number == 2  # type: ignore[union-attr]
    sites[0].react = lambda *_: None
    state = run.resume().run()
    assert state.tokens == whole.tokens
    for name, weight in whole.weights.items():
        assert torch.equal(weight, state.weights[name])
    for name, tensor in whole.outer.items():
        assert torch.equal(tensor, state.outer[name])
    before, after = whole.ledger.to_state(), state.ledger.to_state()
    assert before["committed"] == after["committed"]
    assert sites[0].orders[-1].fence.term == 2


def test_the_books_say_what_the_accepted_replies_trained(server: Any) -> None:
    sites = [ScriptedSite("a", rows=7), ScriptedSite("b", rows=9)]
    run = server(sites, num_rounds=0, epochs=2, round_steps=4)
    state = run.run()
    trained: dict[tuple[int, int], list[int]] = {}
    for reply in events(run, "reply"):
        for epoch, shard, first, end in reply["consumed"]:
            trained.setdefault((epoch, shard), []).extend(range(first, end))
    committed = {
        key: [row for first, end in intervals for row in range(first, end)]
        for key, intervals in state.ledger.committed().items()
    }
    assert {key: sorted(rows) for key, rows in trained.items()} == committed
    assert set(committed) == {(epoch, shard) for epoch in (0, 1) for shard in range(4)}
    assert state.ledger.exhausted
    ledger = state.ledger
    assert ledger.rows_leased == ledger.rows_committed + ledger.rows_returned + ledger.rows_open


def test_validation_rows_are_scored_once_each_and_named_by_the_round_that_merged(
    server: Any,
) -> None:
    run = server([ScriptedSite("a"), ScriptedSite("b")], num_rounds=2)
    state = run.run()
    scored = events(run, "validation")
    assert [event["round"] for event in scored] == [0, 1, 2]
    assert all(event["eval_rows"] == 10 and event["complete"] for event in scored)
    assert [record.val_bpb for record in state.history] == [
        scored[1]["val_bpb"],
        scored[2]["val_bpb"],
    ]


def test_an_order_names_the_last_fence_of_its_client_that_was_merged(server: Any) -> None:
    refused = in_round(2, lambda o, r, u: u.update(w=torch.zeros(6)))
    sites = [ScriptedSite("a", react=refused), ScriptedSite("b", react=in_round(3, fail))]
    run = server(sites, num_rounds=5)
    run.run()
    for site, merged_rounds in zip(sites, ([0, 1, 1, 3, 4], [0, 1, 2, 2, 4]), strict=True):
        orders = [order for order in site.orders if order.segments]
        assert [
            o.last_merged_fence.round_number if o.last_merged_fence else 0 for o in orders
        ] == merged_rounds
        fences = {o.fence.round_number: o.fence for o in orders}
        for order in orders[1:]:
            assert order.last_merged_fence == fences[order.last_merged_fence.round_number]
        assert [order.run_is_over for order in site.orders] == [False] * 5 + [True]
