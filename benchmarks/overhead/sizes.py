"""Models of some sizes, and what a client needs to train them: rows of generated text, without a network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.micro import MICRO
from benchmarks.gpu_check.data import byte_pairs, write_shard
from nanochat.gpt import GPT
from pilot import plan
from pilot.config import RunConfig

_SHARDS, _CHARACTERS = 4, 400_000  # of training, and of each


@dataclass(frozen=True)
class Size:
    """A model; its parameters follow from both."""

    depth: int
    vocab_size: int
    sequence_len: int = 64


SIZES = {
    "tiny": Size(1, 512),
    "10": Size(4, 13_440),
    "100": Size(10, 39_936),
    "186": Size(12, 65_536),
}


def prepare(base: Path, size: Size) -> dict[str, Any]:
    """Make tokenizer and shards below `base` if they are missing; the run-config keys that name them."""
    tokenizer, shards = base / f"tokenizer-{size.vocab_size}", base / f"shards-{size.vocab_size}"
    if not (tokenizer / "tokenizer.json").is_file():
        byte_pairs(size.vocab_size).save(tokenizer)
    shards.mkdir(parents=True, exist_ok=True)
    for number in range(_SHARDS + 1):
        path = shards / f"shard_{number:05d}.parquet"
        if not path.is_file():
            write_shard(path, number, _CHARACTERS)
    return {
        "depth": size.depth,
        "vocab-size": size.vocab_size,
        "sequence-len": size.sequence_len,
        "tokenizer": str(tokenizer),
        "source": str(shards),
        "num-shards": _SHARDS,
    }


def config(base: Path, size: Size, **keys: Any) -> dict[str, Any]:
    """A run of that model; `keys` with underscores differ from the usual ones."""
    usual = {
        "epochs": 1000,
        "eval-rows": 8,
        "total-batch-size": 8 * size.sequence_len,
        "total-tokens": 10**9,
        "compile": "off",
        "client-processes": 1,
        "client-threads": 1,
        "round-max-duration": 3600.0,
        "grace-max": 600.0,
        "clients-timeout": 300.0,
        "heartbeat": 1.0,
        "snapshot-keep": 1,
        "take-back-ratio": 0.0,  # else the snapshot before is kept, too
    }
    dashed = {key.replace("_", "-"): value for key, value in keys.items()}
    return MICRO | usual | prepare(base, size) | dashed


def parameters(values: dict[str, Any]) -> int:
    """Of the model that a run-config describes."""
    with torch.device("meta"):
        model = GPT(plan.model_config(RunConfig.from_mapping(values)), compute_dtype=torch.float32)
    return sum(tensor.numel() for tensor in model.parameters())
