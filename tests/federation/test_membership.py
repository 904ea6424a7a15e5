"""Clients that come, go, fall silent or run out of work while a round runs: real Redis, real messages."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pilot.coordination.coordinator import ClientCoordinator, ServerCoordinator
from pilot.server import round_loop
from pilot.server.open_round import MAX_FRUITLESS_ORDERS
from pilot.wire.messages import Heartbeat, StopReason, TrainOrder

from .scripted import FastClock, ScriptedSite, Server, events

TIMED = {"round_steps": 0, "round_min_duration": 1.0, "round_max_duration": 60.0}
REAL_TIME = 1.0


def beat(server: Server, order: TrainOrder, **values: Any) -> None:
    """A heartbeat, as this client's worker would send it."""
    fence = order.fence
    client = ClientCoordinator(
        server.redis_url,
        fence.run,
        client=order.client,
        term=fence.term,
        round_number=fence.round_number,
    )
    said = {"state": "training", "step": 1, "tokens": 32, **values}
    client.send_heartbeat(Heartbeat(**said), expiry_s=60)
    client.close()


def test_a_client_that_falls_silent_holds_nothing_up_and_its_late_reply_is_refused(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_loop, "return_s", lambda lengths_s: 1.0)
    released = threading.Event()

    def fall_silent(order: TrainOrder, *_: Any) -> None:
        if order.fence.round_number == 1:
            beat(run, order)
            released.wait(30)

    def work(order: TrainOrder, *_: Any) -> None:
        if order.fence.round_number == 2:
            released.set()

    run = server(
        [ScriptedSite("works", react=work), ScriptedSite("silent", react=fall_silent)],
        num_rounds=3,
        grace_max=25.0,
    )
    state = run.run(FastClock(speed=REAL_TIME))
    assert [event["client"] for event in events(run, "client_silent")] == ["silent"]
    assert state.history[0].clients == 1
    assert state.history[0].duration_s < 20, "neither the grace nor Flower was waited for"
    reasons = [event["reason"] for event in events(run, "reply_refused")]
    assert reasons == ["its client is silent", "it answers a round that is over"]


def test_a_client_that_used_up_its_lease_gets_another_one_in_the_same_round(server: Any) -> None:
    def used_up(order: TrainOrder, reply: Any, _: Any) -> Any:
        if len(run.sites[0].orders) <= 2:
            return replace(reply, stopped_by=StopReason.LEASE_USED_UP, train_s=30.0)
        beat(run, order)
        return None

    only = ScriptedSite("only", react=used_up)
    run = server([only], num_rounds=1, min_clients=1, epochs=9, **TIMED)
    state = run.run(FastClock(speed=REAL_TIME))
    orders = [order for order in run.sites[0].orders if order.segments]
    assert [order.fence.round_number for order in orders] == [1, 1, 1]
    assert len({order.fence.lease_id for order in orders}) == 3
    assert state.history[0].clients == 1
    assert state.ledger.rows_committed == 12
    assert [event["client"] for event in events(run, "client_joined")] == ["only", "only"]


def trains_until_the_end(server: Any, look: Callable[[TrainOrder, int], None]) -> Any:
    """A site's reaction: steps of a tenth of a second, `look`ed at, until Redis ends the round."""

    def react(order: TrainOrder, *_: Any) -> None:
        run, fence = server(), order.fence
        signals = ClientCoordinator(
            run.redis_url,
            fence.run,
            client=order.client,
            term=fence.term,
            round_number=fence.round_number,
        )
        for count in range(200 if order.segments else 0):
            beat(run, order, step=count + 1)
            look(order, count)
            if signals.round_over():
                break
            signals.wait(0.1)
        signals.close()

    return react


def test_a_lone_client_goes_on_until_a_second_one_is_there(server: Any) -> None:
    def look(order: TrainOrder, count: int) -> None:
        if count == 15 and order.fence.round_number == 1:
            run.grid.add(200, ScriptedSite("second"))

    first = ScriptedSite("first", react=trains_until_the_end(lambda: run, look))
    run = server([first], num_rounds=2, min_clients=1, **TIMED)
    state = run.run(FastClock(speed=REAL_TIME))
    one, two = state.history
    assert (one.reason, one.clients) == ("min-duration", 1)
    assert 1.5 < one.duration_s < 30, "longer than its minimum, since nobody else was there"
    assert two.clients == 2


SOON = {**TIMED, "round_min_duration": 3.0, "join_min_remaining": 0.1, "quorum": 1}


@pytest.mark.parametrize("failures", [1, 99])
def test_a_client_whose_worker_failed_gets_more_work_in_the_same_round_but_not_without_end(
    server: Any, failures: int
) -> None:
    def fail(order: TrainOrder, reply: Any, update: dict[str, Any]) -> Any:
        if not order.segments or len(run.sites[1].orders) > failures:
            return None
        update.clear()
        return replace(reply, tokens=0, consumed=[], error="worker process 0 was killed")

    steady = ScriptedSite("steady", react=trains_until_the_end(lambda: run, lambda *_: None))
    run = server([steady, ScriptedSite("fails", react=fail)], num_rounds=1, **SOON)
    state = run.run(FastClock(speed=REAL_TIME))
    orders = [order for order in run.sites[1].orders if order.segments]
    assert {order.fence.round_number for order in orders} == {1}
    assert len({order.fence.lease_id for order in orders}) == len(orders)
    assert len(orders) == min(failures + 1, MAX_FRUITLESS_ORDERS)
    assert state.history[0].clients == (2 if failures == 1 else 1)


