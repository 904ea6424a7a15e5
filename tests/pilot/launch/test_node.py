"""`pilot node`: it restarts its SuperNode, and leaves when the server has its reply, not before."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanochat.common import get_base_dir
from pilot.coordination.coordinator import ServerCoordinator
from pilot.errors import PilotError
from pilot.launch import node
from pilot.launch.connection import flower_environment
from pilot.launch.node import NodeOptions, default_name, node_directory, supernode_options
from pilot.processes.scratch import free_port
from pilot.site import in_flight
from pilot.site.in_flight import InFlight
from pilot.wire.messages import Fence

from ...waiting import LIMIT_S, gone, until

# It writes its arguments and its end to $FAKE_LOG, and fails at its first $FAKE_FAILS starts.
SUPERNODE = """#!{python}
import json, os, signal, sys, time
log = os.environ["FAKE_LOG"]
def tell(**values):
    with open(log, "a") as file:
        file.write(json.dumps(values) + "\\n")
def ends(*_):
    tell(ended=os.getpid(), leave=os.path.exists(os.environ["PILOT_NODE_DIR"] + "/leave"))
    sys.exit(0)
signal.signal(signal.SIGTERM, ends)
before = open(log).read().count("argv")
tell(argv=sys.argv[1:], pid=os.getpid(), preempt=os.environ.get("PILOT_PREEMPT_FILE"))
if before < int(os.environ.get("FAKE_FAILS", "0")):
    sys.exit(int(os.environ.get("FAKE_CODE", "1")))
while True:
    time.sleep(0.05)
"""
RUNNER = """
import os, sys
from pilot import cli
from pilot.launch import node
node.supernode.install = lambda directory: sys.argv[1]
node.FIRST_DELAY_S, node.BLIND_UPLOAD_S, node.MAX_RESTARTS = 0.05, 0.3, 3
node.LOST_S = 0.3
node.FROZEN_S = float(os.environ.get("FAKE_FROZEN_S", node.FROZEN_S))
sys.exit(cli.main(["node", "--name", "a", *sys.argv[2:]]))
"""


class Site:
    """A machine with a `pilot node`, whose SuperNode is a script."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = base / "nodes" / "a"
        self.log, self.program = base / "log", base / "supernode"
        self.log.touch()
        self.program.write_text(SUPERNODE.format(python=sys.executable))
        self.program.chmod(0o755)
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
        monkeypatch.setenv("FAKE_LOG", str(self.log))
        self._monkeypatch = monkeypatch

    @contextmanager
    def node(self, *options: str, starts: bool = True) -> Iterator["subprocess.Popen[str]"]:
        command = [sys.executable, "-c", RUNNER, str(self.program), *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            if starts:
                before = len(self.logged("argv"))
                until(lambda: len(self.logged("argv")) > before or process.poll() is not None)
            yield process
        finally:
            process.kill()
            process.communicate()

    def logged(self, key: str) -> list[Any]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line[key] for line in lines if key in line]

    def has_order(self, state: str, url: str = "", lease: int = 1, **values: Any) -> None:
        """A ClientApp in this process works on an order."""
        defaults: dict[str, Any] = {
            "run": "r",
            "redis_url": url,
            "client": "a",
            "fence": Fence("r", 1, 1, lease),
            "state": state,
            "pid": os.getpid(),
            "preempt_file": "",
            "drain_deadline_s": 20.0,
        }
        with self._monkeypatch.context() as patch:
            patch.setenv("PILOT_NODE_DIR", str(self.directory))
            in_flight.write(InFlight(**(defaults | values)))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """(exit code, what it said) of a node that ends by itself."""
    said = process.communicate(timeout=LIMIT_S)[1]
    return process.returncode, said


# -- starting ------------------------------------------------------------------------------------


def test_name_and_a_free_port_are_added_to_the_supernodes_own_options() -> None:
    options = supernode_options("a", ["--insecure", "--superlink", "h:1", "--port", "7"])
    assert options[:4] == ["--insecure", "--superlink", "h:1", "--port"]
    assert options[4:] == ["7", "--node-config", 'name="a"']
    one, two = (int(supernode_options("a", [])[1]) for _ in range(2))
    assert 1024 < one < 65536 and 1024 < two < 65536
    for config in (["--node-config", "k=1 l='x y'"], ["--node-config=k=1 l='x y'"]):
        assert supernode_options("a", [*config, "--port=7"])[-1] == "k=1 l='x y' name=\"a\""
    assert supernode_options("a", ["--node-config", "name='a' k=1"])[-1] == "name='a' k=1"
    for config in ("name='b'", 'k=1 name="b"', "node.toml"):
        with pytest.raises(PilotError):
            supernode_options("a", ["--node-config", config])
    assert default_name()


