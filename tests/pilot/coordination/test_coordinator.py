"""The keys of a run on a real Redis: ends that can't be missed, runs that don't meet, one leader."""

import json
import multiprocessing
import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import redis

from pilot.coordination import coordinator as module
from pilot.coordination.coordinator import CoordinatorError, ServerCoordinator
from pilot.coordination.heartbeats import Heard
from pilot.processes.local_redis import LocalRedis
from pilot.wire.messages import Fence, Heartbeat

from ...waiting import LIMIT_S, until
from ..coordinator_kit import client, keys, server

ROOT = Path(__file__).resolve().parents[3]
_WAIT_S = 30.0  # what a client would sleep that no signal wakes


# -- ends ----------------------------------------------------------------------------------------


def test_end_before_the_client_listens_is_seen_at_once(redis_url: str, tmp_path: Path) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(1)
    with client(redis_url) as half:
        assert half.round_over() is None
    leader.end_round("min-duration")
    with client(redis_url) as late:
        assert late.round_over() == "min-duration"


def test_only_the_clients_own_round_or_a_later_one_ends_it(redis_url: str, tmp_path: Path) -> None:
    leader = server(redis_url, tmp_path, term=2)
    with client(redis_url, term=2, round_number=5) as half:
        assert half.round_over() is None, "nothing is known yet"
        leader.open_round(4)
        leader.end_round("x")
        assert half.round_over() is None, "an earlier round ended"
        leader.open_round(5)
        assert half.round_over() is None
        leader.open_round(6)
        assert half.round_over() == "a later round"
    with client(redis_url, term=1, round_number=99) as of_the_dead_server:
        assert of_the_dead_server.round_over() == "a later round"


