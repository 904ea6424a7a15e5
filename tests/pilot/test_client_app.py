"""The ClientApp: a leaving client takes no work, and others can see the state of its order."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from pilot import client_app
from pilot.client_app import answer
from pilot.coordination.coordinator import ServerCoordinator
from pilot.site import in_flight
from pilot.site.in_flight import InFlight
from pilot.site.rows import ROWS_VARIABLE
from pilot.wire.codec import encode
from pilot.wire.messages import (
    Fence,
    Header,
    HelloOrder,
    HelloReply,
    Part,
    TrainReply,
    from_header,
    to_header,
)
from pilot.wire.records import from_records, to_records

from ..waiting import LIMIT_S, until
from .worker_kit import ENDLESS, first_weights, site_config, train_order

UPDATE = [Part("w", "float32", (1,), b"\0\0\0\0")]


class FakeWorker:
    """Stands for a worker group: answers an order with `reply` and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.update: list[Part] = []
        self.during: Callable[[], object] = lambda: None
        monkeypatch.setattr(client_app, "WorkerHandle", lambda **_: self)

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, header: Header, parts: list[Part]) -> tuple[Header, list[Part]]:
        self.asked += 1
        self.during()
        if header["kind"] == "HelloOrder":
            return to_header(HelloReply()), []
        reply = TrainReply(fence=Fence("r", 1, 1, 1), client="c")
        return to_header(reply), list(self.update)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    return FakeWorker(monkeypatch)


def ask(redis_url: str = "", **config: Any) -> TrainReply:
    order = train_order(site_config(Path("/"), **config), ENDLESS[:1], redis_url=redis_url)
    reply = from_header(from_records(answer(to_records(to_header(order), []), "c"))[0])
    assert isinstance(reply, TrainReply) and reply.fence == order.fence
    return reply


def greet(redis_url: str = "", **config: Any) -> HelloReply:
    values = site_config(Path("/"), **config).to_mapping()
    order = HelloOrder(run="r", config=values, redis_url=redis_url)
    reply = from_header(from_records(answer(to_records(to_header(order), []), "c"))[0])
    assert isinstance(reply, HelloReply)
    return reply


def test_what_runs_once_per_message_or_command_imports_neither_torch_nor_nanochat() -> None:
    modules = (
        "pilot.client_app, pilot.site.handle, pilot.site.in_flight, pilot.site.notice, pilot.cli"
    )
    code = f"import sys, {modules}; print(*{{'torch', 'nanochat'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# -- rows per device -----------------------------------------------------------------------------


def test_rows_of_the_node_configuration_are_those_of_its_worker(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ROWS_VARIABLE, "4")  # the machine's; the node's is narrower
    config = site_config(site, round_steps=1, device_batch_size=2)
    content = to_records(to_header(train_order(config, ENDLESS[:1])), encode(first_weights(config)))
    reply = from_header(from_records(answer(content, "c", {"device-batch-size": 1}))[0])
    assert isinstance(reply, TrainReply) and reply.error == ""
    assert (reply.steps, reply.batches) == (1, config.batch_rows)


def test_rows_that_are_no_number_are_refused_before_a_worker_starts(
    worker: FakeWorker, site: Path
) -> None:
    config = site_config(site)
    orders = (
        HelloOrder(run="r", config=config.to_mapping(), redis_url=""),
        train_order(config, ENDLESS[:1]),
    )
    for order in orders:
        content = to_records(to_header(order), [])
        reply = from_header(from_records(answer(content, "c", {"device-batch-size": "many"}))[0])
        assert isinstance(reply, HelloReply | TrainReply)
        assert reply.error.startswith("device-batch-size in --node-config is 'many'")
    assert worker.asked == 0


# -- leaving -------------------------------------------------------------------------------------


def test_site_with_a_notice_takes_no_work_until_it_is_gone(
    worker: FakeWorker, tmp_path: Path
) -> None:
    notice = tmp_path / "notice"
    notice.touch()
    reply = ask(preempt_file=str(notice))
    assert (reply.stopped_by, reply.tokens, reply.consumed) == ("leaving", 0, [])
    assert "is leaving (preempt-file" in greet(preempt_file=str(notice)).error
    assert worker.asked == 0, "no worker is started for it"
    notice.unlink()
    assert ask(preempt_file=str(notice)).stopped_by == ""
    assert greet(preempt_file=str(notice)).error == "" and worker.asked == 2


