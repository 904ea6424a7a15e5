"""lm_head, softcap and cross entropy in one, without ever holding the logits of all tokens.

At a vocabulary of 32,768 a micro-batch's fp32 logits are 512 kB a token, and the plain chain holds
five tensors of that size. Here rows are taken a chunk at a time, and as their gradient is known as
soon as their logits are (nothing follows but a sum), it is computed in the forward pass: no logits are
kept, none are computed twice. The gradient of the chunk overwrites its logits.

With s = sigmoid(2z/15), the softcap 15 tanh(z/15) is 30s - 15 and its derivative 4s(1-s). It is
bounded by 15, so exp cannot overflow and the softmax needs no pass for the maximum.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGIT_SOFTCAP = 15.0

# Elements of a chunk of logits: for the matmuls it should be large, for passes over it small enough
# for a core's caches. GPUs have the memory for large ones, and need them to be busy.
_MATMUL_ELEMENTS = {"cpu": 1 << 24}
_MATMUL_ELEMENTS_GPU = 1 << 28
_PASS_ELEMENTS_CPU = 1 << 18
_ADD_ELEMENTS = 1 << 18  # small enough to be converted in a core's caches


def softcap(logits: Tensor) -> Tensor:
    """15 tanh(logits / 15), in fp32."""
    return LOGIT_SOFTCAP * torch.tanh(logits.float() / LOGIT_SOFTCAP)


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, reduction: str
) -> Tensor:
    """Cross entropy in nats of `targets` under softcap(x @ weight.T), in fp32.

    x: (N, C); weight: (at least vocab_size, C), in fp32, cast to x's dtype in the matmuls; targets:
    (N,), those that are -1 count nothing; reduction: 'sum', 'mean', or 'none', which gives (N,).
    'none' with gradients does hold all logits: what weighs the tokens is only known later.
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: choose sum, mean or none")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if reduction == "none":
            logits = softcap(F.linear(x, weight[:vocab_size].to(x.dtype)))
            return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
        loss: Tensor = _HeadLoss.apply(x, weight, targets, vocab_size, reduction)
        return loss
    nats, _, _ = _chunks(x, weight, targets, vocab_size, scale=None)
    if reduction == "none":
        return nats
    return nats.sum() if reduction == "sum" else nats.sum() / (targets >= 0).sum()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, reduction: str
    ) -> Tensor:
        scale = torch.ones((), device=x.device)
        if reduction == "mean":
            scale = scale / (targets >= 0).sum()
        nats, ctx.grad_x, ctx.grad_weight = _chunks(x, weight, targets, vocab_size, scale=scale)
        return nats.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_x is None:
            raise RuntimeError("the head's gradients are handed out once: compute the loss again")
        grad_x, grad_weight = ctx.grad_x, ctx.grad_weight
        ctx.grad_x = ctx.grad_weight = None
        return grad_x.mul_(grad), grad_weight.mul_(grad), None, None, None


@torch.no_grad()
def _chunks(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(nats (N,) unscaled, gradient of x, gradient of weight); with `scale` None those are empty.

    The gradients are those of `scale` times the sum of the nats.
    """
    rows = _rows(x, vocab_size)
    table = weight[:vocab_size].to(x.dtype)
    nats = torch.empty(x.size(0), device=x.device)
    grad_x, grad_weight = torch.empty(0), torch.empty(0)
    if scale is not None:
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
    chunk = torch.empty((min(rows, x.size(0)), vocab_size), dtype=x.dtype, device=x.device)
    for first in range(0, x.size(0), rows):
        end = min(first + rows, x.size(0))
        logits = chunk[: end - first]
        torch.mm(x[first:end], table.T, out=logits)
        _passes(logits, targets[first:end], nats[first:end], scale)
        if scale is None:
            continue
        torch.mm(logits, table, out=grad_x[first:end])
        if weight.dtype == x.dtype:
            grad_weight[:vocab_size].addmm_(logits.T, x[first:end])
        else:  # summed over chunks in the weight's dtype
            _add(grad_weight, logits.T @ x[first:end])
    return nats, grad_x, grad_weight


def _add(total: Tensor, part: Tensor) -> None:
    """Add `part` (n, C) to the first n rows of fp32 `total`.

    Converted in pieces: torch's sum of two dtypes costs five times as much (171 against 31 ms a step
    at a vocabulary of 32,768).
    """
    if total.device.type != "cpu":
        total[: len(part)] += part
        return
    rows = max(1, _ADD_ELEMENTS // part.size(1))
    for mine, more in zip(total[: len(part)].split(rows), part.split(rows), strict=True):
        mine += more.float()


def _rows(x: Tensor, vocab_size: int) -> int:
    return max(1, _MATMUL_ELEMENTS.get(x.device.type, _MATMUL_ELEMENTS_GPU) // vocab_size)


def _passes(logits: Tensor, targets: Tensor, nats: Tensor, scale: Tensor | None) -> None:
    """From raw logits (n, V) to `nats` (n,) and, with `scale`, to their gradient, in place."""
    step = len(logits)
    if logits.device.type == "cpu":
        step = max(1, _PASS_ELEMENTS_CPU // logits.size(1))
    for i in range(0, len(logits), step):
        z, target = logits[i : i + step], targets[i : i + step]
        counted = (target >= 0).float()
        target = target.clamp_min(0)[:, None]
        s = torch.mul(z.float(), 2 / LOGIT_SOFTCAP, out=z if z.dtype == torch.float32 else None)
        s.sigmoid_()
        e = torch.mul(s, 2 * LOGIT_SOFTCAP).sub_(LOGIT_SOFTCAP)
        of_target = e.gather(1, target)[:, 0]
        total = e.exp_().sum(dim=1)
        nats[i : i + step] = (total.log() - of_target) * counted
        if scale is None:
            continue
        weight = 4 * scale * counted
        e.mul_((weight / total)[:, None])
        e.scatter_add_(1, target, -weight[:, None])
        torch.ops.aten.sigmoid_backward.grad_input(e, s, grad_input=s)
        if s is not z:
            z.copy_(s)
