"""How the optimizer's work and state are shared out over ranks, in the shapes that upstream keeps.

A Muon group is a stack of matrices, an AdamW parameter an array of rows: both are cut along their
first dimension into one chunk a rank, the last of which may be shorter or empty. AdamW parameters of
fewer than 1,024 elements are not cut: each rank keeps them whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SMALLEST_CUT = 1024  # elements; upstream's bound, which decides what its optimizer files hold


@dataclass
class Shards:
    """One array that is updated together: an AdamW parameter, or a Muon group's stack.

    On the way between the ranks it is padded to a multiple of their number.
    """

    group: dict[str, Any]
    params: list[Tensor]
    own_grads: Tensor | None = None
    own_weights: Tensor | None = None
    everyone: Tensor | None = None
    work: dist.Work | None = None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None

    @property
    def is_muon(self) -> bool:
        return bool(self.group["kind"] == "muon")

    @property
    def is_whole(self) -> bool:
        """Whether every rank keeps all of it."""
        return not self.is_muon and self.params[0].numel() < _SMALLEST_CUT

    @property
    def count(self) -> int:
        """Matrices of the stack, or rows of the parameter."""
        return len(self.params) if self.is_muon else self.params[0].size(0)

    @property
    def item_shape(self) -> torch.Size:
        """Of a matrix of the stack, or of a row of the parameter."""
        return self.params[0].shape if self.is_muon else self.params[0].shape[1:]

    def chunk(self, world_size: int) -> int:
        """Items a rank, padding included."""
        return self.count if self.is_whole else -(-self.count // world_size)

    def own(self, rank: int, world_size: int) -> tuple[int, int]:
        """(first item, number of items) of this rank; the last ranks may have none."""
        if self.is_whole:
            return 0, self.count
        chunk = self.chunk(world_size)
        begin = min(rank * chunk, self.count)
        return begin, min(chunk, self.count - begin)

    def pack(self, tensors: Iterable[Tensor | None], padded: int) -> Tensor:
        """One array of `padded` items, the tensor itself where it can be; None counts as zeros."""
        first = self.params[0]
        tensors = list(tensors)
        if not self.is_muon and padded == self.count and tensors[0] is not None:
            return tensors[0].contiguous()
        array = torch.zeros((padded, *self.item_shape), dtype=first.dtype, device=first.device)
        for i, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if self.is_muon:
                array[i].copy_(tensor)
            else:
                array[: self.count].copy_(tensor)
        return array

    def unpack(self, array: Tensor) -> None:
        """Copy the new weights into the parameters."""
        if not self.is_muon:
            self.params[0].copy_(array[: self.count])
            return
        for i, param in enumerate(self.params):
            param.copy_(array[i])

    def fitted(self, moments: Tensor, rank: int, world_size: int) -> Tensor:
        """A saved state as this rank keeps it; files of ours once had AdamW's chunks as flat arrays.

        Raises ValueError if it is not of this rank's size.
        """
        size = self.own(rank, world_size)[1]
        if self.is_muon:
            fits = moments.dim() == 1 + len(self.item_shape) and moments.size(0) >= size
        else:
            fits = moments.numel() == size * self.item_shape.numel()
        if not fits:
            raise ValueError(
                f"a state of shape {tuple(moments.shape)} is not rank {rank}'s of {world_size}"
            )
        return moments if self.is_muon else moments.view(size, *self.item_shape)
