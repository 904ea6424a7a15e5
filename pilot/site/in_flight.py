"""The order that a client is working on, and its reply until the server has that on its disk.

A ClientApp is one process a message, and Flower uploads its reply only after our function has returned.
So a file in `PILOT_NODE_DIR` tells `pilot node` what it would lose by ending now, and a thread keeps sending
heartbeats while the reply is on its way. Standard library and Redis only.
"""

import contextlib
import json
import logging
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pilot.config import RunConfig
from pilot.coordination.coordinator import ClientCoordinator, resolve_url
from pilot.coordination.heartbeats import heartbeat_expiry_s
from pilot.errors import PilotError
from pilot.site.notice import NODE_VARIABLE
from pilot.wire.messages import Fence, TrainOrder

FILE_NAME = "order.json"
WORKING, SENDING, DONE = "working", "sending", "done"
_SENDING_AT_MOST_S = 3600.0

log = logging.getLogger("pilot")


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """What became of one order so far; `state` is working, sending, or done (nothing to be lost).

    `upload_s` is what the client's last reply took, 0 if nobody has measured it.
    `redis_url` holds no credentials: where it needs some, `PILOT_REDIS_URL` does. `pid` is the ClientApp's.
    """

    run: str
    redis_url: str
    client: str
    fence: Fence
    state: str
    pid: int
    preempt_file: str
    drain_deadline_s: float
    upload_s: float = 0.0

    def coordinator(self) -> ClientCoordinator | None:
        """The client's half of Redis for this order; None without a usable URL."""
        try:
            url = resolve_url(self.redis_url)
        except PilotError as error:
            log.warning("Redis is not used: %s", error)
            return None
        if not url:
            return None
        fence = self.fence
        return ClientCoordinator(
            url, self.run, client=self.client, term=fence.term, round_number=fence.round_number
        )


def of_order(order: TrainOrder, config: RunConfig, state: str) -> InFlight:
    return InFlight(
        run=order.fence.run,
        redis_url=order.redis_url,
        client=order.client,
        fence=order.fence,
        state=state,
        pid=os.getpid(),
        preempt_file=config.preempt_file,
        drain_deadline_s=config.drain_deadline,
        upload_s=order.upload_s,
    )


def write(in_flight: InFlight) -> None:
    """Tell this site's `pilot node`, if there is one; a disk that refuses the file costs no training."""
    if not (directory := os.environ.get(NODE_VARIABLE)):
        return
    path = Path(directory) / FILE_NAME
    whole = path.with_suffix(f".{os.getpid()}")
    try:
        whole.write_text(json.dumps(asdict(in_flight)), encoding="utf-8")
        whole.replace(path)
    except OSError as error:
        log.warning("cannot tell pilot node about the order in progress: %s", error)


def read(directory: Path) -> InFlight | None:
    """What `write` left there; None if there is nothing that can be read."""
    try:
        values = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
        return InFlight(**{**values, "fence": Fence(**values["fence"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def send_heartbeats_until_taken(
    in_flight: InFlight, *, heartbeat_s: float
) -> threading.Thread | None:
    """Heartbeats from a thread until the server has the reply, or has continued without it.

    They end with this process at the latest: Flower then has the reply.
    """
    coordinator = in_flight.coordinator()
    if coordinator is None:
        return None
    thread = threading.Thread(
        target=_send_heartbeats,
        args=(coordinator, in_flight.fence, heartbeat_s),
        name="sending",
        daemon=True,
    )
    thread.start()
    return thread


def _send_heartbeats(coordinator: ClientCoordinator, fence: Fence, heartbeat_s: float) -> None:
    until = time.monotonic() + _SENDING_AT_MOST_S
    expiry_s = heartbeat_expiry_s(heartbeat_s)
    with contextlib.closing(coordinator):
        while time.monotonic() < until:
            coordinator.send_state(SENDING, expiry_s=expiry_s)
            coordinator.wait(heartbeat_s)
            if coordinator.acknowledged(fence) or coordinator.superseded():
                return
