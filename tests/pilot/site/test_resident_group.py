"""Resident worker groups: the next ClientApp finds them, and they end when none can come any more."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

from pilot.coordination.coordinator import ServerCoordinator
from pilot.site.group_directory import GroupDirectory
from pilot.site.handle import SOCKET_NAME, WorkerHandle
from pilot.wire.frames import receive_frame, send_frame
from pilot.wire.messages import Fence, to_header

from ...waiting import family, gone, until
from ..worker_kit import ENDLESS, ROOT, ask, first_weights, lists, site_config, train_order
from .group_kit import SuperNode, hello


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