def test_site_with_a_stop_key_takes_no_work_until_it_is_cleared(
    worker: FakeWorker, redis_url: str, leader: ServerCoordinator
) -> None:
    leader.stop_client("c", "maintenance")
    assert ask(redis_url).stopped_by == "leaving"
    assert "is leaving (maintenance)" in greet(redis_url).error and worker.asked == 0
    leader.clear_client_stop("c")
    assert ask(redis_url).stopped_by == "" and greet(redis_url).error == ""


def test_server_learns_of_a_notice_that_only_the_site_sees(
    worker: FakeWorker, redis_url: str, leader: ServerCoordinator, tmp_path: Path
) -> None:
    notice = tmp_path / "notice"
    notice.touch()
    ask(redis_url, preempt_file=str(notice))
    assert list(leader.draining(["c", "d"])) == ["c"]
    notice.unlink()
    assert ask(redis_url, preempt_file=str(notice)).stopped_by == "", "it is back at once"


def test_site_that_cannot_reach_redis_works(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask("unix:///no.sock").stopped_by == "" and worker.asked == 1
    monkeypatch.setenv("PILOT_REDIS_URL", "no URL at all")
    assert ask().stopped_by == "" and worker.asked == 2


# -- in flight -----------------------------------------------------------------------------------


def test_node_can_read_the_state_of_the_order(
    worker: FakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> str:
        found = in_flight.read(tmp_path)
        return found.state if found else ""

    during: list[str] = []
    worker.during = lambda: during.append(state())
    ask()
    assert list(tmp_path.iterdir()) == [], "there is no pilot node"
    monkeypatch.setenv("PILOT_NODE_DIR", str(tmp_path))
    ask()
    assert (during, state()) == (["", "working"], "done"), "it has nothing to be lost"
    worker.update = UPDATE
    ask()
    assert in_flight.read(tmp_path) == InFlight(
        run="r",
        redis_url="",
        client="c",
        fence=Fence("r", 1, 1, 1),
        state="sending",
        pid=os.getpid(),
        preempt_file="",
        drain_deadline_s=20.0,
    )
    (tmp_path / "leave").touch()
    assert ask().stopped_by == "leaving"
    assert state() == "sending", "an order that is not taken doesn't hide the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leave", "order.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fence": 1}', "\0", json.dumps({"fence": {}})])
def test_broken_file_is_no_order(text: str, tmp_path: Path) -> None:
    assert in_flight.read(tmp_path) is None
    (tmp_path / in_flight.FILE_NAME).write_text(text)
    assert in_flight.read(tmp_path) is None


@pytest.mark.parametrize("end", ["acknowledged", "a later round"])
def test_heartbeats_continue_while_the_reply_is_sent_until(
    end: str, worker: FakeWorker, redis_url: str, leader: ServerCoordinator
) -> None:
    worker.update = UPDATE
    ask(redis_url, heartbeat=0.05)
    until(lambda: [h.heartbeat.state for h in leader.heartbeats(["c"]).values()] == ["sending"])
    with redis.Redis.from_url(redis_url) as raw:
        first = raw.hget("pilot:r:client:c", "beat")
        until(lambda: raw.hget("pilot:r:client:c", "beat") not in (first, None))
    leader.end_round("min-duration")
    assert [thread.name for thread in threading.enumerate()].count("sending") == 1
    if end == "acknowledged":
        leader.acknowledge("c", Fence("r", 1, 1, 1))
    else:
        leader.open_round(2)
    until(lambda: "sending" not in [thread.name for thread in threading.enumerate()])


# -- signals -------------------------------------------------------------------------------------


def test_sigterm_drains_the_worker_and_the_reply_still_goes_out(
    site: Path, redis_url: str, leader: ServerCoordinator
) -> None:
    config = site_config(site, round_steps=0)
    order = train_order(config, ENDLESS, redis_url=redis_url)
    content = to_records(to_header(order), encode(first_weights(config)))
    here, there = multiprocessing.Pipe()

    def client() -> None:
        before = signal.getsignal(signal.SIGTERM)
        header, parts = from_records(answer(content, "c"))
        there.send_bytes(json.dumps([header, len(parts)]).encode())
        assert signal.getsignal(signal.SIGTERM) is before, "what comes next is Flower's"

    process = multiprocessing.get_context("fork").Process(target=client)
    process.start()
    try:
        until(lambda: any(h.heartbeat.tokens for h in leader.heartbeats(["c"]).values()))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        assert here.poll(LIMIT_S)
        header, parts = json.loads(here.recv_bytes())
        process.join(LIMIT_S)
    finally:
        process.kill()
    assert header["stopped_by"] == "SIGTERM" and header["tokens"] > 0 and parts
    assert process.exitcode == 0