def test_end_is_a_durable_key_first_and_a_signal_second(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(1)
    at_the_signal = []

    def publish(self: redis.Redis, channel: str, message: str) -> None:
        at_the_signal.append((channel, self.hget("pilot:r:round", "phase")))

    monkeypatch.setattr(redis.Redis, "publish", publish)
    leader.end_round("min-duration")
    assert at_the_signal == [("pilot:r:signals", "ended")]


def test_waiting_client_is_woken_by_the_end(redis_url: str, tmp_path: Path) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(1)
    with client(redis_url) as half:
        half.wait(0.01)  # subscribes
        timer = threading.Timer(0.3, leader.end_round, ["x"])
        timer.start()
        began = time.monotonic()
        until(lambda: half.wait(_WAIT_S) or half.round_over())
        assert time.monotonic() - began < _WAIT_S / 2, "it slept through the signal"
        timer.join()


# -- who is alive --------------------------------------------------------------------------------


def test_heartbeats_are_those_of_this_round_of_the_clients_asked_for(
    redis_url: str, tmp_path: Path
) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(2)
    with client(redis_url, name="now", round_number=2) as now:
        now.send_heartbeat(Heartbeat("training", tokens=5, loss=1.5), expiry_s=60)
    with client(redis_url, name="before", round_number=1) as before:
        before.send_heartbeat(Heartbeat(tokens=9), expiry_s=60)
    with client(redis_url, name="other", run="s", round_number=2) as other:
        other.send_heartbeat(Heartbeat(tokens=9), expiry_s=60)
    heard = leader.heartbeats(["now", "before", "other", "silent"])
    assert heard == {"now": Heard(Heartbeat("training", tokens=5, loss=1.5), 0.0)}
    assert leader.heartbeats([]) == {}


def test_a_process_that_knows_only_the_state_leaves_how_far_the_client_is(
    redis_url: str, tmp_path: Path
) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(1)
    with client(redis_url) as worker, client(redis_url) as app:
        worker.send_heartbeat(Heartbeat("training", step=2, tokens=5), expiry_s=60)
        app.send_state("sending", expiry_s=60)
    heard = leader.heartbeats(["c"])["c"]
    assert heard.heartbeat == Heartbeat("sending", step=2, tokens=5)


def age(leader: ServerCoordinator) -> float:
    return leader.heartbeats(["c"])["c"].age_s


def test_silent_client_ages_though_its_key_is_gone_until_it_is_heard_again_or_the_round_is_another(
    redis_url: str, tmp_path: Path
) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(1)
    assert leader.heartbeats(["c"]) == {}, "it has not begun: it is not silent"
    with client(redis_url) as half, redis.Redis.from_url(redis_url) as raw:
        half.send_heartbeat(Heartbeat(tokens=5), expiry_s=0.05)
        assert age(leader) == 0.0
        until(lambda: not raw.exists("pilot:r:client:c"))
        until(lambda: age(leader) > 0.2)
        assert leader.heartbeats(["c"])["c"].heartbeat.tokens == 5
        half.send_heartbeat(Heartbeat(tokens=5), expiry_s=60)
        assert age(leader) == 0.0, "any heartbeat counts, whatever it says"
        until(lambda: age(leader) > 0.05)
    leader.open_round(2)
    assert leader.heartbeats(["c"]) == {}


def test_no_heartbeat_ages_while_the_server_cannot_know(
    tcp_redis: LocalRedis, tmp_path: Path
) -> None:
    leader = server(tcp_redis.url, tmp_path)
    leader.open_round(1)
    with client(tcp_redis.url) as half, redis.Redis.from_url(tcp_redis.url) as operator:
        half.send_heartbeat(Heartbeat(tokens=5), expiry_s=60)
        assert age(leader) == 0.0
        operator.config_set("maxmemory", "1")  # clients can't write; reading works
        leader.tick()
        time.sleep(0.1)
        assert age(leader) == 0.0 == age(leader)
        operator.config_set("maxmemory", "0")
        leader.tick()
        age(leader)
        until(lambda: age(leader) > 0.05)


# -- who is to leave, what has arrived -----------------------------------------------------------


def test_stop_of_a_client_is_its_own_until_it_is_cleared(redis_url: str, tmp_path: Path) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(1)
    with client(redis_url) as half, client(redis_url, name="d") as other:
        assert half.told_to_leave() is None
        leader.stop_client("c", "maintenance")
        assert half.told_to_leave() == "maintenance" and other.told_to_leave() is None
        assert half.round_over() is None, "the round is still open"
        assert leader.draining(["c", "d"]) == {"c": "maintenance"}
        with redis.Redis.from_url(redis_url) as raw:
            assert 0 < raw.ttl("pilot:r:stop:c") <= module.STOP_EXPIRY_S
        leader.clear_client_stop("c")
        assert half.told_to_leave() is None and leader.draining(["c", "d"]) == {}
    assert leader.draining([]) == {}


def test_client_that_leaves_by_itself_tells_the_server_and_may_come_back(
    redis_url: str, tmp_path: Path
) -> None:
    leader = server(redis_url, tmp_path)
    with client(redis_url) as half:
        half.announce_leave("preempt-file /x", expiry_s=60)
        assert leader.draining(["c"]) == {"c": "leaving: preempt-file /x"}
        assert half.told_to_leave() is None, (
            "the file decides, not what the client announced before"
        )
        leader.clear_client_stop("c")
        leader.stop_client("c", "maintenance")
        half.announce_leave("SIGTERM", expiry_s=60)
        half.clear_stop("pilot node")
        assert half.told_to_leave() == "maintenance", "others' stops stay"
        half.clear_stop("maint")
        assert half.told_to_leave() is None


def test_acknowledged_is_exactly_the_fence_that_the_server_wrote(
    redis_url: str, tmp_path: Path
) -> None:
    leader = server(redis_url, tmp_path)
    with client(redis_url) as half, client(redis_url, name="d") as other:
        assert not half.acknowledged(Fence("r", 1, 1, 7))
        leader.acknowledge("c", Fence("r", 1, 1, 7))
        assert half.acknowledged(Fence("r", 1, 1, 7))
        assert not half.acknowledged(Fence("r", 1, 1, 8)) and not other.acknowledged(
            Fence("r", 1, 1, 7)
        )
        with redis.Redis.from_url(redis_url) as raw:
            assert 0 < raw.ttl("pilot:r:ack:c") <= module.ACK_EXPIRY_S


def test_waiting_client_is_woken_by_its_stop_and_its_acknowledgement(
    redis_url: str, tmp_path: Path
) -> None:
    leader = server(redis_url, tmp_path)
    fence = Fence("r", 1, 1, 7)
    with client(redis_url) as half:
        half.wait(0.01)  # subscribes
        for act, holds in (
            (lambda: leader.stop_client("c", "x"), half.told_to_leave),
            (lambda: leader.acknowledge("c", fence), lambda: half.acknowledged(fence)),
        ):
            timer = threading.Timer(0.2, act)
            timer.start()
            began = time.monotonic()
            until(lambda holds=holds: half.wait(_WAIT_S) or holds())
            assert time.monotonic() - began < _WAIT_S / 2, "it slept through the signal"
            timer.join()


@pytest.mark.parametrize(("finished", "state"), [(True, "finished"), (False, "interrupted")])
def test_state_of_the_run_is_there_for_late_clients(
    redis_url: str, tmp_path: Path, finished: bool, state: str
) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(1)
    with redis.Redis.from_url(redis_url, decode_responses=True) as raw, client(redis_url) as half:
        assert raw.hgetall("pilot:r:run") == {"term": "1", "state": "running"}
        leader.finish(finished)
        assert raw.hgetall("pilot:r:run") == {"term": "1", "state": state}
        assert 0 < raw.ttl("pilot:r:run") <= module.FINISHED_EXPIRY_S
        assert half.round_over() == state
        raw.hset("pilot:r:round", "phase", "open")  # as if that had never been written
        assert half.round_over() == state
        raw.hset("pilot:r:round", "term", "2")  # the run was taken up again
        with client(redis_url, term=2) as next_term:
            assert next_term.round_over() is None


# -- runs beside each other ----------------------------------------------------------------------


def test_keys_of_others_survive_and_two_runs_dont_see_each_other(
    redis_url: str, tmp_path: Path
) -> None:
    with redis.Redis.from_url(redis_url) as raw:
        foreign = {"r:round": "1", "pilot:rr:round": "2", "pilot": "3", "round": "4"}
        raw.mset(foreign)
        one, two = server(redis_url, tmp_path / "1"), server(redis_url, tmp_path / "2", run="s")
        one.open_round(1)
        two.open_round(1)
        one.end_round("x")
        with client(redis_url) as of_one, client(redis_url, run="s") as of_two:
            assert of_one.round_over() == "x" and of_two.round_over() is None
            of_two.send_heartbeat(Heartbeat(tokens=1), expiry_s=60)
        assert one.heartbeats(["c"]) == {} and list(two.heartbeats(["c"])) == ["c"]
        one.finish()
        two.tick()
        assert raw.get("pilot:s:server") is not None
        two.finish()
        assert {key: raw.get(key).decode() for key in foreign} == foreign
    own = re.compile(r"pilot:[rs]:(server|round|run|client:c)")
    assert all(own.fullmatch(key) for key in set(keys(redis_url)) - set(foreign))


def test_nothing_is_ever_flushed() -> None:
    for path in (ROOT / "pilot").rglob("*.py"):
        assert not re.search(r"(?i)flush(db|all)", path.read_text(encoding="utf-8")), path


def test_keys_of_a_finished_run_expire_and_its_lock_is_free(redis_url: str, tmp_path: Path) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(1)
    leader.finish()
    with redis.Redis.from_url(redis_url) as raw:
        assert raw.get("pilot:r:server") is None
        assert 0 < raw.ttl("pilot:r:round") <= module.FINISHED_EXPIRY_S
        assert all(raw.ttl(key) > 0 for key in raw.keys("pilot:*"))
    with client(redis_url) as half:
        assert half.round_over() == "interrupted", "clients that still train stop"
    again = server(redis_url, tmp_path / "elsewhere", term=2)
    again.open_round(2)
    with redis.Redis.from_url(redis_url) as raw:
        assert raw.ttl("pilot:r:round") == -1


# -- who leads -----------------------------------------------------------------------------------


def test_second_server_is_refused_and_the_first_goes_on(redis_url: str, tmp_path: Path) -> None:
    first = server(redis_url, tmp_path / "1")
    with pytest.raises(CoordinatorError) as caught:
        server(redis_url, tmp_path / "2")
    message = str(caught.value)
    assert "run r is already led" in message and str(os.getpid()) in message
    assert socket.gethostname() in message
    first.open_round(1)
    server(redis_url, tmp_path / "2", run="another")


def lead_and_die(url: str, run_dir: Path) -> None:
    server(url, run_dir).open_round(7)
    os._exit(9)


def test_lock_of_a_dead_server_of_the_same_directory_is_taken_over(
    redis_url: str, tmp_path: Path
) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=lead_and_die, args=(redis_url, tmp_path)
    )
    child.start()
    child.join(LIMIT_S)
    assert child.exitcode == 9
    with pytest.raises(CoordinatorError, match=f"process {child.pid}"):
        server(redis_url, tmp_path / "another directory")
    heir = server(redis_url, tmp_path, term=2)
    heir.open_round(8)
    with redis.Redis.from_url(redis_url, decode_responses=True) as raw:
        assert json.loads(raw.get("pilot:r:server") or "")["pid"] == os.getpid()


