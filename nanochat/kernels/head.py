"""lm_head, softcap and cross entropy in one, without ever holding the logits of all tokens.

At a vocabulary of 32,768 a micro-batch's fp32 logits are 512 kB a token, and the plain chain holds
five tensors of that size. Here rows are taken a chunk at a time, and as their gradient is known as
soon as their logits are (nothing follows but a sum), it is computed in the forward pass: no logits are
kept, none are computed twice. The gradient of the chunk overwrites its logits.

With s = sigmoid(2z/15), the softcap 15 tanh(z/15) is 30s - 15 and its derivative 4s(1-s). It is
bounded by 15, so exp cannot overflow and the softmax needs no pass for the maximum. The 2/15 are in
the cast of the weight and the -15 in nobody's way (softmax doesn't see it), so that one multiplication
is left, into the powers of two of exp2: torch's exp takes 2.7 times as long on a CPU with AVX-512.
"""

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.choices import HeadPasses, choose_head_passes, what_compiling_lacks
from nanochat.kernels.fp8 import HeadProducts

_LOG = logging.getLogger(__name__)
_PRICE = "on an H100 that is a sixth of a step at depth 20"
# what Triton raises where it cannot compile: its own errors are RuntimeErrors or plain Exceptions
_COMPILE_FAILURES = (Exception,)

LOGIT_SOFTCAP = 15.0

# Elements of a chunk of logits: for the matmuls it should be large, for passes over it small enough
# for a core's caches. GPUs have the memory for large ones, and need them to be busy: on
# an H100 the head takes 0.97, 0.91 and 0.89 microseconds per token with 2^27, 2^28 and 2^29.
_MATMUL_ELEMENTS = {"cpu": 1 << 25}
_MATMUL_ELEMENTS_GPU = 1 << 28
_PASS_ELEMENTS_CPU = 1 << 19
_CAST_ELEMENTS = 1 << 18  # small enough to be converted in a core's caches
_INNER = 2 / LOGIT_SOFTCAP  # of the logits, in the sigmoid
_OUTER = 2 * LOGIT_SOFTCAP  # of the sigmoid
_BITS = _OUTER / math.log(2)


def softcap(logits: Tensor) -> Tensor:
    """15 tanh(logits / 15), in fp32."""
    return LOGIT_SOFTCAP * torch.tanh(logits.float() / LOGIT_SOFTCAP)


def head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    reduction: str,
    fp8: bool = False,
) -> Tensor:
    """Cross entropy in nats of `targets` under softcap(x @ weight.T), in fp32.

    x: (N, C); weight: (at least vocab_size, C), in fp32, cast to x's dtype in the matmuls; targets:
    (N,), those that are -1 count nothing; reduction: 'sum', 'mean', or 'none', which gives (N,).
    'none' with gradients does hold all logits: what weighs the tokens is only known later. `fp8`: its
    products where gradients follow (fp8.py).
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: choose sum, mean or none")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if reduction == "none":
            logits = softcap(F.linear(x, weight[:vocab_size].to(x.dtype)))
            return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
        loss: Tensor = _HeadLoss.apply(x, weight, targets, vocab_size, reduction, fp8)
        return loss
    nats, _, _ = _chunks(x, weight, targets, vocab_size, scale=None)
    if reduction == "none":
        return nats
    return nats.sum() if reduction == "sum" else nats.sum() / (targets >= 0).sum()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        reduction: str,
        fp8: bool,
    ) -> Tensor:
        scale = torch.ones((), device=x.device)
        if reduction == "mean":
            scale = scale / (targets >= 0).sum()
        # fp8 holds few orders of magnitude: there the gradients of the sum are scaled once they are known
        ctx.left_out = scale if fp8 else None
        nats, ctx.grad_x, ctx.grad_weight = _chunks(
            x, weight, targets, vocab_size, scale=torch.ones_like(scale) if fp8 else scale, fp8=fp8
        )
        return nats.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_x is None:
            raise RuntimeError("the head's gradients are handed out once: compute the loss again")
        grad_x, grad_weight = ctx.grad_x, ctx.grad_weight
        ctx.grad_x = ctx.grad_weight = None
        if ctx.left_out is not None:
            grad = grad * ctx.left_out
        return grad_x.mul_(grad), grad_weight.mul_(grad), None, None, None, None


class _Products:
    """The products of `x` (N, C) with `table` (V, C), in their dtype; fp8.py has them in fp8."""

    gradient_scale = 1.0  # times which `grad_x` takes its gradients

    def __init__(self, x: Tensor, table: Tensor) -> None:
        self._x, self._table = x, table

    def logits(self, first: int, end: int, out: Tensor) -> None:
        torch.mm(self._x[first:end], self._table.T, out=out)

    def grad_x(self, gradient: Tensor, out: Tensor) -> None:
        torch.mm(gradient, self._table, out=out)


@torch.no_grad()
def _chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    scale: Tensor | None,
    fp8: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(nats (N,) unscaled, gradient of x, gradient of weight); with `scale` None those are empty.

    The gradients are those of `scale` times the sum of the nats.
    """
    rows = _rows(x, vocab_size)
    table = _scaled(weight[:vocab_size], x.dtype)
    products = HeadProducts(x, table) if fp8 else _Products(x, table)
    nats = torch.empty(x.size(0), device=x.device)
    grad_x, grad_weight = torch.empty(0), torch.empty(0)
    if scale is not None:
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        grad_weight[vocab_size:] = 0
        scale = scale * products.gradient_scale
    alpha = _INNER / products.gradient_scale
    chunk = torch.empty((min(rows, x.size(0)), vocab_size), dtype=x.dtype, device=x.device)
    for first in range(0, x.size(0), rows):
        end = min(first + rows, x.size(0))
        logits = chunk[: end - first]
        products.logits(first, end, logits)
        _passes(logits, targets[first:end], nats[first:end], scale)
        if scale is None:
            continue
        products.grad_x(logits, grad_x[first:end])
        is_first = first == 0
        _add_product(grad_weight[:vocab_size], logits.T, x[first:end], alpha, is_first=is_first)
    return nats, grad_x, grad_weight


