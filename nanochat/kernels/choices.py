"""What this machine and this run get: dtype of matmuls, attention kernels, compiling.

The rules are functions of their arguments; only `default_compute_dtype` and `what_compiling_lacks`
look at the machine. What was chosen is one frozen description, whose one sentence base_train and the
workers log. Nothing depends on how much of a run is left: a run that is continued computes what it would
have computed, bit for bit.
"""

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from nanochat.errors import UserError

DTYPE_NAMES = ("bfloat16", "float16", "float32")
COMPILE_MODES = ("auto", "on", "off")

# Seconds of eager work below which compiling costs more than it saves (about a tenth of a step)
_MIN_RUN_S = 600.0
_MIN_PROCESS_S = 200.0
# FLOP/s of eager training, to guess seconds: a core with AVX-512 (measured: 30-60 G), an older GPU
_CPU_FLOPS_PER_THREAD = 4e10
_GPU_FLOPS = 5e13


class Kernel(Enum):
    FLASH3 = "FlashAttention-3"
    CAUSAL = "torch's fused causal attention"
    FLEX = "FlexAttention"
    BLOCKED = "blocks of queries"
    MASK = "torch's attention with a mask"


class HeadPasses(Enum):
    """Who goes over a chunk of logits, from which loss and gradient are made (head.py)."""

    EAGER = "torch's functions one after the other"
    FUSED = "one Triton kernel"


@dataclass(frozen=True)
class CompileChoice:
    """`reason` says why."""

    on: bool
    reason: str

    def __str__(self) -> str:
        return f"compile: {'on' if self.on else 'off'} ({self.reason})"


@dataclass(frozen=True)
class Choices:
    """What a training step is computed with; `kernels` are those of its windows, shortest first."""

    dtype: torch.dtype
    kernels: tuple[tuple[int, Kernel], ...]
    compiling: CompileChoice
    fp8: bool = False

    def __str__(self) -> str:
        attention = ", ".join(
            f"{kernel.value} (window {window})" for window, kernel in self.kernels
        )
        dtype = str(self.dtype).removeprefix("torch.")
        dtype = f"fp8, the small ones in {dtype}" if self.fp8 else dtype
        return f"Training step: matmuls in {dtype}; attention by {attention}; {self.compiling}"


def make_choices(
    *,
    device_type: str,
    dtype: torch.dtype,
    windows: tuple[int, ...],
    length: int,
    has_flash3: bool,
    compiling: CompileChoice,
    fp8: bool = False,
) -> Choices:
    """The description of steps on rows of `length` tokens; `windows` as of `layer_windows`."""
    kernels = tuple(
        (
            window,
            choose_kernel(
                device_type=device_type,
                dtype=dtype,
                length=length,
                window=window,
                has_flash3=has_flash3,
                compiled=compiling.on,
            ),
        )
        for window in sorted({*windows})
    )
    return Choices(dtype, kernels, compiling, fp8)


# -- dtype --------------------------------------------------------------------------------------


def default_compute_dtype(device_type: str) -> torch.dtype:
    """The dtype of matmuls on `device_type`; `$NANOCHAT_DTYPE` wins.

    bf16 where the hardware multiplies it natively: CUDA from SM 80 on, and CPUs with avx512_bf16 or
    AMX (measured there: 1.3-1.8x faster than fp32; CPUs without emulate it and lose). Else fp32.
    """
    name = os.environ.get("NANOCHAT_DTYPE", "")
    if name:
        return dtype_from_name(name)
    if device_type == "cuda" and torch.cuda.is_available():
        native = torch.cuda.get_device_capability() >= (8, 0)
    elif device_type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def dtype_from_name(name: str) -> torch.dtype:
    """ "bfloat16" and its like as a torch.dtype; UserError for anything else."""
    if name not in DTYPE_NAMES:
        raise UserError(f"NANOCHAT_DTYPE is {name!r}: choose one of {', '.join(DTYPE_NAMES)}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


# -- attention ----------------------------------------------------------------------------------


def choose_kernel(
    *,
    device_type: str,
    dtype: torch.dtype,
    length: int,
    window: int,
    has_flash3: bool,
    compiled: bool,
) -> Kernel:
    """What computes attention of `length` positions to `window` positions before each.

    FlexAttention skips what a window hides where it is compiled for CUDA; uncompiled it would compute
    all scores, and hold them. Full windows are left to torch, which on Hopper (and from cuDNN 9.15 on)
    takes cuDNN's kernel, elsewhere FlashAttention-2 (docs/performance.md).
    """
    if has_flash3 and device_type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return Kernel.FLASH3
    if window >= length - 1:  # the first position is visible from the last
        return Kernel.CAUSAL
    if device_type == "cpu" and dtype != torch.float16:  # its exp(score) overflows fp16
        return Kernel.BLOCKED
    return Kernel.FLEX if device_type == "cuda" and compiled else Kernel.MASK


# -- head ---------------------------------------------------------------------------------------


def choose_head_passes(*, device_type: str, missing: str) -> HeadPasses:
    """Triton's kernel on CUDA, where nothing is `missing` that it is compiled with."""
    return HeadPasses.FUSED if device_type == "cuda" and not missing else HeadPasses.EAGER


# -- compiling ----------------------------------------------------------------------------------


def choose_compile(
    mode: str, *, device_type: str, missing: str, run_s: float, process_s: float | None = None
) -> CompileChoice:
    """What `compile = mode` means where `missing` ("": nothing) keeps a compiler from working.

    run_s: seconds of eager training in the whole run; process_s: in each process that would have to
    load what was compiled, None for the whole run. `on` without a compiler means eager; the reason says so.
    """
    if mode not in COMPILE_MODES:
        raise ValueError(f"compile is {mode!r}: choose one of {', '.join(COMPILE_MODES)}")
    if mode == "off":
        return CompileChoice(False, "requested")
    if missing:
        return CompileChoice(False, missing)
    if mode == "on":
        return CompileChoice(True, "requested")
    if device_type == "cpu":
        return CompileChoice(False, "on a CPU it would save a tenth of a step and cost 330 MB")
    process_s = run_s if process_s is None else process_s
    if run_s < _MIN_RUN_S:
        return CompileChoice(
            False, f"not worth it for ~{run_s:.0f} s of training (threshold: {_MIN_RUN_S:.0f} s)"
        )
    if process_s < _MIN_PROCESS_S:
        return CompileChoice(
            False,
            f"each round trains only ~{process_s:.0f} s (threshold: {_MIN_PROCESS_S:.0f} s)",
        )
    return CompileChoice(True, f"the run trains for ~{run_s:.0f} s")


def training_seconds(flops: float, device_type: str, *, threads: int, devices: int = 1) -> float:
    """A guess, to the order of magnitude, of what eager training of `flops` on all devices takes."""
    if device_type == "cpu":
        return flops / (_CPU_FLOPS_PER_THREAD * threads * devices)
    return flops / (_GPU_FLOPS * devices)


def what_compiling_lacks(device_type: str) -> str:
    """What `torch.compile` needs and this machine lacks; "" for nothing.

    Looks, but doesn't try: a toolchain that is there and broken is found when it is used.
    """
    if device_type == "mps":
        return "not on MPS"
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    names = (os.environ.get("CXX"), "g++", "clang++")
    if not any(name and shutil.which(name) for name in names):
        return "there is no C++ compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's headers are not installed"
    return ""
