"""Resident worker groups: the next ClientApp finds them, and they end when none can come any more."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pilot.config import RunConfig
from pilot.coordination.coordinator import ServerCoordinator
from pilot.site.group_directory import GroupDirectory, clear
from pilot.site.handle import SOCKET_NAME, WorkerHandle
from pilot.site.inner_state import inner_state_dir
from pilot.wire.codec import decode, encode
from pilot.wire.frames import receive_frame, send_frame
from pilot.wire.messages import Fence, HelloOrder, TrainOrder, to_header

from ...waiting import LIMIT_S, family, gone, until
from ..worker_kit import ENDLESS, ROOT, ask, first_weights, lists, site_config, train_order

# A ClientApp, which lives for one message as Flower's do; `--parent-pid` names its SuperNode.
CLIENTAPP = """
import socket, sys
from pilot.site.handle import WorkerHandle
from pilot.wire.codec import decode, encode
from pilot.wire.frames import receive_frame, send_frame
test = socket.socket(fileno=int(sys.argv[1]))
header, parts = receive_frame(test)
with WorkerHandle(
    processes=header.get("processes", 1), device="cpu", idle_s=float(sys.argv[2]), name="c"
) as worker:
    print(worker._pid, worker._dir, flush=True)
    answer = worker.ask(header, parts)
