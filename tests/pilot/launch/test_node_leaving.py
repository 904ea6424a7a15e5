"""`pilot node` leaves when the server has its reply, not before."""

import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pilot.coordination.coordinator import ServerCoordinator
from pilot.launch import node
from pilot.launch.node import NodeOptions
from pilot.site import in_flight
from pilot.site.in_flight import InFlight
from pilot.wire.messages import Fence

from ...waiting import until
from .node_kit import Site, end


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_node_without_an_order_ends_at_once(site: Site, signum: signal.Signals) -> None:
    with site.node() as process:
        process.send_signal(signum)
        code, said = end(process)
    assert code == 0 and "no order in progress" in said and signum.name in said
    assert site.logged("leave") == [True], "what starts meanwhile takes no work"
    assert sorted(path.name for path in site.directory.iterdir()) == ["lock", "programs"]


def test_node_waits_until_its_reply_is_acknowledged(
    site: Site, redis_url: str, leader: ServerCoordinator
) -> None:
    with site.node() as process:
        site.has_order("working", redis_url)
        process.terminate()
        until(lambda: leader.draining(["a"]) == {"a": "pilot node: SIGTERM"})
        assert (site.directory / "leave").exists()
        leader.acknowledge("a", Fence("r", 1, 1, 7))  # another's
        site.has_order("sending", redis_url)
        leader.end_round("min-duration")
        time.sleep(0.7)
        assert process.poll() is None and site.logged("ended") == []
        leader.acknowledge("a", Fence("r", 1, 1, 1))
        code, said = end(process)
    assert code == 0 and "the server has our last reply on disk" in said
    assert len(site.logged("ended")) == 1
    assert leader.draining(["a"]) == {}, "it may come back"


def test_order_that_came_with_the_notice_is_waited_for_too(
    site: Site, redis_url: str, leader: ServerCoordinator
) -> None:
    with site.node() as process:
        site.has_order("sending", redis_url)
        process.terminate()
        until(lambda: leader.draining(["a"]))
        second = Fence("r", 1, 2, 2)
        site.has_order("sending", redis_url, fence=second)
        leader.open_round(2)
        time.sleep(1.2)
        assert process.poll() is None and site.logged("ended") == [], "it took it for the first"
        leader.acknowledge("a", second)
        assert end(process)[0] == 0


@pytest.mark.parametrize("how", ["a later round", "interrupted", "done", "ClientApp"])
def test_node_doesnt_wait_for_what_will_not_come(
    how: str, site: Site, redis_url: str, leader: ServerCoordinator
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with site.node() as process:
        site.has_order("working", redis_url)
        process.terminate()
        until(lambda: leader.draining(["a"]))
        if how == "a later round":
            leader.open_round(2)
        elif how == "interrupted":
            leader.finish()
        elif how == "done":
            site.has_order("done", redis_url)
        else:
            site.has_order("working", redis_url, pid=gone.pid)
        code, said = end(process)
    assert code == 0 and (how in said or (how == "done" and "no order in progress" in said))


def test_a_clientapp_that_ends_while_it_is_looked_at_has_said_that_its_reply_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_NODE_DIR", str(tmp_path))
    at_work = InFlight(
        run="r",
        redis_url="",
        client="a",
        fence=Fence("r", 1, 1, 1),
        preempt_file="",
        drain_deadline_s=20.0,
        state=in_flight.WORKING,
        pid=1,
    )
    in_flight.write(at_work)

    def ends_meanwhile(pid: int) -> bool:
        in_flight.write(replace(at_work, state=in_flight.SENDING))
        return False

    monkeypatch.setattr(node, "alive", ends_meanwhile)
    leaving = node._Node(NodeOptions(name="a"), tmp_path, [], print)
    assert leaving._why_done(at_work, None, "a reason") == ""
    monkeypatch.setattr(node, "alive", lambda pid: False)
    in_flight.write(at_work)
    assert "is gone" in leaving._why_done(at_work, None, "a reason")


@pytest.mark.parametrize("how", ["limit", "second signal"])
def test_node_waits_no_longer_than_it_may(
    how: str, site: Site, redis_url: str, leader: ServerCoordinator
) -> None:
    options = ["--leave-within", "0.5"] if how == "limit" else []
    with site.node(*options) as process:
        site.has_order("sending", redis_url)
        process.terminate()
        if how == "second signal":
            until(lambda: leader.draining(["a"]))
            process.send_signal(signal.SIGINT)
        code, said = end(process)
    assert code == (0 if how == "limit" else 130) and "no confirmation" in said
    assert len(site.logged("ended")) == 1


@pytest.mark.parametrize(("upload_s", "limit_s"), [(0.0, 80), (12.0, 80), (150.0, 320)])
def test_time_for_the_upload_follows_the_last_one_that_was_measured(
    upload_s: float, limit_s: int, site: Site, redis_url: str, leader: ServerCoordinator
) -> None:
    with site.node() as process:
        site.has_order("sending", redis_url, upload_s=upload_s)
        process.terminate()
        until(lambda: leader.draining(["a"]))
        process.send_signal(signal.SIGINT)
        _, said = end(process)
    assert f"waiting up to {limit_s} s for the server" in said


def test_without_redis_it_waits_for_the_clientapp_and_a_moment_for_the_upload(site: Site) -> None:
    client = subprocess.Popen(["sleep", "60"])
    try:
        with site.node() as process:
            site.has_order("sending", "unix:///no.sock", pid=client.pid)
            process.terminate()
            time.sleep(0.7)
            assert process.poll() is None
            client.kill()
            threading.Thread(target=client.wait).start()  # as its SuperExec would
            code, said = end(process)
        assert code == 0 and "Redis unreachable" in said
    finally:
        client.kill()
        client.wait()


@pytest.mark.parametrize("whose", ["option", "variable", "run"])
def test_preemption_notice_makes_it_leave(
    whose: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notice = tmp_path / "notice"
    if whose == "variable":
        monkeypatch.setenv("PILOT_PREEMPT_FILE", str(notice))
    with site.node(*(["--preempt-file", str(notice)] if whose == "option" else [])) as process:
        site.has_order("done", preempt_file=str(notice) if whose == "run" else "")
        time.sleep(0.3)
        assert process.poll() is None
        notice.touch()
        code, said = end(process)
    assert code == 0 and f"preempt-file {notice}" in said


def test_node_that_comes_back_takes_its_own_stop_away_but_no_others(
    site: Site, redis_url: str, leader: ServerCoordinator
) -> None:
    with site.node() as process:
        site.has_order("sending", redis_url)
        process.terminate()
        until(lambda: leader.draining(["a"]))
        process.kill()
    until(lambda: len(site.logged("ended")) == 1)
    assert leader.draining(["a"]) and (site.directory / "leave").exists()
    with site.node() as process:
        assert leader.draining(["a"]) == {} and not (site.directory / "leave").exists()
        leader.stop_client("a", "maintenance")
        site.has_order("done", redis_url)
        process.terminate()
        assert end(process)[0] == 0
    assert leader.draining(["a"]) == {"a": "maintenance"}
