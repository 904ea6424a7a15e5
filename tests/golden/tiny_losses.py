"""The first losses of a tiny model of each architecture, in fp32 on one thread.

`python tests/golden/tiny_losses.py` writes them to tiny_losses.json. Do that only after a change that
is meant to change them, and say in the commit why it does.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch

from nanochat.gpt import build_gpt
from nanochat.gpt_config import ARCHITECTURES, config_for_depth
from nanochat.param_groups import make_optimizer
from nanochat.schedule import Schedule, learning_rates
from nanochat.trainer import Trainer

GOLDEN = Path(__file__).with_suffix(".json")
STEPS = 20

_VOCAB_SIZE, _SEQUENCE_LEN, _ROWS = 64, 256, 2  # S windows of 128: `modern` uses both kinds
_DEPTH = 2
_LR_SCALE = 0.3  # large enough for 20 steps to show what 1 % of a setting changes


def losses(arch: str, *, lr_factor: float = 1.0, momentum_factor: float = 1.0) -> list[float]:
    """Mean nats per token of `STEPS` optimizer steps; the factors are what a test varies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(arch, lr_factor, momentum_factor)
    finally:
        torch.set_num_threads(threads)


def _train(arch: str, lr_factor: float, momentum_factor: float) -> list[float]:
    device = torch.device("cpu")
    config = config_for_depth(
        _DEPTH,
        vocab_size=_VOCAB_SIZE,
        sequence_len=_SEQUENCE_LEN,
        arch=arch,
        aspect_ratio=32,
        head_dim=32,
    )
    model = build_gpt(config, device=device, seed=0, compute_dtype=torch.float32)
    tokens = _ROWS * _SEQUENCE_LEN
    rates = learning_rates(arch).scaled(_LR_SCALE * lr_factor)
    schedule = Schedule(
        total_steps=STEPS,
        weight_decay=0.2,
        momentum_start=0.85 * momentum_factor,
        momentum_peak=0.95 * momentum_factor,
        momentum_ramp_steps=STEPS / 2,
    )
    optimizer = make_optimizer(model, rates, weight_decay=schedule.weight_decay)
    trainer = Trainer(model, optimizer, device=device, device_batch_rows=_ROWS // 2)
    found = []
    for step in range(STEPS):
        nats = trainer.step(_rows(step), hyper=schedule.at(step))
        assert nats is not None
        found.append(float(nats) / tokens)
    return found


def _rows(step: int) -> np.ndarray:
    """Rows (_ROWS, T+1) in which a token mostly decides the next: there is something to learn."""
    rng = random.Random(step)
    rows = []
    for _ in range(_ROWS):
        row = [rng.randrange(_VOCAB_SIZE)]
        while len(row) <= _SEQUENCE_LEN:
            known = rng.random() < 0.8
            row.append((5 * row[-1] + 3) % _VOCAB_SIZE if known else rng.randrange(_VOCAB_SIZE))
        rows.append(row)
    return np.array(rows, dtype=np.uint16)


def main() -> None:
    found = {arch: losses(arch) for arch in ARCHITECTURES}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {GOLDEN}")


if __name__ == "__main__":
    main()
