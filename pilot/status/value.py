"""The status of one run, as a value."""

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1  # of `to_json`; docs/protocol.md has its fields


@dataclass(frozen=True)
class ClientStatus:
    """One client. `state`: what it does (starting, evaluating, packing, training, sending) or is kept from
    (waiting, silent, drained, leaving, cooling, aside, killed, left out, asked: an order is out, and nothing
    says more). `heartbeat_s`: the age of its last heartbeat, None if Redis has none. Bytes and goodput are
    of the whole run where its events are here, else since the server's start."""

    name: str
    state: str = ""
    why: str = ""
    host: str = ""
    device: str = ""
    devices: int | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    loss: float | None = None
    step: int | None = None
    shard: int | None = None
    shard_share: float | None = None
    heartbeat_s: float | None = None
    merged_rounds: int | None = None
    refused: int | None = None
    goodput: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None


@dataclass(frozen=True)
class Refused:
    """A reply that was not merged, `age_s` seconds ago (None: not known)."""

    client: str
    round_number: int | None
    reason: str
    age_s: float | None = None


@dataclass(frozen=True)
class Status:
    """A run. `state`: running, stopping, finished, stopped (resumable), lost (no server, and no good end), or
    unknown. `phase` of the open round, or what the server does between two: docs/protocol.md, *Idle time*.
    Shares are of 1, durations seconds, `shards` (share of all rows, complete, of all epochs)."""

    run: str
    state: str = "unknown"
    why: str = ""
    term: int | None = None
    round_number: int | None = None
    num_rounds: int | None = None
    phase: str = ""
    round_s: float | None = None
    round_left_s: float | None = None
    eta_s: float | None = None
    tokens: int | None = None
    total_tokens: int | None = None
    round_tokens: int | None = None
    tokens_per_s: float | None = None
    train_loss: float | None = None
    val_bpb: float | None = None
    shards: tuple[float, int, int] | None = None
    goodput: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    refused: int | None = None
    last_event_s: float | None = None
    clients: list[ClientStatus] = field(default_factory=list)
    refusals: list[Refused] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}
