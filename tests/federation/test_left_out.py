"""Sites whose updates can't be used, in whole runs: counted, left out for a while, back again."""

import json
import logging
from typing import Any

import pytest
import torch

from pilot.run.snapshot import latest_snapshot
from pilot.server.failures import RunFailed

from .scripted import FastClock, ScriptedSite, events, scripted_config


def until_round(last: int, spoil: Any) -> Any:
    def react(order: Any, reply: Any, update: Any) -> None:
        if order.fence.round_number <= last:
            spoil(update)

    return react


def not_finite(update: Any) -> None:
    update["w"][0] = float("nan")


def test_site_refused_three_times_running_is_left_out_and_the_others_go_on(server: Any) -> None:
    bad = ScriptedSite("bad", react=until_round(3, not_finite))
    run = server([ScriptedSite("good"), bad], num_rounds=5, cooling_time=1e6)
    state = run.run(FastClock(speed=20))
    assert [record.refused for record in state.history] == [1, 1, 1, 0, 0]
    assert [record.clients for record in state.history] == [1, 1, 1, 1, 1]
    assert [order.fence.round_number for order in bad.orders if order.segments] == [1, 2, 3]
    assert bad.orders[-1].run_is_over, "to evaluate, everybody is good enough"
    assert [event["client"] for event in events(run, "client_cooling")] == ["bad"]
    committed = events(run, "round_committed")
    assert "refused=1" in committed[0]["message"] and "refused" not in committed[3]["message"]


def test_run_whose_only_site_is_left_out_waits_for_it_and_says_so(
    server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pilot"), "propagate", True)
    caplog.set_level(logging.INFO, logger="pilot")
    # it is there: whether anybody comes is not the question
    values = {"cooling_time": 20.0, "clients_timeout": 5.0}
    run = server([ScriptedSite("alone")], num_rounds=2, min_clients=1, **values)
    run.state.admission.in_a_row["alone"] = 3
    clock = FastClock(speed=20)
    state = run.run(clock)
    assert [record.clients for record in state.history] == [1, 1]
    assert clock.now_s() >= 20.0
    assert state.admission.in_a_row == {}
    assert "1 of 1 clients can take part; left out for a while: alone" in caplog.text


def test_a_resumed_run_does_not_wait_for_a_site_that_is_left_out(server: Any) -> None:
    sites = [ScriptedSite("a"), ScriptedSite("b")]
    run = server(sites, num_rounds=2, min_clients=2, cooling_time=200.0)
    run.state.admission.in_a_row["b"] = 3
    state = run.run(FastClock(speed=20))
    assert [json.loads(line)["client"] for line in state.merged_log] == ["a", "a"]
    assert [order.run_is_over for order in sites[1].orders] == [True]


def test_only_site_is_refused_three_times_and_the_run_goes_on_after_its_cooling_time(
    server: Any,
) -> None:
    alone = ScriptedSite("alone", react=until_round(3, not_finite))
    run = server([alone], num_rounds=5, min_clients=1, cooling_time=20.0)
    state = run.run(FastClock(speed=20))
    assert [record.refused for record in state.history] == [1, 1, 1, 0, 0]
    assert sum(not record.clients for record in state.history) == 3


def test_a_run_whose_every_update_is_refused_ends_with_a_sentence(server: Any) -> None:
    sites = [ScriptedSite(name, react=until_round(99, not_finite)) for name in ("a", "b")]
    run = server(sites, num_rounds=99, cooling_time=2.0, clients_timeout=20.0)
    clock, said = (
        FastClock(speed=20),
        r"^in \d+ rounds every update was refused: a: .*; b: .*Lower lr",
    )
    with pytest.raises(RunFailed, match=said):
        run.run(clock)
    assert clock.now_s() >= 20.0 and len(run.state.history) >= 6


def test_update_out_of_all_proportion_is_refused_and_a_resumed_run_remembers_the_norms(
    server: Any,
) -> None:
    def huge(order: Any, reply: Any, update: Any) -> None:
        if order.fence.round_number in (1, 4):
            update["w"] *= 1000.0

    # in round 1 nothing is known yet; in round 4, after a resume, the norms of three rounds are
    sites = [ScriptedSite("a"), ScriptedSite("b", react=huge)]
    run = server(sites, num_rounds=3)
    first = run.run()
    assert [record.refused for record in first.history] == [0, 0, 0]
    assert len(first.admission.norms) == 6
    snapshot = latest_snapshot(run.run_dir / "snapshots", report=print)
    assert snapshot is not None and snapshot.state["admission"]["norms"] == first.admission.norms
    resumed = run.resume()
    resumed.state.config = resumed.config = scripted_config(
        run_name=run.config.run_name, num_rounds=4
    )
    state = resumed.run()
    assert [record.refused for record in state.history] == [0, 0, 0, 1]
    assert len(state.admission.norms) == 7
    assert bool(torch.isfinite(state.weights["w"]).all())