def test_a_client_whose_update_may_not_be_merged_gets_no_more_work_in_the_round(
    server: Any,
) -> None:
    def spoil(order: TrainOrder, reply: Any, update: dict[str, Any]) -> None:
        for tensor in update.values():
            tensor.fill_(float("nan"))

    steady = ScriptedSite("steady", react=trains_until_the_end(lambda: run, lambda *_: None))
    run = server([steady, ScriptedSite("spoils", react=spoil)], num_rounds=1, **SOON)
    run.run(FastClock(speed=REAL_TIME))
    assert len([order for order in run.sites[1].orders if order.segments]) == 1


def test_a_node_that_takes_the_name_of_a_silent_one_does_its_work_in_the_same_round(
    server: Any,
) -> None:
    released = threading.Event()

    def vanish(order: TrainOrder, *_: Any) -> None:
        beat(run, order)
        released.wait(30)

    def look(order: TrainOrder, count: int) -> None:
        if count == 5 and order.fence.round_number == 1:
            run.grid.add(200, again)

    again = ScriptedSite("dies")
    steady = ScriptedSite("steady", react=trains_until_the_end(lambda: run, look))
    run = server([steady, ScriptedSite("dies", react=vanish)], num_rounds=1, **SOON)
    state = run.run(FastClock(speed=REAL_TIME))
    released.set()
    assert again.orders[0].fence.round_number == 1
    assert state.history[0].clients == 2
    reasons = [event["reason"] for event in events(run, "reply_refused")]
    assert reasons[0] == "a newer node has taken its name"


def test_a_round_of_nobody_ends_when_somebody_comes(server: Any) -> None:
    released = threading.Event()

    def vanish(order: TrainOrder, *_: Any) -> None:
        if order.fence.round_number == 1:
            beat(run, order)
            timer = threading.Timer(4.0, run.grid.add, (200, ScriptedSite("comes")))
            timer.start()
            released.wait(30)

    run = server(
        [ScriptedSite("gone", react=vanish)],
        num_rounds=2,
        min_clients=1,
        **TIMED | {"round_max_duration": 600.0},
    )
    state = run.run(FastClock(speed=REAL_TIME))
    released.set()
    assert [record.reason for record in state.history] == ["nobody-left", "all-replied"]
    assert [record.clients for record in state.history] == [0, 1]
    assert sum(not record.clients for record in state.history) == 1


def test_a_node_that_never_says_what_it_is_holds_up_no_round(server: Any) -> None:
    released = threading.Event()

    class Mute(ScriptedSite):
        def __call__(self, *_: Any) -> Any:
            released.wait(30)

    def comes(order: TrainOrder, *_: Any) -> None:
        if order.fence.round_number == 1:
            run.grid.add(200, Mute("mute"))

    run = server([ScriptedSite("works", react=comes)], num_rounds=2, min_clients=1)
    began = time.monotonic()
    state = run.run(FastClock(speed=10.0))
    waited_s = time.monotonic() - began
    released.set()
    assert [record.clients for record in state.history] == [1, 1]
    assert waited_s < 30, "a round opened only when its node had answered"


def test_every_reply_that_is_on_disk_is_acknowledged_to_its_client(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []
    original = ServerCoordinator.acknowledge

    def acknowledge(self: ServerCoordinator, client: str, fence: Any) -> None:
        spool = run.run_dir / "spool"
        on_disk = (spool / f"lease-{fence.lease_id:08d}.safetensors").exists()
        if fence.lease_id:
            told.append((client, fence.round_number if on_disk else -1))
        original(self, client, fence)

    monkeypatch.setattr(ServerCoordinator, "acknowledge", acknowledge)
    run = server([ScriptedSite("a"), ScriptedSite("b")], num_rounds=2)
    run.run()
    assert sorted(told) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_a_client_that_is_leaving_gets_no_work_until_it_is_back(
    server: Any, redis_url: str
) -> None:
    def leave(order: TrainOrder, *_: Any) -> None:
        if order.fence.round_number == 1:
            signals.stop("the node is told to go", expiry_s=60)
        if order.fence.round_number == 4:
            signals.clear_stop("the node is told to go")

    run = server([ScriptedSite("stays"), ScriptedSite("leaves", react=leave)], num_rounds=7)
    run.sites[0].react = leave
    signals = ClientCoordinator(
        redis_url, run.config.run_name, client="leaves", term=1, round_number=1
    )
    state = run.run()
    signals.close()
    clients = [record.clients for record in state.history]
    assert clients[:3] == [2, 1, 1] and clients[-1] == 2
