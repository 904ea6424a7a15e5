"""Sliding windows through FlexAttention, of which torch's compiler makes one kernel for CUDA.

That kernel skips the tiles that the window hides, according to its block mask, which is computed once for a
length and a window. Called without a compiler it computes all scores, which is slow and right.
"""

from typing import Any

import torch
from torch import Tensor

_masks: dict[tuple[int, int, torch.device], Any] = {}  # by length, window, device


def prepare_flex(length: int, window: int, device: torch.device) -> None:
    """Make the block mask that `flex_attention_of_window` will look for: no part of what is compiled."""
    # imports the compiler, so only where it is used
    from torch.nn.attention.flex_attention import create_block_mask

    key = (length, window, device)
    if key in _masks or window >= length - 1:  # a full window has the causal kernel
        return

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key <= window)

    with torch.inference_mode(False):  # or training could not use what an evaluation has made
        _masks[key] = create_block_mask(visible, None, None, length, length, device=device)


def flex_attention_of_window(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """Causal attention to `window` positions before each; shapes as in `causal_attention`."""
    from torch.nn.attention.flex_attention import flex_attention

    y = flex_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=_masks[(q.size(1), window, q.device)],
        enable_gqa=q.size(2) != k.size(2),
    )
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)
