"""The smallest site: two training shards and a validation shard of one's own, a model of one layer."""

from pathlib import Path
from typing import Any

import torch

from pilot import plan
from pilot.config import RunConfig
from pilot.segment import Segment
from pilot.site.handle import WorkerHandle
from pilot.wire.codec import decode, encode
from pilot.wire.messages import Fence, TrainOrder, TrainReply, from_header, to_header

ROOT = Path(__file__).resolve().parents[2]
T, BATCH_ROWS, VAL_SHARD = 16, 7, 2
VOCAB_SIZE = 256 + 35 + 9


def site_config(site: Path, **values: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "run_name": "r",
        "depth": 1,
        "vocab_size": VOCAB_SIZE,
        "sequence_len": T,
        "source": str(site / "shards"),
        "num_shards": VAL_SHARD,
        "tokenizer": "bytes",
        "packing": "stream",
        "eval_rows": 12,
        "total_tokens": 100_000,
        "total_batch_size": BATCH_ROWS * T,
        "device_batch_size": 2,
        "round_steps": 2,
        "round_min_duration": 0.0,
        "heartbeat": 0.1,
        "device": "cpu",
    }
    names = {key.replace("_", "-"): value for key, value in (defaults | values).items()}
    return RunConfig.from_mapping(names)


def train_order(config: RunConfig, segments: list[list[int]], **values: Any) -> TrainOrder:
    """`segments` as `Segment.to_list` writes them."""
    defaults: dict[str, Any] = {
        "fence": Fence("r", 1, 1, 1),
        "client": "c",
        "config": config.to_mapping(),
        "redis_url": "",
        "processes": 1,
        "segments": [Segment.from_list(values) for values in segments],
        "lease_is_tail": False,
        "seconds_left": 300.0,
        "committed_tokens": 0,
        "total_tokens": 100_000,
        "share": 1.0,
        "step_rows": config.batch_rows,
        "eval_first_row": 0,
        "eval_end_row": 0,
    }
    return TrainOrder(**(defaults | values))


def lists(segments: list[Segment]) -> list[list[int]]:
    return [segment.to_list() for segment in segments]


ENDLESS = [[epoch, shard, 0, -1] for epoch in range(2000) for shard in (0, 1)]


def ask(
    worker: WorkerHandle, order: TrainOrder, weights: dict[str, torch.Tensor]
) -> tuple[TrainReply, dict[str, torch.Tensor]]:
    header, parts = worker.ask(to_header(order), encode(weights))
    reply = from_header(header)
    assert isinstance(reply, TrainReply)
    return reply, decode(parts)


def first_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """Initial weights whose zero matrices are not: every parameter then has a gradient."""
    generator = torch.Generator().manual_seed(0)
    weights = plan.initial_weights(config)
    return {
        name: tensor if tensor.any() else torch.randn(tensor.shape, generator=generator) * 0.02
        for name, tensor in weights.items()
    }
