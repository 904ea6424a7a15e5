"""A SuperNode of `pilot node`: how long it sleeps, and what it does when its ClientApp is gone."""

import inspect
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode, Status
from flwr.supercore.constant import TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from pilot.launch import supernode, warm
from pilot.site import in_flight
from pilot.site.in_flight import InFlight
from pilot.wire.messages import Fence


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Sleeps on a clock that only they move; `slept.append` lets other time pass."""
    passed: list[float] = []
    monkeypatch.setattr(supernode.time, "monotonic", lambda: 100.0 + sum(passed))
    monkeypatch.setattr(supernode.time, "sleep", passed.append)
    return passed


def test_it_is_eager_for_a_while_after_a_message_and_patient_afterwards(
    slept: list[float],
) -> None:
    pace = supernode.Pace()
    for _ in range(45):
        pace.sleep(3)
    assert slept == [0.5] * 40 + [3] * 5
    pace.sleep(0.5)  # waiting for the reply to a message
    assert slept[-1] == 0.2
    slept.append(7.0)
    pace.sleep(3)
    assert slept[-1] == 0.5
    for _ in range(60):
        pace.sleep(3)
    assert slept[-15:] == [3] * 15


def test_flowers_loop_sleeps_as_it_is_expected_to() -> None:
    source = inspect.getsource(start_client_internal)
    assert set(re.findall(r"\btime\.\w+\([^)]*\)", source)) == {"time.sleep(3)", "time.sleep(0.5)"}


@pytest.fixture
def state() -> InMemoryNodeState:
    """Flower's state of a node whose ClientApp has taken the one message and works on it."""
    state = untaken()
    assert len(state.get_messages_legacy(is_reply=False)) == 1
    state.record_message_processing_start("an order")
    return state


