"""Matmuls on 8-bit floats: twice the arithmetic of bf16 on GPUs from SM 8.9 on (Ada, Hopper, Blackwell).

Each tensor is scaled by one number so that its largest value is the largest that the format holds
("tensorwise, dynamic"), rounded, and multiplied with the scales undone in the product's fp32 sums.
Activations and weights are e4m3 (3 bits of mantissa, up to 448), gradients e5m2 (2 bits, up to 57,344),
as in arXiv 2209.05433. Weights and what the optimizer holds stay fp32: a checkpoint is the same. Only
training steps use it; evaluation and generation multiply in bf16.

What multiplies is torch._scaled_mm, on CPUs too (slowly): so tests run what a GPU runs. All dimensions
of a product must be multiples of 16, its left factor in rows and its right one in columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.errors import UserError
from nanochat.gpus import capability_of

MULTIPLE = 16  # of which every dimension must be one
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_LEAST = 1e-30  # a largest value below it counts as this: scales and their inverses stay finite
_OLDEST = (8, 9)  # compute capability with such matmuls
# What gradients of the raw logits' 2/15, of at most 30 / 4, are multiplied with: within e5m2's range
_HEAD_GRADIENT_SCALE = 4096.0


def check_fp8(
    device: torch.device, dtype: torch.dtype, *, sequence_len: int, vocab_size: int
) -> None:
    """Raise UserError where a model cannot be trained in fp8; dtype: of its other matmuls."""
    if device.type != "cuda":
        raise UserError(
            f"fp8 needs an NVIDIA GPU (Ada, Hopper or newer), and this trains on {device.type}: leave it out"
        )
    major, minor = capability_of(device)
    if (major, minor) < _OLDEST:
        raise UserError(
            f"fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper), and this one has "
            f"{major}.{minor}: leave it out"
        )
    if dtype != torch.bfloat16:
        raise UserError("fp8 needs bfloat16 for all other matmuls: leave fp8 or NANOCHAT_DTYPE out")
    check_shapes(sequence_len=sequence_len, vocab_size=vocab_size)


def check_shapes(*, sequence_len: int, vocab_size: int) -> None:
    """Raise UserError for a size that the matmuls do not take."""
    for name, size in (("tokens per row", sequence_len), ("vocabulary", vocab_size)):
        if size % MULTIPLE:
            raise UserError(
                f"fp8 needs multiples of {MULTIPLE}: the {name} is {size}, choose "
                f"{size - size % MULTIPLE} or {size + MULTIPLE - size % MULTIPLE}, or leave fp8 out"
            )


def fits(weight: Tensor) -> bool:
    """Whether fp8 multiplies with this matrix: the small gates of a modern model stay in bf16."""
    return all(size % MULTIPLE == 0 for size in weight.shape)


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T and, in the backward pass, both gradients in fp8; the result has x's dtype.

    x: (..., C), of a multiple of 16 rows in all; weight: (D, C), fp32. Inputs are kept as fp8, too.
    """
    y: Tensor = _Linear.apply(x.reshape(-1, x.size(-1)), weight)
    return y.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = _rounded(x, _E4M3)
        w8, w_scale = _rounded(weight, _E4M3)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.weight_dtype = weight.dtype
        # sums of fewer bits (`fast`) are enough here, not for gradients
        return _product(x8, w8.t(), x_scale, w_scale, x.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = _rounded(grad, _E5M2)
        grad_x = _product(g8, _in_columns(w8), g_scale, w_scale, grad.dtype)
        by_row = g8.t().contiguous()
        grad_weight = _product(by_row, _in_columns(x8), g_scale, x_scale, grad.dtype)
        return grad_x, grad_weight.to(ctx.weight_dtype)


class HeadProducts:
    """The head's products with its weight (head.py), for one micro-batch.

    The weight's own gradient is left to bf16: of the logits' gradients it would need a copy with
    rows and columns exchanged, and a sum of chunks apart from the product; that moves about as many
    bytes as the product saves (not measured on a GPU).
    """

    gradient_scale = _HEAD_GRADIENT_SCALE

    def __init__(self, x: Tensor, table: Tensor) -> None:
        """x: (N, C); table: (V, C), 2/15 of the weight."""
        self._x8, self._x_scale = _rounded(x, _E4M3)
        self._table8, self._table_scale = _rounded(table, _E4M3)
        self._by_column: Tensor | None = None
        self._undone = torch.full((), 1 / _HEAD_GRADIENT_SCALE, device=x.device)

    def logits(self, first: int, end: int, out: Tensor) -> None:
        """`out` (end - first, V): 2/15 of the raw logits."""
        torch._scaled_mm(
            self._x8[first:end],
            self._table8.t(),
            scale_a=self._x_scale,
            scale_b=self._table_scale,
            out_dtype=out.dtype,
            use_fast_accum=True,
            out=out,
        )

    def grad_x(self, gradient: Tensor, out: Tensor) -> None:
        """`out` (n, C), from `gradient_scale` times the gradient of 2/15 of the logits (n, V).

        How large that can be is known, so nothing looks for the largest value.
        """
        if self._by_column is None:
            self._by_column = _in_columns(self._table8)
        torch._scaled_mm(
            gradient.to(_E5M2),
            self._by_column,
            scale_a=self._undone,
            scale_b=self._table_scale,
            out_dtype=out.dtype,
            out=out,
        )


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x divided by its scale, in fp8; the scale, fp32): the largest value becomes the format's largest."""
    most = torch.finfo(dtype).max
    largest = torch.amax(x.abs()).float().clamp_min(_LEAST)
    # rounding of the quotient may exceed what the format holds, which would be no number
    return (x.float() * (most / largest)).clamp(-most, most).to(dtype), largest / most


def _in_columns(x: Tensor) -> Tensor:
    """The same matrix, one column after the other in memory."""
    return x.t().contiguous().t()


def _product(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    dtype: torch.dtype,
    *,
    fast: bool = False,
) -> Tensor:
    return torch._scaled_mm(
        left,
        right,
        scale_a=left_scale,
        scale_b=right_scale,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
