"""Whether the fast training step learns what the plain one learns: loss curves on real text.

python -m benchmarks.loss_curve --text ../shared/data/books

`plain` and `default` as in `benchmarks.train_step`: eager fp32 with all logits, against what this
machine chooses by itself. Each seed sets the first weights and the order of rows; both configurations
get the same. One line of JSON per seed, and a last one: `difference`, the mean over seeds and steps of
default - plain; `noise`, the standard deviation of plain's own curve over seeds, averaged over steps;
`last`, the mean loss of the last tenth, one number per seed. Losses are nats per token; curves are smoothed
over ten steps.
"""

import json
import os
import subprocess
import sys
from argparse import SUPPRESS, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rustbpe
from benchmarks.quality.text import beginning, cut_rows
from benchmarks.train_step import make_trainer
from nanochat.common import ArgumentParser, run_command_line
from nanochat.schedule import Schedule

_SMOOTH = 10
_TEXT_BYTES = 6 << 20


def main() -> None:
    parser = ArgumentParser(
        prog="benchmarks.loss_curve", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--text", type=Path, required=True, help="directory of parquet shards")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--arch", default="modern", choices=["classic", "modern"])
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--sequence-len", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--child", help=SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_train(arguments)))
        return
    curves: dict[str, list[np.ndarray]] = {"plain": [], "default": []}
    for seed in range(arguments.seeds):
        for name, found in curves.items():
            found.append(_smoothed(_in_child(name, seed)))
        plain, default = curves["plain"][-1], curves["default"][-1]
        difference = {"mean": float((default - plain).mean()), "worst": _worst(default - plain)}
        print(json.dumps({"seed": seed, "difference": difference}), flush=True)
    plain, default = (np.stack(curves[name]) for name in ("plain", "default"))
    tenth = max(1, plain.shape[1] // 10)
    last = {
        n: np.round(c[:, -tenth:].mean(1), 4).tolist()
        for n, c in (("plain", plain), ("default", default))
    }
    result = {
        "difference": round(float((default - plain).mean()), 5),
        "noise": round(float(plain.std(axis=0, ddof=1).mean()), 5) if len(plain) > 1 else None,
        "worst": round(_worst(default - plain), 4),
        "last": last,
        "first": round(float(plain[:, 0].mean()), 4),
    }
    print(json.dumps(result))


def _worst(differences: np.ndarray) -> float:
    return float(np.abs(differences).max())


def _smoothed(losses: list[float]) -> np.ndarray:
    return np.convolve(losses, np.ones(_SMOOTH) / _SMOOTH, mode="valid")


def _in_child(name: str, seed: int) -> list[float]:
    """A configuration changes this package's functions: each has a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loss_curve", *sys.argv[1:]]
    command += ["--child", name, "--seed", str(seed)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])
    return losses


def _train(arguments: Namespace) -> list[float]:
    """Nats per token of every step."""
    shape: dict[str, Any] = {
        key: getattr(arguments, key) for key in ("depth", "arch", "vocab", "sequence_len")
    }
    trainer, _ = make_trainer(
        arguments.child, **shape, batch_tokens=arguments.batch_tokens, seed=arguments.seed
    )
    rows = _rows(arguments.text, arguments.vocab, arguments.sequence_len)
    order = np.random.default_rng(arguments.seed).permutation(len(rows))
    schedule = Schedule(total_steps=arguments.steps, weight_decay=0.1)
    size = arguments.batch_tokens // arguments.sequence_len
    nats = []
    for step in range(arguments.steps):
        batch = rows[order[step * size : (step + 1) * size]]
        taken = trainer.step(batch, hyper=schedule.at(step))
        assert taken is not None
        nats.append(taken)
    return (torch.stack(nats) / arguments.batch_tokens).tolist()


def _rows(directory: Path, vocab: int, sequence_len: int) -> np.ndarray:
    """(n, T+1) ids of the first shard's text, which its own tokenizer was trained on."""
    documents = beginning(min(directory.glob("*.parquet")), _TEXT_BYTES)
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(documents), vocab_size=vocab - 1)
    bos = vocab - 1
    ids = np.concatenate([[bos, *encoded] for encoded in tokenizer.batch_encode(documents)])
    return cut_rows(ids, sequence_len)


if __name__ == "__main__":
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    run_command_line(main)
