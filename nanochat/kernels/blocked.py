"""Causal attention with a window as batched matmuls over blocks of queries: for CPUs.

torch's CPU kernel wants a T x T mask for a window, which costs more than full causal attention. Here a
block of queries meets just the keys that it may see, in one matmul. Queries and keys are normed, which
bounds a score by 1.44 sqrt(D): exp cannot overflow, and the softmax needs no pass for the maximum.
Only each row's log-sum-exp is kept; the backward pass computes the probabilities again.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BAND = 64
_BLOCK = 64  # queries; smaller blocks waste less on hidden keys, larger ones make better matmuls


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """Each position attends to itself and to at most `window` positions before it.

    q: (B, T, H, D); k, v: (B, T, H_kv, D) with H a multiple of H_kv; returns (B, T, H, D). The norm
    of each query and key must be of the order of sqrt(D).
    """
    out: Tensor = _BlockedAttention.apply(q, k, v, window)
    return out


def banded_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """`blocked_attention` for a compiler: all blocks in one batch, no loop, torch's own gradient.

    Each block of queries meets its own keys and those of whole blocks before it, as many as the
    window needs: the same shape for all. Before the sequence there are keys that nobody sees.
    """
    B, T, H, D = q.shape
    H_kv, after = k.size(2), -T % _BAND
    blocks, before = (T + after) // _BAND, -(-window // _BAND)

    def banded(x: Tensor) -> Tensor:
        """(B, T, H_kv, D) to (B * H_kv * blocks, keys, D)."""
        x = F.pad(x.transpose(1, 2), (0, 0, before * _BAND, after))
        x = x.reshape(B, H_kv, before + blocks, _BAND, D)
        x = torch.cat([x[:, :, i : i + blocks] for i in range(before + 1)], dim=3)
        return x.reshape(B * H_kv * blocks, -1, D)

    queries = F.pad(q / math.sqrt(D), (0, 0, 0, 0, 0, after))
    queries = queries.reshape(B, blocks, _BAND, H_kv, H // H_kv, D).permute(0, 3, 1, 4, 2, 5)
    scores = torch.bmm(queries.reshape(B * H_kv * blocks, -1, D), banded(k).mT).float()
    keys = scores.size(-1)
    scores = scores.view(B * H_kv, blocks, H // H_kv, _BAND, keys)
    distance = torch.arange(_BAND, device=q.device)[:, None] + before * _BAND
    distance = distance - torch.arange(keys, device=q.device)
    first = torch.arange(blocks, device=q.device) * _BAND - before * _BAND
    real = first[:, None] + torch.arange(keys, device=q.device) >= 0  # (blocks, keys)
    visible = (distance >= 0) & (distance <= window) & real[:, None, None]
    p = torch.where(visible, scores.exp(), 0.0)
    p = p / p.sum(dim=-1, keepdim=True)
    y = torch.bmm(p.to(v.dtype).view(B * H_kv * blocks, -1, keys), banded(v))
    y = y.view(B, H_kv, blocks, H // H_kv, _BAND, D).permute(0, 2, 4, 1, 3, 5)
    return y.reshape(B, T + after, H, D)[:, :T]


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        B, T, _, D = q.shape
        H_kv = k.size(2)
        q, k, v = _by_kv_head(q / math.sqrt(D), H_kv), _by_kv_head(k, H_kv), _by_kv_head(v, H_kv)
        out = torch.empty_like(q)
        lse = q.new_empty((*q.shape[:2], T, 1), dtype=torch.float32)
        for rows, keys in _blocks(T, window):
            p = _scores(q, k, rows, keys, window).exp_()
            total = p.sum(dim=-1, keepdim=True)
            lse[:, :, rows] = total.log()
            y = torch.bmm(p.to(v.dtype).flatten(1, 2), v[:, 0, keys])
            torch.div(y.view_as(out[:, :, rows]), total, out=out[:, :, rows])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.window, ctx.batch = window, B
        return _by_position(out, B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = _by_kv_head(grad, k.size(0) // ctx.batch)
        delta = (grad * out).sum(dim=-1, keepdim=True, dtype=torch.float32)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys in _blocks(q.size(2), ctx.window):
            p = _scores(q, k, rows, keys, ctx.window).sub_(lse[:, :, rows]).exp_()
            grad_rows = grad[:, :, rows].flatten(1, 2)
            grad_v[:, 0, keys] += torch.bmm(p.to(v.dtype).flatten(1, 2).mT, grad_rows)
            grad_p = torch.bmm(grad_rows, v[:, 0, keys].mT).view_as(p).float()
            grad_scores = grad_p.sub_(delta[:, :, rows]).mul_(p).to(q.dtype).flatten(1, 2)
            grad_q[:, :, rows] = torch.bmm(grad_scores, k[:, 0, keys]).view_as(grad_q[:, :, rows])
            grad_k[:, 0, keys] += torch.bmm(grad_scores.mT, q[:, :, rows].flatten(1, 2))
        grad_q /= math.sqrt(q.size(3))
        return (*(_by_position(x, ctx.batch) for x in (grad_q, grad_k, grad_v)), None)


def _by_kv_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """(B, T, H, D) to (B * H_kv, G, T, D): the G heads that share keys become one matmul's rows."""
    B, T, H, D = x.shape
    return x.transpose(1, 2).reshape(B * num_kv_heads, H // num_kv_heads, T, D)


def _by_position(x: Tensor, batch: int) -> Tensor:
    """The inverse of `_by_kv_head`."""
    return x.view(batch, -1, *x.shape[2:]).transpose(1, 2)


def _blocks(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that any of them sees."""
    for first in range(0, length, _BLOCK):
        end = min(first + _BLOCK, length)
        yield slice(first, end), slice(max(0, first - window), end)


def _scores(q: Tensor, k: Tensor, rows: slice, keys: slice, window: int) -> Tensor:
    """(B * H_kv, G, rows, keys) in fp32 of scaled queries; hidden ones are minus infinity."""
    block = q[:, :, rows]
    scores = torch.bmm(block.flatten(1, 2), k[:, 0, keys].mT).float()
    scores = scores.view(*block.shape[:3], -1)
    num_rows, before = rows.stop - rows.start, rows.start - keys.start
    scores[..., before:].add_(_hidden(num_rows, num_rows, 0, window))
    if rows.stop - 1 - keys.start > window:  # the last query does not see the first key
        edge = min(before, num_rows)
        scores[..., :edge].add_(_hidden(num_rows, edge, before, window))
    return scores


@lru_cache(maxsize=32)
def _hidden(num_rows: int, num_keys: int, before: int, window: int) -> Tensor:
    """(num_rows, num_keys): 0 where the key is visible, else minus infinity.

    The first query comes `before` positions after the first key.
    """
    with torch.inference_mode(False):  # or training could not use what an evaluation has made
        distance = before + torch.arange(num_rows)[:, None] - torch.arange(num_keys)
        hidden = (distance < 0) | (distance > window)
        return torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)
