"""The GPT: one class, two architectures.

`classic` is what transformers' NanoChatForCausalLM computes. `modern` adds value embeddings,
residual scalars, smear and backout: a lower loss per token, but 2.5 times the bytes to synchronise at
depth 20. Both share rotary positions, QK norm, grouped-query attention, relu^2 MLPs, untied
embeddings, norms without weights, no biases, and a softcap on the logits.

Master weights are fp32 and cast to the activations' dtype in each matmul, so no autocast is needed;
the embedding tables, which are only gathered, are stored in the compute dtype. A new model's
tensors are memory without data (none at all on the meta device) until `init_weights` or a
checkpoint fills them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nanochat.common import autodetect_device_type
from nanochat.gpt_config import SMEAR_CHANNELS, GPTConfig, config_for_depth
from nanochat.kernels.attention import layer_windows, rotary_tables
from nanochat.kernels.choices import default_compute_dtype
from nanochat.kernels.cpu import norm
from nanochat.kernels.fp8 import fits
from nanochat.kernels.head import head_loss, softcap
from nanochat.kv_cache import KVCache
from nanochat.layers import Block, Embedding, Linear, Mix, RunBlock, run_block
from nanochat.optim import MuonAdamW
from nanochat.param_groups import make_optimizer
from nanochat.sampling import sample_next_token, seeded_generator
from nanochat.schedule import learning_rates

__all__ = ["GPT", "GPTConfig", "Linear", "build_gpt", "config_for_depth", "norm"]

_ROTARY_LENGTH_FACTOR = 10  # positions beyond sequence_len, for generation


class _Transformer(nn.Module):
    """Only a name: the keys of a checkpoint begin with `transformer.`."""

    def __init__(self, config: GPTConfig, windows: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.wte = Embedding(config.padded_vocab_size, config.n_embd, dtype=dtype)
        self.h = nn.ModuleList(Block(config, i, w) for i, w in enumerate(windows))


class GPT(nn.Module):
    """The model. `compute_dtype` None takes `default_compute_dtype` of the best device there is."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, *, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if compute_dtype is None:
            compute_dtype = default_compute_dtype(autodetect_device_type())
        self.config = config
        self.compute_dtype = compute_dtype
        self.fp8 = False
        # fp16 cannot hold the small updates of a table that has no fp32 master copy
        table_dtype = torch.float32 if compute_dtype == torch.float16 else compute_dtype
        positions = _ROTARY_LENGTH_FACTOR * config.sequence_len
        # Beyond sequence_len modern's L is a window, as upstream's is; classic sees all, as transformers' does
        full = config.sequence_len if config.is_modern else positions
        self.windows = layer_windows(config.pattern, config.n_layer, config.sequence_len, full=full)
        self.transformer = _Transformer(config, self.windows, table_dtype)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
        if config.is_modern:
            self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
            self.backout_lambda = nn.Parameter(torch.empty(1))
            kv_dim = config.n_kv_head * config.head_dim
            self.value_embeds = nn.ModuleDict(
                {
                    str(i): Embedding(config.padded_vocab_size, kv_dim, dtype=table_dtype)
                    for i in range(config.n_layer)
                    if config.has_value_embedding(i)
                }
            )
        shape = (1, positions, 1, config.head_dim // 2)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(shape, dtype=compute_dtype), persistent=False)

    # -- data for the tensors ------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(
        self, *, seed: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Fill every tensor. A `seed` makes the result a function of it (and of the device type).

        Numbers are drawn in fp32 and rounded, so the dtype of a table does not change the draw.
        """
        if seed is not None:
            generator = torch.Generator(self.get_device()).manual_seed(seed)
        config = self.config
        s = (3 / config.n_embd) ** 0.5  # uniform(-s, s) has the deviation n_embd^-0.5
        s_fc = 0.4 * s if config.is_modern else s

        def normal(weight: Tensor, std: float) -> None:
            draw = torch.empty_like(weight, dtype=torch.float32)
            weight.copy_(draw.normal_(0.0, std, generator=generator))

        def uniform(weight: Tensor, low: float, high: float) -> None:
            draw = torch.empty_like(weight, dtype=torch.float32)
            weight.copy_(draw.uniform_(low, high, generator=generator))

        self.init_rotary()
        normal(self.transformer.wte.weight, 0.8 if config.is_modern else 1.0)
        normal(self.lm_head.weight, 0.001)
        for block in self._blocks():
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                uniform(linear.weight, -s, s)
            uniform(block.mlp.c_fc.weight, -s_fc, s_fc)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        if not config.is_modern:
            return
        for layer, block in enumerate(self._blocks()):
            share = layer / max(config.n_layer - 1, 1)
            self.resid_lambdas[layer] = 1.15 - 0.10 * share
            self.x0_lambdas[layer] = 0.20 - 0.15 * share
            if config.has_value_embedding(layer):
                uniform(self._value_embed(layer).weight, -s, s)
                uniform(block.attn.ve_gate.weight, 0.0, 0.02)
        uniform(self.smear_gate.weight, 0.0, 0.02)
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)

    @torch.no_grad()
    def init_rotary(self) -> None:
        """Fill the rotary tables; enough before loading a checkpoint, which does not hold them."""
        base = 100_000.0 if self.config.is_modern else 10_000.0
        cos, sin = rotary_tables(
            self.cos.size(1),
            self.config.head_dim,
            base=base,
            device=self.cos.device,
            dtype=self.cos.dtype,
        )
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    def use_fp8(self) -> None:
        """From now on, training multiplies in fp8: in blocks and head, wherever sizes allow it.

        Tensors and their names stay as they are. `kernels.fp8.check_fp8` says where that works.
        """
        self.fp8 = True
        for module in self.transformer.h.modules():
            if isinstance(module, Linear):
                module.fp8 = fits(module.weight)

    # -- the function that it computes ---------------------------------------------------------

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: KVCache | None = None,
        loss_reduction: str = "mean",
        *,
        run_block: RunBlock = run_block,
    ) -> Tensor:
        """Logits (B, T, vocab_size) in fp32, or the cross entropy of `targets` in nats.

        idx, targets: (B, T) of token ids, target -1 is ignored; loss_reduction: 'mean', 'sum', or
        'none', which gives (B * T,). With `kv_cache`, idx follows the tokens that it holds and is
        added to them.
        """
        x = self._hidden(idx, kv_cache, run_block)
        if targets is None:
            return self._logits(x)
        return head_loss(
            x.flatten(0, 1),
            self.lm_head.weight,
            targets.reshape(-1),
            vocab_size=self.config.vocab_size,
            reduction=loss_reduction,
            fp8=self.fp8,
        )

    def _hidden(
        self, idx: Tensor, cache: KVCache | None = None, run_block: RunBlock = run_block
    ) -> Tensor:
        """(B, T) token ids to (B, T, C), the normed output of the last block."""
        config, (B, T), pos = self.config, idx.shape, 0
        if cache is not None:
            cache.check_room(B, T)
            pos = cache.get_pos()
        if self.max_positions < pos + T:
            raise ValueError(f"{pos + T} tokens are more than {self.max_positions} positions")
        cos, sin = self.cos[:, pos : pos + T], self.sin[:, pos : pos + T]
        x = norm(self.transformer.wte(idx).to(self.compute_dtype))
        middle: Tensor | None = None
        if config.is_modern:
            x = self._smear(x, cache)
        x0 = x
        for i, block in enumerate(self._blocks()):
            ve, mix = None, None
            if config.is_modern:
                mix = Mix(self.resid_lambdas[i], self.x0_lambdas[i], x0)
                if config.has_value_embedding(i):
                    ve = self._value_embed(i)(idx).to(self.compute_dtype)
            x = run_block(block, x, cos, sin, ve, cache, mix)
            if config.is_modern and i == config.n_layer // 2:
                middle = x
        if cache is not None:
            cache.advance(T)
        if middle is not None:
            x = x - self.backout_lambda.to(x.dtype) * middle
        return norm(x)

    def _smear(self, x: Tensor, cache: KVCache | None) -> Tensor:
        """Mix a gated part of each position's predecessor into it: cheap bigrams."""
        before = None if cache is None else cache.prev_embedding  # (B, 1, C)
        if cache is not None:
            cache.prev_embedding = x[:, -1:].clone()
        first = x[:, :1] if before is None else x[:, :0]  # nothing comes before it
        previous = x[:, :-1] if before is None else torch.cat((before, x[:, :-1]), dim=1)
        x = x[:, 1:] if before is None else x
        gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))  # (B, T or T-1, 1)
        smeared = x + self.smear_lambda.to(x.dtype) * gate * previous
        return torch.cat((first, smeared), dim=1)

    def _logits(self, x: Tensor) -> Tensor:
        return softcap(self.lm_head(x)[..., : self.config.vocab_size])

    @torch.inference_mode()
    def generate(
        self,
        tokens: list[int],
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[int]:
        """Yield `max_tokens` sampled tokens after `tokens`; temperature 0 takes the likeliest.

        Recomputes the whole sequence for each token: plain, and the reference for faster ways.
        """
        device = self.get_device()
        generator = seeded_generator(seed, device)
        ids = torch.tensor([tokens], dtype=torch.long, device=device)
        for _ in range(max_tokens):
            logits = self._logits(self._hidden(ids)[:, -1])  # (1, vocab_size)
            token = sample_next_token(logits, generator, temperature, top_k)
            ids = torch.cat((ids, token), dim=1)
            yield int(token)

    # -- what it is made of --------------------------------------------------------------------

    def get_device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @property
    def max_positions(self) -> int:
        """The longest sequence that it can be given: beyond sequence_len for generation only."""
        return self.cos.size(1)

    def _blocks(self) -> Iterator[Block]:
        for block in self.transformer.h:
            assert isinstance(block, Block)
            yield block

    def _value_embed(self, layer: int) -> nn.Embedding:
        embedding = self.value_embeds[str(layer)]
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def params_by_role(self) -> dict[str, list[nn.Parameter]]:
        """All parameters, as `param_groups` gives them their rules."""
        modern = self.config.is_modern
        return {
            "lm_head": list(self.lm_head.parameters()),
            "wte": list(self.transformer.wte.parameters()),
            "value_embeds": list(self.value_embeds.parameters()) if modern else [],
            "resid_lambdas": [self.resid_lambdas] if modern else [],
            "x0_lambdas": [self.x0_lambdas] if modern else [],
            "smear": (
                [*self.smear_gate.parameters(), self.smear_lambda, self.backout_lambda]
                if modern
                else []
            ),
            "matrices": list(self.transformer.h.parameters()),
        }

    def num_scaling_params(self) -> dict[str, int]:
        """Number of parameters by role; `total` is their sum."""
        sizes = {
            role: sum(param.numel() for param in params)
            for role, params in self.params_by_role().items()
        }
        counts = {name: sizes[name] for name in ("wte", "value_embeds", "lm_head")}
        counts["transformer_matrices"] = sizes["matrices"]
        total = sum(sizes.values())
        return {**counts, "scalars": total - sum(counts.values()), "total": total}

    def data_ratio_params(self) -> int:
        """The parameters that a token-to-parameter ratio counts.

        classic counts all of them (20 tokens each are 11.2 G tokens at depth 20), modern those that
        every token is multiplied with: the blocks and lm_head, as its ratios were fitted.
        """
        counts = self.num_scaling_params()
        if self.config.is_modern:
            return counts["transformer_matrices"] + counts["lm_head"]
        return counts["total"]

    def estimate_flops(self) -> int:
        """Floating-point operations per trained token, forward and backward.

        6 per weight of each matmul, and 12 * heads * head_dim per visible key in attention.
        """
        config = self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        visible = sum(min(window, config.sequence_len) for window in self.windows)
        return 6 * weights + 12 * config.n_head * config.head_dim * visible

    def setup_optimizer(
        self,
        unembedding_lr: float | None = None,
        embedding_lr: float | None = None,
        matrix_lr: float | None = None,
        weight_decay: float = 0.0,
        scalar_lr: float | None = None,
    ) -> MuonAdamW:
        """The optimizer over all parameters; a rate that is not given is the architecture's own."""
        rates = learning_rates(
            self.config.arch,
            embedding_lr=embedding_lr,
            unembedding_lr=unembedding_lr,
            scalar_lr=scalar_lr,
        )
        if matrix_lr is not None:
            rates = rates.replace(matrix=matrix_lr)
        return make_optimizer(self, rates, weight_decay=weight_decay)


def build_gpt(
    config: GPTConfig,
    *,
    device: torch.device,
    seed: int,
    compute_dtype: torch.dtype | None = None,
) -> GPT:
    """A new model on `device`.

    Its numbers are drawn on the CPU: a seed means the same weights on every kind of device (up to
    the rounding of the tables to `compute_dtype`, None for the device's default).
    """
    model = GPT(config, compute_dtype=compute_dtype or default_compute_dtype(device.type))
    model.init_weights(seed=seed)
    return model.to(device)
