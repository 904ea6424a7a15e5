"""Events as intervals per client."""

import itertools
from typing import Any

import pytest

from pilot.page.timeline import Interval, State, coarse, is_death, timeline
from pilot.run.events import read_events

from .story_kit import SHORT, SPOT, event, refusal, reply

OPENED = event(10, "round_opened", round=1, clients=["a"])
ENDED = event(20, "round_ended", round=1, reason="target-tokens")
STARTED = event(0, "run_started", term=1)


def lane(client: str, *events: dict[str, Any]) -> list[tuple[str, float, float]]:
    found = timeline([STARTED, *events]).intervals
    return [
        (i.state.value, round(i.start_s, 3), round(i.end_s, 3)) for i in found if i.client == client
    ]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        pytest.param(
            [OPENED, ENDED, reply(23, "a", 1)],
            [
                ("starting", 10, 14),
                ("evaluating", 14, 16),
                ("training", 16, 20),
                ("sending", 20, 23),
            ],
            id="the round's end stopped it: training ended there",
        ),
        pytest.param(
            [OPENED, ENDED, reply(23, "a", 1, eval_s=1.0)],
            [
                ("starting", 10, 15),
                ("evaluating", 15, 16),
                ("training", 16, 20),
                ("sending", 20, 23),
            ],
            id="newer clients say how long they evaluated",
        ),
        pytest.param(
            [OPENED, reply(18, "a", 1, stopped_by="lease used up", eval_rows=0)],
            [("starting", 10, 14), ("training", 14, 18)],
            id="it stopped by itself: training ended with the reply, as nothing says how long sending takes",
        ),
        pytest.param(
            [
                OPENED,
                ENDED,
                reply(22, "a", 1),
                event(23, "round_opened", round=2, clients=["a"]),
                reply(33, "a", 2, stopped_by="lease used up", eval_rows=0),
            ],
            [
                *[("starting", 10, 14), ("evaluating", 14, 16), ("training", 16, 20)],
                *[("sending", 20, 22), ("starting", 23, 27), ("training", 27, 31)],
                ("sending", 31, 33),
            ],
            id="sending takes what it took before",
        ),
        pytest.param(
            [OPENED, ENDED, reply(23, "a", 1, train_s=900.0, total_s=1e9)],
            [("training", 10, 20), ("sending", 20, 23)],
            id="what a client says never leaves its order",
        ),
        pytest.param(
            [OPENED, refusal(25, "a", 1, "w is not finite"), event(30, "x")],
            [("refused", 10, 25)],
            id="refused",
        ),
        pytest.param(
            [
                OPENED,
                refusal(15, "a", 1, "worker process 0 was killed by signal 9"),
                event(40, "client_joined", client="a", round=1),
                event(41, "x"),
            ],
            [("killed", 10, 15), ("killed", 15, 40), ("starting", 40, 41)],
            id="killed, until the next order",
        ),
        pytest.param(
            [
                OPENED,
                ENDED,
                reply(22, "a", 1, stopped_by="SIGTERM"),
                event(50, "round_opened", round=2, clients=["a"]),
            ],
            [
                ("starting", 10, 16),
                ("evaluating", 16, 18),
                ("training", 18, 22),
                ("drained", 22, 50),
            ],
            id="drained, until the next order",
        ),
        pytest.param(
            [
                OPENED,
                event(14, "client_silent", client="a", round=1),
                event(17, "client_back", client="a", round=1),
                ENDED,
                reply(23, "a", 1, train_s=9.0, total_s=9.0, eval_rows=0),
            ],
            [
                *[("starting", 10, 11), ("training", 11, 14), ("silent", 14, 17)],
                *[("training", 17, 20), ("sending", 20, 23)],
            ],
            id="silence is cut out of what it did",
        ),
        pytest.param(
            [event(1, "client_left_out", client="a", round=1, reason="no Redis"), OPENED],
            [("left out", 1, 10)],
            id="left out until an order comes",
        ),
        pytest.param(
            [OPENED, event(18, "idle", cause="merge", seconds=1), event(30, "run_started", term=2)],
            [("refused", 10, 18)],
            id="an order is lost when its server says its last word",
        ),
        pytest.param([OPENED, event(30, "x")], [("starting", 10, 30)], id="the run is not over"),
        pytest.param(
            [event(50, "x"), reply(60, "a", 1, eval_rows=0)],
            [("starting", 54, 56), ("training", 56, 60)],
            id="a reply to an order of which no event tells",
        ),
    ],
)
def test_a_lane_says_what_happened(
    events: list[dict[str, Any]], expected: list[tuple[str, float, float]]
) -> None:
    assert lane("a", *events) == expected


