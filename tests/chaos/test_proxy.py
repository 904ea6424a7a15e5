"""The line between two processes: it passes bytes, holds them, and cuts connections."""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.chaos.proxy import Line, Network, Wire
from pilot.processes.scratch import free_port


@pytest.fixture
def echo() -> Iterator[int]:
    """A port that sends back what it gets, one connection at a time."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    try:
                        while data := connection.recv(1024):
                            connection.sendall(data)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


@pytest.fixture
def line(echo: int) -> Iterator[Line]:
    with Network() as network:
        yield network.line(echo)


def connect(line: Line) -> socket.socket:
    return socket.create_connection(("127.0.0.1", line.port), timeout=10)


def ask(connection: socket.socket, text: bytes) -> bytes:
    connection.sendall(text)
    return connection.recv(1024)


def test_bytes_pass_both_ways_and_slowly_when_the_line_is_slow(line: Line) -> None:
    with connect(line) as connection:
        assert ask(connection, b"one") == b"one"
        line.delay(0.05)
        assert ask(connection, b"two") == b"two"


def test_lines_on_one_wire_share_what_it_carries_and_take_turns() -> None:
    came: list[str] = []

    async def send(wire: Wire, name: str, chunks: int) -> None:
        for _ in range(chunks):
            await wire.carry(10_000, down=False)
            came.append(name)

    async def both() -> float:
        wire, loop = Wire(500_000.0), asyncio.get_running_loop()
        began_s = loop.time()
        endless = asyncio.create_task(wire.carry(1 << 30, down=True))  # the other way: no matter
        await asyncio.gather(send(wire, "upload", 8), send(wire, "heartbeat", 2))
        endless.cancel()
        return loop.time() - began_s

    assert asyncio.run(both()) >= 10 * 10_000 / 500_000 - 0.01
    assert came[:4].count("heartbeat") == 2, "it waits for a chunk of the upload, not for all"


def test_bytes_cross_a_narrow_wire_both_ways(echo: int) -> None:
    with Network() as network, connect(network.line(echo, Wire(100_000.0))) as connection:
        began_s = time.monotonic()
        connection.sendall(bytes(20_000))
        left = 20_000
        while left:
            left -= len(connection.recv(left))
        # up and down overlap, chunk by chunk
        assert time.monotonic() - began_s >= 20_000 / 100_000 - 0.01


def test_a_stalled_line_holds_bytes_back_until_it_is_up_again(line: Line) -> None:
    with connect(line) as connection:
        assert ask(connection, b"one") == b"one"
        line.stall()
        connection.sendall(b"two")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1024)
        line.up()
        connection.settimeout(10)
        assert connection.recv(1024) == b"two"


def test_a_cut_line_resets_connections_and_takes_none_until_it_is_up_again(line: Line) -> None:
    with connect(line) as connection:
        assert ask(connection, b"one") == b"one"
        line.cut()
        with pytest.raises(ConnectionError):
            _ = ask(connection, b"two") or ask(connection, b"two")
    with pytest.raises(ConnectionError), connect(line) as connection:
        _ = ask(connection, b"three") or ask(connection, b"three")
    line.up()
    with connect(line) as connection:
        assert ask(connection, b"four") == b"four"


def test_a_connection_that_the_far_end_resets_is_reset_at_the_near_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Network() as network:
        with connect(network.line(server.getsockname()[1])) as near:
            far, _ = server.accept()
            near.sendall(b"never read")
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.close()
            with pytest.raises(ConnectionError):
                near.recv(1024)


def test_a_line_to_a_closed_port_resets() -> None:
    with Network() as network, pytest.raises(ConnectionError):
        with connect(network.line(free_port())) as connection:
            _ = ask(connection, b"one") or ask(connection, b"one")
