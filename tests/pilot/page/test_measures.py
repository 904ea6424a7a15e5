"""Events as the numbers of curves, bars and tables."""

from typing import Any

import pytest

from pilot.page.measures import Energy, Measures, measure
from pilot.page.timeline import State, timeline
from pilot.run.events import read_events

from .story_kit import BOOKS, SPOT, committed, event, refusal, reply


def measured(*events: dict[str, Any]) -> Measures:
    listed = [event(0, "run_started", term=1), *events]
    return measure(listed, timeline(listed))


def test_a_validation_belongs_to_the_round_whose_model_it_scores() -> None:
    found = measured(
        event(10, "round_opened", round=1, clients=["a"]),
        event(20, "validation", round=0, val_bpb=4.5, complete=True),
        committed(21, 1, 1000),
        event(30, "validation", round=1, val_bpb=3.5, complete=False),
        committed(31, 2, 1800),
    )
    points = [(p.round_number, p.tokens, p.at_s, p.bpb, p.whole) for p in found.points]
    assert points == [
        (0, 0, 10, 4.5, True),
        (1, 1000, 21, 3.5, False),
        (2, 1800, 31, None, True),
    ]
    assert [p.train_loss for p in found.points] == [None, 2.0, 2.0]


def test_two_replies_of_a_client_in_a_round_are_one_pace_over_their_whole_time() -> None:
    found = measured(
        reply(10, "a", 1, tokens=100, train_s=4.0, loss_nats=300.0, mfu=0.5),
        reply(20, "a", 1, tokens=300, train_s=4.0, loss_nats=500.0, mfu=0.25),
    )
    (pace,) = found.paces
    assert (pace.tokens, pace.tokens_per_s, pace.loss, pace.mfu) == (400, 50.0, 2.0, 0.375)


def test_a_round_counts_whoever_had_an_order_in_its_last_opening() -> None:
    found = measured(
        event(1, "round_opened", round=1, clients=["a", "b"]),
        event(2, "run_started", term=2),
        event(3, "round_opened", round=1, clients=["b"]),
        event(4, "client_joined", round=1, client="c"),
        event(5, "client_joined", round=1, client="c"),
        committed(6, 1, 10, c=[[0, 0, 0, 8]]),
    )
    (presence,) = found.presences
    assert (presence.asked, presence.merged) == (["b", "c"], ["c"])


def test_rows_of_a_merge_that_was_taken_back_are_not_seen() -> None:
    found = measured(
        committed(1, 1, 10, a=[[0, 3, 0, 8], [0, 4, 0, 2]]),
        committed(2, 2, 20, a=[[0, 3, 8, 16]], b=[[1, 3, 0, 5]]),
        committed(3, 3, 30, a=[[0, 5, 0, 100]]),
        event(4, "merge_taken_back", round=4, taken_back=[3, 3]),
    )
    assert found.shards == {(0, 3): 16, (0, 4): 2, (1, 3): 5}


def test_old_files_tell_the_time_by_idle_spans_and_the_rest_is_training() -> None:
    found = measured(
        event(5, "idle", cause="hello", seconds=5.0),
        event(10, "round_opened", round=1, clients=["a"]),
        event(12, "idle", cause="start", seconds=4.0),  # two of them before the first round
        event(20, "idle", cause="merge", seconds=1.0),
        committed(20, 1, 10),
    )
    assert found.spent == {"start": 2.0, "merge": 1.0, "training": 7.0}
    assert found.training_share == pytest.approx(0.7)
    assert (found.goodput, found.traffic) == (None, [])


def test_newer_files_tell_time_bytes_and_goodput_by_round() -> None:
    account = {"period_s": 10.0, "goodput_s": 4.0, "bytes_down": 100, "bytes_up": 50}
    other = {"period_s": 10.0, "goodput_s": 2.0, "bytes_down": 1, "bytes_up": 0}
    found = measured(
        event(1, "round_opened", round=1, clients=["a", "b"]),
        event(20, "idle", cause="merge", seconds=9.0),
        event(
            21,
            "round_time",
            round=1,
            phases={"training": 8.0, "merge": 2.0},
            clients={"a": account, "b": other},
            bytes_down=101,
            bytes_up=50,
        ),
    )
    assert found.spent == {"training": 8.0, "merge": 2.0}
    assert found.goodput == pytest.approx(0.3)
    assert [(t.round_number, t.down, t.up) for t in found.traffic] == [(1, 101, 50)]
    a = found.clients[0]
    assert (a.client, a.goodput, a.bytes_down, a.bytes_up) == ("a", 0.4, 100, 50)


def test_a_client_is_alive_in_the_time_in_which_it_is_neither_silent_nor_gone() -> None:
    found = measured(
        event(10, "round_opened", round=1, clients=["a"]),
        refusal(20, "a", 1, "its node is gone"),
        event(30, "client_joined", round=1, client="a"),
        event(50, "x"),
    )
    (a,) = found.clients
    assert a.alive_share == pytest.approx(0.5)  # from 10 to 30 s, of 10 to 50 s, it was not
    assert (a.refused, a.merged) == (1, 0)


def test_the_figures_of_the_real_run_are_those_of_its_server() -> None:
    events = list(read_events(SPOT / "events.jsonl"))
    found = measure(events, timeline(events))
    last = [one for one in events if one["event"] == "round_committed"][-1]
    assert found.points[-1].tokens == last["total_tokens"] == 1_709_056
    assert len(found.presences) == 27
    assert found.finished
    assert sum(found.shards.values()) * 64 == 1_709_056  # rows of 64 tokens
    assert sum(one.refused for one in found.clients) == 16


def test_goodput_and_bytes_of_a_real_run_are_those_of_its_own_tables() -> None:
    events = list(read_events(BOOKS / "events.jsonl"))
    found = measure(events, timeline(events))
    books = [one for one in events if one["event"] == "round_time"]
    assert len(books) == 24
    assert sum(t.down for t in found.traffic) == sum(one["bytes_down"] for one in books)
    assert found.whole_s == pytest.approx(sum(one["round_s"] for one in books), abs=0.05)
    parts = [client for one in books for client in one["clients"].values()]
    whole = sum(part["goodput_s"] for part in parts) / sum(part["period_s"] for part in parts)
    assert found.goodput == pytest.approx(whole)
    assert 0.2 < whole < 0.6
    assert all(one.goodput is not None and one.bytes_up for one in found.clients)
    drained = [one for one in timeline(events).intervals if one.state is State.DRAINED]
    assert drained  # a site left in order


def test_energy_adds_up_by_client_and_what_nobody_says_stays_unknown() -> None:
    found = measured(
        event(1, "energy", client="a", kwh=0.5, grams=None),
        event(2, "energy", client="a", kwh=0.25, grams=100.0),
        event(3, "energy", client="b", kwh=None, money=2.0),
    )
    assert found.energy == {"a": Energy(0.75, 100.0, None), "b": Energy(None, None, 2.0)}
    assert measured(event(1, "x")).energy == {}
