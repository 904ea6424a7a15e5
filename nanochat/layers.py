"""The layers of a GPT: matmuls over fp32 master weights, attention, MLP, and the block of the two."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.gpt_config import VE_GATE_CHANNELS, GPTConfig
from nanochat.kernels.attention import cached_attention, causal_attention
from nanochat.kernels.cpu import norm, relu_squared_mlp, rotated_norm
from nanochat.kernels.fp8 import fp8_linear
from nanochat.kv_cache import KVCache


def _leave_unset(_module: nn.Module) -> None:
    """`init_weights` sets all data; torch's own drawing would cost 2 s of imports on meta tensors."""


class Linear(nn.Linear):
    """A matmul in the input's dtype over an fp32 master weight; never a bias.

    With `fp8` set, in fp8 where gradients follow: not in evaluation.
    """

    reset_parameters = _leave_unset
    fp8 = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 and torch.is_grad_enabled():
            return fp8_linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    reset_parameters = _leave_unset


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, window: int) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim, self.window, self.layer = config.head_dim, window, layer
        self.qk_scale = 1.2 if config.is_modern else 1.0
        kv_dim = self.n_kv_head * self.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if config.has_value_embedding(layer):
            self.ve_gate = Linear(VE_GATE_CHANNELS, self.n_kv_head)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """x: (B, T, C); ve: (B, T, n_kv_head * head_dim) on layers with a value embedding."""
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if ve is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))  # (B, T, n_kv_head)
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q = rotated_norm(q, cos, sin, scale=self.qk_scale)
        k = rotated_norm(k, cos, sin, scale=self.qk_scale)
        if cache is None:
            y = causal_attention(q, k, v, window=self.window)
        else:
            keys, values = cache.get_layer_cache(self.layer)
            y = cached_attention(q, k, v, keys, values, pos=cache.get_pos(), window=self.window)
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        if self.c_fc.fp8:
            hidden: Tensor = self.c_proj(F.relu(self.c_fc(x)).square())
            return hidden
        return relu_squared_mlp(x, self.c_fc.weight, self.c_proj.weight)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, window: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer, window)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        x = x + self.attn(norm(x), cos, sin, ve, cache)
        x = x + self.mlp(norm(x))
        return x


class Mix(NamedTuple):
    """What a modern model's block takes in: `resid` * x + `skip` * `x0`, scalars and (B, T, C)."""

    resid: Tensor
    skip: Tensor
    x0: Tensor


def run_block(
    block: Block,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    ve: Tensor | None,
    cache: KVCache | None,
    mix: Mix | None = None,
) -> Tensor:
    """What a faster form of a block (acceleration.py) computes.

    The mix is in it: apart from the block it is six passes over memory, of which a compiler leaves one.
    """
    if mix is not None:
        x = mix.resid * x + mix.skip * mix.x0
    out: Tensor = block(x, cos, sin, ve, cache)
    return out


class RunBlock(Protocol):
    """`run_block`, or a faster form of it."""

    def __call__(
        self,
        block: Block,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        ve: Tensor | None,
        cache: KVCache | None,
        mix: Mix | None = None,
    ) -> Tensor: ...
