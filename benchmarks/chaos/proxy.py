"""A TCP proxy whose lines can be cut, stalled, delayed or narrow: the network between two processes."""

import asyncio
import contextlib
import socket
import struct
import threading

_CHUNK_BYTES = 1 << 16
_BURST_S = 0.005  # what a wire catches up that had nothing to carry, or whose timer was late


class Wire:
    """A wire of `bytes_per_s` each way, which all its lines share; who has waited longest is next.

    So a connection that sends without end leaves the others their turns, a chunk each, as a network does.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = [0.0, 0.0]  # up, down

    async def carry(self, num_bytes: int, *, down: bool) -> None:
        """Return when `num_bytes` are through."""
        now_s = asyncio.get_running_loop().time()
        began_s = max(now_s - _BURST_S, self._free_at_s[down])
        self._free_at_s[down] = began_s + num_bytes / self._bytes_per_s
        await asyncio.sleep(max(0.0, self._free_at_s[down] - now_s))


class Line:
    """One proxied port. Its state can be changed from any thread and holds for new connections, too:

    up       bytes pass (after `delay_s`)
    stalled  bytes wait, as if packets were lost; they pass once the line is up again
    cut      connections are reset, and so are new ones

    Bytes also have to wait for its `wire`, if it has one.
    """

    def __init__(self, network: "Network", target_port: int, wire: Wire | None = None) -> None:
        self._network, self._target_port, self._wire = network, target_port, wire
        self._up = asyncio.Event()
        self._up.set()
        self._cut = False
        self._delay_s = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    def up(self) -> None:
        """Let everything pass at once."""
        self._network.call(self._set, True, False, 0.0)

    def stall(self) -> None:
        """Hold all bytes back."""
        self._network.call(self._set, False, False, 0.0)

    def cut(self) -> None:
        """Reset all connections, and new ones."""
        self._network.call(self._set, True, True, 0.0)

    def delay(self, delay_s: float) -> None:
        """Let each chunk of bytes pass only after `delay_s`."""
        self._network.call(self._set, True, False, delay_s)

    def _set(self, up: bool, cut: bool, delay_s: float) -> None:
        self._cut, self._delay_s = cut, delay_s
        if cut:
            for writer in self._writers:
                _reset(writer)
        if up:
            self._up.set()
        else:
            self._up.clear()

    async def serve(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            _reset(writer)
            return
        try:
            target = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:  # no listener: as if the port were closed
            _reset(writer)
            return
        ends = {writer, target[1]}
        self._writers |= ends
        try:
            async with asyncio.TaskGroup() as pumps:  # an end that is reset takes the other with it
                pumps.create_task(self._pump(reader, target[1], down=False))
                pumps.create_task(self._pump(target[0], writer, down=True))
        except* OSError:
            pass
        finally:
            self._writers -= ends
            for end in ends:
                _reset(end)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, down: bool
    ) -> None:
        """Raises OSError if one of the two ends was reset."""
        while data := await reader.read(_CHUNK_BYTES):
            await self._up.wait()
            if self._wire is not None:
                await self._wire.carry(len(data), down=down)
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset, as a host does that does not know the connection: the other end gets an error."""
    with contextlib.suppress(OSError):
        end = writer.get_extra_info("socket")
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Network:
    """All lines of a test, served by one thread. Use as a context manager.

    `passes`: there is no proxy, a line's port is its target's; what lines can do has no effect.
    """

    def __init__(self, *, passes: bool = False) -> None:
        self._passes = passes
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> "Network":
        self._thread.start()
        return self

    def line(self, target_port: int, wire: Wire | None = None) -> Line:
        """A new line to 127.0.0.1:`target_port`; clients connect to its `port`."""
        line = Line(self, target_port, wire)
        if self._passes:
            line.port = target_port
            return line
        asyncio.run_coroutine_threadsafe(line.serve(), self._loop).result(timeout=10)
        return line

    def call(self, action: object, *arguments: object) -> None:
        """Run a function in the proxy's thread."""
        self._loop.call_soon_threadsafe(action, *arguments)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @staticmethod
    async def _end() -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
