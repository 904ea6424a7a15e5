"""One process of a worker group: rank 0 serves the ClientApp, the others follow it."""

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from nanochat.errors import UserError
from pilot.errors import PilotError
from pilot.site.data import hello
from pilot.site.group import last_words
from pilot.site.ranks import Ranks
from pilot.site.round import Round
from pilot.wire.codec import decode, encode
from pilot.wire.frames import WireError, receive_frame, send_frame
from pilot.wire.messages import (
    HelloOrder,
    HelloReply,
    Part,
    TrainOrder,
    TrainReply,
    from_header,
    package_hash,
    to_header,
)

_LOOK_S = 0.2
_FAILED, _CLIENTAPP_GONE = 1, 3  # exit codes


def main() -> None:
    """Serve connections as the rank that the supervisor's environment says."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    directory, rank = Path(sys.argv[1]), int(os.environ["PILOT_RANK"])
    idle_s = float(os.environ["PILOT_IDLE_S"])
    try:
        if rank == 0:
            _Server(directory, idle_s).serve()
        else:
            _follow(directory, idle_s)
    except Exception as error:  # noqa: BLE001 - told, printed, and the end of this process
        # last words for the handle: the reason, not "a process ended with code 1"
        told = isinstance(error, (UserError, PilotError))
        last_words(directory, str(error) if told else f"{type(error).__name__}: {error}")
        traceback.print_exc()
        sys.stderr.flush()
        # An interpreter that ends takes gloo and NCCL apart while their threads wait for other ranks:
        # they may abort, and "killed by signal 6" would be the reason that the user reads.
        os._exit(_FAILED)


class _Server:
    """Rank 0: one order in, one answer out; a resident one waits `idle_s` for the next connection."""

    def __init__(self, directory: Path, idle_s: float) -> None:
        self._directory, self._idle_s = directory, idle_s
        self._package = package_hash()  # of the code that this process has imported
        self._ranks: Ranks | None = None  # joined when there is something to train

    def serve(self) -> None:
        with socket.socket(fileno=int(os.environ["PILOT_LISTENER"])) as listener:
            listener.settimeout(self._idle_s or None)
            stays = True
            while stays:
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    break
                _hold_sigterm()  # until the order's own handler is there
                connection.settimeout(None)
                with connection:
                    stays = self._converse(connection) and self._idle_s > 0
                _end_on_sigterm()
        if self._ranks is not None:
            self._ranks.broadcast_json(None)  # there is no next order
            self._ranks.leave()

    def _converse(self, connection: socket.socket) -> bool:
        """Serve one ClientApp; whether this group may wait for the next one."""
        theirs, _ = receive_frame(connection)
        send_frame(connection, {"package": self._package, "supervisor": os.getppid()})
        if theirs.get("package") != self._package:
            return False  # this site's package has been replaced, or is another than the run's
        try:
            header, parts = receive_frame(connection)
        except WireError:
            return False  # as good as dead: it came to give an order
        received = time.monotonic()
        order = from_header(header)
        answer: HelloReply | TrainReply
        update: dict[str, Tensor]
        with _ends_with(connection):
            if isinstance(order, HelloOrder):
                answer, update, stays = hello(order), {}, True
            elif isinstance(order, TrainOrder):
                answer, update, stays = self._train(order, parts, received)
            else:
                raise ValueError(f"a worker takes orders, not {type(order).__name__}")
        wire_dtype = str(order.config["wire-dtype"])
        send_frame(connection, to_header(answer), encode(update, dtype=wire_dtype))
        return stays

    def _train(
        self, order: TrainOrder, parts: list[Part], received: float
    ) -> tuple[TrainReply, dict[str, Tensor], bool]:
        weights = decode(parts)
        if self._ranks is None:
            self._ranks = Ranks.join(self._directory, device_type=os.environ["PILOT_DEVICE"])
        self._ranks.broadcast_json(to_header(order))
        task = Round(order, self._ranks, received, resident=self._idle_s > 0)
        reply, update = task.run(weights)
        return reply, update, not (order.run_is_over or task.leaving)


def _follow(directory: Path, idle_s: float) -> None:
    """Any other rank: the same rounds, told by rank 0, which alone speaks."""
    logging.getLogger("nanochat").setLevel(logging.WARNING)
    ranks = Ranks.join(directory, device_type=os.environ["PILOT_DEVICE"])
    while (header := ranks.broadcast_json(None)) is not None:
        order = from_header(header)
        assert isinstance(order, TrainOrder)
        Round(order, ranks, time.monotonic(), resident=idle_s > 0).run({})
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing in hand: it may end here
    ranks.leave()


@contextlib.contextmanager
def _ends_with(connection: socket.socket) -> Iterator[None]:
    """End this process, and with it the group, when the ClientApp goes while its order is worked on."""
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            # nothing is due from the other end: readable means closed
            if select.select([connection], [], [], _LOOK_S)[0] and not done.is_set():
                os._exit(_CLIENTAPP_GONE)

    watcher = threading.Thread(target=watch, name="clientapp", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _hold_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _end_on_sigterm() -> None:
    """Without an order in hand, SIGTERM is the end of this process and its group."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
