"""The status of a run from its events, from Redis, from both: what is known, and what is not."""

import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from pilot.coordination.operator import Beat, Live
from pilot.run.facts import RunFacts
from pilot.status.now import status
from pilot.status.render import duration, render, size
from pilot.status.value import Status
from pilot.wire.messages import Heartbeat

from ..page.story_kit import BEGAN, committed, event, refusal, reply

NOW_S = BEGAN + 130.0
ACCEPTED = {"host": "h", "devices": 2, "device_name": "H100"}
EVENTS = [
    event(0, "run_started", run="r", term=3, tokens=0, round=0),
    event(1, "client_accepted", client="a", **ACCEPTED),
    event(2, "round_opened", round=1, clients=["a", "b"]),
    event(50, "round_ended", round=1, reason="target-tokens"),
    reply(51, "a", 1, mfu=0.5),
    refusal(52, "b", 1, "no GPU"),
    committed(60, 1, 1000, a=[[0, 0, 0, 8]]),
    event(61, "validation", round=1, val_bpb=1.25, complete=True),
    event(62, "round_opened", round=2, clients=["a", "b"]),
    event(110, "round_ended", round=2, reason="target-tokens"),
    reply(111, "b", 2),
    committed(120, 2, 3000, b=[[0, 1, 0, 8]]),
    event(121, "round_opened", round=3, clients=["a", "b"]),
    event(125, "client_silent", round=3, client="b"),
]
FACTS = RunFacts(config={"num-rounds": 10, "heartbeat": 1.0}, total_tokens=9000, alive=True)
PROGRESS: dict[str, Any] = {
    "phase": "training",
    "round": 3,
    "elapsed_s": 8.0,
    "left_s": 30.0,
    "round_tokens": 500,
    "tokens": 3000,
    "total_tokens": 9000,
    "rounds": 2,
    "num_rounds": 0,
    "tokens_per_s": 40.0,
    "round_s": 50.0,
    "shards": [0.25, 1, 8],
    "goodput": 0.8,
    "train_loss": 2.5,
    "val_bpb": 1.25,
    "heartbeat_s": 1.0,
    "refused": 1,
    "refusals": [{"client": "b", "round": 1, "reason": "no GPU"}],
    "clients": {
        "a": {"state": "training", "host": "h", "devices": 2, "device": "H100", "bytes_up": 44},
        "b": {"state": "silent", "why": "", "refused": 1, "bytes_down": 7},
    },
}
LIVE = Live(
    "r",
    leader={"host": "h"},
    state="running",
    term=3,
    round_number=3,
    round_open=True,
    progress=PROGRESS,
    progress_age_s=2.0,
    beats={"a": Beat(Heartbeat("training", 4, 500, 2.25, 99.0, 0.5, 7, 3, 12), 3, 3, left_s=9.5)},
)


def now(events: Any = EVENTS, facts: RunFacts = FACTS, live: Live | None = LIVE) -> Status:
    return status("r", events, facts, live, now_s=NOW_S)


def test_both_sources_together_say_everything() -> None:
    found = now()
    assert (found.state, found.term, found.round_number, found.phase) == (
        "running",
        3,
        3,
        "training",
    )
    assert (found.round_s, found.round_left_s) == (10.0, 28.0), "two seconds have passed since"
    assert found.tokens_per_s == pytest.approx(2000 / 60), "of commits, whatever lay between them"
    # by tokens: (9000 - 3000 - 500) / (2000 / 60); by rounds: 8 of 60 s each, less the 8 s of the third
    assert found.eta_s == pytest.approx(min(5500 * 60 / 2000, 8 * 60 - 8))
    assert (found.tokens, found.total_tokens, found.round_tokens) == (3000, 9000, 500)
    assert (found.shards, found.train_loss, found.val_bpb) == ((0.25, 1, 8), 2.5, 1.25)
    assert found.unknown == [] and found.last_event_s == 5.0
    (refused,) = found.refusals
    assert (refused.client, refused.reason, refused.age_s) == ("b", "no GPU", 78.0)
    a, b = found.clients
    assert (a.name, a.state, a.device, a.devices, a.host) == ("a", "training", "H100", 2, "h")
    assert (a.tokens_per_s, a.mfu, a.loss, a.step, a.shard, a.shard_share) == (
        99,
        0.5,
        2.25,
        4,
        7,
        0.25,
    )
    assert a.heartbeat_s == pytest.approx(0.5), "Redis keeps it for 10 s, of which 9.5 are left"
    assert (a.merged_rounds, a.refused) == (1, 0)
    assert (b.state, b.merged_rounds, b.refused, b.heartbeat_s) == ("silent", 1, 1, None)


def test_events_alone_say_what_was_and_that_nothing_is_known_of_now() -> None:
    found = status("r", EVENTS, FACTS, None, now_s=NOW_S, unknown=["no Redis"])
    assert (found.state, found.round_number, found.phase) == ("running", 3, "open")
    assert found.round_left_s is None and found.unknown == ["no Redis"]
    assert found.eta_s == pytest.approx(6000 * 60 / 2000)
    a, b = found.clients
    assert (a.state, a.device, a.loss, a.heartbeat_s) == ("asked", "H100", 2.0, None)
    assert (b.state, b.tokens_per_s) == ("silent", 25.0)


