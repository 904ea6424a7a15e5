"""`pilot node` starts its SuperNode, and starts it again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from nanochat.common import get_base_dir
from pilot.errors import PilotError
from pilot.launch.connection import flower_environment
from pilot.launch.node import default_name, node_directory, supernode_options
from pilot.processes.scratch import free_port
from pilot.site import in_flight

from ...waiting import gone, until
from .node_kit import Site, end


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
