"""Who works, who is silent, and what a site's rounds cost, from heartbeats and replies."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pilot.config import RunConfig
from pilot.rules.ledger import Ledger
from pilot.run.events import read_events
from pilot.run.state import RunState
from pilot.server.mailbox import Answer
from pilot.server.monitor import Beat, RoundMonitor, uploads_s
from pilot.server.open_round import OpenRound, Work
from pilot.server.roster import Site
from pilot.server.telemetry import Telemetry
from pilot.wire.messages import Fence, HelloReply, TrainReply


class Watched:
    """A round of clients a and b, opened and asked at second 100, and its monitor."""

    def __init__(self, directory: Path) -> None:
        ledger = Ledger(num_shards=1, epochs=1, shard_order=lambda _: [0])
        state = RunState(RunConfig(), {"w": torch.zeros(1)}, ledger, total_tokens=10**6)
        telemetry = Telemetry(
            directory, config_dict={}, wandb_mode="disabled", wandb_project="", run_name="r"
        )
        spool = directory / "spool"
        self.round = OpenRound(1, state, telemetry, spool=spool, opened_at_s=100.0)
        self.works = {}
        for number, name in enumerate("ab"):
            site = Site(name, number, HelloReply())
            self.works[name] = Work(f"m-{name}", site, Fence("r", 1, 1, 0), None, 100.0)
            self.round.add(self.works[name])
        self.monitor = RoundMonitor(self.round, telemetry, heartbeat_s=1.0)
        self.directory = directory

    def look(self, now_s: float, *, blind: bool = False, **beats: dict[str, Any]) -> set[str]:
        """Who is silent after these beats."""
        values = {n: {k: str(v) for k, v in beat.items()} for n, beat in beats.items()}
        self.monitor.look(values, now_s, blind=blind)
        return self.monitor.silent

    def told(self) -> list[tuple[str, str]]:
        path = self.directory / "events.jsonl"
        events = [e for e in read_events(path) if e["event"].startswith("client_")]
        return [(event["event"], event["client"]) for event in events]


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def beat(age: float = 0.1, **values: Any) -> dict[str, Any]:
    return {"state": "training", "age": age, "step": 1, "tokens": 50, "tokens_per_s": 10, **values}


def test_a_client_that_misses_three_heartbeats_is_silent_and_its_return_is_told(
    watched: Watched,
) -> None:
    assert watched.look(110.0, a=beat(), b=beat(age=2.9)) == set()
    assert watched.look(111.0, a=beat(), b=beat(age=3.1)) == {"b"}
    assert watched.look(120.0, a=beat(), b=beat(age=12.1)) == {"b"}
    assert [work.site.name for work in watched.monitor.awaited] == ["a", "b"], "not for long"
    assert watched.look(121.0, a=beat(), b=beat(age=13.1)) == {"b"}
    assert [work.site.name for work in watched.monitor.awaited] == ["a"]
    assert watched.look(122.0, a=beat(), b=beat()) == set()
    assert watched.told() == [("client_silent", "b"), ("client_back", "b")]


def test_nobody_becomes_silent_or_unbegun_while_redis_fails(watched: Watched) -> None:
    watched.look(102.0, a=beat(), b=beat())
    for now_s in (110.0, 400.0):
        assert watched.look(now_s, blind=True) == set()
    watched.monitor.ended_at_s = 401.0
    assert [work.site.name for work in watched.monitor.awaited] == ["a", "b"]
    assert watched.look(402.0) == set(), "Redis is back and empty: they have time to be heard again"
    assert watched.look(440.0, a=beat()) == set()
    assert watched.look(446.0, a=beat()) == {"b"}


def test_a_client_whose_order_came_while_redis_failed_may_have_begun(watched: Watched) -> None:
    watched.look(102.0, a=beat())
    watched.look(110.0, blind=True)
    watched.monitor.ended_at_s = 120.0
    assert watched.monitor.unbegun == set()


def test_signs_of_life_before_an_order_are_not_of_that_order(watched: Watched) -> None:
    watched.look(110.0, a=beat(), b=beat())
    del watched.round.pending["m-b"]
    again = replace(watched.works["b"], message_id="m-b2", sent_at_s=120.0)
    watched.round.add(again)
    assert watched.look(125.0, a=beat(), b=beat(age=10.0, tokens=600)) == set()
    view = watched.monitor.view(125.0, waiting=0, rows_left=True)
    assert (view.tokens, view.training) == (50, 1)


def test_a_silent_client_is_waited_for_as_long_as_all_need_to_train_what_it_has(
    watched: Watched,
) -> None:
    watched.works["a"].site.tokens_per_s, watched.works["b"].site.tokens_per_s = 15.0, 10.0
    watched.look(110.0, a=beat(), b=beat(age=3.1, tokens=50))  # two seconds' work of both
    watched.look(111.9, a=beat(), b=beat(age=5.0, tokens=50))
    assert [work.site.name for work in watched.monitor.awaited] == ["a", "b"]
    watched.look(112.1, a=beat(), b=beat(age=5.2, tokens=50))
    assert [work.site.name for work in watched.monitor.awaited] == ["a"]


def test_who_had_not_begun_at_the_end_of_a_round_is_not_waited_for(watched: Watched) -> None:
    watched.look(110.0, a=beat())
    assert [work.site.name for work in watched.monitor.awaited] == ["a", "b"], "it goes on"
    watched.monitor.ended_at_s = 110.0
    assert [work.site.name for work in watched.monitor.awaited] == ["a"]
    assert watched.monitor.unbegun == {"b"}
    watched.works["b"].site.hello = HelloReply(warning="cannot reach Redis")
    assert [work.site.name for work in watched.monitor.awaited] == ["a", "b"], "it can't be heard"


def test_where_nobody_is_heard_all_are_waited_for_at_the_end(watched: Watched) -> None:
    watched.look(110.0)
    watched.monitor.ended_at_s = 110.0
    assert [work.site.name for work in watched.monitor.awaited] == ["a", "b"]


def test_a_client_whose_reply_is_on_its_way_is_not_silent(watched: Watched) -> None:
    assert watched.look(150.0, a=beat(), b=beat(age=40.0, state="sending")) == set()


def test_a_client_that_never_began_is_silent_long_after_it_should_have(watched: Watched) -> None:
    watched.works["b"].site.start_s = 20.0  # in its last round
    assert watched.look(170.0, a=beat()) == set()
    assert watched.look(181.0, a=beat()) == {"b"}


def test_a_client_that_was_never_heard_is_given_four_times_what_others_needed(
    watched: Watched,
) -> None:
    watched.look(115.0, a=beat())
    assert watched.look(160.0, a=beat()) == set()
    assert watched.look(161.0, a=beat()) == {"b"}


def test_nothing_follows_from_the_silence_of_who_was_never_heard_or_has_no_redis(
    watched: Watched,
) -> None:
    assert watched.look(500.0) == set(), "a first round: nobody knows how long it takes"
    site = watched.works["b"].site
    site.start_s, site.hello = 2.0, HelloReply(warning="cannot reach Redis")
    watched.works["a"].site.hello = HelloReply(warning="cannot reach Redis")
    assert watched.look(501.0) == set()


def test_a_reply_that_comes_after_all_ends_the_silence_without_a_word(watched: Watched) -> None:
    watched.look(110.0, a=beat(), b=beat(age=9.0))
    watched.round.take(Answer("m-b", 1, {}, [], "gone", lost=True))
    assert watched.look(111.0, a=beat()) == set()
    assert watched.told() == [("client_silent", "b")]


def test_the_view_counts_who_has_begun_to_train_and_all_tokens(watched: Watched) -> None:
    watched.look(110.0, a=beat(), b=beat(step=0, tokens=0, tokens_per_s=0))
    view = watched.monitor.view(112.0, waiting=3, rows_left=True)
    assert (view.elapsed_s, view.tokens, view.tokens_per_s) == (12.0, 50, 10.0)
    assert (view.training, view.pending, view.silent, view.waiting) == (1, 2, 0, 3)
    watched.look(113.0, a=beat(age=9.0), b=beat())
    view = watched.monitor.view(113.0, waiting=0, rows_left=False)
    # what the silent one has trained may still come; it is not at work
    assert (view.tokens, view.training, view.tokens_per_s, view.silent) == (100, 1, 10.0, 1)


def test_what_a_round_costs_a_site_is_measured_from_its_replies(watched: Watched) -> None:
    work = watched.works["a"]
    watched.look(104.0, a=beat(step=0))
    reply = TrainReply(fence=work.fence, client="a", tokens=64, train_s=16.0)
    watched.monitor.ended_at_s = 120.0
    watched.monitor.measure(work, reply, 125.0)
    site = work.site
    assert (site.start_s, site.upload_s, site.fixed_cost_s) == (4.0, 5.0, 9.0)
    assert site.tokens_per_s == 4.0
    for odd in (replace(reply, tokens=0), replace(reply, train_s=math.nan)):
        watched.monitor.measure(work, odd, 130.0)
        assert site.tokens_per_s == 4.0, "who had no time to train is not slow"
    assert uploads_s([work]) == [10.0]
    assert uploads_s([work, watched.works["b"]]) == [], "nobody knows how long b takes"


def test_nonsense_in_a_heartbeat_counts_as_not_said() -> None:
    values = {
        "state": "training",
        "step": "x",
        "tokens": "12",
        "loss": "nan",
        "age": "inf",
        "?": "",
    }
    assert Beat.of(values) == Beat(state="training", tokens=12)
    assert Beat.of({}) == Beat()
