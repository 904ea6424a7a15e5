"""What a run configuration means in nanochat's terms: the model, its optimizer, its schedule.

Server and workers both ask here, so they can't disagree.
"""

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
