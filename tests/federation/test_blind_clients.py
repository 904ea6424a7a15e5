"""Clients without the run's Redis: asked for less or told why not, and never waited for."""

import threading
import time
from typing import Any

import pytest

from pilot.run.state import RoundRecord
from pilot.server import roster
from pilot.wire.messages import TrainOrder, TrainReply

from .scripted import ROW_TOKENS, FastClock, ScriptedSite, events
from .test_membership import beat

TIMED = {
    "round_steps": 0,
    "round_min_duration": 40.0,
    "round_max_duration": 500.0,
    "quorum": 1,
    "epochs": 9,
    "heartbeat": 2.0,
    "min_clients": 2,
    "grace_max": 300.0,
}
SPEED = 20.0


def until_its_seconds(order: TrainOrder, reply: TrainReply, update: dict[str, Any]) -> None:
    """Trains as a client that hears of nothing: until the seconds in its order are over."""
    time.sleep(order.seconds_left / SPEED if order.segments else 0)


def test_client_without_redis_ends_well_before_the_round_and_its_work_counts(server: Any) -> None:
    def sighted(order: TrainOrder, reply: TrainReply, update: dict[str, Any]) -> None:
        for _ in range(21 if order.segments else 0):  # 42 s, then the round is over
            beat(run, order)
            time.sleep(2.0 / SPEED)

    blind = ScriptedSite("blind", react=until_its_seconds, redis=False)
    run = server([ScriptedSite("sees", react=sighted), blind], num_rounds=2, **TIMED)
    state = run.run(FastClock(speed=SPEED))
    assert [record.clients for record in state.history] == [2, 2]
    seconds = [order.seconds_left for order in blind.orders if order.segments]
    assert seconds == pytest.approx([28.0, 28.0], abs=3.0)
    assert not events(run, "reply_refused") and not events(run, "client_left_out")


def test_nobody_waits_in_the_grace_for_who_does_not_know_that_the_round_is_over(
    server: Any,
) -> None:
    released = threading.Event()

    def forever(order: TrainOrder, *_: Any) -> None:
        if order.segments:
            released.wait(20)

    blind = ScriptedSite("blind", react=forever, redis=False)
    run = server([ScriptedSite("sees"), blind], num_rounds=1, **TIMED)
    run.sites[0].react = lambda *_: time.sleep(0.1)
    run.config = run.state.config = type(run.config).from_mapping(
        run.config.to_mapping() | {"target-tokens": 4 * ROW_TOKENS}
    )
    # rounds of 400 s so far: it is given 280 of them, and this one is over at once
    run.state.history = [_round(400.0)]
    threading.Timer(3.0, released.set).start()
    state = run.run(FastClock(speed=SPEED))
    assert state.history[-1].clients == 1
    assert state.history[-1].duration_s < 200, "its 280 s, or the grace of 300 s, were waited for"
    (refused,) = events(run, "reply_refused")[:1]
    assert (
        refused["client"] == "blind" and "did not hear that the round was over" in refused["reason"]
    )


def _round(seconds: float) -> RoundRecord:
    return RoundRecord(0, "target-tokens", 1, 32, seconds, None)


def test_client_without_redis_is_left_out_of_rounds_too_short_for_it_and_comes_back_with_redis(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "BLIND_AGAIN_S", 5.0)
    blind = ScriptedSite("blind", redis=False)

    def sees(order: TrainOrder, *_: Any) -> None:
        time.sleep(0.2)
        if order.fence.round_number == 3:
            blind.redis = True

    run = server(
        [ScriptedSite("sees", react=sees), blind],
        num_rounds=8,
        **TIMED | {"target_tokens": 4 * ROW_TOKENS},
    )
    state = run.run(FastClock(speed=SPEED))
    clients = [record.clients for record in state.history]
    assert clients[:3] == [1, 1, 1] and clients[-1] == 2
    left_out = events(run, "client_left_out")
    assert [event["round"] for event in left_out] == [1], "it is told once"
    assert "how long rounds last is not known yet" in left_out[0]["message"]
    assert "let it reach the run's Redis (PILOT_REDIS_URL)" in left_out[0]["message"]


def test_where_nobody_has_redis_all_are_asked_as_ever(server: Any) -> None:
    sites = [ScriptedSite(name, redis=False) for name in ("a", "b")]
    run = server(sites, num_rounds=2, **TIMED)
    state = run.run(FastClock(speed=SPEED))
    assert [record.clients for record in state.history] == [2, 2]
    assert all(order.seconds_left > 400 for site in sites for order in site.orders)


def test_fixed_steps_need_no_redis_to_end(server: Any) -> None:
    blind = ScriptedSite("blind", redis=False)
    run = server([ScriptedSite("sees"), blind], num_rounds=2)
    assert [record.clients for record in run.run().history] == [2, 2]
    assert all(order.seconds_left > 500 for order in blind.orders)
