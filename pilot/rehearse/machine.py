"""What a simulated client is made of, and what it has to do with."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from pilot.config import RunConfig
from pilot.rehearse.clock import VirtualClock
from pilot.wire.messages import Fence, Part

SCORING = 3.0  # times as fast as training: no backward pass
_MICRO_ROWS = 16  # where the configuration leaves it to the device's memory


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A client's machine.

    `boot_s`: from its start until Flower knows its node; `start_s`: from the arrival of an order to the first
    row; lines in bytes a second; `jitter`: the spread of its speed from round to round, relative;
    `scoring`: how many times as fast as it trains it evaluates.
    """

    name: str
    tokens_per_s: float
    jitter: float = 0.03
    boot_s: float = 30.0
    start_s: float = 2.0
    download_bytes_s: float = 125e6
    upload_bytes_s: float = 125e6
    devices: int = 1
    scoring: float = SCORING


@dataclass(frozen=True)
class Physics:
    """What is the same for all clients. `order_bytes` and `reply_bytes` travel, `shard_rows` each shard has."""

    config: RunConfig
    order_bytes: int
    reply_bytes: int
    shard_rows: int

    @property
    def micro_rows(self) -> int:
        """Rows per device and forward pass: a client answers the end of a round only between two."""
        return self.config.device_batch_size or _MICRO_ROWS


class Surroundings(Protocol):
    """What a client has to do with: time, Flower and Redis (`world.py`)."""

    clock: VirtualClock
    redis_is_there: bool
    stops: dict[str, str]  # client → why it is to leave

    def new_node(self, client: Any, boot_s: float) -> int:
        """The id of a node that Flower knows in `boot_s` seconds; it speaks for `client` (client.py)."""

    def node_died(self, node_id: int) -> None:
        """Its processes are gone; Flower will miss it."""

    def reply(
        self, message_id: str, header: dict[str, Any], parts: Iterable[Part], *, twice: bool = False
    ) -> None:
        """An answer leaves the node, perhaps twice."""

    def crashed(self, message_id: str) -> None:
        """The ClientApp that had the message has ended without an answer."""

    def over(self, fence: Fence) -> str:
        """Why the round of `fence` is over; "" while it is not."""

    def announce_stop(self, name: str, why: str) -> None:
        """The client says that it is leaving."""

    def clear_stop(self, name: str) -> None:
        """It is there again."""
