"""What the tests of the training step run on each rank of a process group, or alone.

As a program: `python step_worker.py DIRECTORY RANK WORLD_SIZE` joins a gloo group through a file
and leaves what `run` returns in DIRECTORY/rank<r>of<n>.pt.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanochat.gpt import GPT, GPTConfig, build_gpt
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import MuonAdamW
from nanochat.param_groups import make_optimizer
from nanochat.schedule import Hyper, learning_rates
from nanochat.trainer import Trainer, rank_slice

DEVICE_BATCH_ROWS = 2
# rows of the steps that are taken one after the other: a multiple of nothing in particular, fewer
# than the ranks, one more than a micro-batch of 1, 2 or 3 ranks, and a full one of all
STEP_ROWS = (5, 1, 7, 12)
HYPER = Hyper(lr_multiplier=0.5, momentum=0.9, weight_decay=0.1)
SEQUENCE_LEN, VOCAB_SIZE = 16, 50
VARIANTS = ("bf16", "classic", "modern")


def make(variant: str) -> tuple[GPT, MuonAdamW]:
    """A model in fp32 of the architecture `variant`, or a modern one in bf16."""
    arch = "modern" if variant == "bf16" else variant
    dtype = torch.bfloat16 if variant == "bf16" else torch.float32
    # 3 layers: Muon groups of 12, 3, 3 and 2 matrices divide unevenly; so do tables by 3 ranks
    config = GPTConfig(
        sequence_len=SEQUENCE_LEN,
        vocab_size=VOCAB_SIZE,
        n_layer=3,
        n_head=2,
        n_kv_head=2,
        n_embd=32,
        arch=arch,
    )
    model = build_gpt(config, device=torch.device("cpu"), seed=0, compute_dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # no zero matrices: every gradient is to be compared
        for block in model.transformer.h:
            for parameter in block.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.lm_head.weight.mul_(100)
    optimizer = make_optimizer(model, learning_rates(arch).scaled(0.1), weight_decay=0.1)
    for group in optimizer.param_groups:
        # AdamW divides by the gradient's size: with an eps of 1e-10 the sign of rounding noise
        # would be a full step
        if group["kind"] == "adamw":
            group["eps"] = 1e-4
    return model, optimizer


def rows(step: int) -> np.ndarray:
    generator = np.random.default_rng(step)
    shape = (STEP_ROWS[step], SEQUENCE_LEN + 1)
    return generator.integers(0, VOCAB_SIZE, shape).astype(np.uint16)


def run(rank: int, world_size: int) -> dict[str, Any]:
    """Everything that is compared between ranks and between numbers of ranks."""
    result: dict[str, Any] = {}
    for arch in VARIANTS:
        model, optimizer = make(arch)
        trainer = Trainer(
            model,
            optimizer,
            device=torch.device("cpu"),
            device_batch_rows=DEVICE_BATCH_ROWS,
            rank=rank,
            world_size=world_size,
        )
        nats = []
        for step in range(len(STEP_ROWS)):
            if step == 2:  # stopped at each of its micro-steps first, which must leave no trace
                _stop_everywhere(trainer, rows(step), result, arch)
            step_nats = trainer.step(rows(step), hyper=HYPER)
            assert step_nats is not None
            nats.append(step_nats)
        result[arch] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        result[f"{arch} nats"] = torch.stack(nats)
    result["bpb"] = _bpb(model, rank, world_size)
    return result


def _stop_everywhere(
    trainer: Trainer, step_rows: np.ndarray, result: dict[str, Any], arch: str
) -> None:
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    micro_steps = -(-len(step_rows) // trainer.micro_batch_rows)
    for stop_at in range(micro_steps):
        asked = 0

        def should_stop(stop_at: int = stop_at) -> bool:
            nonlocal asked
            decision = torch.tensor([float(asked == stop_at)])
            if trainer.world_size > 1:
                dist.broadcast(decision, src=0)  # as on a site: all ranks hear of rank 0's decision
            asked += 1
            return bool(decision)

        assert trainer.step(step_rows, hyper=HYPER, should_stop=should_stop) is None
        assert asked == stop_at + 1
    after = trainer.model.state_dict()
    result[f"{arch} untouched"] = all(torch.equal(before[k], after[k]) for k in before)
    result[f"{arch} gradients dropped"] = all(p.grad is None for p in trainer.model.parameters())


def _bpb(model: GPT, rank: int, world_size: int) -> float:
    mine = rows(3)[rank_slice(12, rank=rank, world_size=world_size)].astype(np.int64)
    ids = torch.from_numpy(mine)
    token_bytes = torch.arange(VOCAB_SIZE, dtype=torch.int32) % 7
    return evaluate_bpb(model, [(ids[:, :-1], ids[:, 1:])], 1, token_bytes)


def main() -> None:
    directory, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/group_of_{world_size}",
        rank=rank,
        world_size=world_size,
    )
    torch.save(run(rank, world_size), directory / f"rank{rank}of{world_size}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
