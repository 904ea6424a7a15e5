"""The smallest runs of `scripts.base_train`, and what they leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

# 32,768 parameters: a checkpoint is 131 kB of weights and 0.2 MB of optimizer
COMMON = [
    *("--depth", "1", "--head-dim", "32", "--aspect-ratio", "32", "--max-seq-len", "32"),
    *("--batch-size", "2", "--total-batch-size", "160", "--num-iterations", "4"),
    *("--eval-rows", "4", "--log-every", "1", "--device-type", "cpu", "--packing", "bestfit"),
]
Call = Callable[..., tuple[int, str, str]]


def run_arguments(base: Path, run: str, *more: str) -> list[str]:
    return [*COMMON, "--source", str(base / "shards"), "--run", run, *more]


def directory_of(base: Path, run: str) -> Path:
    return base / "base_checkpoints" / run


def meta_of(directory: Path, step: int) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((directory / f"meta_{step:06d}.json").read_text())
    return meta


def assert_one_sentence(error: str, said: str) -> None:
    assert error.count("error: ") == 1 and said in error and "Traceback" not in error, error
