"""Orders for worker groups without a server: what `groups` and `stops` ask for."""

import time
from typing import Any

import psutil
from torch import Tensor

from benchmarks.gpu_check import data
from benchmarks.gpu_check.verdict import Setup
from pilot.config import RunConfig
from pilot.segment import Segment
from pilot.site.handle import WorkerHandle
from pilot.wire.codec import decode, encode
from pilot.wire.messages import Fence, TrainOrder, TrainReply, from_header, to_header

RUN = "gpu-check"


def config(setup: Setup, **more: Any) -> RunConfig:
    """A run on the generated data; `more` are run-config keys with underscores."""
    data.make(setup)
    values: dict[str, Any] = {
        "run-name": RUN,
        "depth": setup.size(6, 1),
        "vocab-size": data.vocab_size(setup),
        "sequence-len": setup.size(1024, 64),
        "source": str(data.shard_dir(setup)),
        "num-shards": data.TRAIN_SHARDS,
        "tokenizer": str(data.tokenizer_dir(setup)),
        "packing": "stream",
        "eval-rows": setup.size(64, 8),
        "total-batch-size": setup.size(32 * 1024, 8 * 64),
        "device-batch-size": setup.size(16, 4),
        "weight-decay": 0.0,
        "device": setup.device,
        "compile": "on" if setup.cuda else "off",
        "heartbeat": 0.2,
        "wandb-mode": "disabled",
    }
    return RunConfig.from_mapping(values | {k.replace("_", "-"): v for k, v in more.items()})


def order(
    run: RunConfig, client: str, round_number: int, *, seconds: float, **more: Any
) -> TrainOrder:
    """An order that ends by its seconds, its `round-steps`, or a stop."""
    first = 0 if client.endswith("0") else data.TRAIN_SHARDS // 2
    values: dict[str, Any] = {
        "fence": Fence(run.run_name, 1, round_number, 1),
        "client": client,
        "config": run.to_mapping(),
        "redis_url": "",
        "processes": 1,
        "segments": [
            Segment(epoch, first + shard, 0, None)
            for epoch in range(100)
            for shard in range(data.TRAIN_SHARDS // 2)
        ],
        "lease_is_tail": False,
        "seconds_left": seconds,
        "committed_tokens": 0,
        "total_tokens": 10**9,
        "share": 1.0,
        "step_rows": run.batch_rows,
        "eval_first_row": 0,
        "eval_end_row": run.eval_rows,
    }
    return TrainOrder(**(values | more))


def ask(
    worker: WorkerHandle, what: TrainOrder, weights: dict[str, Tensor]
) -> tuple[TrainReply, dict[str, Tensor], float]:
    """(reply, pseudo-gradient, seconds from question to answer)."""
    began = time.monotonic()
    header, parts = worker.ask(to_header(what), encode(weights))
    reply = from_header(header)
    assert isinstance(reply, TrainReply)
    return reply, decode(parts), time.monotonic() - began


def ranks_below(pid: int) -> list[psutil.Process]:
    """Worker processes of the groups that `pid` has started: Python processes with a rank."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "PILOT_RANK" in child.environ():
                found.append(child)
        except psutil.Error:
            continue
    return found
