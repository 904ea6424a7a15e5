"""Messages over Flower: each gets exactly one answer, whatever becomes of its node."""

import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from pilot.server.mailbox import FORGET_AFTER_S, LOST_AFTER_S, Answer, Mailbox
from pilot.wire import transfer
from pilot.wire.messages import MAX_TEXT_CHARS, HelloReply, Part, to_header

from ..grid_fixture import ManualClock, ManualGrid


def make(*nodes: int, **options: Any) -> tuple[Mailbox, ManualGrid, ManualClock]:
    grid, clock = ManualGrid(*nodes, **options), ManualClock()
    return Mailbox(grid, clock), grid, clock  # type: ignore[arg-type]  # what Grid is used for


def test_answer_carries_what_the_node_said() -> None:
    box, grid, _ = make(7)
    part = Part("w", "float32", (1,), b"abcd")
    message_id = box.send(7, "train", {"n": 1}, [part])
    assert grid.pushed[message_id].metadata.message_type == "train"
    assert grid.pushed[message_id].metadata.dst_node_id == 7 and grid.header(message_id) == {"n": 1}
    assert list(box.poll()) == [] and box.busy(7)
    hello = HelloReply(host="here")
    grid.answer(message_id, to_header(hello) | {"node_name": "site-a"}, [part])
    assert list(box.poll()) == [Answer(message_id, 7, hello, [part], name="site-a")]
    assert list(box.poll()) == [] and not box.busy(7)


@pytest.mark.parametrize("unknown", ["left out", "empty"])
def test_message_to_a_node_that_is_not_there_is_told_at_once(unknown: str) -> None:
    box, _, clock = make(7, unknown=unknown)
    assert box.send(8, "train", {}) == ""
    clock.at_s += 10 * LOST_AFTER_S
    assert list(box.poll()) == [] and not box.busy(8)


def test_each_message_is_answered_by_its_own_node() -> None:
    box, grid, _ = make(1, 2)
    one, two = box.send(1, "query", {}), box.send(2, "query", {})
    grid.fail(two, 5, "offline")  # Flower's error names no node
    (answer,) = list(box.poll())
    assert (answer.message_id, answer.node_id) == (two, 2)
    assert answer.error == "Flower error 5: offline"
    assert box.busy(1) and not box.busy(2)
    grid.answer(one, {})
    assert [answer.node_id for answer in list(box.poll())] == [1]


def test_error_without_a_reason_is_a_sentence_too() -> None:
    box, grid, _ = make(1)
    grid.fail(box.send(1, "query", {}), 8)
    assert next(box.poll()).error == "Flower error 8: no reason given"


def test_answer_that_is_not_ours_is_an_error_not_an_exception() -> None:
    box, grid, _ = make(1)
    grid.answer_with(box.send(1, "query", {}), RecordDict({"config": ConfigRecord({"a": 1})}))
    (answer,) = list(box.poll())
    assert "not a Pilot message" in answer.error


def test_message_whose_node_stays_away_is_lost_and_not_before() -> None:
    box, grid, clock = make(1, 2)
    message_id = box.send(1, "train", {})
    box.send(2, "train", {})
    grid.online.discard(1)
    assert list(box.poll()) == []
    clock.at_s += LOST_AFTER_S - 0.1
    assert list(box.poll()) == []
    clock.at_s += 0.1
    (answer,) = list(box.poll())
    assert (answer.message_id, answer.node_id, answer.error) == (message_id, 1, "its node is gone")
    assert not box.busy(1) and box.busy(2)


def test_message_to_a_node_that_is_another_process_by_now_is_lost_though_it_was_never_away() -> (
    None
):
    box, grid, clock = make(1, 2)
    message_id = box.send(1, "train", {})
    other = box.send(2, "train", {})
    assert list(box.poll()) == []
    grid.activated[1] = "later"  # killed, and let in again under its id between two polls
    assert list(box.poll()) == []
    clock.at_s += LOST_AFTER_S
    (answer,) = list(box.poll())
    assert (answer.message_id, answer.error) == (message_id, "its node restarted")
    assert answer.lost and not box.busy(1)
    again = box.send(1, "train", {})
    clock.at_s += 10 * LOST_AFTER_S
    assert list(box.poll()) == []
    for sent in (again, other):
        grid.answer(sent, {})
    assert {answer.message_id for answer in list(box.poll())} == {again, other}


def test_node_that_was_away_for_a_moment_loses_nothing() -> None:
    box, grid, clock = make(1)
    message_id = box.send(1, "train", {})
    for _ in range(5):
        grid.online.discard(1)
        assert list(box.poll()) == []
        clock.at_s += LOST_AFTER_S * 0.9
        grid.online.add(1)
        assert list(box.poll()) == []
        clock.at_s += LOST_AFTER_S * 5
    grid.answer(message_id, {})
    assert len(list(box.poll())) == 1


def test_answer_after_its_message_was_given_up_is_never_pulled() -> None:
    box, grid, clock = make(1)
    message_id = box.send(1, "train", {})
    grid.online.clear()
    list(box.poll())
    clock.at_s += LOST_AFTER_S
    assert len(list(box.poll())) == 1
    grid.answer(message_id, {})
    assert list(box.poll()) == []


def test_replies_are_pulled_one_a_call() -> None:
    box, grid, _ = make(1, 2, 3)
    for node in (1, 2, 3):
        grid.answer(box.send(node, "train", {}), {})
    assert len(list(box.poll())) == 3 and grid.pulls == 3


def test_node_that_rejoined_under_its_id_is_not_busy_for_ever() -> None:
    box, _, clock = make(7)
    message_id = box.send(7, "train", {})
    box.abandon(message_id)  # the round went on without it
    clock.at_s += FORGET_AFTER_S - 1
    assert list(box.poll()) == [] and box.busy(7)
    clock.at_s += 1
    assert list(box.poll()) == [] and not box.busy(7)


