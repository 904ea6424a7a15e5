"""One process of a worker group: rank 0 takes orders from ClientApps, the other ranks follow rank 0.

A ClientApp connects, both sides compare the hashes of their code, the ClientApp sends one order,
rank 0 answers it. Then a temporary group ends. A resident one writes its inner optimizer's state, while the
ClientApp carries the answer away, and waits for the next connection.
"""

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

from nanochat.errors import UserError
from pilot.errors import PilotError
from pilot.site.data import hello
from pilot.site.group import record_failure
from pilot.site.mirror import Mirror
from pilot.site.ranks import Ranks
from pilot.site.resident import Resident
from pilot.site.round import Round
from pilot.wire.code_hashes import code_hashes
from pilot.wire.frames import WireError, receive_frame, send_frame
from pilot.wire.messages import (
    HelloOrder,
    HelloReply,
    Part,
    TrainOrder,
    TrainReply,
    from_header,
    to_header,
)

log = logging.getLogger("pilot.site")
_POLL_S = 0.2
_FAILED, _CLIENTAPP_GONE = 1, 3  # exit codes


def main() -> None:
    """Run the rank that the environment, set by the supervisor, names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    directory, rank = Path(sys.argv[1]), int(os.environ["PILOT_RANK"])
    idle_s = float(os.environ["PILOT_IDLE_S"])
    try:
        if rank == 0:
            _Server(directory, idle_s).serve()
        else:
            _follow(directory, idle_s)
    except Exception as error:  # noqa: BLE001 - recorded, printed, and the end of this process
        # for the handle: a better reason than "worker process 0 exited with code 1"
        is_sentence = isinstance(error, (UserError, PilotError))
        record_failure(directory, str(error) if is_sentence else f"{type(error).__name__}: {error}")
        traceback.print_exc()
        sys.stderr.flush()
        # An interpreter that exits takes gloo and NCCL apart while their threads wait for other ranks.
        # They may abort, and the user would read "killed by signal 6" as the reason.
        os._exit(_FAILED)


class _Server:
    """Rank 0: one order in, one answer out. With `idle_s` it waits that long for the next connection."""

    def __init__(self, directory: Path, idle_s: float) -> None:
        self._directory, self._idle_s = directory, idle_s
        self._package = code_hashes()  # of the code that this process has imported
        self._ranks: Ranks | None = None  # joined when there is something to train
        self._kept = Resident()  # between two orders
        self._task: Round | None = None  # the last one, until it has kept its state
        self._mirror = Mirror()

    def serve(self) -> None:
        with socket.socket(fileno=int(os.environ["PILOT_LISTENER"])) as listener:
            listener.settimeout(self._idle_s or None)
            resident = True
            while resident:
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    break
                _block_sigterm()  # until the order has its handler
                connection.settimeout(None)
                with connection:
                    resident = self._converse(connection) and self._idle_s > 0
                _exit_on_sigterm()
        if self._ranks is not None:
            self._ranks.broadcast_json(None)  # no order follows
            self._ranks.leave()

    def _converse(self, connection: socket.socket) -> bool:
        """Serve one ClientApp. Returns whether a resident group may wait for the next one."""
        theirs, _ = receive_frame(connection)
        send_frame(connection, {"package": self._package, "supervisor": os.getppid()})
        if theirs.get("package") != self._package:
            return False  # this site's package was replaced since, or is not the run's
        try:
            header, parts = receive_frame(connection)
        except WireError:
            return False  # the ClientApp died before it gave its order
        received = time.monotonic()
        order = from_header(header)
        answer: HelloReply | TrainReply
        update: list[Part]
        with _exit_if_closed(connection):
            if isinstance(order, HelloOrder):
                answer, update, may_stay = hello(order), [], True
            elif isinstance(order, TrainOrder):
                answer, update, may_stay = self._train(order, parts, received)
            else:
                raise ValueError(f"a worker takes orders, not {type(order).__name__}")
        send_frame(connection, to_header(answer), update)
        self._keep_state()
        return may_stay

    def _needs_model(self, order: TrainOrder) -> TrainReply:
        """Nothing was done: the server is to ask again, with what leads on from what this client has."""
        log.info("The mirror of %s does not fit its order", order.client)
        held = self._mirror.held(order)
        return TrainReply(fence=order.fence, client=order.client, needs_model=True, mirror=held)

    def _keep_state(self) -> None:
        """What a round leaves for the next one, now that its answer is out; SIGTERM waits for the write."""
        task, self._task = self._task, None
        if task is not None:
            _block_sigterm()
            task.keep_state()
            if self._idle_s:
                self._mirror.keep(task.order)

    def _train(
        self, order: TrainOrder, parts: list[Part], received: float
    ) -> tuple[TrainReply, list[Part], bool]:
        """(reply, parts, whether this group may stay): after a run's last order, or when leaving, it ends."""
        weights = self._mirror.take(order, parts)
        parts.clear()  # what they were is in the mirror
        if self._ranks is None:  # the others wait for that, whatever the order is
            self._ranks = Ranks.join(self._directory, device_type=os.environ["PILOT_DEVICE"])
        if weights is None:
            return self._needs_model(order), [], True
        self._ranks.broadcast_json(to_header(order))
        resident = self._idle_s > 0
        self._task = task = Round(order, self._ranks, received, resident=resident, kept=self._kept)
        reply, update = task.run(weights)
        if not self._idle_s and not task.leaving:
            self._mirror.keep(order)
        return reply, update, not (order.run_is_over or task.leaving)


def _follow(directory: Path, idle_s: float) -> None:
    """Every other rank: it trains the rounds that rank 0 broadcasts."""
    logging.getLogger("nanochat").setLevel(logging.WARNING)
    ranks = Ranks.join(directory, device_type=os.environ["PILOT_DEVICE"])
    kept = Resident()
    while (header := ranks.broadcast_json(None)) is not None:
        order = from_header(header)
        assert isinstance(order, TrainOrder)
        task = Round(order, ranks, time.monotonic(), resident=idle_s > 0, kept=kept)
        task.run({})
        task.keep_state()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # no order in progress: it may end here
    ranks.leave()


@contextlib.contextmanager
def _exit_if_closed(connection: socket.socket) -> Iterator[None]:
    """End this process, and so the group, if the ClientApp goes away while its order is being worked on."""
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            # the ClientApp sends nothing now: readable means closed
            if select.select([connection], [], [], _POLL_S)[0] and not done.is_set():
                os._exit(_CLIENTAPP_GONE)

    watcher = threading.Thread(target=watch, name="clientapp", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _block_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _exit_on_sigterm() -> None:
    """Between two orders, SIGTERM ends this process and its group at once."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