def test_rows_per_device_are_added_to_the_node_configuration() -> None:
    assert supernode_options("a", [], 16)[-1] == 'name="a" device-batch-size=16'
    for given in (None, 8):
        config = supernode_options("a", ["--node-config", "device-batch-size=8"], given)[-1]
        assert config == 'device-batch-size=8 name="a"'
    for configured, given in (
        ("", -1),
        ("device-batch-size=8", 16),
        ("device-batch-size='8'", None),
    ):
        with pytest.raises(PilotError, match="device-batch-size"):
            supernode_options("a", ["--node-config", configured], given)


@pytest.mark.parametrize("base", ["", "~/elsewhere", "here"])
def test_node_and_its_workers_agree_on_the_base_directory(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", base)
    monkeypatch.chdir(tmp_path)
    directory = node_directory("a")
    assert directory == get_base_dir() / "nodes" / "a"
    # Flower's processes, of which some have another working directory
    monkeypatch.setattr(os, "environ", flower_environment())
    monkeypatch.chdir("/")
    assert node_directory("a") == directory


def test_supernode_that_exits_is_restarted_with_one_line_each_time(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "2")
    with site.node("--preempt-file", "/no/notice", "--insecure", "--superlink", "h:1") as process:
        until(lambda: len(site.logged("argv")) == 3)
        process.terminate()
        code, said = end(process)
    assert code == 0 and len(site.logged("ended")) == 1
    assert site.logged("argv")[2][:3] == ["--insecure", "--superlink", "h:1"]
    assert site.logged("preempt") == ["/no/notice"] * 3
    assert said.count("exited with code 1") == 2 and "restarting in 0.1 s" in said


@pytest.mark.parametrize(("exit_code", "attempts"), [("2", 1), ("1", 4)])
def test_supernode_that_never_stays_is_given_up(
    site: Site, monkeypatch: pytest.MonkeyPatch, exit_code: str, attempts: int
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "99")
    monkeypatch.setenv("FAKE_CODE", exit_code)
    with site.node() as process:
        code, said = end(process)
    assert code == 2 and said.splitlines()[-1].startswith("error: flower-supernode exited")
    assert len(site.logged("argv")) == attempts


def test_supernode_that_does_not_see_its_clientapps_death_is_restarted(site: Site) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    with site.node() as process:
        site.has_order(
            in_flight.SENDING, pid=dead.pid
        )  # it has replied: its end is as it should be
        time.sleep(0.5)
        assert len(site.logged("argv")) == 1
        site.has_order(in_flight.WORKING, pid=dead.pid)
        until(lambda: len(site.logged("argv")) == 2)
        assert site.logged("ended") == site.logged("pid")[:1], "it said goodbye"
        site.has_order(in_flight.WORKING)
        time.sleep(0.5)
        assert len(site.logged("argv")) == 2
        process.kill()


def test_the_order_of_a_supernode_that_was_killed_is_forgotten_with_it(site: Site) -> None:
    with site.node() as process:
        site.has_order(in_flight.WORKING)
        os.kill(site.logged("pid")[0], signal.SIGKILL)
        until(lambda: len(site.logged("argv")) == 2)
        assert in_flight.read(site.directory) is None
        process.kill()


def test_supernode_of_a_node_that_stood_still_is_restarted_at_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FROZEN_S", "1.0")
    with site.node() as node:
        (first,) = site.logged("pid")
        site.has_order(in_flight.WORKING)
        node.send_signal(signal.SIGSTOP)
        time.sleep(1.5)  # what it must notice is the time itself
        node.send_signal(signal.SIGCONT)
        until(lambda: len(site.logged("pid")) > 1)
        assert site.logged("ended") == [first]
        assert in_flight.read(site.directory) is None, "the server has given that order up"
        node.terminate()
        _, said = end(node)
    assert "pilot node a: this node stood still for " in said and "restarting the SuperNode" in said


def test_second_node_of_a_name_is_refused(site: Site) -> None:
    with site.node() as first:
        with site.node(starts=False) as second:
            code, said = end(second)
        assert code == 2 and "already runs on this machine" in said and said.count("\n") == 1
        assert first.poll() is None and len(site.logged("argv")) == 1
        first.terminate()
        assert end(first)[0] == 0


def test_redis_that_is_not_there_is_one_sentence_and_no_reason_not_to_start(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_REDIS_URL", f"redis://:hunter2@127.0.0.1:{free_port()}")
    with site.node() as process:
        process.terminate()
        code, said = end(process)
    assert code == 0 and said.count("cannot reach Redis") == 1 and "hunter2" not in said


def test_supernode_ends_with_its_node_however_that_ends(site: Site) -> None:
    with site.node() as process:
        supernode = psutil.Process(site.logged("pid")[0])
        process.kill()
    until(lambda: gone([supernode]))


# -- leaving -------------------------------------------------------------------------------------


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