def test_abandoned_answer_that_comes_in_time_is_heard() -> None:
    box, grid, _ = make(7)
    message_id = box.send(7, "train", {})
    box.abandon(message_id)
    grid.answer(message_id, to_header(HelloReply(host="x")))
    assert [answer.message for answer in list(box.poll())] == [HelloReply(host="x")]
    assert not box.busy(7)


def test_reply_that_never_comes_whole_blocks_neither_the_loop_nor_other_replies() -> None:
    there = threading.Event()

    class HalfUploaded(ManualGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            if any(reply.metadata.src_node_id == 1 for reply in replies):
                assert there.wait(30)
            return replies

    grid, clock = HalfUploaded(1, 2), ManualClock()
    box = Mailbox(grid, clock)  # type: ignore[arg-type]  # what Grid is used for
    box._puller._patience_s = 0.1
    one, two = box.send(1, "train", {}), box.send(2, "train", {})
    grid.answer(one, {})
    assert list(box.poll()) == []
    grid.answer(two, {})
    assert [answer.message_id for answer in list(box.poll())] == [two]
    assert list(box.poll()) == [] and box.busy(1), (
        "it is not pulled a second time, which Flower refuses"
    )
    there.set()
    until = time.monotonic() + 30
    while not (answers := list(box.poll())):
        assert time.monotonic() < until
    assert [answer.message_id for answer in answers] == [one] and not box.busy(1)


def test_the_next_reply_comes_when_the_one_before_has_been_dealt_with() -> None:
    pulled: list[str] = []

    class Watched(ManualGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            pulled.extend(reply.metadata.reply_to_message_id for reply in replies)
            return replies

    grid = Watched(1, 2, 3)
    box = Mailbox(grid, ManualClock())  # type: ignore[arg-type]  # what Grid is used for
    box._puller._patience_s = 30.0
    for node in (1, 2, 3):
        grid.answer(box.send(node, "train", {}), {})
    seen = []
    for answer in box.poll():
        time.sleep(0.05)  # in which the next ones would come
        seen.append(answer.message_id)
        assert len(pulled) == len(seen)
    assert len(seen) == 3


def test_while_a_large_reply_is_coming_no_other_is_pulled_beside_it() -> None:
    there, pieces = threading.Event(), threading.Event()

    class Large(ManualGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            if any(reply.metadata.src_node_id == 1 for reply in replies):
                while not there.wait(0.01):
                    if not pieces.is_set():
                        transfer._noted.note()
            return replies

    grid = Large(1, 2)
    box = Mailbox(grid, ManualClock())  # type: ignore[arg-type]  # what Grid is used for
    box._puller._patience_s = 0.3
    one, two = box.send(1, "train", {}), box.send(2, "train", {})
    grid.answer(one, {})
    assert list(box.poll()) == []
    grid.answer(two, {})
    assert list(box.poll()) == [], "it is still coming"
    pieces.set()  # it stops
    time.sleep(0.4)
    assert [answer.message_id for answer in box.poll()] == [two]
    there.set()
    until = time.monotonic() + 30
    while not (answers := list(box.poll())):
        assert time.monotonic() < until
    assert [answer.message_id for answer in answers] == [one]


def test_error_of_megabytes_is_cut() -> None:
    box, grid, _ = make(1)
    grid.fail(box.send(1, "query", {}), 8, "x" * 3_000_000)
    assert len(next(box.poll()).error) == MAX_TEXT_CHARS


@pytest.mark.parametrize(
    "name", ["", "x" * 201, 7.5, ["a"], {}, "²", "a\nb", "\ud800"], ids=lambda n: repr(n)[:9]
)
def test_name_is_a_short_line_or_none(name: Any) -> None:
    box, grid, _ = make(1)
    grid.answer(box.send(1, "query", {}), to_header(HelloReply()) | {"node_name": name})
    (answer,) = list(box.poll())
    expected = {"²": "²", "a\nb": "a b", "\ud800": ""}
    assert answer.name == (expected.get(name, "") if isinstance(name, str) else "")
    assert answer.malformed == (name not in ("", {}, *expected))


@pytest.mark.parametrize("what", ["record", "array"])
def test_reply_that_flower_cannot_read_is_refused_and_the_others_come(what: str) -> None:
    """Its own header is no JSON: Flower raises where it makes records of what it has downloaded."""

    class Inflating(ManualGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            if any(reply.metadata.src_node_id == 1 for reply in replies):
                whole: Any = ArrayRecord({"w": Array("float32", (1,), "pilot.raw", b"abcd")})
                part = whole if what == "record" else whole["w"]
                raw = part.deflate()
                head = raw.index(b"{")
                type(part).inflate(raw[:head] + b"\xff" + raw[head + 1 :], part.children)
            return replies

    grid = Inflating(1, 2)
    box = Mailbox(grid, ManualClock())  # type: ignore[arg-type]  # what Grid is used for
    for node in (1, 2):
        grid.answer(box.send(node, "train", {}), to_header(HelloReply()))
    bad, good = sorted(box.poll(), key=lambda answer: answer.node_id)
    assert bad.malformed and bad.error.startswith("it cannot be read (") and not bad.lost
    assert good.message == HelloReply() and not box.busy(1)
    assert list(box.poll()) == []


def test_what_pulling_raises_reaches_the_round_loop() -> None:
    class Broken(ManualGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            raise ConnectionError("no SuperLink")

    box = Mailbox(Broken(1), ManualClock())  # type: ignore[arg-type]  # what Grid is used for
    box.send(1, "train", {})
    with pytest.raises(ConnectionError, match="no SuperLink"):
        list(box.poll())
