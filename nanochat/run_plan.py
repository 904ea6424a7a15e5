"""What a run's settings come to: shape of the model, tokens per step, steps, schedule."""

import math

import torch

from nanochat.common import print0
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, config_for_depth
from nanochat.schedule import (
    REFERENCE_BATCH_TOKENS,
    Schedule,
    make_schedule,
    scale_lr_for_batch,
    scale_weight_decay,
    scale_weight_decay_for_tokens,
)
from nanochat.settings import Settings

_DEFAULT_WEIGHT_DECAY = {"pilot": 0.2, "upstream": 0.28}
_BATCH_EXPONENT = 0.383
_REFERENCE_DEPTH = 12  # upstream scales its weight decay relative to a model of this depth


def model_config(settings: Settings, depth: int, vocab_size: int) -> GPTConfig:
    """The model's shape: the dials of `settings` at `depth`."""
    return config_for_depth(
        depth,
        vocab_size=vocab_size,
        sequence_len=settings.max_seq_len,
        arch=settings.arch,
        head_dim=settings.head_dim,
        aspect_ratio=settings.aspect_ratio,
        window_pattern=settings.window_pattern,
    )


def _reference_params(settings: Settings, params: GPT) -> int:
    """`data_ratio_params` at the depth at which upstream's rules were fitted."""
    reference = model_config(settings, _REFERENCE_DEPTH, params.config.vocab_size)
    with torch.device("meta"):
        return GPT(reference, compute_dtype=torch.float32).data_ratio_params()


def batch_tokens(settings: Settings, params: GPT) -> int:
    """Tokens per step; for -1 by upstream's rule: they grow as the run's tokens to the power of 0.383
    (arXiv 2505.13738), from 2^19 at depth 12, rounded to a power of two."""
    if settings.total_batch_size != -1:
        return settings.total_batch_size
    # all are trained on the same number of tokens per parameter, so parameters stand for tokens
    growth = params.data_ratio_params() / _reference_params(settings, params)
    tokens = 2 ** round(math.log2(REFERENCE_BATCH_TOKENS * growth**_BATCH_EXPONENT))
    rows = max(1, round(tokens / settings.max_seq_len))
    print0(f"Steps of {rows * settings.max_seq_len:,} tokens fit the length of this run")
    return rows * settings.max_seq_len


def step_count(settings: Settings, params: GPT) -> int:
    """Optimizer steps of the run; UserError if its tokens do not fill one."""
    if settings.given_iterations is not None:
        return settings.given_iterations
    if settings.given_flops is not None:
        return max(
            1, round(settings.given_flops / params.estimate_flops() / settings.total_batch_size)
        )
    tokens = settings.target_param_data_ratio * params.data_ratio_params()
    steps = int(tokens // settings.total_batch_size)
    if steps < 1:
        raise UserError(
            f"--target-param-data-ratio {settings.target_param_data_ratio} of this model is less "
            f"than one step of {settings.total_batch_size} tokens: choose a greater ratio"
        )
    return steps


def run_schedule(settings: Settings, params: GPT, num_steps: int) -> Schedule:
    """Learning rate, momentum and weight decay over the run; prints how they were scaled."""
    kind, step_tokens = settings.schedule, settings.total_batch_size
    given = settings.weight_decay
    weight_decay = _DEFAULT_WEIGHT_DECAY[kind] if given is None else given
    if kind == "pilot":
        scaled = scale_weight_decay(weight_decay, settings.depth)
    else:
        # both are trained on the same number of tokens per parameter, so parameters stand for tokens
        scaled = scale_weight_decay_for_tokens(
            weight_decay,
            total_batch_tokens=step_tokens,
            train_tokens=params.data_ratio_params(),
            reference_tokens=_reference_params(settings, params),
        )
    print0(
        f"Scaling weight decay from {weight_decay:.6f} to {scaled:.6f} for depth {settings.depth}"
    )
    print0(f"Scaling learning rates by {scale_lr_for_batch(step_tokens):.6f} for the batch size")
    return make_schedule(
        kind,
        total_steps=num_steps,
        weight_decay=scaled,
        warmup_steps=settings.warmup_steps,
        warmdown_ratio=settings.warmdown_ratio,
        final_lr_fraction=settings.final_lr_fraction,
    )
