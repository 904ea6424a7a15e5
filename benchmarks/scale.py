"""What many clients cost the server, when none of them trains: the control plane alone.

python -m benchmarks.scale                                  # 10, 100 and 1,000 clients
python -m benchmarks.scale --clients 1000 --profile scale.pstats

The real round loop, ledger, roster, monitor, mailbox, rules, snapshots and a Redis server of its own; the model
has 11 parameters, and clients are stand-ins in this process: a thread sends their heartbeats to Redis once a
second and answers each order after --train seconds at most, one client after another over half of that time.

Per number of clients: `cpu_s_per_round` is the process's time on a processor without that thread's, `cpu_share`
the same over the time that passed (1: a whole core), `redis_cpu_s_per_round` that of Redis, `rss_bytes` what is
resident when each round opens and at the end, stand-ins included. The first round, which asks who is there, is
in no other figure. A real Grid adds a request to the SuperLink per client and look. One line of JSON.
"""

import cProfile
import json
import logging
import os
import queue
import sys
import tempfile
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis
import torch
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from nanochat.common import ArgumentParser, run_command_line
from pilot.config import RunConfig
from pilot.coordination.coordinator import ServerCoordinator
from pilot.processes.local_redis import LocalRedis
from pilot.rules.ledger import Ledger
from pilot.rules.rounds import MonotonicClock
from pilot.run.state import RunState
from pilot.segment import first_rows
from pilot.server.mailbox import Mailbox
from pilot.server.report import Report
from pilot.server.round_loop import RoundLoop
from pilot.server.telemetry import Telemetry
from pilot.wire.code_hashes import code_hashes
from pilot.wire.codec import encode
from pilot.wire.messages import (
    HelloReply,
    TrainOrder,
    TrainReply,
    from_header,
    to_header,
)
from pilot.wire.records import from_records, to_arrays, to_records

_RUN = "scale"
_ROW_TOKENS, _BATCH_ROWS, _SHARD_ROWS = 8, 4, 1000
_SHARDS_PER_CLIENT = 4
_HEARTBEAT_S, _POLL_S = 1.0, 0.05


def main() -> None:
    parser = ArgumentParser(prog="benchmarks.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", default="10,100,1000", help="numbers of clients, with commas")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--train", type=float, default=5.0, help="seconds that a client is away")
    parser.add_argument("--profile", type=Path, help="write a profile of the server's thread there")
    arguments = parser.parse_args()
    logging.getLogger("pilot").setLevel(logging.WARNING)  # lines for people are not the matter
    numbers = [int(number) for number in arguments.clients.split(",")]
    print(json.dumps({number: _measure(number, arguments) for number in numbers}))


def _measure(clients: int, arguments: Namespace) -> dict[str, Any]:
    config = RunConfig.from_mapping(_keys(clients, arguments.rounds))
    shards = _SHARDS_PER_CLIENT * clients
    ledger = Ledger(num_shards=shards, epochs=config.epochs, shard_order=lambda _: range(shards))
    weights = {"w": torch.zeros(5), "b": torch.ones(2, 3)}
    state = RunState(config, weights, ledger, total_tokens=config.total_tokens)
    with tempfile.TemporaryDirectory() as name, LocalRedis() as local:
        run_dir, clock = Path(name), MonotonicClock()
        server = redis.Redis.from_url(local.url)
        grid = StandIns(clients, arguments.train, server)
        coordinator = ServerCoordinator(local.url, _RUN, term=1, run_dir=run_dir)
        telemetry = Telemetry(
            run_dir, config_dict={}, wandb_mode="disabled", wandb_project="", run_name=_RUN
        )
        watch = Watch(grid, psutil.Process(int(server.info("server")["process_id"])))
        loop = RoundLoop(
            config,
            state,
            term=1,
            mailbox=Mailbox(grid, clock),  # type: ignore[arg-type]  # what Grid is used for
            coordinator=coordinator,
            report=Watched(telemetry, watch),
            clock=clock,
            run_dir=run_dir,
            trained=watch.stop,
        )
        profile = cProfile.Profile() if arguments.profile else None
        try:
            loop.run() if profile is None else profile.runcall(loop.run)
        finally:
            grid.stop()
            coordinator.finish()
            if profile is not None:
                profile.dump_stats(arguments.profile)
        return watch.figures(arguments.rounds)


def _keys(clients: int, rounds: int) -> dict[str, Any]:
    batch_tokens = _BATCH_ROWS * _ROW_TOKENS
    return {
        "run-name": _RUN,
        "sequence-len": _ROW_TOKENS,
        "total-batch-size": batch_tokens,
        "depth": 1,
        "vocab-size": 300,
        "num-shards": _SHARDS_PER_CLIENT * clients,
        "eval-rows": 2 * clients,
        "num-rounds": rounds + 1,
        "total-tokens": 10**9,
        "target-tokens": clients * batch_tokens,
        "round-min-duration": 0.0,
        "round-max-duration": 600.0,
        "min-clients": clients,
        "heartbeat": _HEARTBEAT_S,
        "outer-lr": 0.7,
        "outer-momentum": 0.9,
        "take-back-ratio": 0.0,
    }


class Watched(Report):
    """The run's voice, which also says when rounds are over."""

    def __init__(self, telemetry: Telemetry, watch: "Watch") -> None:
        super().__init__(telemetry)
        self._watch = watch

    def round_opened(self, number: int, *arguments: Any) -> None:
        self._watch.opened(number)
        super().round_opened(number, *arguments)


