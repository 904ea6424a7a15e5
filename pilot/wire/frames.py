"""Frames on the Unix socket between a ClientApp and its worker group. Standard library only.

A frame is an 8-byte length, a JSON header of that length, and the bytes of the parts that the header
lists. Nothing is pickled. Both ends of a conversation start with the hashes of their code.
"""

import json
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from pilot.wire.jsonable import header_text
from pilot.wire.messages import Header, Part, drained

_LENGTH = struct.Struct("!Q")
_MAX_HEADER_BYTES = 64 << 20
_CHUNK_BYTES = 4 << 20


class WireError(ConnectionError):
    """The other end is gone, or what it sends is not a frame."""


def send_frame(
    connection: socket.socket, header: Header, parts: Sequence[Part] = (), *, drain: bool = False
) -> None:
    """Send one frame; raises WireError if the other end is gone.

    `drain`: the list `parts` lets go of each part once it is sent.
    """
    listed = [[part.name, part.dtype, list(part.shape), len(part.data)] for part in parts]
    text = f'{{"header": {header_text(header)}, "parts": {json.dumps(listed)}}}'.encode()
    try:
        connection.sendall(_LENGTH.pack(len(text)) + text)
        for part in drained(parts) if drain and isinstance(parts, list) else parts:
            connection.sendall(part.data)
    except OSError as error:
        raise WireError(f"the other end closed the connection ({error})") from error


def receive_frame(
    connection: socket.socket,
    *,
    while_waiting: Callable[[], None] = lambda: None,
    poll_s: float = 0.5,
) -> tuple[Header, list[Part]]:
    """Wait for one frame, calling `while_waiting` every `poll_s` (it may raise to give up).

    Raises WireError when the other end closes, or sends what is not a frame.
    """
    wait = _Waiter(connection, while_waiting, poll_s)
    (length,) = _LENGTH.unpack(wait.read(_LENGTH.size))
    if length > _MAX_HEADER_BYTES:
        raise WireError(f"a header of {length} bytes is not one of ours")
    try:
        text = json.loads(bytes(wait.read(length)))
        header, listed = text["header"], text["parts"]
        if not isinstance(header, dict):
            raise TypeError("its header is no table")
        parts = [
            Part(str(name), str(dtype), tuple(int(n) for n in shape), wait.read(int(size)))
            for name, dtype, shape, size in listed
        ]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise WireError(f"not a frame: {type(error).__name__} {error}") from error
    return header, parts


class _Waiter:
    """Reads exact numbers of bytes, and looks up from it now and then."""

    def __init__(
        self, connection: socket.socket, while_waiting: Callable[[], None], poll_s: float
    ) -> None:
        self._connection, self._while_waiting, self._poll_s = connection, while_waiting, poll_s
        self._next_look = time.monotonic() + poll_s

    def read(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view: Any = memoryview(buffer)
        while view:
            self._look()
            if not select.select([self._connection], [], [], self._poll_s)[0]:
                continue
            try:
                count = self._connection.recv_into(view[:_CHUNK_BYTES])
            except OSError as error:
                raise WireError(f"the other end closed the connection ({error})") from error
            if count == 0:
                raise WireError("the other end closed the connection")
            view = view[count:]
        return buffer

    def _look(self) -> None:
        if time.monotonic() >= self._next_look:
            self._while_waiting()
            self._next_look = time.monotonic() + self._poll_s
