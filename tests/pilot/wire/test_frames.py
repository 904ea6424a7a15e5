"""Frames on a socket: what is sent arrives, and whatever else comes is an error, never a hang."""

import json
import random
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pilot.wire.frames import WireError, receive_frame, send_frame
from pilot.wire.messages import Part


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with one, other:
        yield one, other


def send_in_background(
    connection: socket.socket, *frames: tuple[Any, list[Part]]
) -> threading.Thread:
    def send() -> None:
        for header, parts in frames:
            send_frame(connection, header, parts)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def plain_parts(parts: list[Part]) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    return [(p.name, p.dtype, p.shape, bytes(p.data)) for p in parts]


def random_frame(rng: random.Random) -> tuple[dict[str, Any], list[Part]]:
    header = {
        f"k{i}": rng.choice([None, 1, 1.5, "täxt", [1, [2]]]) for i in range(rng.randrange(4))
    }
    parts = []
    for i in range(rng.randrange(4)):
        size = rng.choice([0, 1, 3, 4096, 70_001])
        kind = rng.choice([bytes, bytearray, memoryview])
        parts.append(Part(f"p{i}", "float32", (size,), kind(rng.randbytes(size))))
    return header, parts


def test_frames_arrive_in_both_directions_as_they_were_sent(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    rng = random.Random(0)
    for sender, receiver in (ends, ends[::-1]) * 3:
        frames = [random_frame(rng) for _ in range(5)]
        thread = send_in_background(sender, *frames)
        for header, parts in frames:
            received, received_parts = receive_frame(receiver)
            assert received == header and plain_parts(received_parts) == plain_parts(parts)
        thread.join(10)


def test_part_larger_than_any_buffer_arrives_whole(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    data = random.Random(1).randbytes(40_000_001)
    thread = send_in_background(ends[0], ({}, [Part("big", "float32", (1,), data)]))
    _, (part,) = receive_frame(ends[1])
    assert part.data == data
    thread.join(10)


def test_header_with_a_tensor_in_it_is_sent_all_the_same(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    send_frame(ends[0], {"loss": torch.tensor(1.5), "odd": object()})
    header, _ = receive_frame(ends[1])
    assert header["loss"] == 1.5


def frame_bytes(header: Any, *, listed: Any = (), length: int | None = None) -> bytes:
    text = json.dumps({"header": header, "parts": listed}).encode()
    return struct.pack("!Q", len(text) if length is None else length) + text


WHOLE = frame_bytes({"k": 1}, listed=[["p", "float32", [1], 4]]) + b"abcd"


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, len(WHOLE) - 5, len(WHOLE) - 1])
def test_end_that_closes_in_mid_frame_is_noticed(
    ends: tuple[socket.socket, socket.socket], cut: int
) -> None:
    ends[0].sendall(WHOLE[:cut])
    ends[0].close()
    with pytest.raises(WireError, match="closed"):
        receive_frame(ends[1])


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!Q", 1 << 40),
        struct.pack("!Q", 2) + b"\xff\xfe",
        struct.pack("!Q", 0),
        struct.pack("!Q", 4) + b"null",
        struct.pack("!Q", 2) + b"[]",
        struct.pack("!Q", 2) + b"{}",
        struct.pack("!Q", 90_000) + b"[" * 90_000,
        frame_bytes(["no", "table"]),
        frame_bytes({}, listed=5),
        frame_bytes({}, listed=[["p"]]),
        frame_bytes({}, listed=[["p", "float32", "shape", 4]]),
        frame_bytes({}, listed=[["p", "float32", [1], -4]]),
        frame_bytes({}, listed=[["p", "float32", [1], "four"]]),
        frame_bytes({}, listed=[["p", "float32", [1], 10**30]]),
        frame_bytes({}, listed=[["p", "float32", [1], 1 << 60]]),
    ],
    ids=range(16),
)
def test_garbage_is_refused(ends: tuple[socket.socket, socket.socket], garbage: bytes) -> None:
    ends[0].sendall(garbage)
    with pytest.raises(WireError, match=r"frame|header"):
        receive_frame(ends[1])


def test_sending_to_an_end_that_is_gone_is_an_error(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ends[1].close()
    with pytest.raises(WireError, match="closed"):
        send_frame(ends[0], {}, [Part("p", "float32", (1,), b"x" * 1_000_000)])


class GoneError(Exception):
    pass


@pytest.mark.parametrize("sent", [b"", WHOLE[:9], WHOLE[:-1]])
def test_who_waits_can_look_up_and_give_up(
    ends: tuple[socket.socket, socket.socket], sent: bytes
) -> None:
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise GoneError

    ends[0].sendall(sent)
    with pytest.raises(GoneError):
        receive_frame(ends[1], while_waiting=look, poll_s=0.01)


def test_who_is_served_all_the_time_looks_up_too(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1

    thread = send_in_background(ends[0], ({}, [Part("p", "float32", (1,), bytes(4_000_000))]))
    receive_frame(ends[1], while_waiting=look, poll_s=0.0)
    assert looks > 0
    thread.join(10)