@dataclass
class Watch:
    """What server, stand-ins and Redis have used of processors since the second round's opening."""

    grid: "StandIns"
    redis: psutil.Process
    rss: list[int] = field(default_factory=list)
    used: dict[str, float] = field(default_factory=dict)
    _began: dict[str, float] = field(default_factory=dict)

    def opened(self, number: int) -> None:
        self.rss.append(psutil.Process().memory_info().rss)
        if number == 2:
            self._began = self._now()

    def stop(self) -> None:
        """The last round is committed."""
        if not self.used:
            self.rss.append(psutil.Process().memory_info().rss)
            self.used = {name: end - self._began[name] for name, end in self._now().items()}

    def _now(self) -> dict[str, float]:
        times = self.redis.cpu_times()
        stand_ins_s = self.grid.cpu_s
        return {
            "wall": time.monotonic(),
            "server": time.process_time() - stand_ins_s,
            "stand_ins": stand_ins_s,
            "redis": times.user + times.system,
        }

    def figures(self, rounds: int) -> dict[str, Any]:
        used = self.used
        return {
            "rounds": rounds,
            "round_s": round(used["wall"] / rounds, 3),
            "cpu_s_per_round": round(used["server"] / rounds, 3),
            "cpu_share": round(used["server"] / used["wall"], 3),
            "redis_cpu_s_per_round": round(used["redis"] / rounds, 3),
            "stand_ins_cpu_s_per_round": round(used["stand_ins"] / rounds, 3),
            "rss_bytes": self.rss,
            "rss_bytes_per_round": round((self.rss[-1] - self.rss[1]) / rounds),
        }


class StandIns:
    """A Flower `Grid` whose nodes are all played by one thread; `cpu_s`: its time on a processor."""

    def __init__(self, clients: int, train_s: float, server: "redis.Redis") -> None:
        # Flower refuses to make messages outside a run
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.cpu_s = 0.0
        self._clients, self._train_s, self._server = clients, train_s, server
        self._nodes = [NodeInfo(node_id=1 + number) for number in range(clients)]
        self._update = to_arrays(encode({"w": torch.ones(5), "b": torch.ones(2, 3)}))
        self._came: queue.SimpleQueue[tuple[str, Message]] = queue.SimpleQueue()
        self._ready: dict[str, Message] = {}
        self._due: list[tuple[float, str, Message, TrainOrder]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stand-ins", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    # -- what the server uses of a Grid ----------------------------------------------------------

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(uuid.uuid4().hex)
            self._came.put((ids[-1], message))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._ready.pop(i) for i in message_ids if i in self._ready]

    # -- the clients -----------------------------------------------------------------------------

    def _run(self) -> None:
        beat_s = 0.0
        while not self._done.wait(_POLL_S):
            now_s = time.monotonic()
            while not self._came.empty():
                self._take(*self._came.get(), now_s)
            late = [one for one in self._due if one[0] <= now_s]
            self._due = [one for one in self._due if one[0] > now_s]
            for _, message_id, message, order in late:
                self._answer(message_id, message, to_header(_reply(order)), self._update)
            if now_s - beat_s >= _HEARTBEAT_S:
                beat_s = now_s
                self._send_heartbeats(now_s)
            self.cpu_s = time.thread_time()

    def _take(self, message_id: str, message: Message, now_s: float) -> None:
        header, _ = from_records(message.content)
        order = from_header(header)
        number = message.metadata.dst_node_id - 1
        if isinstance(order, TrainOrder):
            share = 0.5 * number / self._clients
            due_s = now_s + self._train_s * (0.5 + share) * bool(order.segments)
            self._due.append((due_s, message_id, message, order))
            return
        shards = list(range(_SHARDS_PER_CLIENT * self._clients))
        prints = {"tokenizer": "t", "validation rows": "v", **code_hashes()}
        hello = HelloReply(shards=shards, fingerprints=prints, host=f"host-{number}", redis=True)
        name = {"node_name": f"client_{number}"}
        self._answer(message_id, message, to_header(hello) | name)

    def _answer(self, message_id: str, message: Message, header: Any, parts: Any = ()) -> None:
        content: RecordDict = to_records(header, parts)
        self._ready[message_id] = Message(content, reply_to=message)

    def _send_heartbeats(self, now_s: float) -> None:
        """Of all that owe a reply, as `ClientCoordinator` would send them."""
        with self._server.pipeline(transaction=False) as pipe:
            for _, _, _, order in self._due:
                key = f"pilot:{_RUN}:client:{order.client}"
                values: dict[Any, Any] = {"client": order.client, "term": order.fence.term}
                values |= {"round": order.fence.round_number, "beat": f"{now_s}"}
                values |= {"state": "training", "step": 1, "tokens": _ROW_TOKENS, "loss": 2.5}
                pipe.hset(key, mapping=values)
                pipe.pexpire(key, 10_000)
            pipe.execute()


def _reply(order: TrainOrder) -> TrainReply:
    """One optimizer step on the first rows of the lease."""
    rows = order.eval_end_row - order.eval_first_row
    consumed = first_rows(order.segments, _BATCH_ROWS, shard_rows=_SHARD_ROWS)
    tokens = sum(segment.rows or 0 for segment in consumed) * _ROW_TOKENS
    return TrainReply(
        fence=order.fence,
        client=order.client,
        stopped_by="steps done",
        steps=1,
        batches=1,
        tokens=tokens,
        loss_nats=2.5 * tokens,
        eval_nats=1.5 * rows,
        eval_bytes=2 * rows,
        eval_rows=rows,
        train_s=1.0,
        total_s=1.5,
        consumed=consumed,
        row_counts={segment.shard: _SHARD_ROWS for segment in consumed},
    )


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")
    sys.setswitchinterval(0.001)  # stand-ins should not wait for the server's thread
    run_command_line(main)
