"""A SuperNode and a SuperLink that is started again."""

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.supercore.retry import http_retry, make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection

from benchmarks.chaos.processes import BIN, end_group, environment, listening
from pilot.launch import rejoin
from pilot.processes.scratch import free_port

from ...waiting import until


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What connections of this process say; afterwards they are Flower's again."""
    said: list[str] = []
    for name in ("FleetHttpClient", "Node"):
        monkeypatch.setitem(vars(fleet_http_connection), name, vars(fleet_http_connection)[name])
    monkeypatch.setitem(vars(http_retry), "MAX_RETRY_DELAY", http_retry.MAX_RETRY_DELAY)
    rejoin.install(fleet_http_connection, say=said.append)
    return said


class SuperLink:
    def __init__(self, directory: Path) -> None:
        self.port, self._env = free_port(), environment(directory, directory)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [str(BIN / "flower-superlink"), "--insecure", "--port", str(self.port)]
        command += ["--isolation", "process"]
        null = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, env=self._env, stdout=null, stderr=null, start_new_session=True
        )
        until(lambda: listening(self.port), 60, "the SuperLink")

    def kill(self) -> None:
        if self._process is not None:
            end_group(self._process)


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[SuperLink]:
    superlink = SuperLink(tmp_path)
    try:
        superlink.start()
        yield superlink
    finally:
        superlink.kill()


def test_a_node_registers_again_with_a_superlink_that_was_started_again(
    superlink: SuperLink, lasting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []  # how Flower's SuperNode would end itself
    monkeypatch.setattr(os, "kill", lambda _pid, signum: ended.append(signum))
    monkeypatch.setattr(http_retry, "FORCE_EXIT_TIMEOUT_SECONDS", -1)
    address = f"127.0.0.1:{superlink.port}"
    answers: list[object] = []
    # which swallows whatever is raised inside, failed assertions as well
    with fleet_http_connection.http_request_response(address, True) as (first, receive, *_):
        answers += [receive(), list(lasting)]
        superlink.kill()
        superlink.start()
        answers += [receive(), list(lasting), receive(), list(lasting)]
    assert answers[:2] == [None, []]
    (line,) = lasting
    assert answers[2:] == [None, [line], None, [line]] and ended == []
    assert line.startswith("The SuperLink was started again: this node is now ")
    assert int(line.rpartition(" ")[2]) != first


def test_flower_waits_for_a_superlink_that_is_away_three_seconds_at_most(
    lasting: list[str],
) -> None:
    pauses = make_simple_http_retry_invoker().wait_gen_factory()
    assert list(itertools.islice(pauses, 5)) == [1, 2, 3, 3, 3]
