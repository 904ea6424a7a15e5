"""What an operator asks of a run through Redis: a client drained and undrained, a run stopped and resumed."""

import time
from dataclasses import replace
from typing import Any

import pytest
import redis

from pilot.coordination.operator import Operator
from pilot.run.snapshot import latest_snapshot
from pilot.server.failures import RunInterrupted

from .books import check_rows, rows_in
from .scripted import ROW_TOKENS, FastClock, ScriptedSite, Server, events
from .test_membership import SOON, trains_until_the_end
from .test_round_loop import in_round


def books(run: Server) -> dict[str, Any]:
    """The last snapshot's state, once its books are seen to be exact."""
    snapshot = latest_snapshot(run.run_dir / "snapshots", report=print)
    assert snapshot is not None
    merged = [one for event in events(run, "round_committed") for one in event["merged"]]
    state: dict[str, Any] = dict(snapshot.state)
    check_rows(merged, rows_in(state), tokens=state["tokens"], row_tokens=ROW_TOKENS)
    return state


def test_a_drained_client_gets_no_order_until_it_is_undrained_and_the_others_train_its_rows(
    server: Any, redis_url: str
) -> None:
    def look(order: Any, *_: Any) -> None:
        with Operator(redis_url) as operator:
            if order.fence.round_number == 2:
                operator.drain(run.config.run_name, "b", "new disks")
                time.sleep(0.5)  # the server looks once a second of its clock
            if order.fence.round_number == 8:
                assert operator.undrain(run.config.run_name, "b") == ""
                time.sleep(0.5)

    # each takes 4 rows a round of a shard of its own: `a` has used its 24 up after six
    sites = [ScriptedSite("a", react=look, shards=[0, 1]), ScriptedSite("b", shards=[0, 1])]
    run = server(sites, num_rounds=9, batch_of="client")
    run.run(FastClock(speed=10.0))
    rounds = events(run, "round_committed")
    by_round = [sorted(reply["client"] for reply in one["merged"]) for one in rounds]
    assert by_round[:7] == [["a", "b"]] * 2 + [["a"]] * 5
    assert any("b" in names for names in by_round[7:]), "in the open round already, or later"
    (drained,), (undrained,) = events(run, "client_drained"), events(run, "client_undrained")
    assert (drained["client"], drained["reason"]) == ("b", "new disks")
    assert undrained["client"] == "b"
    rows = {
        reply["client"]: reply["consumed"]
        for one in (rounds[1], rounds[6])
        for reply in one["merged"]
    }
    (began,) = events(run, "round_committed")[0]["merged"][1]["consumed"]
    assert rows["a"] == [[0, began[1], 8, 12]], "where b had stopped"
    assert books(run)["tokens"] == (9 * 4 + 3 * 4) * ROW_TOKENS


def test_a_stopped_run_merges_its_open_round_and_resumes_after_it(
    server: Any, redis_url: str
) -> None:
    def look(order: Any, count: int) -> None:
        if count == 3 and order.fence.round_number == 2:
            with Operator(redis_url) as operator:
                operator.stop(run.config.run_name, "the grid is dear")

    trains = trains_until_the_end(lambda: run, look)
    sites = [ScriptedSite("a", react=in_round(2, trains)), ScriptedSite("b")]
    run = server(sites, num_rounds=3, **SOON | {"round_min_duration": 30.0})
    with pytest.raises(RunInterrupted, match=r"the run was stopped \(the grid is dear\)"):
        run.run(FastClock(speed=1.0))
    assert [e["reason"] for e in events(run, "round_ended")][-1] == "stopped"
    assert [e["reason"] for e in events(run, "run_stopping")] == ["the grid is dear"]
    state = books(run)
    assert state["round"] == 2, "what the open round had is on disk"
    assert not (run.run_dir / "server-alive").exists(), "the time until it resumes is not idle"
    with redis.Redis.from_url(redis_url) as raw:
        assert not raw.exists(f"pilot:{run.config.run_name}:stop"), "the wish is fulfilled"
    again = run.resume()
    sites[0].react = lambda *_: None
    assert again.run(FastClock()).round_number == 3
    books(again)


def test_what_the_server_publishes_is_what_it_does(server: Any, redis_url: str) -> None:
    seen: list[Any] = []

    def look(order: Any, count: int) -> None:
        if count == 15 and order.fence.round_number == 2:
            with Operator(redis_url) as operator:
                seen.append(operator.look(run.config.run_name))
                assert run.config.run_name in operator.runs()

    site = ScriptedSite("a", react=trains_until_the_end(lambda: run, look))
    values = SOON | {"round_min_duration": 2.5, "total_tokens": 100_000}
    run = server([site], num_rounds=2, min_clients=1, **values)
    run.run(FastClock(speed=1.0))
    (live,) = seen
    assert (live.state, live.term, live.round_number, live.round_open) == ("running", 1, 2, True)
    assert live.beats["a"].heartbeat.step == 16 and 0 < live.beats["a"].left_s <= 60
    said = live.progress
    assert (said["phase"], said["round"], said["tokens"]) == ("training", 2, 32)
    assert (said["total_tokens"], said["rounds"], said["num_rounds"]) == (100_000, 1, 2)
    assert 0 < said["left_s"] < 2.5 and said["round_tokens"] > 0 and live.progress_age_s < 5
    assert said["shards"] == [round(4 / 96, 4), 0, 4]
    client = said["clients"]["a"]
    assert (client["state"], client["device"], client["bytes_up"]) == ("training", "cpu", 44)
    assert client["bytes_down"] == 44 and said["refused"] == 0


def test_a_reply_that_was_refused_is_among_what_the_server_publishes(
    server: Any, redis_url: str
) -> None:
    def bad(order: Any, reply: Any, _: Any) -> Any:
        return replace(reply, error="no GPU") if order.fence.round_number == 1 else None

    run = server([ScriptedSite("bad", react=bad), ScriptedSite("good", delay_s=0.2)], num_rounds=4)
    run.run(FastClock(speed=20.0))
    with Operator(redis_url) as operator:
        said = operator.look(run.config.run_name).progress
    assert said["refusals"] == [{"client": "bad", "round": 1, "reason": "no GPU"}]
    assert said["refused"] == 1 and said["clients"]["bad"]["refused"] == 1
