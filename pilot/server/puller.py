"""Replies pulled beside the round loop, since Flower waits for what may never come.

A SuperNode that dies while it uploads leaves a reply whose tensors are announced and not there: pulling it
blocks for about three minutes, up to two hours (Flower 1.41, `pull_objects`). So pulls are made in a thread,
one message after another; one that takes longer than a moment is left to its thread, and a new thread pulls
the others.

What a client has put together may be unreadable for Flower itself: then its reply is the exception that reading
it raised, and everybody else's replies are pulled as before. Only a SuperLink that cannot be reached is raised.
"""

import queue
import threading
from collections.abc import Collection, Sequence
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

# modules whose exceptions speak of the connection to the SuperLink, never of what was pulled over it
_TRANSPORTS = ("httpx", "httpcore", "grpc")

PATIENCE_S = 1.0
# Replies that are on their way at once, which is how many may be in memory
MAX_SLOW = 4


_Item = tuple[str, Message | Exception] | BaseException


class Pulls(Protocol):
    """Something that fetches replies."""

    def pull(self, message_ids: Collection[str]) -> list[tuple[str, Message | Exception]]:
        """(message id, its reply) for what has come of `message_ids`."""


class Puller:
    """Pulls replies over `grid`; each call of `pull` takes `patience_s` at the longest, or little more."""

    def __init__(self, grid: Grid, *, patience_s: float = PATIENCE_S) -> None:
        self._grid, self._patience_s = grid, patience_s
        self._came: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._slow: list[_Sweep] = []

    def pull(self, message_ids: Collection[str]) -> list[tuple[str, Message | Exception]]:
        """(message id, its reply) for what has come of `message_ids`, and of those of earlier calls.

        Raises what a broken connection has raised.
        """
        self._slow = [sweep for sweep in self._slow if not sweep.done.is_set()]
        busy = {sweep.message_id for sweep in self._slow}
        # those that nobody waits for any more don't count
        if len(busy.intersection(message_ids)) < MAX_SLOW:
            sweep = _Sweep(self._grid, [i for i in message_ids if i not in busy], self._came)
            if not sweep.finish(self._patience_s):
                self._slow.append(sweep)
        came = []
        while not self._came.empty():
            item = self._came.get()
            if isinstance(item, BaseException):
                raise item
            came.append(item)
        return came


class _Sweep:
    """A thread that pulls each of `message_ids` in turn; once asked to stop, it finishes the current one."""

    def __init__(
        self,
        grid: Grid,
        message_ids: Sequence[str],
        came: "queue.SimpleQueue[_Item]",
    ) -> None:
        self._grid, self._message_ids, self._came = grid, message_ids, came
        self._lock, self._last = threading.Lock(), False
        self.message_id = ""  # which it is at
        self.done = threading.Event()
        threading.Thread(target=self._run, name="pull", daemon=True).start()

    def finish(self, timeout_s: float) -> bool:
        """Whether it is through within `timeout_s`; if not, the message that it is at is its last."""
        if self.done.wait(timeout_s):
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

    def _pull(self, message_id: str) -> None:
        try:
            # one a call: Flower downloads all ready replies of a call before it returns
            for reply in self._grid.pull_messages([message_id]):
                self._came.put((message_id, reply))
        except Exception as error:
            if _of_the_connection(error):
                raise
            self._came.put((message_id, error))


def _of_the_connection(error: Exception) -> bool:
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not modules.isdisjoint(_TRANSPORTS)
