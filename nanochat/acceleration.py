"""Whether the blocks of a training step are compiled: the one place where that is chosen.

The dtype of the matmuls is `common.default_compute_dtype`'s choice, the attention kernel `attention.py`'s.
All layers of a kind share one compiled block. The head and AdamW are not compiled: on CPUs they work in
pieces that fit the caches, which does as well (docs/log.md).

A process pays about ten seconds for compiled blocks, the first one half a minute, so short runs stay
eager. The choice depends on the run's settings and the machine, never on how much of the run is left:
a run that is continued computes what it would have computed, bit for bit.
"""

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanochat.common import get_base_dir
from nanochat.flash3 import flash3_for
from nanochat.layers import RunBlock, run_block

COMPILE_MODES = ("auto", "on", "off")

# Eager work below which compiling is not repaid: it saves about a tenth of the step
_MIN_RUN_S = 600.0
_MIN_PROCESS_S = 200.0
# FLOP/s of eager training, to guess seconds: a core with AVX-512 (measured: 30-60 G), an older GPU
_CPU_FLOPS_PER_THREAD = 4e10
_GPU_FLOPS = 5e13


@dataclass(frozen=True)
class CompileChoice:
    """`reason` completes the sentence "compile is on/off: …"."""

    on: bool
    reason: str

    def __str__(self) -> str:
        return f"Compiling the training step: {'on' if self.on else 'off'} ({self.reason})"


def choose_compile(
    mode: str, *, missing: str, run_s: float, process_s: float | None = None
) -> CompileChoice:
    """What `compile = mode` means where `missing` ("": nothing) keeps a compiler from working.

    run_s: seconds of eager training in the whole run; process_s: in each process that would have to
    load what was compiled, None for the whole run. `on` without a compiler is eager, too, and says so.
    """
    if mode not in COMPILE_MODES:
        raise ValueError(f"compile is {mode!r}: choose one of {', '.join(COMPILE_MODES)}")
    if mode == "off":
        return CompileChoice(False, "as it was told")
    if missing:
        return CompileChoice(False, missing)
    if mode == "on":
        return CompileChoice(True, "as it was told")
    process_s = run_s if process_s is None else process_s
    if run_s < _MIN_RUN_S:
        return CompileChoice(
            False, f"about {run_s:.0f} s of training repay it not; from {_MIN_RUN_S:.0f} s on"
        )
    if process_s < _MIN_PROCESS_S:
        return CompileChoice(
            False,
            f"about {process_s:.0f} s of training a round repay no start; from {_MIN_PROCESS_S:.0f} s on",
        )
    return CompileChoice(True, f"the run trains for {run_s:.0f} s or so")


def training_seconds(flops: float, device_type: str, *, threads: int, devices: int = 1) -> float:
    """A guess, to the order of magnitude, of what eager training of `flops` on all devices takes."""
    if device_type == "cpu":
        return flops / (_CPU_FLOPS_PER_THREAD * threads * devices)
    return flops / (_GPU_FLOPS * devices)


def what_compiling_lacks(device_type: str) -> str:
    """What `torch.compile` needs on this machine and is not there; "" if all of it is.

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


def accelerated_block(
    mode: str, *, device: torch.device, run_s: float, process_s: float | None = None
) -> tuple[RunBlock, CompileChoice]:
    """The form of `run_block` for `Trainer`, and the line to log. Arguments as of `choose_compile`."""
    missing = what_compiling_lacks(device.type)
    choice = choose_compile(mode, missing=missing, run_s=run_s, process_s=process_s)
    if choice.on:
        if (compiled := compiled_block(device)) is not None:
            return compiled, choice
        choice = CompileChoice(False, "the compiler that is here does not work")
    return run_block, choice


def compiled_block(device: torch.device) -> RunBlock | None:
    """A compiled `run_block`, which compiles when it is first called; None if compiling fails here.

    What was compiled is kept in `$NANOCHAT_BASE_DIR/compile_cache`, for all later processes.
    """
    cache = get_base_dir() / "compile_cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    # in this process: a pool of compilers would be processes to start and to end
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch._dynamo  # 1.5 s and 150 MB, so only here

    flash3_for(device)  # may fetch it: nothing that a compiler should trace into
    if not _works(device):
        return None
    # a later surprise of the compiler means an eager function, not the end of a run
    torch._dynamo.config.suppress_errors = True
    return torch.compile(run_block, dynamic=False)


def _works(device: torch.device) -> bool:
    """Compile one line, and see."""
    try:
        doubled: Tensor = torch.compile(_double, dynamic=False)(torch.ones(8, device=device))
        return bool((doubled == 2).all())
    except (RuntimeError, OSError, ImportError):  # what dynamo, inductor and the linker raise
        return False


def _double(x: Tensor) -> Tensor:
    return 2 * x