def test_a_span_without_a_server_ends_with_the_event_that_tells_of_it() -> None:
    found = timeline([STARTED, event(50, "idle", cause="server-away", seconds=20.0)])
    assert found.outages == [(30.0, 50.0)]


def test_a_late_reply_is_listed_and_changes_no_lane() -> None:
    late = event(30, "reply_refused", client="a", reason="it answers a round that is over")
    late["fence"] = {"round_number": 1}
    found = timeline([STARTED, OPENED, ENDED, reply(23, "a", 1), late])
    assert [(r.client, r.round_number, r.reason) for r in found.refusals] == [
        ("a", 1, "it answers a round that is over")
    ]
    assert State.REFUSED not in found.seconds("a")


def test_clocks_that_are_set_back_make_no_interval_negative() -> None:
    back = reply(5, "a", 1)
    assert lane("a", OPENED, ENDED, back, event(21, "x")) == [
        ("starting", 10, 14),
        ("evaluating", 14, 16),
        ("training", 16, 20),
    ]


@pytest.mark.parametrize(
    ("reason", "death"),
    [
        ("worker process 0 was killed by signal 9 (possibly out of memory)", True),
        ("Flower error 5: Error: Node Unavailable — The destination node failed", True),
        ("Flower error 8: ClientApp stopped responding.", True),
        ("a newer node has taken its name", True),
        ("its node is gone", True),
        ("transformer.wte.weight is not finite", False),
        ("no reply within the 10 s of grace", False),
    ],
)
def test_reasons_that_mean_a_death(reason: str, death: bool) -> None:
    assert is_death(reason) is death


@pytest.mark.parametrize("run", [SPOT, SHORT])
def test_the_lanes_of_a_real_run_neither_overlap_nor_leave_it(run: Any) -> None:
    found = timeline(read_events(run / "events.jsonl"))
    assert found.clients == ["site-a", "site-b", "site-c"]
    for client in found.clients:
        own = [one for one in found.intervals if one.client == client]
        assert len(own) > 40
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in itertools.pairwise(own))
        assert own[0].start_s >= 0
        assert own[-1].end_s <= found.end_s


def test_the_real_runs_hold_every_state() -> None:
    seen = {
        i.state
        for run in (SPOT, SHORT)
        for i in timeline(read_events(run / "events.jsonl")).intervals
    }
    assert seen == set(State)


def test_a_coarse_lane_keeps_what_fills_most_of_each_piece_and_all_of_its_length() -> None:
    fine = [
        Interval("a", State.TRAINING, 0, 6),
        Interval("a", State.SENDING, 6, 10),
        Interval("a", State.TRAINING, 10, 19),
        Interval("b", State.SILENT, 12, 18),
    ]
    found = [(i.client, i.state, i.start_s, i.end_s) for i in coarse(fine, 10)]
    assert found == [("a", State.TRAINING, 0, 20), ("b", State.SILENT, 10, 20)]


def test_no_events_are_no_run() -> None:
    with pytest.raises(ValueError):
        timeline([])


def test_a_client_that_is_only_spoken_of_has_no_lane() -> None:
    away = event(12, "energy", client="off", kwh=0.0)
    assert timeline([STARTED, OPENED, away, ENDED]).clients == ["a"]
