"""Bits per byte: a loss that does not depend on the tokenizer.

bpb = nats summed over targets that stand for bytes / (ln 2 * the number of those bytes). Special
tokens stand for 0 bytes and are left out of both sums.
"""

import math
from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.gpt import GPT


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """The bpb of sums, infinite over no bytes at all."""
    return nats / (math.log(2) * num_bytes) if num_bytes else math.inf


def bpb_sums(
    model: GPT, rows_batches: Iterable[np.ndarray], token_bytes: Tensor
) -> tuple[float, int]:
    """(nats, bytes) of the targets in batches of rows (n, T+1), in float64, of this rank only.

    token_bytes: (vocab_size,) bytes of each token, 0 for special ones.
    """
    device = model.get_device()
    batches = (torch.from_numpy(rows.astype(np.int64)).to(device) for rows in rows_batches)
    return _sums(model, ((rows[:, :-1], rows[:, 1:]) for rows in batches), token_bytes)


def evaluate_bpb(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor]], steps: int, token_bytes: Tensor
) -> float:
    """bpb over the first `steps` batches (inputs, targets), summed over the ranks.

    Targets of -1 are left out. All ranks must call it together.
    """
    nats, num_bytes = _sums(model, islice(batches, steps), token_bytes)
    return bits_per_byte(*sum_over_ranks(nats, num_bytes, device=model.get_device()))


def sum_over_ranks(nats: float, num_bytes: int, *, device: torch.device) -> tuple[float, int]:
    """The two sums added up over the process group, if there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return nats, num_bytes
    sums = torch.tensor([nats, float(num_bytes)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)  # float64 holds integers exactly up to 2^53 bytes
    return float(sums[0]), int(sums[1])


@torch.inference_mode()
def _sums(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor
) -> tuple[float, int]:
    token_bytes = token_bytes.to(model.get_device())
    nats, num_bytes = 0.0, 0
    for inputs, targets in batches:
        loss = model(inputs, targets, loss_reduction="none")  # (B * T,)
        targets = targets.reshape(-1)
        target_bytes = token_bytes[targets.clamp_min(0)] * (targets >= 0)
        counted = loss[target_bytes > 0].cpu()  # float64 does not exist on MPS
        nats += float(counted.sum(dtype=torch.float64))
        num_bytes += int(target_bytes.sum(dtype=torch.int64))
    return nats, num_bytes
