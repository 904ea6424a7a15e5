"""A training step's blocks in their compiled form, where that was chosen (choices.py).

All layers of a kind share one compiled block. The head and AdamW are not compiled: on CPUs they work in
pieces that fit the caches, which does as well (docs/log.md).
"""

import logging
import os
from typing import Any

import torch
from torch import Tensor

from nanochat.common import compile_cache
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
from nanochat.layers import Block, Mix, RunBlock, run_block

_LOG = logging.getLogger(__name__)
_GRAPHS = 64  # that one function may be compiled to; torch's 8 are for functions that it should not
_REASON = 200  # characters of a compiler's complaint


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
    if missing and mode != "off" and device.type == "cuda":
        _LOG.warning("%s, so nothing is compiled: steps take a quarter longer", missing)
    if choice.on:
        if (compiled := compiled_block(device)) is not None:
            run = compiled
        else:
            choice = CompileChoice(False, "the compiler that is here does not work")
    return run, make_choices(
        device_type=device.type,
        dtype=model.compute_dtype,
        windows=tuple(min(window, model.config.sequence_len) for window in model.windows),
        length=model.config.sequence_len,
        has_flash3=flash3_for(device) is not None,
        compiling=choice,
        fp8=model.fp8,
    )


def compiled_block(device: torch.device, *, backend: Any = "inductor") -> "CompiledBlock | None":
    """A compiled `run_block`, which compiles when it is first called; None if compiling fails here.

    What was compiled is kept in `$NANOCHAT_BASE_DIR/compile_cache`, for all later processes. `backend` is
    torch.compile's, which compiles a graph.
    """
    cache = compile_cache()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    # in this process: a pool of compilers would be processes to start and to end. For CUDA, where a block
    # is some twenty kernels, `prepare_device` has asked for one.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

    flash3_for(device)  # may fetch it: nothing that a compiler should trace into
    if not _works(device, backend):
        return None
    return CompiledBlock(device, backend)


class CompiledBlock:
    """`run_block`, compiled, or from its first failure to compile on as it is, with one warning.

    Backward graphs are compiled with their forward ones, before anything runs: torch would do it at the
    first `.backward()`, where no failure can be mended any more. A graph that breaks is a failure too:
    what is logged as compiled is compiled whole.
    """

    def __init__(self, device: torch.device, backend: Any) -> None:
        import torch._dynamo
        import torch._functorch.config
        import torch._inductor.exc

        if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
            torch._functorch.config.force_non_lazy_backward_lowering = True
        # kinds of block times sizes of micro-batch, of which `Trainer` may try several
        torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
        self._cuda = device.type == "cuda"
        self._failures = (
            torch._dynamo.exc.TorchDynamoException,
            torch._dynamo.exc.FailOnRecompileLimitHit,
            torch._inductor.exc.InductorError,
        )
        self._run: RunBlock = torch.compile(
            run_block, dynamic=False, fullgraph=True, backend=backend
        )

    @property
    def is_compiled(self) -> bool:
        """Whether nothing has failed so far."""
        return self._run is not run_block

    def __call__(
        self,
        block: Block,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        ve: Tensor | None,
        cache: KVCache | None,
        mix: Mix | None = None,
    ) -> Tensor:
        if self._cuda:
            prepare_flex(x.size(1), block.attn.window, x.device)  # nothing to trace
        try:
            return self._run(block, x, cos, sin, ve, cache, mix)
        except self._failures as error:
            if not self.is_compiled:
                raise
            _LOG.warning(
                "the blocks cannot be compiled (%s) and run eagerly from here on: on a GPU steps take a "
                "quarter longer, on a CPU a tenth",
                _reason(error),
            )
            self._run = run_block
            return run_block(block, x, cos, sin, ve, cache, mix)


def _works(device: torch.device, backend: Any) -> bool:
    """Compile one line and its gradient, and see."""
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        doubled: Tensor = torch.compile(_double, dynamic=False, backend=backend)(x)
        doubled.sum().backward()
        return x.grad is not None and bool((doubled == 2).all() and (x.grad == 2).all())
    except (RuntimeError, OSError, ImportError) as error:  # of dynamo, inductor and the linker
        _LOG.warning("compiling fails here: %s", _reason(error))
        return False


def _reason(error: Exception) -> str:
    """The first line of what went wrong, not of what was being done."""
    inner = getattr(error, "inner_exception", None) or error
    lines = str(inner).strip().splitlines() or [""]
    return f"{type(inner).__name__}: {lines[0][:_REASON]}"


def _double(x: Tensor) -> Tensor:
    return 2 * x
