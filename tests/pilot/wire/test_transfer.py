"""What stands in for two functions of Flower's does what they do, and holds a message once."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import array as array_module
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid

from pilot.wire import transfer
from pilot.wire.messages import Part
from pilot.wire.records import from_records, to_arrays, to_records

PARTS = [
    Part("a", "float32", (3, 5), bytes(range(60))),
    Part("zeros", "int8", (100,), bytes(100)),  # chunks that are all the same
    Part("again", "int8", (100,), bytes(100)),
    Part("empty", "float32", (0,), b""),
    Part("one", "int4", (1, 2), b"x"),
]


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, bytes]]:
    """A message in pieces, as Flower sends them: its object id, and the pieces by theirs."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    monkeypatch.setattr(array_module, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 16)
    message = Message(to_records({"kind": "x"}, PARTS), 1, "train")
    objects = get_all_nested_objects(message)
    return message.object_id, {i: one.deflate() for i, one in objects.items()}


def inflated(inflate: Any, contents: tuple[str, dict[str, bytes]]) -> Message:
    message = inflate(contents[0], dict(contents[1]))
    assert isinstance(message, Message)
    return message


def test_a_message_is_put_together_as_flower_does(contents: Any) -> None:
    theirs = inflated(inflatable_utils.inflate_object_from_contents, contents)
    ours = inflated(transfer.inflating(inflatable_utils.inflate_object_from_contents), contents)
    assert from_records(ours.content) == from_records(theirs.content) == ({"kind": "x"}, PARTS)
    assert ours.object_id == theirs.object_id


def test_chunks_are_gone_once_they_are_joined(contents: Any) -> None:
    left = dict(contents[1])
    arrays = transfer.joined(left)
    assert len(arrays) == len(PARTS) - 1, "two of them are the same object"
    assert not [one for one in left.values() if one.startswith((b"Array ", b"ArrayChunk "))]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"ArrayChunk ", b"MetricRecord "),
        (b'"arraychunk_ids": [0', b'"arraychunk_ids": [9'),
        (b'"shape"', b'"shade"'),
        (b"\x00{", b"{"),
    ],
)
def test_what_is_no_array_raises_what_the_server_takes_for_the_clients_fault(
    contents: Any, old: bytes, new: bytes
) -> None:
    spoilt = {i: one.replace(old, new) for i, one in contents[1].items()}
    assert spoilt != contents[1]
    with pytest.raises((KeyError, ValueError, TypeError, IndexError)):
        transfer.inflating(inflatable_utils.inflate_object_from_contents)(contents[0], spoilt)


def test_a_missing_chunk_raises(contents: Any) -> None:
    chunk = next(i for i, one in contents[1].items() if one.startswith(b"ArrayChunk "))
    with pytest.raises(KeyError):
        transfer.joined({i: one for i, one in contents[1].items() if i != chunk})


def test_contents_are_asked_for_as_fast_as_they_leave_and_all_arrive() -> None:
    asked, sent, most = [0], dict[str, bytes](), [0]
    lock = threading.Lock()

    def contents() -> Iterator[tuple[str, bytes]]:
        for i in range(40):
            asked[0] += 1
            yield str(i), bytes([i])

    def send(object_id: str, content: bytes) -> None:
        time.sleep(0.001)
        with lock:
            sent[object_id] = content
            most[0] = max(most[0], asked[0] - len(sent))

    transfer.push(contents(), send, max_concurrent_pushes=2)
    assert sent == {str(i): bytes([i]) for i in range(40)}
    assert most[0] <= 2 * 3


def test_what_cannot_be_sent_raises_and_nothing_more_is_asked_for() -> None:
    asked = []

    def contents() -> Iterator[tuple[str, bytes]]:
        for i in range(1000):
            asked.append(i)
            yield str(i), b""

    def refuse(object_id: str, content: bytes) -> None:
        raise ConnectionError("no SuperLink")

    with pytest.raises(ConnectionError, match="no SuperLink"):
        transfer.push(contents(), refuse, max_concurrent_pushes=2)
    assert len(asked) < 20


def test_flower_uses_them_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (inflatable_utils, http_grid):
        for name in (transfer._INFLATE, transfer._PUSH, transfer._PULL):
            if hasattr(module, name):  # put back by pytest
                monkeypatch.setattr(module, name, getattr(module, name))
    transfer.install()
    transfer.install()
    for module in (inflatable_utils, http_grid):
        assert vars(module)[transfer._INFLATE].__wrapped__.__module__ == inflatable_utils.__name__
    assert inflatable_utils.push_object_contents_from_iterable is transfer.push
    pushed: dict[str, bytes] = {}
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(to_records({"kind": "x"}, PARTS), 1, "train")
    object_id, objects = message.object_id, get_all_nested_objects(message)
    inflatable_utils.push_objects(objects, pushed.__setitem__)
    came: list[int] = []
    with transfer.noting(lambda: came.append(1)):
        pulled = http_grid.pull_objects(list(pushed), pushed.__getitem__)
    assert pulled == pushed and len(came) == len(pushed)
    assert http_grid.pull_objects(list(pushed), pull_object_fn=pushed.__getitem__) == pushed
    assert len(came) == len(pushed)
    found = http_grid.inflate_object_from_contents(object_id, pushed)
    assert from_records(found.content)[1] == PARTS  # type: ignore[attr-defined]


def test_a_message_of_borrowed_memory_is_the_same_to_flower() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    memory = bytearray(range(60))
    part = Part("a", "float32", (3, 5), memory)
    lent, copied = to_arrays([part], borrow=True), to_arrays([part])
    assert lent["a"].object_id == copied["a"].object_id
    assert isinstance(copied["a"].data, bytes)
    objects = get_all_nested_objects(lent)
    pieces = {i: one.deflate() for i, one in objects.items()}
    memory[0] = 99
    found: Any = inflatable_utils.inflate_object_from_contents(lent.object_id, dict(pieces))
    assert found["a"].data == bytes(range(60))
    assert lent["a"].data[0] == 99, "it is not a copy"
    record: Any = RecordDict({"parts": lent, "config": ConfigRecord({"header": "{}"})})
    assert isinstance(record["parts"], ArrayRecord) and isinstance(record["parts"]["a"], Array)
