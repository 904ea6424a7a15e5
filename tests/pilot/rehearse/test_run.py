"""What a rehearsal says, where one can say it by hand."""

from pathlib import Path
from typing import Any

import pytest

from pilot.config import RunConfig
from pilot.rehearse.machine import Machine, Physics
from pilot.rehearse.run import Rehearsal, rehearse
from pilot.rehearse.trace import Happening
from pilot.run.events import EVENTS_FILE, read_events

ROW, BATCH = 8, 64  # tokens


def run(tmp_path: Path, trace: list[Happening], *, clients: int = 2, **values: Any) -> Rehearsal:
    """Rounds of 100 s, of clients that do a step of 64 tokens in 2 s, order and reply taking a second each."""
    config = RunConfig.from_mapping(
        {
            "run-name": "r",
            "depth": 1,
            "vocab-size": 300,
            "sequence-len": ROW,
            "total-batch-size": BATCH,
            "batch-of": "client",
            "device-batch-size": 1,
            "num-shards": 100,
            "total-tokens": 64_000,
            "round-min-duration": 100.0,
            "round-max-duration": 100.0,
            "min-clients": 1,
            "heartbeat": 1.0,
            "eval-rows": 12,
            **values,
        }
    )
    machines = [
        Machine(
            name=f"c{i}",
            tokens_per_s=32.0,
            jitter=0.0,
            boot_s=5.0,
            start_s=0.5,
            download_bytes_s=1000.0,
            upload_bytes_s=1000.0,
        )
        for i in range(clients)
    ]
    physics = Physics(config, order_bytes=1000, reply_bytes=1000, shard_rows=100)
    return rehearse(config, machines, trace, tmp_path, physics=physics, seed=0, until_s=1e5)


def events(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(tmp_path / EVENTS_FILE) if e["event"] == kind]


UP = [Happening(0.0, f"c{i}", "up") for i in range(2)]


def trained(done: Rehearsal) -> bool:
    """Whether the run has its tokens; a step that is under way when it has them may be one more for each."""
    return done.failure == "" and 0 <= done.state.tokens - 64_000 <= 4 * BATCH


def test_a_calm_run_trains_what_its_clients_can_and_wastes_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, UP)
    assert trained(done) and (done.wasted_tokens, done.terms) == (0, 1)
    rounds = events(tmp_path, "round_committed")
    # Of 100 s: delivery 0.5, the order 1, start 0.5, half of 12 rows and one of the other's, scored at
    # 96 tokens/s, 0.6. So 48 steps of 2 s for each.
    assert {(one["tokens"], one["clients"]) for one in rounds[1:-1]} == {(2 * 48 * BATCH, 2)}
    # and between two rounds a reply of a second, and the ticks
    assert {one["duration_s"] for one in rounds[1:-1]} <= {101.25, 101.5}


def test_a_machine_that_dies_costs_its_round_and_no_row(tmp_path: Path) -> None:
    died = [*UP, Happening(150.0, "c1", "down"), Happening(400.0, "c1", "up")]
    done = run(tmp_path, died)
    assert trained(done)
    clients = [one["clients"] for one in events(tmp_path, "round_committed")]
    assert clients[:2] == [2, 1] and clients[-2] == 2
    assert [one["client"] for one in events(tmp_path, "client_silent")] == ["c1"]


def test_an_update_that_is_refused_is_wasted(tmp_path: Path) -> None:
    done = run(tmp_path, [*UP, Happening(50.0, "c1", "lie")])
    # its first order: of shards of unknown size, two of 100 rows
    assert trained(done) and done.wasted_tokens == 2 * 100 * ROW
    refused = events(tmp_path, "reply_refused")
    assert len(refused) == 1 and "not finite" in refused[0]["reason"]


def test_a_notice_lets_a_client_reply_before_it_goes(tmp_path: Path) -> None:
    done = run(tmp_path, [*UP, Happening(150.0, "c1", "notice", 30.0)])
    assert trained(done) and done.wasted_tokens == 0
    assert [one["clients"] for one in events(tmp_path, "round_committed")][:3] == [2, 2, 1]


@pytest.mark.parametrize("event", ["kill", "crash"])
def test_a_server_that_dies_resumes_and_counts_its_starts(event: str, tmp_path: Path) -> None:
    done = run(tmp_path, [*UP, Happening(250.0, "server", event, 20.0)])
    assert trained(done) and done.terms == 2
    away = [e["seconds"] for e in events(tmp_path, "idle") if e["cause"] == "server-away"]
    assert away == [pytest.approx(35.0, abs=2.0)]


def test_a_run_without_enough_clients_fails_with_the_sentence_of_a_real_one(tmp_path: Path) -> None:
    done = run(tmp_path, UP[:1], **{"min-clients": 2, "clients-timeout": 60.0})
    assert "not enough clients to continue" in done.failure and done.state.tokens == 0