def untaken() -> InMemoryNodeState:
    """The same, an instant before: the ClientApp runs, and has not taken the message."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    state = InMemoryNodeState(ObjectStoreFactory().store())
    state.set_node_id(1)
    message = Message(RecordDict(), 1, "train")
    message.metadata.__dict__["_message_id"] = "an order"
    state.store_message(message)
    task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=message.metadata.run_id)
    assert task is not None and state.claim_task(task) and state.activate_task(task)
    return state


def works_on_an_order(pid: int) -> None:
    order: dict[str, Any] = {
        "run": "r",
        "redis_url": "",
        "client": "a",
        "fence": Fence("r", 1, 1, 1),
    }
    rest: dict[str, Any] = {"preempt_file": "", "drain_deadline_s": 20.0}
    in_flight.write(InFlight(**order, **rest, state=in_flight.WORKING, pid=pid))


def test_a_clientapp_that_dies_at_work_has_its_order_answered_at_once(
    state: InMemoryNodeState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_NODE_DIR", str(tmp_path))
    clientapp = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    works_on_an_order(clientapp.pid)
    os.utime(tmp_path / in_flight.FILE_NAME, (0, 0))
    replies: list[list[Message]] = []

    def push(*, state: InMemoryNodeState, store: str) -> None:  # as Flower's, but for the waiting
        assert store == "a store"

        def wait() -> None:
            lost.look()
            replies.append(list(state.get_messages_legacy(is_reply=True)))

        clientapp.kill()
        clientapp.wait()
        wait()  # the file is of an earlier message
        works_on_an_order(os.getpid())
        wait()
        works_on_an_order(clientapp.pid)
        wait()

    lost = supernode.LostClientApp(tmp_path)
    assert lost.noted(lambda **given: given)(store="a store") == {"store": "a store"}
    lost.watched(push)(state=state, store="a store")
    assert replies[:2] == [[], []]
    (reply,) = replies[2]
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert reply.metadata.reply_to_message_id == "an order"
    assert in_flight.read(tmp_path) is None
    works_on_an_order(clientapp.pid)
    lost.look()
    assert in_flight.read(tmp_path) is not None, "nothing is waited for any more"


def test_a_clientapp_that_dies_before_it_says_anything_has_its_message_answered_at_once(
    state: InMemoryNodeState, tmp_path: Path
) -> None:
    clientapp = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    last = tmp_path / warm.LAST_CLIENTAPP
    last.write_text("1")
    os.utime(last, (0, 0))
    replies: list[list[Message]] = []

    def push(*, state: InMemoryNodeState) -> None:
        def wait() -> None:
            lost.look()
            replies.append(list(state.get_messages_legacy(is_reply=True)))

        wait()  # the file is of an earlier message
        last.write_text(str(clientapp.pid))
        wait()
        clientapp.kill()
        clientapp.wait()
        wait()

    lost = supernode.LostClientApp(tmp_path)
    lost.noted(lambda: None)()
    lost.watched(push)(state=state)
    assert replies[:2] == [[], []]
    (reply,) = replies[2]
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert not last.exists()


@pytest.mark.parametrize("seen", [True, False])
def test_a_clientapp_that_dies_before_it_takes_its_message_has_that_answered_at_once(
    tmp_path: Path, seen: bool
) -> None:
    """Flower finishes its task, and waits for a reply for ever. `seen`: the node saw the death first."""
    state = untaken()
    lost = supernode.LostClientApp(tmp_path)
    lost.noted(lambda: None)()
    (tmp_path / warm.LAST_CLIENTAPP).write_text(str(2**22 + 1) if seen else str(os.getpid()))
    replies: list[list[Message]] = []

    def push(*, state: InMemoryNodeState) -> None:
        if not seen:
            lost.look()
            assert state.get_messages_legacy(is_reply=True) == [], "its task still runs"
            for record in state.task_token_store.values():
                record.active_until -= timedelta(days=1)
        lost.look()
        replies.append(list(state.get_messages_legacy(is_reply=True)))
        lost.look()
        replies.append(list(state.get_messages_legacy(is_reply=True)))

    lost.watched(push)(state=state)
    (reply,) = replies[0]
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert reply.metadata.reply_to_message_id == "an order"
    assert replies[1] == [], "answered once"


def test_a_clientapp_of_an_earlier_message_that_dies_late_is_not_the_one_at_work(
    state: InMemoryNodeState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_NODE_DIR", str(tmp_path))
    lost = supernode.LostClientApp(tmp_path)
    lost.noted(lambda: None)()
    (tmp_path / warm.LAST_CLIENTAPP).write_text(str(os.getpid()))
    works_on_an_order(2**22 + 1)
    lost.watched(lambda *, state: lost.look())(state=state)
    assert state.get_messages_legacy(is_reply=True) == []


def test_a_clientapp_that_dies_as_it_starts_is_started_again(tmp_path: Path) -> None:
    state = untaken()
    (task,) = state.task_store.values()
    task.status.status = Status.STARTING
    lost = supernode.LostClientApp(tmp_path)
    lost.noted(lambda: None)()
    (tmp_path / warm.LAST_CLIENTAPP).write_text(str(2**22 + 1))
    lost.watched(lambda *, state: lost.look())(state=state)
    assert task.status.status == Status.PENDING
    assert state.get_messages_legacy(is_reply=True) == []
    assert len(state.get_messages_legacy(is_reply=False)) == 1, "for the next one"


def test_flowers_loop_waits_for_a_reply_as_it_is_expected_to() -> None:
    called = re.search(
        r"\n( +)_push_messages\((.*?)\n\1\)", inspect.getsource(start_client_internal), re.S
    )
    assert called is not None and "state=state," in called[2]


def test_flowers_loop_takes_a_message_as_it_is_expected_to() -> None:
    source = inspect.getsource(start_client_internal)
    called = re.search(r"run_id = _pull_and_store_message\((.*?)\n +\)", source, re.S)
    assert called is not None and all("=" in word for word in called[1].split(",")[:-1])
