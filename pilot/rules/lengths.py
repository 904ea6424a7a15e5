"""How long a mean of updates should be: as long as the updates that it is the mean of.

Muon and AdamW normalise: equally many steps go about as far with any batch. What is noise in an update differs
from client to client and cancels in the mean, which is up to sqrt(K) times shorter than each of K updates that
have little in common. One cluster that takes the same steps on all the rows goes as far as one client does; so
each row of the mean is given the length of the clients' rows back (their root mean square), but never more
than noise can have taken. With one client, and where all agree, nothing changes. What it is worth:
docs/quality.md.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Numbers that are squared at once, in float64: 34 M of them take 0.06 s of a thread. With 2^17 at once it is
# 0.55 s, of page faults.
_PIECE = 1 << 16
_TINY = 1e-300


class Lengths:
    """Row by row of each tensor, how long the updates of a round are; they are added one by one.

    A row is what the last dimension holds (one number of a vector is none: a vector is one row).
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # of w * length^2 and of w^2 * length^2

    def add(self, weight: float, update: Mapping[str, Tensor]) -> None:
        """`weight` is what it counts in the mean."""
        self._weight += weight
        for name, tensor in update.items():
            square = squares(tensor)
            if name not in self._sums:
                self._sums[name] = weight * square, weight * weight * square
                continue
            for total, factor in zip(self._sums[name], (weight, weight * weight), strict=True):
                total.add_(square, alpha=factor)

    def restore(self, mean: Mapping[str, Tensor]) -> None:
        """Make each row of `mean`, in place, as long as those of the updates, by their mean square."""
        for name, tensor in mean.items():
            total, doubly = self._sums[name]
            # of noise alone, the mean's square is sum(w^2 * length^2) / W^2: 1 / K of K equal clients' own
            most = self._weight * total / doubly.clamp_min(_TINY)
            tensor.mul_(factors(tensor, total / self._weight, most=most))


def squares(tensor: Tensor) -> Tensor:
    """The square of each row's length, float64: (..., n) → (..., 1); of a scalar its own square."""
    if tensor.dim() == 0:
        return tensor.double().square()
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    pieces = rows.split(max(1, _PIECE // max(1, rows.shape[1])))  # so that temporaries stay small
    found = torch.cat([piece.double().square().sum(dim=1) for piece in pieces])
    return found.reshape(*tensor.shape[:-1], 1)


def factors(mean: Tensor, usual: Tensor, *, most: Tensor | float) -> Tensor:
    """What gives the rows of `mean` the squared lengths `usual`; each from 1 to the root of `most`. fp32."""
    square = squares(mean)
    ratio = torch.where(square > 0, usual / square.clamp_min(_TINY), torch.ones_like(square))
    ratio = torch.minimum(
        ratio.clamp_min(1.0), torch.as_tensor(most, dtype=ratio.dtype).clamp_min(1.0)
    )
    return ratio.sqrt().float()
