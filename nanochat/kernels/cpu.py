"""Parts of a block for CPUs, with gradients by hand: fewer passes over memory, and less of it kept.

torch's RMS norm of a bf16 tensor is ten passes on a CPU and keeps two fp32 copies of it for the backward
pass; a chain of rotary, norm and scale does that for each of its steps. Here a piece that fits the
caches goes through all steps in fp32 and is rounded once; what is kept is the input, and one number a
row. Compilers and GPUs get the plain forms, from which these differ by rounding only.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.attention import apply_rotary

_PIECE = 1 << 18  # elements
_EPS = torch.finfo(torch.float32).eps  # torch's default


def norm(x: Tensor) -> Tensor:
    """RMS norm without weights, over the last dimension."""
    if _plain(x):
        return F.rms_norm(x, (x.size(-1),))
    y: Tensor = _RMSNorm.apply(x)
    return y


def rotated_norm(x: Tensor, cos: Tensor, sin: Tensor, *, scale: float) -> Tensor:
    """`scale` times the RMS norm of each head of `apply_rotary(x, cos, sin)`.

    x: (B, T, H, D); cos, sin: (1, T, 1, D/2).
    """
    if _plain(x):
        y = F.rms_norm(apply_rotary(x, cos, sin), (x.size(-1),))
        return y if scale == 1.0 else y * scale
    y = _RotatedNorm.apply(x, cos, sin, scale)
    return y


def relu_squared_mlp(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """relu(x @ inner.T)^2 @ outer.T; weights are cast to x's dtype. x: (..., C)."""
    if _plain(x):
        hidden = F.relu(F.linear(x, inner.to(x.dtype))).square()
        return F.linear(hidden, outer.to(x.dtype))
    y: Tensor = _ReluSquaredMLP.apply(x, inner, outer)
    return y


def _plain(x: Tensor) -> bool:
    by_hand = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)
    return not by_hand or not torch.is_grad_enabled() or torch.compiler.is_compiling()


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, as many as are a piece of the first one."""
    first = tensors[0]
    rows = max(1, _PIECE // max(1, first[0].numel()))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _inverse_rms(x: Tensor) -> Tensor:
    """(..., 1) of fp32 x (..., D)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.size(-1)).add_(_EPS).rsqrt_()


def _norm_gradient(grad: Tensor, x: Tensor, inverse: Tensor, scale: float = 1.0) -> Tensor:
    """The gradient of x (..., D) from that of scale * x * inverse, where inverse is 1 / rms(x)."""
    along = (grad * x).sum(dim=-1, keepdim=True)
    along.mul_(inverse.pow(3)).mul_(scale / x.size(-1))
    return torch.mul(grad, scale * inverse).addcmul_(x, along, value=-1)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        out = torch.empty_like(rows)
        inverse = torch.empty((len(rows), 1))
        for piece, kept, y in _pieces(rows, inverse, out):
            wide = piece.float()
            kept.copy_(_inverse_rms(wide))
            y.copy_(wide * kept)
        ctx.save_for_backward(rows, inverse)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        rows, inverse = ctx.saved_tensors
        out = torch.empty_like(rows)
        for x, kept, g, gx in _pieces(rows, inverse, grad.reshape(rows.shape), out):
            gx.copy_(_norm_gradient(g.float(), x.float(), kept))
        return out.view(grad.shape)


class _RotatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        cos, sin = cos.float(), sin.float()
        out = torch.empty(x.shape, dtype=x.dtype)
        inverse = torch.empty((*x.shape[:-1], 1))
        for piece, kept, y in _pieces(x, inverse, out):
            wide = _rotate(piece.float(), cos, sin)
            kept.copy_(_inverse_rms(wide))
            y.copy_(wide.mul_(scale * kept))
        ctx.save_for_backward(x, cos, sin, inverse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, inverse = ctx.saved_tensors
        out = torch.empty(x.shape, dtype=x.dtype)
        for piece, kept, g, gx in _pieces(x, inverse, grad, out):
            rotated = _rotate(piece.float(), cos, sin)
            back = _norm_gradient(g.float(), rotated, kept, ctx.scale)
            gx.copy_(_rotate(back, cos, -sin))
        return out, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    y = torch.empty_like(x)
    y1, y2 = y.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=-1)
    return y


class _ReluSquaredMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        hidden = torch.mm(rows, inner.to(x.dtype).T).relu_()
        ctx.save_for_backward(rows, inner, outer, hidden)
        return torch.mm(hidden.square(), outer.to(x.dtype).T).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, inner, outer, hidden = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(len(x), -1)
        grad_outer = torch.mm(grad.T, hidden.square())
        grad_hidden = torch.mm(grad, outer.to(x.dtype)).mul_(hidden).mul_(2)
        grad_inner = torch.mm(grad_hidden.T, x)
        grad_x = torch.mm(grad_hidden, inner.to(x.dtype))
        return (
            grad_x.view(*shape[:-1], -1),
            grad_inner.to(inner.dtype),
            grad_outer.to(outer.dtype),
        )
