"""One process of a worker group: rank 0 serves the ClientApp, the others follow it."""

import logging
import os
import socket
import sys
import time
from pathlib import Path

from torch import Tensor

from nanochat.common import UserError
from pilot.codec import decode, encode
from pilot.config import PilotError
from pilot.messages import (
    HelloOrder,
    HelloReply,
    Part,
    TrainOrder,
    TrainReply,
    from_header,
    package_hash,
    to_header,
)
from pilot.worker.group import last_words
from pilot.worker.loop import Round
from pilot.worker.ranks import Ranks
from pilot.worker.site import hello
from pilot.worker.wire import receive_frame, send_frame


def main() -> None:
    """Serve one connection as the rank that the supervisor's environment says."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    directory, rank = Path(sys.argv[1]), int(os.environ["PILOT_RANK"])
    try:
        if rank == 0:
            _serve(directory)
        else:
            _follow(directory)
    except Exception as error:
        # last words for the handle: the reason, not "a process ended with code 1"
        told = isinstance(error, (UserError, PilotError))
        last_words(directory, str(error) if told else f"{type(error).__name__}: {error}")
        raise


def _serve(directory: Path) -> None:
    """Rank 0: one order in, one answer out."""
    received = time.monotonic()
    with socket.socket(fileno=int(os.environ["PILOT_LISTENER"])) as listener:
        connection, _ = listener.accept()
    with connection:
        receive_frame(connection)  # the other end's package hash, which it compares with ours
        send_frame(connection, {"package": package_hash()})
        header, parts = receive_frame(connection)
        received = time.monotonic()
        order = from_header(header)
        answer: HelloReply | TrainReply
        update: dict[str, Tensor]
        if isinstance(order, HelloOrder):
            answer, update = hello(order), {}
        elif isinstance(order, TrainOrder):
            answer, update = _train(directory, order, parts, received)
        else:
            raise ValueError(f"a worker takes orders, not {type(order).__name__}")
        wire_dtype = str(order.config["wire-dtype"])
        send_frame(connection, to_header(answer), encode(update, dtype=wire_dtype))


def _train(
    directory: Path, order: TrainOrder, parts: list[Part], received: float
) -> tuple[TrainReply, dict[str, Tensor]]:
    weights = decode(parts)
    ranks = Ranks.join(directory, device_type=os.environ["PILOT_DEVICE"])
    ranks.broadcast_json(to_header(order))
    result = Round(order, ranks, received).run(weights)
    ranks.leave()  # not after an error: the others would fail too, and tell it before we have
    return result


def _follow(directory: Path) -> None:
    """Any other rank: the same round, told by rank 0, which alone speaks."""
    logging.getLogger("nanochat").setLevel(logging.WARNING)
    ranks = Ranks.join(directory, device_type=os.environ["PILOT_DEVICE"])
    order = from_header(ranks.broadcast_json(None))
    assert isinstance(order, TrainOrder)
    Round(order, ranks, time.monotonic()).run({})
    ranks.leave()
