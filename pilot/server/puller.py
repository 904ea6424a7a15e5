"""Replies pulled beside the round loop, since Flower waits for what may never come.

A SuperNode that dies while it uploads leaves a reply whose tensors are announced and not there: pulling it
blocks for about three minutes, up to two hours (Flower 1.41, `pull_objects`). So pulls are made in a thread,
one message after another; one that takes longer than a moment is left to its thread, and a new thread pulls
the others.

A reply may be as large as a model, so one is pulled at a time, when the one before has been dealt with. Only
while its pieces stop coming (`wire/transfer.py` tells) are others pulled beside it.

What a client has put together may be unreadable for Flower itself: then its reply is the exception that reading
it raised, and everybody else's replies are pulled as before. Only a SuperLink that cannot be reached is raised.
"""

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from pilot.wire import transfer

# modules whose exceptions speak of the connection to the SuperLink, never of what was pulled over it
_TRANSPORTS = ("httpx", "httpcore", "grpc")

PATIENCE_S = 1.0
# Replies that have stopped on their way, which may be in memory in parts
MAX_SLOW = 4


_Item = tuple[str, Message | Exception] | BaseException


class Pulls(Protocol):
    """Something that fetches replies."""

    def pull(self, message_ids: Collection[str]) -> Iterable[tuple[str, Message | Exception]]:
        """(message id, its reply) for what has come of `message_ids`."""


class Puller:
    """Pulls replies over `grid`; each call of `pull` takes `patience_s` at the longest, or little more."""

    def __init__(
        self,
        grid: Grid,
        *,
        patience_s: float = PATIENCE_S,
        now_s: Callable[[], float] = time.monotonic,  # of the threads, which wait for a real line
    ) -> None:
        self._grid, self._patience_s, self._now_s = grid, patience_s, now_s
        self._came: queue.SimpleQueue[_Item | None] = (
            queue.SimpleQueue()
        )  # None: a sweep is through
        self._room = threading.Semaphore(1)  # for one reply that is being dealt with
        self._slow: list[_Sweep] = []

    def pull(self, message_ids: Collection[str]) -> Iterator[tuple[str, Message | Exception]]:
        """(message id, its reply) for what has come of `message_ids`, and of those of earlier calls.

        Raises what a broken connection has raised.
        """
        self._slow = [sweep for sweep in self._slow if not sweep.done.is_set()]
        busy = {sweep.message_id for sweep in self._slow}
        moving = next((sweep for sweep in self._slow if sweep.moves(self._patience_s)), None)
        sweep = moving
        # those that nobody waits for any more don't count
        if moving is None and len(busy.intersection(message_ids)) < MAX_SLOW:
            wanted = [i for i in message_ids if i not in busy]
            sweep = _Sweep(self._grid, wanted, self._came, self._room, self._now_s)
        until_s = self._now_s() + self._patience_s
        while (item := self._next(sweep, until_s)) is not None:
            if isinstance(item, BaseException):
                raise item
            try:
                yield item
            finally:
                del item
                self._room.release()
        if sweep is not None and not sweep.finish() and sweep is not moving:
            self._slow.append(sweep)

    def _next(self, sweep: "_Sweep | None", until_s: float) -> _Item | None:
        """What has come, or comes while `sweep` is at work; None when that is through, or it is too late."""
        while True:
            waits = sweep is not None and not sweep.done.is_set()
            left_s = until_s - self._now_s() if waits else 0.0
            try:
                item = self._came.get(timeout=left_s) if left_s > 0 else self._came.get_nowait()
            except queue.Empty:
                return None
            if item is not None:
                return item


class _Sweep:
    """A thread that pulls each of `message_ids` in turn; once asked to stop, it finishes the current one."""

    def __init__(
        self,
        grid: Grid,
        message_ids: Sequence[str],
        came: "queue.SimpleQueue[_Item | None]",
        room: threading.Semaphore,
        now_s: Callable[[], float],
    ) -> None:
        self._grid, self._message_ids, self._came = grid, message_ids, came
        self._room, self._now_s = room, now_s
        self._lock, self._last = threading.Lock(), False
        self._moved_s = self._now_s()  # when it last had a piece of a reply
        self.message_id = ""  # which it is at
        self.done = threading.Event()
        threading.Thread(target=self._run, name="pull", daemon=True).start()

    def moves(self, within_s: float) -> bool:
        """Whether a piece of a reply has come within that time."""
        return not self.done.is_set() and self._now_s() - self._moved_s < within_s

    def finish(self) -> bool:
        """Whether it is through; if not, the message that it is at is its last."""
        if self.done.is_set():
            return True
        with self._lock:
            self._last = True
        return False

    def _run(self) -> None:
        try:
            for message_id in self._message_ids:
                with self._lock:
                    if self._last:
                        return
                    self.message_id = message_id
                self._pull(message_id)
        except BaseException as error:  # noqa: BLE001 - raised where the round loop can act on it
            self._came.put(error)
        finally:
            self.done.set()
            self._came.put(None)

    def _pull(self, message_id: str) -> None:
        try:
            with transfer.noting(self._note):
                # one a call: Flower downloads all ready replies of a call before it returns
                replies = list[Message | Exception](self._grid.pull_messages([message_id]))
        except Exception as error:
            if _of_the_connection(error):
                raise
            replies = [error]
        for reply in replies:
            self._room.acquire()
            self._came.put((message_id, reply))
            # the next one comes when this one has been dealt with
            self._room.acquire()
            self._room.release()

    def _note(self) -> None:
        self._moved_s = self._now_s()


def _of_the_connection(error: Exception) -> bool:
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not modules.isdisjoint(_TRANSPORTS)
