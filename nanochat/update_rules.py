"""How one gradient changes weights: AdamW and Muon, as functions of tensors.

Muon's update is upstream's, in this order:
    momentum        Nesterov, as an exponential moving average
    equilibration   rows scaled to their mean norm (MuonEq, arXiv 2603.28254)
    orthogonalize   polar express (arXiv 2505.16932)
    norm snap       to the norm of an exactly orthogonal matrix (upstream names Muon+, arXiv
                    2602.21545; the paper normalizes rows or columns at this place)
    NorMuon         a second moment per row or column (arXiv 2510.05491), norm kept
    weight decay    cautious (arXiv 2510.12402): only where update and weight agree in sign
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# arXiv 2505.16932, for 5 iterations with a safety factor of 2e-2 (upstream's numbers)
_POLAR_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_STEPS = len(_POLAR_COEFFICIENTS)
_POLAR_SAFETY = 1.01
_PIECE = (
    1 << 20
)  # elements of AdamW on a CPU: 86 ms per step at a vocabulary of 32,768, 94 with 2^17
_TINY = 1e-10  # keeps divisions by a norm finite where a gradient is exactly zero


@dataclass(frozen=True, kw_only=True)
class AdamWRule:
    """A group's settings for one step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class MuonRule:
    """A group's settings for one step; `polar_dtype` is that of the matmuls in `polar_express`."""

    lr: float
    momentum: float
    beta2: float
    weight_decay: float
    polar_dtype: torch.dtype
    polar_steps: int = POLAR_STEPS


def adamw_update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    rule: AdamWRule,
) -> None:
    """One AdamW step in place (arXiv 1711.05101): decoupled decay, then the bias-corrected update.

    All tensors have one shape (n,); moments are fp32, weight and grad may be bf16 (rounded once, at
    the end). On a CPU, pieces that fit its caches go through torch's fused kernel one after another,
    so that temporaries stay small.
    """
    pieces = [(weight, grad, exp_avg, exp_avg_sq)]
    if weight.device.type == "cpu":
        pieces = list(zip(*(t.split(_PIECE) for t in pieces[0]), strict=True))
    for piece in pieces:
        _adamw_piece(*piece, step, rule)


def _adamw_piece(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    rule: AdamWRule,
) -> None:
    lr, (beta1, beta2) = rule.lr, rule.betas
    grad, new = grad.float(), weight.float()  # themselves, if they are in fp32
    if weight.device.type == "cpu":
        torch._fused_adamw_(
            [new],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.tensor(float(step))],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=rule.weight_decay,
            eps=rule.eps,
            amsgrad=False,
            maximize=False,
        )
    else:
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.lerp_(grad.square(), 1 - beta2)
        deviation = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(rule.eps)
        new.mul_(1 - lr * rule.weight_decay)
        new.addcdiv_(exp_avg, deviation, value=-lr / (1 - beta1**step))
    if new is not weight:
        weight.copy_(new)


def equilibrate_rows(x: Tensor) -> Tensor:
    """Scale the rows of each matrix (..., m, n) to the mean of their norms.

    As upstream does, which names MuonEq (arXiv 2603.28254): equilibrate before orthogonalizing.
    """
    norms = x.norm(dim=-1, keepdim=True)
    return x * (norms.mean(dim=-2, keepdim=True) / norms.clamp_min(_TINY))


def polar_express(
    x: Tensor, *, dtype: torch.dtype = torch.float32, steps: int = POLAR_STEPS
) -> Tensor:
    """Approximate the orthogonal factor of the polar decomposition of each matrix (..., m, n).

    arXiv 2505.16932: a minimax-optimal polynomial per iteration, where Newton-Schulz repeats one.
    `steps` is at most 5. Works on the smaller Gram matrix, in `dtype`; the safety margin allows bf16.
    """
    x = x.to(dtype)
    x = x / (_POLAR_SAFETY * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in _POLAR_COEFFICIENTS[:steps]:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    return x


def snap_norm(x: Tensor) -> Tensor:
    """Scale each matrix (..., m, n) to the Frobenius norm of an exactly orthogonal one.

    Upstream's step, which names Muon+ (arXiv 2602.21545); there rows or columns are normalized here.
    """
    target = math.sqrt(min(x.size(-2), x.size(-1)))
    return x * (target / x.norm(dim=(-2, -1), keepdim=True).clamp_min(_TINY))


def reduce_variance(x: Tensor, second_moment: Tensor, *, beta2: float) -> Tensor:
    """NorMuon (arXiv 2510.05491): even out the rows of an update, keeping its Frobenius norm.

    Columns instead, if those are more, as upstream does; the paper has rows, one per neuron.

    x: (..., m, n); second_moment: (..., m, 1) if m >= n, else (..., 1, n), is updated in place.
    """
    mean_square = x.square().mean(dim=shorter_dim(x.shape), keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    evened = x * second_moment.clamp_min(_TINY).rsqrt()
    norms = [t.norm(dim=(-2, -1), keepdim=True) for t in (x, evened)]
    return evened * (norms[0] / norms[1].clamp_min(_TINY))


def shorter_dim(shape: torch.Size) -> int:
    return -1 if shape[-2] >= shape[-1] else -2


def muon_update(
    weights: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    rule: MuonRule,
) -> None:
    """One Muon step in place on a stack of matrices (k, m, n), fp32.

    second_moment: as for `reduce_variance`. The decay is cautious (arXiv 2510.12402): only weights
    that the update moves towards zero are decayed.
    """
    momentum_buffer.lerp_(grads, 1 - rule.momentum)
    update = equilibrate_rows(torch.lerp(grads, momentum_buffer, rule.momentum))
    update = polar_express(update, dtype=rule.polar_dtype, steps=rule.polar_steps)
    update = snap_norm(update.float())
    update = reduce_variance(update, second_moment, beta2=rule.beta2)
    lr = rule.lr * math.sqrt(max(1.0, weights.size(-2) / weights.size(-1)))
    if rule.weight_decay:
        agree = (update * weights) >= 0
        update = update + rule.weight_decay * weights * agree
    weights.sub_(update, alpha=lr)