def _scaled(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, C) in `dtype`: 2/15 of the weight, so that a matmul yields what the sigmoid takes.

    In pieces, without a copy of the weight in fp32; rounded once, as a cast without the factor is.
    """
    scaled = torch.empty_like(weight, dtype=dtype)
    for mine, more in _pieces(scaled, weight):
        mine.copy_(more * _INNER)
    return scaled


def _add_product(
    total: Tensor, left: Tensor, right: Tensor, alpha: float, *, is_first: bool
) -> None:
    """Add `alpha` times left @ right to `total`, or set it: chunks are summed in the weight's dtype.

    On CUDA bf16 matmuls write their fp32 sums: no rounding to bf16, and 18 bytes an element and chunk
    less than a product of its own (1.4 of 145 ms at depth 20 with chunks of 4,096 rows).
    """
    if total.device.type == "cuda" and left.dtype in (torch.bfloat16, torch.float16):
        if is_first:
            total.zero_()
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=alpha, out=total)
        return
    _add_scaled(total, left @ right, alpha, is_first=is_first)


def _add_scaled(total: Tensor, part: Tensor, alpha: float, *, is_first: bool) -> None:
    """Add `alpha` times `part` to fp32 `total`, or set it, if it is the first.

    Converted in pieces: torch's sum of two dtypes costs five times as much (171 against 31 ms per step
    at a vocabulary of 32,768).
    """
    for mine, more in _pieces(total, part):
        if is_first:
            torch.mul(more.float(), alpha, out=mine)
        else:
            mine.add_(more.float(), alpha=alpha)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each: on a CPU as many as stay in its caches, else all."""
    rows = len(tensors[0])
    if tensors[0].device.type == "cpu":
        rows = max(1, _CAST_ELEMENTS // tensors[0].size(1))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _rows(x: Tensor, vocab_size: int) -> int:
    return max(1, _MATMUL_ELEMENTS.get(x.device.type, _MATMUL_ELEMENTS_GPU) // vocab_size)


def gpu_bytes(tokens: int, *, vocab_size: int, width: int, dtype: torch.dtype) -> int:
    """What the loss of `tokens` holds on a GPU: a chunk of logits, the weight in `dtype`, its fp32 gradient."""
    rows = min(tokens, max(1, _MATMUL_ELEMENTS_GPU // vocab_size))
    return vocab_size * ((rows + width) * dtype.itemsize + 4 * width)


def _passes(scaled: Tensor, targets: Tensor, nats: Tensor, scale: Tensor | None) -> None:
    """From 2/15 of the raw logits, (n, V), to `nats` (n,) and, with `scale`, to their gradient with
    respect to what was handed in, in place."""
    device_type = scaled.device.type
    missing = _Fused.missing(device_type)
    if choose_head_passes(device_type=device_type, missing=missing) is HeadPasses.EAGER:
        _eager_passes(scaled, targets, nats, scale)
        return
    from nanochat.kernels.fused_head import fused_passes  # imports Triton

    try:
        fused_passes(scaled, targets, nats, scale, outer=_OUTER)
    except _COMPILE_FAILURES as error:  # before it has run, so nothing is overwritten
        _Fused.give_up(error)
        _eager_passes(scaled, targets, nats, scale)


class _Fused:
    """Why this process's GPU has no fused passes, once it is known."""

    reason: str | None = None

    @classmethod
    def missing(cls, device_type: str) -> str:
        if device_type != "cuda":
            return ""
        if cls.reason is None:
            cls.reason = what_compiling_lacks(device_type)
            if cls.reason:
                _LOG.warning("the head's loss is computed unfused (%s): %s", cls.reason, _PRICE)
        return cls.reason

    @classmethod
    def give_up(cls, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        first = str(error).splitlines()[0] if str(error) else ""
        cls.reason = f"{type(error).__name__}: {first}"
        _LOG.warning("the head's kernel cannot be compiled (%s): %s", cls.reason, _PRICE)


def _eager_passes(scaled: Tensor, targets: Tensor, nats: Tensor, scale: Tensor | None) -> None:
    """`_passes` by torch's functions: on a CPU in pieces that fit its caches."""
    step = len(scaled)
    if scaled.device.type == "cpu":
        step = max(1, _PASS_ELEMENTS_CPU // scaled.size(1))
    counted = (targets >= 0).float()
    totals, bits_of_target = torch.empty_like(nats), torch.empty_like(nats)
    given = (scaled, targets.clamp_min(0)[:, None], totals[:, None], bits_of_target[:, None])
    weights = counted if scale is None else _OUTER * scale * counted
    pieces = zip(*(t.split(step) for t in (*given, weights[:, None])), strict=True)
    for z, target, total, bits, weight in pieces:
        s = z.float().sigmoid_()  # fp32 is overwritten
        e = torch.mul(s, _BITS)
        torch.gather(e, 1, target, out=bits)
        torch.sum(e.exp2_(), 1, keepdim=True, out=total)
        if scale is None:
            continue
        e.mul_(weight / total).scatter_add_(1, target, -weight)
        torch.ops.aten.sigmoid_backward.grad_input(e, s, grad_input=s)
        if s is not z:
            z.copy_(s)
    torch.mul(totals.log2_().sub_(bits_of_target), counted.mul_(math.log(2)), out=nats)
