"""Clients that begin later than others finish: rounds wait for them, within bounds, or say they do not."""

import time
from typing import Any

from pilot.coordination.coordinator import ClientCoordinator
from pilot.wire.messages import TrainOrder, TrainReply

from .scripted import ROW_TOKENS, FastClock, ScriptedSite, Server, events

# one client's order fills a round
SHORT = {
    "round_steps": 0,
    "target_tokens": 4 * ROW_TOKENS,
    "round_max_duration": 1000.0,
    "epochs": 9,
    "heartbeat": 2.0,
}


def over(run: Server, order: TrainOrder) -> str | None:
    fence = order.fence
    signals = ClientCoordinator(
        run.redis_url,
        fence.run,
        client=order.client,
        term=fence.term,
        round_number=fence.round_number,
    )
    try:
        return signals.round_over()
    finally:
        signals.close()


def too_late(order: TrainOrder, update: dict[str, Any], reason: str) -> TrainReply:
    update.clear()
    return TrainReply(fence=order.fence, client=order.client, stopped_by=reason)


def test_client_that_starts_later_than_others_finish_takes_part_in_every_round(
    server: Any,
) -> None:
    def slow(order: TrainOrder, reply: TrainReply, update: dict[str, Any]) -> TrainReply | None:
        time.sleep(0.5 if order.segments else 0)  # 10 s: the other is long done
        reason = over(run, order) if order.segments else None
        return too_late(order, update, reason) if reason else None

    run = server([ScriptedSite("fast"), ScriptedSite("slow", react=slow)], num_rounds=3, **SHORT)
    state = run.run(FastClock(speed=20))
    assert [record.clients for record in state.history] == [2, 2, 2]
    assert [record.tokens for record in state.history] == [8 * ROW_TOKENS] * 3
    assert {record.reason for record in state.history} <= {"target-tokens", "all-replied"}
    assert not events(run, "reply_refused") and not events(run, "client_too_late")


def test_client_that_never_begins_is_told_so_and_not_waited_for_any_more(server: Any) -> None:
    def never(order: TrainOrder, reply: TrainReply, update: dict[str, Any]) -> TrainReply | None:
        if not order.segments:
            return None
        while not (reason := over(run, order)):
            time.sleep(0.02)
        return too_late(order, update, reason)

    run = server([ScriptedSite("fast"), ScriptedSite("never", react=never)], num_rounds=5, **SHORT)
    state = run.run(FastClock(speed=60))
    assert [record.clients for record in state.history] == [1] * 5
    ended = [event["round"] for event in events(run, "round_ended")]
    assert ended == [1, 2, 3, 4, 5]
    seconds = [record.duration_s for record in state.history]
    # each time twice as long, three times; real seconds count sixty times
    assert seconds[0] >= 30 and seconds[1] >= 60 and seconds[2] >= 120
    (told,) = events(run, "client_too_late")
    assert (told["client"], told["round"], told["rounds"]) == ("never", 3, 3)
    assert "could take no step in its last 3 rounds" in told["message"]
    assert "raise target-tokens" in told["message"]
    assert max(seconds[3:]) < 100, "it is asked, but not waited for"
