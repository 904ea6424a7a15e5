"""What a client's Redis user may do is what docs/protocol.md lists, on a real server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from pilot.coordination.coordinator import ClientCoordinator, ServerCoordinator, ping
from pilot.coordination.link import CoordinatorError, check_run, connect
from pilot.fleet.redis_users import SERVER, new_password, password_hash, user_of
from pilot.wire.messages import Fence, Heartbeat

from .redis_kit import FleetRedis, fleet_redis

PASSWORD = new_password()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetRedis]:
    with fleet_redis(tmp_path_factory.mktemp("redis")) as started:
        hashes = {"a": password_hash(PASSWORD), "b": password_hash("another")}
        started.admin.let_in(hashes, changed=hashes)
        yield started


def test_a_client_and_a_server_work_as_ever(
    server: FleetRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leader = ServerCoordinator(server.url(SERVER), "works", term=1, run_dir=tmp_path)
    leader.open_round(1)
    url = server.url(user_of("a"), PASSWORD)
    check_run(url, "works")
    half = ClientCoordinator(url, "works", client="a", term=1, round_number=1)
    assert half.round_over() is None and not half.failing
    half.send_heartbeat(Heartbeat(state="training", step=3, tokens=96), expiry_s=20)
    assert leader.heartbeats(["a"])["a"].heartbeat.tokens == 96
    half.wait(0.01)  # subscribes
    leader.end_round("min-duration")
    half.wait(20)
    assert half.round_over() == "min-duration"
    fence = Fence("works", 1, 1, 1)
    leader.acknowledge("a", fence)
    assert half.acknowledged(fence)
    half.announce_leave("maintenance", expiry_s=60)
    assert leader.draining(["a"]) == {"a": "leaving: maintenance"}
    half.clear_stop("something else")
    assert leader.draining(["a"])
    half.clear_stop("leaving: ")
    assert leader.draining(["a"]) == {}
    assert not half.failing and "unavailable" not in caplog.text
    half.close()
    leader.finish()


@pytest.mark.parametrize(
    "command",
    [
        ("HSET", "pilot:r:round", "phase", "ended"),
        ("HSET", "pilot:r:run", "state", "finished"),
        ("SET", "pilot:r:server", "me"),
        ("DEL", "pilot:r:server"),
        ("SET", "pilot:r:ack:a", "{}"),
        ("SET", "pilot:r:stop:b", "go away"),
        ("HSET", "pilot:r:client:b", "tokens", "1"),
        ("HGETALL", "pilot:r:client:b"),
        ("SET", "other", "1"),
        ("EVAL", "while true do end", "0"),
        ("PUBLISH", "pilot:r:signals", "x"),
        ("SUBSCRIBE", "others"),
        ("KEYS", "*"),
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("ACL", "WHOAMI"),
        ("SHUTDOWN",),
    ],
    ids=" ".join,
)
def test_a_client_is_refused_what_is_not_its_own(
    server: FleetRedis, command: tuple[str, ...]
) -> None:
    with connect(server.url(user_of("a"), PASSWORD)) as client:
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command)


def test_the_server_is_kept_to_runs_and_cannot_end_redis(server: FleetRedis) -> None:
    with connect(server.url(SERVER)) as client:
        assert client.set("pilot:r:x", "1") and client.info()["maxmemory"] > 0
        for command in (("SET", "x", "1"), ("FLUSHALL",), ("SHUTDOWN",), ("ACL", "LIST")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)


def test_strangers_and_those_shut_out_are_refused(server: FleetRedis) -> None:
    for url in (
        f"redis://127.0.0.1:{server.port}/0",
        server.url("default", "nothing"),
        server.url(user_of("a"), "guessed"),
    ):
        with pytest.raises(CoordinatorError):
            ping(url)
    hashes = {"a": password_hash(PASSWORD), "gone": password_hash("was here")}
    server.admin.let_in(hashes, changed=["gone"])
    ping(server.url(user_of("gone"), "was here"))
    server.admin.let_in({"a": hashes["a"]}, changed=[])
    with pytest.raises(CoordinatorError):
        ping(server.url(user_of("gone"), "was here"))
    ping(server.url(user_of("a"), PASSWORD))
