"""What may enter the mean, and the mean.

A reply reaches the model only through `refusal`: tensors of the right names, shapes and dtype, all
finite, with tokens behind them. The mean is folded in the order it is given (lease order), one reply at
a time: memory is one model, not one a client, and the result doesn't depend on who arrived first.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def refusal(
    update: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, tokens: int
) -> str | None:
    """Why `update` (a pseudo-gradient) may not be merged into `weights`, or None: it may."""
    if tokens <= 0:
        return f"it reports {tokens} tokens"
    if update.keys() != weights.keys():
        strange = sorted(update.keys() ^ weights.keys())
        return f"its tensors are not the model's (first difference: {strange[0]})"
    for name, tensor in update.items():
        if tensor.shape != weights[name].shape:
            expected = tuple(weights[name].shape)
            return f"{name} has shape {tuple(tensor.shape)}, not {expected}"
        if not tensor.is_floating_point():
            return f"{name} has dtype {tensor.dtype}"
        # a sum is finite unless a term isn't (or it overflows: also no update that one wants)
        if not bool(torch.isfinite(tensor.float().sum())):
            return f"{name} is not finite"
    return None


def weighted_mean(
    updates: Iterable[tuple[float, Mapping[str, Tensor]]],
) -> dict[str, Tensor] | None:
    """sum(weight * update) / sum(weight), fp32, folded in the order given; None if there are none.

    Raises ValueError for a weight that isn't positive: a mean without tokens has no meaning.
    """
    total_weight = 0.0
    total: dict[str, Tensor] = {}
    for weight, update in updates:
        if not weight > 0:
            raise ValueError(f"weights must be positive, not {weight}")
        total_weight += weight
        for name, tensor in update.items():
            if name in total:
                total[name].add_(tensor.float(), alpha=weight)
            else:
                total[name] = tensor.float() * weight
    if not total:
        return None
    for tensor in total.values():
        tensor.div_(total_weight)
    return total
