"""The head's passes over a chunk of logits as one Triton kernel: for CUDA.

One row a program. The first loop sums exp2, the second one overwrites the logits with their gradient:
a logit is read from memory, read again (mostly from the L2 cache), and written, 4-6 bytes in all. torch's
functions one after the other move 60, since each of the twelve reads and writes fp32 (docs/performance.md).
Importing this module imports Triton, so only what runs on CUDA does.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Logits of a row at once, 8 each of 256 threads. A chunk of 4,096 rows of 65,536 takes 0.62 ms on an H100,
# with 4,096 logits 0.77, with 8,192 0.90
_BLOCK, _WARPS = 2048, 8


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]  # Triton's language, not Python's
    logits,
    targets,
    nats,
    scale,
    stride,
    vocab,
    BITS: tl.constexpr,
    OUTER: tl.constexpr,
    LN2: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cross entropy of a row of 2/15 of its logits, then their gradient in its place."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    target = tl.load(targets + row).to(tl.int32)
    counted = tl.where(target >= 0, 1.0, 0.0)
    target = tl.maximum(target, 0)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    # picked on the way: a load of its own could meet what another warp has already overwritten
    picked = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, vocab, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(start + columns, mask=columns < vocab, other=0.0).to(tl.float32)
        bits = BITS * tl.sigmoid(z)
        sums += tl.where(columns < vocab, tl.exp2(bits), 0.0)
        picked += tl.where(columns == target, bits, 0.0)
    total = tl.sum(sums, axis=0)
    of_target = tl.sum(picked, axis=0)
    tl.store(nats + row, (tl.log2(total) - of_target) * LN2 * counted)
    if GRADIENT:
        weight = OUTER * counted * tl.load(scale)
        share = weight / total
        for first in range(0, vocab, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            z = tl.load(start + columns, mask=columns < vocab, other=0.0).to(tl.float32)
            s = tl.sigmoid(z)
            of_softmax = share * tl.exp2(BITS * s) - tl.where(columns == target, weight, 0.0)
            gradient = of_softmax * s * (1 - s)
            tl.store(start + columns, gradient.to(logits.dtype.element_ty), mask=columns < vocab)


def fused_passes(
    scaled: Tensor, targets: Tensor, nats: Tensor, scale: Tensor | None, *, outer: float
) -> None:
    """As `head._passes`: from 2/15 of the raw logits (n, V) to `nats` (n,), and to their gradient in
    place. `outer` is what the softcap multiplies a sigmoid with.
    """
    assert scaled.stride(1) == 1 and nats.is_contiguous() and targets.is_contiguous()
    kernel: Any = _row_kernel
    kernel[(len(scaled),)](
        scaled,
        targets,
        nats,
        nats if scale is None else scale,
        scaled.stride(0),
        scaled.size(1),
        BITS=outer / math.log(2),
        OUTER=outer,
        LN2=math.log(2),
        GRADIENT=scale is not None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(scaled.size(1))),
        num_warps=_WARPS,
    )