def test_redis_alone_says_what_is_and_nothing_of_the_past() -> None:
    found = now([], RunFacts())
    assert (found.state, found.round_number, found.round_left_s) == ("running", 3, 28.0)
    assert found.eta_s == pytest.approx(5500 / 40)
    assert (found.refused, found.refusals[0].age_s, found.last_event_s) == (1, None, None)
    a, b = found.clients
    assert (a.state, a.bytes_up, a.merged_rounds) == ("training", 44, None)
    assert (b.state, b.refused, b.bytes_down) == ("silent", 1, 7)
    assert (found.bytes_down, found.bytes_up) == (7, 44)


@pytest.mark.parametrize(
    ("events", "facts", "live", "state"),
    [
        ([*EVENTS, event(126, "run_finished")], FACTS, LIVE, "finished"),
        (EVENTS, FACTS, replace(LIVE, stop="dear"), "stopping"),
        (EVENTS, FACTS, replace(LIVE, leader={}, state="interrupted"), "stopped"),
        (EVENTS, FACTS, replace(LIVE, leader={}), "lost"),
        (EVENTS, replace(FACTS, alive=False), None, "lost"),
        ([*EVENTS, event(126, "run_stopping", reason="x")], FACTS, None, "stopping"),
        ([*EVENTS, event(126, "run_stopping", reason="x")], RunFacts(), None, "stopped"),
        ([*EVENTS, event(126, "run_stopping"), event(127, "run_started")], FACTS, None, "running"),
        ([], RunFacts(), replace(LIVE, leader={}, state="finished"), "finished"),
    ],
)
def test_the_state_of_a_run(events: Any, facts: RunFacts, live: Live | None, state: str) -> None:
    late = replace(facts) if facts.alive or events is not EVENTS else facts
    found = status("r", events, late, live, now_s=NOW_S + 100)
    assert found.state == state
    if state in ("finished", "stopped", "lost"):
        assert found.eta_s is None and found.phase == ""


def test_what_the_server_published_long_ago_says_nothing_of_now() -> None:
    found = now([], RunFacts(), replace(LIVE, progress_age_s=90.0))
    assert found.round_left_s is None and found.eta_s is None
    assert found.unknown == [
        "the server published nothing for 90 s: it writes a snapshot, or hangs"
    ]
    assert [(c.name, c.state) for c in found.clients] == [("a", "training")], "its heartbeat is new"


def test_a_drained_client_is_shown_as_such_with_the_reason() -> None:
    live = replace(LIVE, progress={}, leaving={"a": "drained: new disks"}, beats={})
    found = {client.name: client for client in now(EVENTS, FACTS, live).clients}
    assert (found["a"].state, found["a"].why) == ("drained", "drained: new disks")


@pytest.mark.parametrize(
    "junk",
    [
        {"phase": 3},
        {"phase": "training", "clients": {"a": 3, "b": {"state": [], "bytes_up": "x"}}},
        {"phase": "training", "refusals": [None, {"reason": 5}], "shards": ["x"], "round": True},
        {"phase": "a\x1b[31mb", "clients": {"c": {"why": "x\x07"}}},
    ],
)
def test_whatever_anybody_has_written_to_redis_is_shown_or_left_out(junk: dict[str, Any]) -> None:
    found = now([], RunFacts(), replace(LIVE, progress=junk))
    text = shown(found)
    assert "\x1b" not in text and "\x07" not in text
    json.dumps(found.to_json(), allow_nan=False)


def shown(found: Status) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(found))
    return console.export_text(styles=False)


def test_what_people_see() -> None:
    text = shown(now())
    assert "run r  running" in text and "round 3 of 10 · training · 28 s left of it" in text
    assert "the run ends in about 2 min 45 s" in text
    assert "tokens 3,000 of 9,000 · 500 more in this round · 33/s · shards 1 of 8 complete" in text
    assert "refused: b (round 1, 1 min 18 s ago): no GPU" in text
    line = next(one for one in text.splitlines() if one.startswith(" a "))
    assert line.split()[:10] == [
        "a",
        "training",
        "99",
        "50.0%",
        "2.250",
        "4",
        "7",
        "(25.0%)",
        "0",
        "s",
    ]
    assert "2 × H100 on h" in line


def test_the_json_form_has_a_schema_and_no_number_that_json_lacks() -> None:
    found = json.loads(json.dumps(now().to_json(), allow_nan=False))
    assert found["schema"] == 1 and found["clients"][0]["name"] == "a"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (7320, "2 h 2 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert duration(3 * 86400 + 4 * 3600) == "3 d 4 h"


def test_sizes_of_bytes() -> None:
    assert [size(n) for n in (None, 999, 1500, 2.2e9)] == ["-", "999 B", "1.5 kB", "2.2 GB"]  # type: ignore[arg-type]
