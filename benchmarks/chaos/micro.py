"""The smallest run that is a real one: one layer, 64 tokens a row, on the built-in corpus.

The chaos tours and tests/federation train it.
"""

import json
from typing import Any

TOKENIZER, VOCAB_SIZE = "tokenizer_512", 512

MICRO: dict[str, Any] = {
    "depth": 1,
    "vocab-size": VOCAB_SIZE,
    "sequence-len": 64,
    "source": "builtin",
    "num-shards": 8,
    "tokenizer": TOKENIZER,
    "packing": "stream",
    "eval-rows": 32,
    "total-batch-size": 1024,
    "device-batch-size": 8,
    "weight-decay": 0.0,
    "lr": 0.1,
    "round-min-duration": 0.0,
    "round-max-duration": 120.0,
    "grace-max": 90.0,
    "clients-timeout": 150.0,
    "device": "cpu",
    "heartbeat": 0.2,
    "wandb-mode": "disabled",
}


def as_toml(values: dict[str, Any]) -> str:
    """`values` as a run-config file."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
