"""What a run configuration means in nanochat's terms: the model, its optimizer, its schedule.

Server and workers both ask here, so they can't disagree.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat import param_groups
from nanochat.gpt import GPT, build_gpt
from nanochat.gpt_config import GPTConfig, config_for_depth
from nanochat.optim import MuonAdamW
from nanochat.schedule import (
    Schedule,
    learning_rates,
    scale_lr_for_batch,
    scale_weight_decay,
)
from pilot.config import RunConfig


def model_config(config: RunConfig) -> GPTConfig:
    """Raises nanochat.errors.UserError for a shape that the architecture can't have."""
    return config_for_depth(
        config.depth,
        vocab_size=config.vocab_size,
        sequence_len=config.sequence_len,
        arch=config.arch,
        window_pattern=config.window_pattern or None,
    )


def build_model(config: RunConfig, *, device: torch.device, compute_dtype: torch.dtype) -> GPT:
    """The model with its rotary tables; its weights are undefined until somebody fills them."""
    with torch.device("meta"):
        model = GPT(model_config(config), compute_dtype=compute_dtype)
    model.to_empty(device=device)
    model.init_rotary()
    if config.fp8:
        model.use_fp8()
    return model


def initial_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """The fp32 weights that a run starts from: a function of its seed."""
    cpu = torch.device("cpu")
    model = build_gpt(
        model_config(config), device=cpu, seed=config.seed, compute_dtype=torch.float32
    )
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def total_tokens(config: RunConfig) -> int:
    """Tokens that the run trains on, whole optimizer steps."""
    with torch.device("meta"):
        model = GPT(model_config(config), compute_dtype=torch.float32)
    wanted = config.total_tokens or config.target_param_data_ratio * model.data_ratio_params()
    return max(1, round(wanted / config.total_batch_size)) * config.total_batch_size


def scaled_weight_decay(config: RunConfig) -> float:
    return scale_weight_decay(config.weight_decay, config.depth)


def schedule(config: RunConfig, *, total_tokens: int) -> Schedule:
    """Rates as functions of the global step = committed tokens / total batch size."""
    return Schedule(
        total_steps=total_tokens / config.total_batch_size,
        weight_decay=scaled_weight_decay(config),
        warmdown_ratio=config.warmdown_ratio,
    )


@dataclass(frozen=True)
class _Rate:
    """How far one step moves a tensor at most: `fixed`, times what AdamW's `betas` allow a coordinate, and
    `decay` times its norm."""

    name: str
    fixed: float
    decay: float
    betas: tuple[float, float] | None

    def furthest(self, share: float) -> float:
        """Without the decay, of a client that has this `share` of the batch."""
        if self.betas is None:
            return self.fixed
        beta1, beta2 = betas_of_share(self.betas, share)
        spread = max(1e-3, 1 - beta1**2 / beta2)
        return self.fixed * max(1.0, (1 - beta1) / math.sqrt((1 - beta2) * spread))


@dataclass(frozen=True)
class Movement:
    """How far optimizer steps can move the weights of a run at most, whatever the data: an L2 norm.

    A Muon update has the norm of an orthogonal matrix (`update_rules.snap_norm`). Of AdamW, no coordinate moves
    further than lr * (1 - beta1) / sqrt((1 - beta2)(1 - beta1^2 / beta2)), by Cauchy-Schwarz over its moments.
    Measured, clients move 1-35 % of it.
    """

    rates: tuple[_Rate, ...]

    @staticmethod
    def of(config: RunConfig) -> "Movement":
        with torch.device("meta"):
            model = GPT(model_config(config), compute_dtype=torch.float32)
        names = {id(param): name for name, param in model.named_parameters()}
        return Movement(
            tuple(
                _Rate(names[id(param)], *_furthest(group, param.shape))
                for group in make_optimizer(config, model).param_groups
                for param in group["params"]
            )
        )

    def limit(
        self, weights: Mapping[str, torch.Tensor], *, steps: int, share: float = 1.0
    ) -> float:
        """For `steps` steps from `weights` of a client that has `share` of the batch; half as much again for
        bf16 and what rounding adds."""
        total = 0.0
        for rate in self.rates:
            norm = float(torch.linalg.vector_norm(weights[rate.name].float()))
            step = rate.furthest(share)
            furthest = norm + steps * step  # to which it may have grown
            total += (steps * (step + rate.decay * furthest)) ** 2
        return 1.5 * math.sqrt(total)


def _furthest(
    group: Mapping[str, Any], shape: torch.Size
) -> tuple[float, float, tuple[float, float] | None]:
    rate = float(group["lr"])
    if group["kind"] == "muon":
        rate *= math.sqrt(max(1.0, shape[-2] / shape[-1]))
        return rate * math.sqrt(min(shape[-2:])), rate * group["weight_decay"], None
    return rate * math.sqrt(shape.numel()), rate * group["weight_decay"], group["betas"]


def betas_of_share(betas: tuple[float, float], share: float) -> tuple[float, float]:
    """AdamW's `betas` for a client that takes `share` (0..1) of the batch that they are meant for.

    Its second moments remember as many tokens as those of the whole batch would: a decay in tokens, as in arXiv
    2507.07101. With as many steps as before they would see a fraction of them, and a token that is rare in one
    client's rows would make steps that are too long. What it is worth: docs/quality.md.
    """
    return betas[0], 1.0 - (1.0 - betas[1]) * share


def take_share(
    optimizer: MuonAdamW, betas: Sequence[tuple[float, float] | None], share: float
) -> None:
    """The next steps of `optimizer` are of `share` of the batch for which `betas` are (Muon's groups: None)."""
    for group, whole in zip(optimizer.param_groups, betas, strict=True):
        if whole is not None:
            group["betas"] = betas_of_share(whole, share)


def make_optimizer(config: RunConfig, model: GPT) -> MuonAdamW:
    """Fresh inner optimizer; all rates scaled to the batch."""
    rates = learning_rates(
        config.arch,
        lr=config.lr,
        embedding_lr=config.embedding_lr or None,
        unembedding_lr=config.unembedding_lr or None,
        scalar_lr=config.scalar_lr or None,
    ).scaled(scale_lr_for_batch(config.total_batch_size))
    return param_groups.make_optimizer(model, rates, weight_decay=scaled_weight_decay(config))
