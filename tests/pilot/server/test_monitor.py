"""Who works, who is silent, and what a site's rounds cost, from heartbeats and replies."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pilot.config import RunConfig
from pilot.coordination.heartbeats import Heard
from pilot.rules.ledger import Lease, Ledger
from pilot.run.events import read_events
from pilot.run.state import RunState
from pilot.segment import Segment
from pilot.server.mailbox import Answer
from pilot.server.monitor import RoundMonitor, uploads_s
from pilot.server.open_round import OpenRound, SentOrder
from pilot.server.report import Report
from pilot.server.roster import Client
from pilot.server.telemetry import Telemetry
from pilot.wire.messages import Fence, Heartbeat, HelloReply, TrainReply, to_header

from .round_kit import said


class Watched:
    """A round of clients a and b, opened and asked at second 100, and its monitor."""

    def __init__(self, directory: Path) -> None:
        ledger = Ledger(num_shards=1, epochs=1, shard_order=lambda _: [0])
        state = RunState(RunConfig(), {"w": torch.zeros(1)}, ledger, total_tokens=10**6)
        telemetry = Telemetry(
            directory, config_dict={}, wandb_mode="disabled", wandb_project="", run_name="r"
        )
        spool = directory / "spool"
        report = Report(telemetry)
        self.round = OpenRound(1, state, report, spool=spool, opened_at_s=100.0)
        self.orders: dict[str, SentOrder] = {}
        for number, name in enumerate("ab"):
            client = Client(name, number, HelloReply())
            self.orders[name] = SentOrder(
                f"m-{name}", client, Fence("r", 1, 1, 0), None, 100.0, step_tokens=8
            )
            self.round.add(self.orders[name])
        self.monitor = RoundMonitor(self.round, report, heartbeat_s=1.0)
        self.directory = directory

    def silent(self, now_s: float, *, blind: bool = False, **heard: Heard) -> set[str]:
        """Which clients are silent after these heartbeats."""
        self.monitor.update(heard, now_s, blind=blind)
        return self.monitor.silent

    @property
    def awaited(self) -> list[str]:
        return [order.client.name for order in self.monitor.awaited]

    def told(self) -> list[tuple[str, str]]:
        path = self.directory / "events.jsonl"
        events = [e for e in read_events(path) if e["event"].startswith("client_")]
        return [(event["event"], event["client"]) for event in events]


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def beat(age: float = 0.1, **values: Any) -> Heard:
    said = {"state": "training", "step": 1, "tokens": 50, "tokens_per_s": 10.0, **values}
    return Heard(Heartbeat(**said), age)


def test_a_client_that_misses_three_heartbeats_is_silent_and_its_return_is_told(
    watched: Watched,
) -> None:
    assert watched.silent(110.0, a=beat(), b=beat(age=2.9)) == set()
    assert watched.silent(111.0, a=beat(), b=beat(age=3.1)) == {"b"}
    assert watched.silent(120.0, a=beat(), b=beat(age=12.1)) == {"b"}
    assert watched.awaited == ["a", "b"], "not for long"
    assert watched.silent(121.0, a=beat(), b=beat(age=13.1)) == {"b"}
    assert watched.awaited == ["a"]
    assert watched.silent(122.0, a=beat(), b=beat()) == set()
    assert watched.told() == [("client_silent", "b"), ("client_back", "b")]


def test_nobody_becomes_silent_or_unbegun_while_redis_fails(watched: Watched) -> None:
    watched.silent(102.0, a=beat(), b=beat())
    for now_s in (110.0, 400.0):
        assert watched.silent(now_s, blind=True) == set()
    watched.monitor.ended_at_s = 401.0
    assert watched.awaited == ["a", "b"]
    assert watched.silent(402.0) == set(), (
        "Redis is back and empty: they have time to be heard again"
    )
    assert watched.silent(440.0, a=beat()) == set()
    assert watched.silent(446.0, a=beat()) == {"b"}


def test_a_client_whose_order_came_while_redis_failed_may_have_begun(watched: Watched) -> None:
    watched.silent(102.0, a=beat())
    watched.silent(110.0, blind=True)
    watched.monitor.ended_at_s = 120.0
    assert watched.monitor.unbegun == set()


def test_signs_of_life_before_an_order_are_not_of_that_order(watched: Watched) -> None:
    watched.silent(110.0, a=beat(), b=beat())
    again = replace(watched.orders["b"], message_id="m-b2", sent_at_s=120.0)
    watched.round.add(again)
    assert watched.silent(125.0, a=beat(), b=beat(age=10.0, tokens=600)) == set()
    view = watched.monitor.view(125.0, waiting=0, rows_left=True)
    assert (view.tokens, view.training) == (50, 1)


def test_a_silent_client_is_waited_for_as_long_as_all_need_to_train_what_it_has(
    watched: Watched,
) -> None:
    watched.orders["a"].client.tokens_per_s, watched.orders["b"].client.tokens_per_s = 15.0, 10.0
    watched.silent(110.0, a=beat(), b=beat(age=3.1, tokens=50))  # two seconds' order of both
    watched.silent(111.9, a=beat(), b=beat(age=5.0, tokens=50))
    assert watched.awaited == ["a", "b"]
    watched.silent(112.1, a=beat(), b=beat(age=5.2, tokens=50))
    assert watched.awaited == ["a"]


def test_a_missing_reply_is_worth_as_long_a_wait_as_its_training_shared_by_those_that_wait(
    watched: Watched,
) -> None:
    watched.silent(130.0, a=beat(), b=beat())
    assert watched.monitor.worth_waiting_s == math.inf, "the round runs"
    watched.monitor.ended_at_s = 130.0
    assert watched.monitor.worth_waiting_s == math.inf, "nobody stands still for another"
    reply = to_header(TrainReply(fence=watched.orders["a"].fence, client="a"))
    watched.round.handle_answer(said("m-a", reply))
    assert watched.monitor.worth_waiting_s == 30.0, "one waits for one that has trained for 30 s"


def test_who_had_not_begun_at_the_end_of_a_round_is_not_waited_for(watched: Watched) -> None:
    watched.silent(110.0, a=beat())
    assert watched.awaited == ["a", "b"], "it goes on"
    watched.monitor.ended_at_s = 110.0
    assert watched.awaited == ["a"]
    assert watched.monitor.unbegun == {"b"}
    watched.orders["b"].client.hello = HelloReply(warning="cannot reach Redis")
    assert watched.awaited == ["a", "b"], "it can't be heard"


def leased(watched: Watched, name: str) -> SentOrder:
    """The order of `name`, now with rows to train on."""
    lease = Lease(1, name, (Segment(0, 0, 0, 4),), last=False)
    watched.orders[name] = replace(watched.orders[name], lease=lease)
    watched.round.add(watched.orders[name])
    return watched.orders[name]


def test_who_was_sent_rows_and_may_still_begin_is_counted_until_its_patience_is_over(
    watched: Watched,
) -> None:
    def starting(now_s: float, **heard: Heard) -> tuple[int, float]:
        watched.silent(now_s, a=beat(), **heard)
        view = watched.monitor.view(now_s, waiting=0, rows_left=True)
        return view.starting, view.begin_left_s

    client = leased(watched, "b").client
    assert starting(104.0) == (1, 26.0)
    assert starting(105.0, b=beat(step=0)) == (1, 25.0), "it has begun to evaluate"
    client.begin_s = 40.0
    assert starting(110.0, b=beat(step=0)) == (1, 70.0)
    assert starting(112.0, b=beat(step=1)) == (0, 0.0)
    assert client.begin_s == 12.0
    client.begin_s = None
    watched.monitor._begun.discard("m-b")
    assert starting(131.0) == (0, 0.0)
    assert starting(120.0, b=beat(age=5.0)) == (0, 0.0), "it is silent"


def test_nobody_is_waited_for_to_begin_who_cannot_be_heard(watched: Watched) -> None:
    client = leased(watched, "b").client
    watched.silent(104.0, blind=True)
    assert watched.monitor.view(104.0, waiting=0, rows_left=True).starting == 0
    watched.silent(105.0, a=beat())
    assert watched.monitor.view(105.0, waiting=0, rows_left=True).starting == 1
    client.hello = HelloReply(warning="cannot reach Redis")
    assert watched.monitor.view(105.0, waiting=0, rows_left=True).starting == 0


def test_round_that_was_over_before_a_client_began_makes_the_next_one_wait_longer(
    watched: Watched,
) -> None:
    order = leased(watched, "b")
    watched.silent(104.0, a=beat())
    watched.monitor.ended_at_s = 150.0
    watched.monitor.note_late_beginners()
    assert (order.client.begin_s, order.client.late_rounds) == (50.0, 1)
    over = TrainReply(fence=order.fence, client="b", stopped_by="target-tokens")
    watched.monitor.measure(order, over, 160.0)
    assert order.client.late_rounds == 1, "once a round"
    watched.monitor._late.clear()
    for other in ("SIGTERM", "lease used up", "leaving"):
        watched.monitor.measure(order, replace(over, stopped_by=other), 160.0)
    assert order.client.late_rounds == 1
    watched.monitor.measure(order, over, 160.0)
    assert order.client.late_rounds == 2
    watched.monitor.measure(order, replace(over, tokens=8, train_s=1.0), 160.0)
    assert (order.client.begin_s, order.client.late_rounds) == (60.0, 0)


def test_where_nobody_is_heard_all_are_waited_for_at_the_end(watched: Watched) -> None:
    watched.silent(110.0)
    watched.monitor.ended_at_s = 110.0
    assert watched.awaited == ["a", "b"]


def test_a_client_whose_reply_is_on_its_way_is_not_silent(watched: Watched) -> None:
    assert watched.silent(150.0, a=beat(), b=beat(age=40.0, state="sending")) == set()


def test_a_client_that_never_began_is_silent_long_after_it_should_have(watched: Watched) -> None:
    watched.orders["b"].client.start_s = 20.0  # in its last round
    assert watched.silent(170.0, a=beat()) == set()
    assert watched.silent(181.0, a=beat()) == {"b"}


def test_a_client_that_was_never_heard_is_given_four_times_what_others_needed(
    watched: Watched,
) -> None:
    watched.silent(115.0, a=beat())
    assert watched.silent(160.0, a=beat()) == set()
    assert watched.silent(161.0, a=beat()) == {"b"}


def test_nothing_follows_from_the_silence_of_who_was_never_heard_or_has_no_redis(
    watched: Watched,
) -> None:
    assert watched.silent(500.0) == set(), "a first round: nobody knows how long it takes"
    client = watched.orders["b"].client
    client.start_s, client.hello = 2.0, HelloReply(warning="cannot reach Redis")
    watched.orders["a"].client.hello = HelloReply(warning="cannot reach Redis")
    assert watched.silent(501.0) == set()


def test_a_reply_that_comes_after_all_ends_the_silence_without_a_word(watched: Watched) -> None:
    watched.silent(110.0, a=beat(), b=beat(age=9.0))
    watched.round.handle_answer(Answer("m-b", 1, error="gone", lost=True))
    assert watched.silent(111.0, a=beat()) == set()
    assert watched.told() == [("client_silent", "b")]


def test_the_view_counts_who_has_begun_to_train_and_all_tokens(watched: Watched) -> None:
    watched.silent(110.0, a=beat(), b=beat(step=0, tokens=0, tokens_per_s=0))
    view = watched.monitor.view(112.0, waiting=3, rows_left=True)
    assert (view.elapsed_s, view.tokens, view.tokens_per_s) == (12.0, 50, 10.0)
    assert (view.training, view.pending, view.silent, view.waiting) == (1, 2, 0, 3)
    watched.silent(113.0, a=beat(age=9.0), b=beat())
    view = watched.monitor.view(113.0, waiting=0, rows_left=False)
    # what the silent one has trained may still come; it is not at order
    assert (view.tokens, view.training, view.tokens_per_s, view.silent) == (100, 1, 10.0, 1)


def test_what_a_round_costs_a_site_is_measured_from_its_replies(watched: Watched) -> None:
    order = watched.orders["a"]
    watched.silent(104.0, a=beat(step=0))
    reply = TrainReply(fence=order.fence, client="a", tokens=64, train_s=16.0)
    watched.monitor.ended_at_s = 120.0
    watched.monitor.measure(order, reply, 125.0)
    client = order.client
    assert (client.start_s, client.upload_s, client.fixed_cost_s) == (4.0, 5.0, 9.0)
    assert client.tokens_per_s == 4.0
    for odd in (replace(reply, tokens=0), replace(reply, train_s=0.0)):
        watched.monitor.measure(order, odd, 130.0)
        assert client.tokens_per_s == 4.0, "who had no time to train is not slow"
    assert uploads_s([order]) == [10.0]  # twice
    assert uploads_s([order, watched.orders["b"]]) == [], "nobody knows how long b takes"


def test_one_slow_upload_is_no_reason_to_wait_longer_and_two_are(watched: Watched) -> None:
    order = watched.orders["a"]
    reply = TrainReply(fence=order.fence, client="a", tokens=64, train_s=16.0)
    watched.monitor.ended_at_s = 120.0
    usual = []
    for took_s in (2.0, 9.0, 2.5, 8.0, 7.0):  # frozen once; later on a slower line
        watched.monitor.measure(order, reply, 120.0 + took_s)
        usual.append(order.client.upload_s)
    assert usual == [2.0, 2.0, 2.5, 2.5, 7.0]
    order.client.sends_no_faster_than(14.0)  # nothing had come by then
    watched.monitor.measure(order, reply, 120.0 + 20.0)
    assert order.client.upload_s == 14.0, "or the next wait would be too short again"


@pytest.mark.parametrize(("said_s", "believed_s"), [(1e-6, 0.25), (1e9, 25.0), (16.0, 16.0)])
def test_time_that_a_site_says_it_trained_is_believed_as_far_as_it_can_be_true(
    watched: Watched, said_s: float, believed_s: float
) -> None:
    order = watched.orders["a"]  # sent 25 seconds before its reply comes
    reply = TrainReply(fence=order.fence, client="a", tokens=64, train_s=said_s)
    watched.monitor.measure(order, reply, 125.0)
    assert order.client.tokens_per_s == pytest.approx(64 / believed_s)
    assert order.client.fixed_cost_s == pytest.approx(25.0 - believed_s)


def test_tokens_that_a_heartbeat_claims_count_as_far_as_they_can_be_true(watched: Watched) -> None:
    lease = Lease(1, "a", (Segment(0, 0, 2, 12), Segment(0, 1, 0, 5)), last=False)
    leased = replace(watched.orders["a"], lease=lease)
    watched.round.add(leased)
    tokens = 15 * RunConfig().sequence_len
    claim = {"a": beat(tokens=2**50), "b": beat(step=0, tokens=0)}

    def counted() -> int:
        watched.silent(110.0, **claim)
        return watched.monitor.view(110.0, waiting=0, rows_left=True).tokens

    assert counted() == tokens, "no more than was leased"
    leased.client.tokens_per_s = 20.0
    assert counted() == 4 * 20 * 10 + 1, "nor much faster than ever before"
    claim["a"] = beat(tokens=300)
    assert counted() == 300


def test_nonsense_in_a_heartbeat_counts_as_not_said() -> None:
    values = {
        "state": "training",
        "step": "x",
        "tokens": "12",
        "loss": "nan",
        "shard": "9" * 400,
        "?": "",
    }
    assert Heartbeat.from_redis(values) == Heartbeat(state="training", tokens=12)
    assert Heartbeat.from_redis({}) == Heartbeat()


def test_why_nobody_trains(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    monitor = watched.monitor

    def cause(now_s: float, *, blind: bool = False, **states: str) -> str | None:
        beats = {n: Heard(Heartbeat(state=state, step=1), 0.1) for n, state in states.items()}
        monitor.update(beats, now_s, blind=blind)
        return monitor.idle_cause

    assert cause(101.0) == "start"
    assert cause(102.0, a="starting") == "start"
    assert cause(103.0, a="starting", b="evaluating") == "evaluation"
    assert cause(104.0, a="evaluating", b="packing") == "evaluation"
    assert cause(105.0, b="packing") == "packing"
    assert cause(106.0, a="training", b="packing") is None
    assert cause(107.0, a="sending", b="sending") == "replies"
    assert cause(108.0, blind=True) is None  # nobody can be seen
    late = {name: Heard(Heartbeat(state="training", step=1), 9.0) for name in "ab"}
    monitor.update(late, 130.0)
    assert monitor.idle_cause == "silence"
    watched.orders["b"].client.hello = HelloReply(redis=False)
    monitor.update({}, 131.0)
    assert monitor.idle_cause is None  # it may well train
    monitor.ended_at_s = 140.0
    assert cause(141.0, a="training") == "replies"
