"""Rotary position embedding and causal attention with a sliding window.

choices.py says which kernel. `scaled_dot_product_attention` has a fused causal kernel on CPU, CUDA and MPS,
and takes an explicit T x T mask for a window shorter than the sequence: exact everywhere, but twice the
work of a windowed kernel at T = 2048. On CPUs windows have a kernel of their own (2.3-2.9 times as fast as
the mask at windows of a quarter), on Hopper GPUs FlashAttention-3 takes all of them, on other CUDA GPUs
FlexAttention where blocks are compiled.
Attention has no fp8 (fp8.py has, for the matmuls around it).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.kernels.blocked import banded_attention, blocked_attention
from nanochat.kernels.choices import Kernel, choose_kernel
from nanochat.kernels.flash3 import flash3_attention, flash3_for
from nanochat.kernels.flex import flex_attention_of_window

_WINDOW_MULTIPLE = 128  # the tile of windowed CUDA kernels; S windows are rounded up to it
_SHORT_WINDOW_DIVISOR = 4
# torch's kernels for sequences that grow: without cuDNN's, for which the host plans each new length (88 ms
# per token at depth 12 on an H100: 10 tokens/s instead of 83). Rows of training have one length.
_OF_ANY_LENGTH = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def rotary_tables(
    length: int, head_dim: int, *, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/head_dim), each (1, length, 1, head_dim/2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / (base**exponents)
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)[None, :, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head: y1 = x1*cos + x2*sin, y2 = -x1*sin + x2*cos.

    x: (B, T, H, D); cos, sin: (1, T, 1, D/2).
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def layer_windows(
    pattern: str, n_layer: int, sequence_len: int, *, full: int | None = None
) -> tuple[int, ...]:
    """How many tokens back each layer sees: the pattern of S and L tiled, the last layer always L.

    L is the whole sequence (or `full`, for generation beyond it), S a quarter of `sequence_len`,
    rounded up to a multiple of 128.
    """
    full = sequence_len if full is None else full
    tile = _SHORT_WINDOW_DIVISOR * _WINDOW_MULTIPLE
    short = (sequence_len + tile - 1) // tile * _WINDOW_MULTIPLE
    windows = {"L": full, "S": short}
    tiled = [windows[pattern[i % len(pattern)]] for i in range(n_layer)]
    tiled[-1] = full
    return tuple(tiled)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """Each position attends to itself and to at most `window` positions before it.

    q: (B, T, H, D); k, v: (B, T, H_kv, D) with H a multiple of H_kv; returns (B, T, H, D). Queries
    and keys have been normed: each has a norm of the order of sqrt(D).
    """
    kernel = choose_kernel(
        device_type=q.device.type,
        dtype=q.dtype,
        length=q.size(1),
        window=window,
        has_flash3=flash3_for(q.device) is not None,
        compiled=torch.compiler.is_compiling(),
    )
    return attention_by(kernel, q, k, v, window=window)


def attention_by(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """`causal_attention` by a kernel that can compute it."""
    if kernel is Kernel.FLASH3:
        flash3 = flash3_for(q.device)
        assert flash3 is not None
        return flash3_attention(flash3, q, k, v, window=window)
    if kernel is Kernel.FLEX:
        return flex_attention_of_window(q, k, v, window=window)
    if kernel is Kernel.BLOCKED:
        if torch.compiler.is_compiling():
            return banded_attention(q, k, v, window=window)
        return blocked_attention(q, k, v, window=window)
    mask = _window_mask(q.size(1), window, q.device) if kernel is Kernel.MASK else None
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.size(2) != k.size(2),
    )
    return y.transpose(1, 2)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *, pos: int, window: int
) -> Tensor:
    """`causal_attention` of T new positions from `pos` on, over the `pos` cached ones and themselves.

    q: (B, T, H, D); k, v: (B, T, H_kv, D); keys, values: (B, length, H_kv, D), whose first `pos`
    positions are filled and whose next T are written here.
    """
    T = q.size(1)
    end = pos + T
    keys[:, pos:end] = k
    values[:, pos:end] = v
    if q.device.type == "cuda":
        with sdpa_kernel(_OF_ANY_LENGTH):
            return _after(q, k, v, keys[:, :end], values[:, :end], window=window)
    return _after(q, k, v, keys[:, :end], values[:, :end], window=window)


def _after(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *, window: int) -> Tensor:
    """Attention of the last T of `keys`' positions, whose own keys and values are k and v."""
    T, end = q.size(1), keys.size(1)
    pos = end - T
    if pos == 0:
        return causal_attention(q, k, v, window=window)
    first = max(0, pos - window)  # the oldest key that the first new position sees
    visible = None
    if T > 1:
        queries = torch.arange(pos, end, device=q.device)[:, None]
        distance = queries - torch.arange(first, end, device=q.device)
        visible = (distance >= 0) & (distance <= window)  # (T, end - first)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        keys[:, first:].transpose(1, 2),
        values[:, first:].transpose(1, 2),
        attn_mask=visible,
        enable_gqa=q.size(2) != k.size(2),
    )
    return y.transpose(1, 2)


@lru_cache(maxsize=8)
def _window_mask(T: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool: True where key j is visible to query i, that is 0 <= i - j <= window."""
    # Outside inference mode: a mask first made during an evaluation is used in training later.
    with torch.inference_mode(False):
        distance = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
        return (distance >= 0) & (distance <= window)
