"""Sites that follow a script instead of training, and a server around them: quick, and odd on demand."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict

from pilot.config import RunConfig
from pilot.coordination.coordinator import ServerCoordinator
from pilot.rules.ledger import Ledger
from pilot.run.events import read_events
from pilot.run.snapshot import latest_snapshot, read_snapshot
from pilot.run.state import RunState
from pilot.segment import first_rows
from pilot.server.mailbox import Mailbox
from pilot.server.report import Report
from pilot.server.round_loop import RoundLoop
from pilot.server.telemetry import Telemetry
from pilot.site.mirror import Mirror, digest_on_disk, mirror_path
from pilot.wire.code_hashes import code_hashes
from pilot.wire.codec import encode
from pilot.wire.messages import (
    HelloOrder,
    HelloReply,
    TrainOrder,
    TrainReply,
    from_header,
    to_header,
)
from pilot.wire.records import from_records, to_records
from pilot.wire.steps import FULL, digest_of

from .local_grid import LocalGrid

SHARD_ROWS = 24
ROW_TOKENS = 8
FINGERPRINTS = {"tokenizer": "t", "validation rows": "v", **code_hashes()}

Reaction = Callable[[TrainOrder, TrainReply, dict[str, torch.Tensor]], Any]


class FastClock:
    """A clock that runs `speed` times as fast as the real one: grace periods without the waiting."""

    def __init__(self, speed: float = 20.0) -> None:
        self._speed, self._zero = speed, time.monotonic()

    def now_s(self) -> float:
        return (time.monotonic() - self._zero) * self._speed

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / self._speed)


@dataclass
class ScriptedSite:
    """Consumes `rows` rows of each lease; its pseudo-gradient is a function of those rows only.

    `react` may change the reply and the update in place, return a header of its own, or raise.
    """

    name: str
    rows: int = 4
    shards: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    fingerprints: dict[str, str] = field(default_factory=lambda: dict(FINGERPRINTS))
    error: str = ""
    react: Reaction = lambda order, reply, update: None
    orders: list[TrainOrder] = field(default_factory=list)
    delay_s: float = 0.0
    redis: bool | None = None
    host: str = "here"

    def __call__(self, kind: str, content: RecordDict) -> RecordDict:
        header, _ = from_records(content)
        order = from_header(header)
        assert isinstance(order, HelloOrder | TrainOrder)
        if isinstance(order, HelloOrder):
            hello = HelloReply(
                error=self.error,
                shards=self.shards,
                fingerprints=self.fingerprints,
                host=self.host,
                redis=self.redis,
                mirror=self.held(order.run),
            )
            return to_records(to_header(hello) | {"node_name": self.name}, [])
        self.orders.append(order)
        time.sleep(self.delay_s)
        reply, update = self._train(order)
        own = self.react(order, reply, update)
        answer = own if isinstance(own, dict) else to_header(own or reply)
        return to_records(answer | {"node_name": self.name}, encode(update))

    def held(self, run: str) -> str:
        """The digest of the mirror that it says it has."""
        return ""

    def _train(self, order: TrainOrder) -> tuple[TrainReply, dict[str, torch.Tensor]]:
        consumed = first_rows(order.segments, self.rows, shard_rows=SHARD_ROWS)
        rows = sum(segment.rows or 0 for segment in consumed)
        reply = TrainReply(
            fence=order.fence,
            client=order.client,
            steps=1,
            batches=1,
            tokens=rows * ROW_TOKENS,
            loss_nats=2.5 * rows * ROW_TOKENS,
            eval_nats=1.5 * (order.eval_end_row - order.eval_first_row),
            eval_bytes=2 * (order.eval_end_row - order.eval_first_row),
            eval_rows=order.eval_end_row - order.eval_first_row,
            consumed=consumed,
            row_counts={segment.shard: SHARD_ROWS for segment in consumed},
        )
        seed = sum(segment.shard * 1000 + segment.first_row for segment in consumed)
        generator = torch.Generator().manual_seed(seed)
        update = {"w": torch.randn(5, generator=generator), "b": torch.randn(2, 3)}
        update["b"] = torch.randn(2, 3, generator=generator)
        return reply, update if rows else {}


@dataclass
class MirrorSite(ScriptedSite):
    """One that holds a mirror as a worker group does, and says of it what is so; its update depends on the
    model that it trains from."""

    mirror: Mirror = field(default_factory=Mirror)
    trained_from: list[str] = field(default_factory=list)  # digests
    kept: int = 0  # orders whose model lies on disk
    received: list[int] = field(
        default_factory=list
    )  # bytes of each order, those that did not fit, too

    def held(self, run: str) -> str:
        return digest_on_disk(mirror_path(run, self.name))

    def __call__(self, kind: str, content: RecordDict) -> RecordDict:
        header, parts = from_records(content)
        order = from_header(header)
        if not isinstance(order, TrainOrder):
            return super().__call__(kind, content)
        self.orders.append(order)
        self.received.append(sum(len(part.data) for part in parts))
        time.sleep(self.delay_s)
        weights = self.mirror.take(order, parts)
        if weights is None:
            unfit = needs_model(order, self.mirror)
            return to_records(to_header(unfit) | {"node_name": self.name}, [])
        self.trained_from.append(digest_of(weights))
        reply, update = self._train(order)
        if update:
            generator = torch.Generator().manual_seed(reply.consumed[0].first_row)
            update = {
                name: 0.1 * weight + torch.randn(weight.shape, generator=generator)
                for name, weight in weights.items()
            }
        own = self.react(order, reply, update)
        self.mirror.keep(order)
        self.kept += 1
        answer = to_header(replace(own or reply, mirror="" if order.run_is_over else order.digest))
        return to_records(answer | {"node_name": self.name}, encode(update))


def needs_model(order: TrainOrder, mirror: Mirror) -> TrainReply:
    """What a worker group answers to an order that does not fit its mirror."""
    held = mirror.held(order)
    return TrainReply(fence=order.fence, client=order.client, needs_model=True, mirror=held)


def scripted_config(**values: Any) -> RunConfig:
    defaults = {
        "run-name": "scripted",
        "sequence-len": ROW_TOKENS,
        "total-batch-size": ROW_TOKENS * 4,
        "batch-of": "client",  # scripted clients take the steps of their own figures
        "depth": 1,
        "vocab-size": 300,
        "num-shards": 4,
        "eval-rows": 10,
        "num-rounds": 3,
        "total-tokens": 10**6,
        "round-steps": 1,
        "round-max-duration": 600.0,
        "grace-max": 20.0,
        "clients-timeout": 300.0,
        "heartbeat": 0.05,
        "outer-lr": 0.7,
        "outer-momentum": 0.9,
        "min-update-cosine": -1.0,  # updates are random numbers, which point anywhere
    }
    dashed = {key.replace("_", "-"): value for key, value in values.items()}
    return RunConfig.from_mapping(defaults | {"round-min-duration": 1.0} | dashed)


def fresh_state(config: RunConfig) -> RunState:
    weights = {"w": torch.zeros(5), "b": torch.ones(2, 3)}
    if config.wire_down != FULL:
        weights["m"] = torch.linspace(-1, 1, 64 * 80).view(64, 80)  # large enough for a code
    ledger = Ledger(num_shards=config.num_shards, epochs=config.epochs, shard_order=_in_order)
    return RunState(config, weights, ledger, total_tokens=config.total_tokens)


def _in_order(epoch: int) -> list[int]:
    return list(range(4))


@dataclass
class Server:
    """One term of a server over a LocalGrid; `resume` starts the next one from disk."""

    config: RunConfig
    sites: list[ScriptedSite]
    run_dir: Path
    redis_url: str
    term: int = 1
    closed: bool = False

    def __post_init__(self) -> None:
        self.grid = LocalGrid({100 + i: site for i, site in enumerate(self.sites)})
        self.stopped = threading.Event()
        snapshot = latest_snapshot(self.run_dir / "snapshots", report=print)
        self.state = fresh_state(self.config)
        if snapshot is not None:
            self.state = RunState.from_snapshot(snapshot, self.config, shard_order=_in_order)
            self.config = self.state.config

    def run(self, clock: FastClock | None = None) -> RunState:
        clock = clock or FastClock()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        name = self.config.run_name
        coordinator = ServerCoordinator(
            self.redis_url, name, term=self.term, run_dir=self.run_dir, clock=clock
        )
        with Telemetry(
            self.run_dir,
            config_dict={},
            wandb_mode="disabled",
            wandb_project="",
            run_name=name,
        ) as telemetry:
            loop = RoundLoop(
                self.config,
                self.state,
                term=self.term,
                mailbox=Mailbox(self.grid, clock),  # type: ignore[arg-type]  # what Grid is used for
                coordinator=coordinator,
                report=Report(telemetry),
                clock=clock,
                run_dir=self.run_dir,
                closed=self.closed,
                interrupted=self.stopped.is_set,
                version=self._version,
            )
            try:
                loop.run()
            finally:
                coordinator.finish()
        return self.state

    def _version(self, round_number: int) -> RunState:
        if round_number == 0:
            return fresh_state(self.config)
        snapshot = read_snapshot(self.run_dir / "snapshots", round_number)
        return RunState.from_snapshot(snapshot, self.config, shard_order=_in_order)

    def resume(self, **changes: Any) -> "Server":
        return replace(self, term=self.term + 1, **changes)


def events(server: Server, kind: str) -> list[dict[str, Any]]:
    """What happened in the run of `server`, of one kind."""
    path = server.run_dir / "events.jsonl"
    return [event for event in read_events(path) if event["event"] == kind]
