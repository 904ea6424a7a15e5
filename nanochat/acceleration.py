"""A training step's blocks in their compiled form, where that was chosen (choices.py).

All layers of a kind share one compiled block. The head and AdamW are not compiled: on CPUs they work in
pieces that fit the caches, which does as well (docs/log.md).
"""

import os

import torch
from torch import Tensor

from nanochat.common import get_base_dir
from nanochat.gpt import GPT
from nanochat.kernels.choices import (
    Choices,
    CompileChoice,
    choose_compile,
    make_choices,
    what_compiling_lacks,
)
from nanochat.kernels.flash3 import flash3_for
from nanochat.kernels.flex import prepare_flex
from nanochat.kv_cache import KVCache
from nanochat.layers import Block, RunBlock, run_block


def accelerated_block(
    mode: str, *, model: GPT, run_s: float, process_s: float | None = None
) -> tuple[RunBlock, Choices]:
    """The form of `run_block` for `Trainer`, and what was chosen: a line to log.

    `mode`, `run_s` and `process_s` are as of `choose_compile`.
    """
    device = model.get_device()
    missing = what_compiling_lacks(device.type)
    run: RunBlock = run_block
    choice = choose_compile(
        mode, device_type=device.type, missing=missing, run_s=run_s, process_s=process_s
    )
    if choice.on:
        if (compiled := compiled_block(device)) is not None:
            run = compiled
        else:
            choice = CompileChoice(False, "the compiler that is here does not work")
    return run, make_choices(
        device_type=device.type,
        dtype=model.compute_dtype,
        windows=model.windows,
        length=model.config.sequence_len,
        has_flash3=flash3_for(device) is not None,
        compiling=choice,
    )


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
    compiled = torch.compile(run_block, dynamic=False)
    if device.type != "cuda":
        return compiled

    def run(
        block: Block, x: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        prepare_flex(x.size(1), block.attn.window, x.device)  # nothing to trace
        return compiled(block, x, cos, sin, ve, cache)

    return run


def _works(device: torch.device) -> bool:
    """Compile one line, and see."""
    try:
        doubled: Tensor = torch.compile(_double, dynamic=False)(torch.ones(8, device=device))
        return bool((doubled == 2).all())
    except (RuntimeError, OSError, ImportError):  # what dynamo, inductor and the linker raise
        return False


def _double(x: Tensor) -> Tensor:
    return 2 * x
