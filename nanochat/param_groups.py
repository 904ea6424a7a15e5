"""Which parameter of a GPT is trained by which rule and at which rate."""

from typing import TYPE_CHECKING, Any

from torch import nn

from nanochat.optim import POLAR_STEPS
from nanochat.schedule import LearningRates

if TYPE_CHECKING:
    from nanochat.gpt import GPT

_LR_REFERENCE_WIDTH = 768  # the rates of the vocabulary matrices were tuned at this n_embd


def param_groups(
    model: "GPT", rates: LearningRates, *, weight_decay: float
) -> list[dict[str, Any]]:
    """A group a role for AdamW, then a group a shape for Muon: all matrices of the blocks.

    `weight_decay` is that of the matrices; the others' are constants of the architecture.
    """
    width_scale = (model.config.n_embd / _LR_REFERENCE_WIDTH) ** -0.5
    embedding_lr = rates.embedding * width_scale
    unembedding_lr = rates.unembedding * width_scale
    head = list(model.lm_head.parameters())
    table = list(model.transformer.wte.parameters())
    if model.config.is_modern:
        smear = [*model.smear_gate.parameters(), model.smear_lambda, model.backout_lambda]
        embeds = list(model.value_embeds.parameters())
        groups = [
            _adamw(head, unembedding_lr, (0.8, 0.96), 0.01),
            _adamw(table, embedding_lr, (0.8, 0.995), 0.001),
            _adamw(embeds, 0.5 * embedding_lr, (0.8, 0.995), 0.01),
            _adamw([model.resid_lambdas], 0.01 * rates.scalar, (0.8, 0.95), 0.05),
            _adamw([model.x0_lambdas], rates.scalar, (0.96, 0.95), 0.0),
            _adamw(smear, rates.smear, (0.8, 0.95), 0.0),
        ]
    else:
        groups = [
            _adamw(head, unembedding_lr, (0.8, 0.95), 0.0),
            _adamw(table, embedding_lr, (0.8, 0.95), 0.0),
        ]
    matrices = list(model.transformer.h.parameters())
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