def test_lock_of_a_server_that_is_gone_expires(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SERVER_EXPIRY_S", 0.2)
    server(redis_url, tmp_path / "1")

    def takes_over() -> bool:
        try:
            server(redis_url, tmp_path / "2")
        except CoordinatorError:
            return False
        return True

    until(takes_over)


def test_server_that_lost_its_lock_to_another_stops_and_leaves_the_others_keys(
    redis_url: str, tmp_path: Path
) -> None:
    first = server(redis_url, tmp_path / "1")
    first.open_round(1)
    with redis.Redis.from_url(redis_url) as raw:
        raw.delete("pilot:r:server")  # it was stopped for longer than its lock lives
        second = server(redis_url, tmp_path / "2", term=5)
        second.open_round(9)
        for order in (
            first.tick,
            lambda: first.open_round(2),
            lambda: first.end_round("x"),
            lambda: first.stop_client("c", "x"),
            lambda: first.clear_client_stop("c"),
            lambda: first.acknowledge("c", Fence("r", 1, 1, 1)),
        ):
            with pytest.raises(CoordinatorError, match="another server has taken over run r"):
                order()
        first.finish()
        assert not raw.exists("pilot:r:stop:c", "pilot:r:ack:c")
        assert raw.hget("pilot:r:run", "state") == b"running"
        assert raw.hget("pilot:r:round", "round") == b"9"
        assert raw.hget("pilot:r:round", "phase") == b"open"
        assert raw.get("pilot:r:server") is not None
    second.tick()


# -- what anybody may have written ------------------------------------------------------------------


def test_junk_in_one_clients_keys_costs_that_client_only(redis_url: str, tmp_path: Path) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(1)
    with client(redis_url, name="good") as half, redis.Redis.from_url(redis_url) as raw:
        half.send_heartbeat(Heartbeat(state="training", step=2, tokens=64), expiry_s=60)
        raw.set("pilot:r:client:text", "no hash")
        values = {"term": "1", "round": "1", "beat": "x", "tokens": "9" * 4000, "loss": b"\xff\xfe"}
        raw.hset("pilot:r:client:odd", mapping=values | {"state": "y" * 1_000_000})  # type: ignore[arg-type]
        raw.set("pilot:r:stop:odd", b"\xff" + b"z" * 1_000_000)
        heard = leader.heartbeats(["text", "odd", "good"])
        assert not leader.failing
        assert heard["good"].heartbeat == Heartbeat(state="training", step=2, tokens=64)
        assert "text" not in heard
        assert heard["odd"].heartbeat == Heartbeat(state="y" * 38 + " …")
        assert len(leader.draining(["odd"])["odd"]) == 2000


@pytest.mark.parametrize("held", ["no JSON", "[1]", "7", "[" * 9999, "\ud7ff"])
def test_lock_that_holds_no_server_is_somebody_elses(
    redis_url: str, tmp_path: Path, held: str
) -> None:
    with redis.Redis.from_url(redis_url) as raw:
        raw.set("pilot:r:server", held)
    with pytest.raises(CoordinatorError, match="already led by process None on None"):
        server(redis_url, tmp_path)


@pytest.mark.parametrize("values", [{"term": "x"}, {"round": "1"}, {"term": "1", "round": "²"}])
def test_round_key_that_no_server_wrote_ends_no_round(
    redis_url: str, values: dict[str, str]
) -> None:
    with client(redis_url) as half, redis.Redis.from_url(redis_url) as raw:
        raw.hset("pilot:r:round", mapping=values | {"phase": "ended"})  # type: ignore[arg-type]
        assert half.round_over() is None and half.superseded() is None
