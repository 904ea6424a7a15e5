"""Which parameter of a GPT is trained by which rule and at which rate."""

from typing import Any, Protocol

import torch
from torch import nn

from nanochat.gpt_config import GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.schedule import LearningRates
from nanochat.update_rules import POLAR_STEPS

_LR_REFERENCE_WIDTH = 768  # the rates of the vocabulary matrices were tuned at this n_embd


class TrainableModel(Protocol):
    """What an optimizer needs of a `nanochat.gpt.GPT`, which can therefore import this module."""

    config: GPTConfig
    compute_dtype: torch.dtype

    def params_by_role(self) -> dict[str, list[nn.Parameter]]:
        """All parameters, by `lm_head`, `wte`, `value_embeds`, `resid_lambdas`, `x0_lambdas`, `smear`
        and `matrices` (of the blocks); the third to the sixth are empty in `classic`."""


def make_optimizer(
    model: TrainableModel, rates: LearningRates, *, weight_decay: float
) -> MuonAdamW:
    """MuonAdamW over `param_groups`; `weight_decay` is that of the matrices."""
    bf16 = model.compute_dtype == torch.bfloat16
    return MuonAdamW(
        param_groups(model, rates, weight_decay=weight_decay),
        polar_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def param_groups(
    model: TrainableModel, rates: LearningRates, *, weight_decay: float
) -> list[dict[str, Any]]:
    """One group per role for AdamW, then one per shape for Muon: all matrices of the blocks.

    `weight_decay` is that of the matrices; the others' are constants of the architecture.
    """
    width_scale = (model.config.n_embd / _LR_REFERENCE_WIDTH) ** -0.5
    embedding_lr = rates.embedding * width_scale
    unembedding_lr = rates.unembedding * width_scale
    roles = model.params_by_role()
    if model.config.is_modern:
        groups = [
            _adamw(roles["lm_head"], unembedding_lr, (0.8, 0.96), 0.01),
            _adamw(roles["wte"], embedding_lr, (0.8, 0.995), 0.001),
            _adamw(roles["value_embeds"], 0.5 * embedding_lr, (0.8, 0.995), 0.01),
            _adamw(roles["resid_lambdas"], 0.01 * rates.scalar, (0.8, 0.95), 0.05),
            _adamw(roles["x0_lambdas"], rates.scalar, (0.96, 0.95), 0.0),
            _adamw(roles["smear"], rates.smear, (0.8, 0.95), 0.0),
        ]
    else:
        groups = [
            _adamw(roles["lm_head"], unembedding_lr, (0.8, 0.95), 0.0),
            _adamw(roles["wte"], embedding_lr, (0.8, 0.95), 0.0),
        ]
    matrices = roles["matrices"]
    for shape in sorted({p.shape for p in matrices}):
        groups.append(
            {
                "kind": "muon",
                "params": [p for p in matrices if p.shape == shape],
                "lr": rates.matrix,
                "momentum": 0.95,
                "ns_steps": POLAR_STEPS,
                "beta2": 0.9,
                "weight_decay": weight_decay,
            }
        )
    return groups


def _adamw(
    params: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> dict[str, Any]:
    return {
        "kind": "adamw",
        "params": params,
        "lr": lr,
        "betas": betas,
        "eps": 1e-10,
        "weight_decay": weight_decay,
    }