send_frame(test, *answer)
"""


@dataclass
class ClientApp:
    """A ClientApp, running or done: which group it uses, and what that answered."""

    process: "subprocess.Popen[str]"
    connection: socket.socket
    pid: int = field(init=False)  # of the group's supervisor
    group_dir: Path = field(init=False)

    def __post_init__(self) -> None:
        assert self.process.stdout is not None
        pid, group_dir = self.process.stdout.readline().split()
        self.pid, self.group_dir = int(pid), Path(group_dir)

    def answer(self) -> dict[str, Any]:
        return self.answer_and_update()[0]

    def answer_and_update(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        header, parts = receive_frame(self.connection)
        assert self.process.wait(LIMIT_S) == 0
        return header, decode(parts)


class SuperNode:
    """A process that does nothing and is named as the SuperNode of ClientApps."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(["sleep", "600"])
        self._directory, self._apps = directory, list[ClientApp]()

    def send(
        self,
        order: HelloOrder | TrainOrder,
        weights: dict[str, torch.Tensor] | None = None,
        *,
        idle_s: float = 600.0,
    ) -> ClientApp:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", CLIENTAPP, str(theirs.fileno()), str(idle_s)]
        with theirs:
            process = subprocess.Popen(
                [*command, "--parent-pid", str(self.process.pid)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PILOT_SCRATCH_DIR": str(self._directory)},
                pass_fds=[theirs.fileno()],
            )
        send_frame(ours, to_header(order), encode(weights or {}))
        self._apps.append(ClientApp(process, ours))
        return self._apps[-1]

    def close(self) -> None:
        for process in (self.process, *(app.process for app in self._apps)):
            process.kill()
            process.communicate()
        for app in self._apps:
            app.connection.close()
            with contextlib.suppress(psutil.NoSuchProcess):
                members = family(app.pid)
                until(lambda members=members: gone(members))  # type: ignore[misc]


@pytest.fixture
def supernode(tmp_path: Path) -> Iterator[SuperNode]:
    supernode = SuperNode(tmp_path)
    try:
        yield supernode
    finally:
        supernode.close()


def hello(site: Path) -> HelloOrder:
    return HelloOrder(run="r", config=site_config(site).to_mapping(), redis_url="")


@pytest.mark.parametrize("processes", [1, 2])
def test_next_order_goes_to_the_same_group_and_gives_what_a_new_group_would(
    site: Path, supernode: SuperNode, processes: int
) -> None:
    config = site_config(site)
    weights = first_weights(config)
    orders = [
        train_order(config, [[0, 0, 4, -1]], processes=processes, eval_end_row=12),
        train_order(config, [[0, 1, 0, -1]], processes=processes, fence=Fence("r", 1, 2, 2)),
    ]
    first = supernode.send(orders[0], weights)
    first.answer()
    second = supernode.send(orders[1], weights)
    answer, update = second.answer_and_update()
    assert first.pid == second.pid
    with WorkerHandle(processes=processes, device="cpu") as worker:
        reply, expected = ask(worker, orders[1], weights)
    assert answer["consumed"] == lists(reply.consumed) and answer["loss_nats"] == reply.loss_nats
    assert update.keys() == expected.keys()
    assert all(torch.equal(update[name], expected[name]) for name in expected)


def test_group_without_a_next_order_ends_and_leaves_no_directory(
    site: Path, supernode: SuperNode
) -> None:
    app = supernode.send(hello(site), idle_s=0.3)
    members = family(app.pid)
    app.answer()
    until(lambda: gone(members), limit_s=10.0)
    until(lambda: not app.group_dir.exists(), limit_s=10.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_group_that_died_between_two_orders_is_replaced_and_supernodes_death_ends_the_new_one(
    site: Path, supernode: SuperNode, number: signal.Signals
) -> None:
    first = supernode.send(hello(site))
    first.answer()
    members = family(first.pid)
    members[1].send_signal(number)  # rank 0, which waits for an order
    until(lambda: gone(members), limit_s=10.0)
    second = supernode.send(hello(site))
    assert second.answer()["error"] == "" and second.pid != first.pid
    # the one that waits now ends with the SuperNode
    members = family(second.pid)
    supernode.process.kill()
    supernode.process.wait()
    until(lambda: gone(members), limit_s=10.0)
    until(lambda: not second.group_dir.exists(), limit_s=10.0)


WHOLE_CLIENTAPP = """
import json, sys
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from pilot import client_app
from pilot.wire.records import to_records
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
message = Message(to_records(json.loads(sys.argv[1]), []), 1, "train")
context = Context(1, 1, {"name": "c"}, RecordDict(), {})
print("works", flush=True)
client_app.train(message, context)
"""


def test_clientapp_ends_with_its_supernode_in_mid_round_and_tries_to_reply_to_nobody(
    site: Path, supernode: SuperNode, redis_url: str, leader: ServerCoordinator
) -> None:
    order = train_order(site_config(site, round_steps=0), ENDLESS, redis_url=redis_url)
    command = [sys.executable, "-c", WHOLE_CLIENTAPP, json.dumps(to_header(order))]
    command += ["--parent-pid", str(supernode.process.pid)]
    env = {**os.environ, "PILOT_SCRATCH_DIR": str(site)}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "works\n"
        until(lambda: len(family(process.pid)) > 1)
        members = family(process.pid)
        supernode.process.kill()
        supernode.process.wait()
        until(lambda: gone(members), limit_s=10.0)
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "the SuperNode of this client is gone: ending" in errors


@pytest.mark.parametrize("orders_before", [0, 1])
def test_clientapps_death_in_mid_round_ends_the_group(
    site: Path,
    supernode: SuperNode,
    redis_url: str,
    leader: ServerCoordinator,
    orders_before: int,
) -> None:
    for _ in range(orders_before):
        supernode.send(hello(site)).answer()
    config = site_config(site, round_steps=0)
    order = train_order(config, ENDLESS, redis_url=redis_url)
    app = supernode.send(order, first_weights(config))
    until(lambda: any(h.heartbeat.tokens for h in leader.heartbeats(["c"]).values()))
    members = family(app.pid)
    app.process.kill()
    until(lambda: gone(members), limit_s=10.0)


def test_runs_last_order_ends_the_group(site: Path, supernode: SuperNode) -> None:
    config = site_config(site)
    app = supernode.send(
        train_order(config, [], run_is_over=True, eval_end_row=12), first_weights(config)
    )
    members = family(app.pid)
    assert app.answer()["eval_rows"] == 12
    until(lambda: gone(members), limit_s=10.0)


def test_group_that_is_drained_ends_with_its_reply(
    site: Path, supernode: SuperNode, redis_url: str, leader: ServerCoordinator
) -> None:
    config = site_config(site, round_steps=0)
    order = train_order(config, ENDLESS, redis_url=redis_url)
    app = supernode.send(order, first_weights(config))
    until(lambda: any(h.heartbeat.tokens for h in leader.heartbeats(["c"]).values()))
    members = family(app.pid)
    os.kill(app.pid, signal.SIGTERM)
    assert app.answer()["stopped_by"] == "SIGTERM"
    until(lambda: gone(members), limit_s=10.0)


def test_group_of_another_version_is_replaced(site: Path, supernode: SuperNode) -> None:
    facts = ("c", 1, "cpu")
    os.environ["PILOT_SCRATCH_DIR"] = str(supernode._directory)
    try:
        directory = GroupDirectory.acquire(psutil.Process(supernode.process.pid), *facts)
    finally:
        del os.environ["PILOT_SCRATCH_DIR"]
    assert directory is not None
    directory.release()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(directory.directory / SOCKET_NAME))
        listener.listen()

        def another() -> None:
            connection, _ = listener.accept()
            with connection:
                receive_frame(connection)
                send_frame(connection, {"package": "another", "supervisor": 1})

        other = threading.Thread(target=another)
        other.start()
        app = supernode.send(hello(site))
        assert app.answer()["error"] == "" and app.group_dir == directory.directory
        other.join()


def test_second_clientapp_at_a_time_gets_a_group_of_its_own(
    site: Path, supernode: SuperNode, redis_url: str, leader: ServerCoordinator
) -> None:
    config = site_config(site, round_steps=0)
    busy = supernode.send(train_order(config, ENDLESS, redis_url=redis_url), first_weights(config))
    other = supernode.send(hello(site))
    members = family(other.pid)
    assert other.answer()["error"] == "" and other.pid != busy.pid
    assert gone(members) and not other.group_dir.exists()
    leader.end_round("target-tokens")
    assert busy.answer()["error"] == ""


ACTOR = """
import os, sys, time
import ray._raylet
from pilot.site.handle import WorkerHandle
ray._raylet.setproctitle("ray::ClientAppActor.run")
for name in ("client_0", "client_1"):
    with WorkerHandle(device="cpu", idle_s=600.0, name=name) as worker:
        print(worker._pid, worker._dir, flush=True)
        assert not worker.ask(%s)[0]["error"]
time.sleep(600)
"""


def test_in_a_simulation_an_actor_keeps_one_group_for_its_clients_until_it_ends(
    site: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", ACTOR % repr(to_header(hello(site)))]
    env = {**os.environ, "PILOT_SCRATCH_DIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as actor:
        try:
            assert actor.stdout is not None
            first = actor.stdout.readline().split()
            members = family(int(first[0]))
            assert actor.stdout.readline().split() == first
            assert not gone(members)
        finally:
            actor.kill()
    until(lambda: gone(members), limit_s=10.0)
    until(lambda: not Path(first[1]).exists(), limit_s=10.0)


def test_without_a_supernode_no_group_is_resident(site: Path) -> None:
    with WorkerHandle(device="cpu", idle_s=60.0) as worker:
        worker.ask(to_header(hello(site)))
        members = family(worker._pid)
    assert gone(members)


# -- directories ---------------------------------------------------------------------------------


def test_directory_admits_one_clientapp_at_a_time_and_is_not_removed_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_SCRATCH_DIR", str(tmp_path))
    me = psutil.Process()
    directory = GroupDirectory.acquire(me, "a", 1)
    assert directory is not None and GroupDirectory.acquire(me, "a", 1) is None
    other = GroupDirectory.acquire(me, "b", 1)
    assert other is not None and other.directory != directory.directory
    clear(directory.directory)
    assert directory.directory.exists()
    directory.release()
    clear(directory.directory)
    assert not directory.directory.exists()
    again = GroupDirectory.acquire(me, "a", 1)
    assert again is not None and again.directory == directory.directory
    again.release()


def test_directory_that_others_may_enter_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_SCRATCH_DIR", str(tmp_path))
    me = psutil.Process()
    directory = GroupDirectory.acquire(me, "a")
    assert directory is not None
    directory.release()
    directory.directory.chmod(0o755)
    assert GroupDirectory.acquire(me, "a") is None


# -- the reply first -----------------------------------------------------------------------------

# Ranks that hold back the inner optimizer's state until a file appears
HELD_BACK = """
import os, time
from pathlib import Path
if "PILOT_RANK" in os.environ:
    from pilot.site import inner_state
    save = inner_state.save_file
    def held_back(*given):
        while not Path(os.environ["STATE_MAY_BE_WRITTEN"]).exists():
            time.sleep(0.01)
        save(*given)
    inner_state.save_file = held_back
"""


@dataclass
class HeldBack:
    """A client with two ranks that trains until `notice` appears; `written` lets it write its state."""

    supernode: SuperNode
    leader: ServerCoordinator
    order: TrainOrder
    weights: dict[str, torch.Tensor]
    notice: Path
    written: Path

    @property
    def states(self) -> list[str]:
        directory = inner_state_dir("r", self.order.client)
        return sorted(path.name for path in directory.glob("*")) if directory.exists() else []

    def leaves(self) -> ClientApp:
        """The ClientApp of a client that was told to leave in its round and has replied."""
        app = self.supernode.send(self.order, self.weights)
        names = [self.order.client]
        until(lambda: any(h.heartbeat.tokens for h in self.leader.heartbeats(names).values()))
        self.notice.touch()
        reply, update = app.answer_and_update()
        assert reply["stopped_by"] == f"preempt-file {self.notice}" and not reply.get("error")
        assert reply["tokens"] > 0 and update and self.states == [], "the reply came first"
        return app


@pytest.fixture
def held_back(
    supernode: SuperNode,
    site: Path,
    redis_url: str,
    leader: ServerCoordinator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> HeldBack:
    (tmp_path / "sitecustomize.py").write_text(HELD_BACK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    written, notice = tmp_path / "may-be-written", tmp_path / "notice"
    monkeypatch.setenv("STATE_MAY_BE_WRITTEN", str(written))
    config = site_config(site, round_steps=0, preempt_file=str(notice), drain_deadline=60.0)
    order = train_order(config, ENDLESS, processes=2, redis_url=redis_url, client=tmp_path.name)
    return HeldBack(supernode, leader, order, first_weights(config), notice, written)


def test_client_that_is_leaving_replies_first_and_writes_its_inner_state_afterwards(
    held_back: HeldBack,
) -> None:
    app = held_back.leaves()
    members = family(app.pid)
    assert len(members) == 3, "its ranks are still there: they have something to write"
    held_back.written.touch()
    until(lambda: gone(members))
    assert held_back.states == ["1-1-1.rank0of2.safetensors", "1-1-1.rank1of2.safetensors"]


def test_crash_before_the_state_is_written_costs_the_state_and_not_the_next_round(
    held_back: HeldBack,
) -> None:
    app = held_back.leaves()
    members = family(app.pid)
    psutil.Process(app.pid).kill()
    until(lambda: gone(members))
    assert held_back.states == []
    held_back.notice.unlink()
    held_back.written.touch()
    order = held_back.order
    config = RunConfig.from_mapping({**order.config, "round-steps": 1})
    again = replace(
        order,
        config=config.to_mapping(),
        fence=Fence("r", 1, 2, 2),
        last_merged_fence=order.fence,
        redis_url="",
    )
    reply = held_back.supernode.send(again, held_back.weights).answer()
    assert (reply["steps"], reply.get("error", "")) == (1, "")
    states = ["1-2-2.rank0of2.safetensors", "1-2-2.rank1of2.safetensors"]
    until(lambda: held_back.states == states)
