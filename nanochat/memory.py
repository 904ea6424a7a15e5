"""What a training step takes of a GPU's memory, and how a process on a CPU treats memory that it frees."""

import ctypes
import sys
from dataclasses import dataclass

import torch

from nanochat.gpt import GPT
from nanochat.kernels import head
from nanochat.optim import MuonAdamW

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc
_TRIM_BYTES = (1 << 31) - 1

# Bytes that a block keeps for its backward pass, per token and channel, in bf16. Measured with depths 12 and
# 20 on an H100 (docs/performance.md): 36.6-36.9, and 38 for modern.
_KEPT_BYTES = 37


@dataclass(frozen=True, kw_only=True)
class DeviceBytes:
    """What one rank holds on its GPU in a training step; `total` is the peak, without the CUDA context.

    `working`: the weights in the dtype of matmuls, and what the head needs. `activations`: of the blocks.
    `updating`: what the optimizer packs, at a time when `working` and `activations` are free again.
    """

    weights: int
    gradients: int
    optimizer: int
    working: int
    activations: int
    updating: int

    @property
    def total(self) -> int:
        at_the_peak = max(self.working + self.activations, self.updating)
        return self.weights + self.gradients + self.optimizer + at_the_peak


def device_bytes(
    model: GPT, optimizer: MuonAdamW, *, rows: int, world_size: int = 1
) -> DeviceBytes:
    """For `rows` rows at once, as the first of `world_size` ranks; the model may be one without data.

    Weights, gradients and optimizer state are exact. `working` and `activations` are a model of what was
    measured in bf16, within 3 % for classic and modern; twice as much per element in fp32 is arithmetic.
    """
    config, dtype = model.config, model.compute_dtype
    weights = sum(param.nbytes for param in model.parameters())
    matrices = sum(param.numel() for param in model.params_by_role()["matrices"])
    tokens = rows * config.sequence_len
    kept = tokens * config.n_layer * config.n_embd * _KEPT_BYTES
    working = head.gpu_bytes(
        tokens, vocab_size=config.padded_vocab_size, width=config.n_embd, dtype=dtype
    )
    return DeviceBytes(
        weights=weights,
        gradients=weights,
        optimizer=optimizer.state_bytes(world_size),
        working=working + (0 if dtype == torch.float32 else matrices * dtype.itemsize),
        activations=kept * dtype.itemsize // torch.bfloat16.itemsize,
        updating=2 * 4 * matrices,
    )


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks for the next micro-batch, as far as 2 GB; False elsewhere.

    By itself it gives big ones back to the kernel, and faults them in again, page by page:
    1.34 → 0.77 CPU-seconds per step of configs/tiny.toml on one thread (docs/log.md).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library has none
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
