"""How the optimizer's work and state are divided among ranks, in the shapes that upstream keeps.

A Muon group is a stack of matrices, an AdamW parameter an array of rows: both are cut along their
first dimension into one chunk per rank; the last chunks may be shorter or empty. AdamW parameters of
fewer than 1,024 elements are not cut: each rank keeps them whole.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SMALLEST_CUT = 1024  # elements; upstream's bound, which decides what its optimizer files hold


@dataclass
class ShardedArray:
    """One array that is updated together: an AdamW parameter, or the stack of a Muon group.

    It is padded to a multiple of the number of ranks while it travels between them.
    """

    group: dict[str, Any]
    params: list[Tensor]
    grads: Tensor | None = None  # of this rank's chunk, summed over the ranks
    sent: Tensor | None = None  # this rank's new weights; must live until `gathered` is complete
    gathered: Tensor | None = None  # the new weights of all ranks
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

    def chunk_size(self, world_size: int) -> int:
        """Items per rank, padding included."""
        return self.count if self.is_whole else -(-self.count // world_size)

    def chunk_of(self, rank: int, world_size: int) -> tuple[int, int]:
        """(first item, number of items) of `rank`; the last ranks may have none."""
        if self.is_whole:
            return 0, self.count
        chunk = self.chunk_size(world_size)
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
        """A saved state in the shape that this rank keeps; older files of ours hold AdamW's chunks flat.

        Raises ValueError if it is not of this rank's size.
        """
        size = self.chunk_of(rank, world_size)[1]
        if self.is_muon:
            fits = moments.dim() == 1 + len(self.item_shape) and moments.size(0) >= size
        else:
            fits = moments.numel() == size * self.item_shape.numel()
        if not fits:
            raise ValueError(
                f"a state of shape {tuple(moments.shape)} is not rank {rank}'s of {world_size}"
            )
        return moments if self.is_muon else moments.view(size, *self.item_shape)

    def recut(self, parts: Sequence[Tensor | None], rank: int, world_size: int) -> Tensor | None:
        """What `rank` of `world_size` keeps of a state that was saved by `len(parts)` ranks.

        parts: by rank; None where a rank had no items and so no state. None if this one has none.
        Raises ValueError for a state that is missing or not of its rank's size.
        """
        if self.is_whole:
            return parts[0]
        begin, size = self.chunk_of(rank, world_size)
        pieces = []
        for other, part in enumerate(parts):
            first, count = self.chunk_of(other, len(parts))
            low, high = max(begin, first), min(begin + size, first + count)
            if low >= high:
                continue
            if part is None:
                raise ValueError(f"rank {other}'s state is missing")
            pieces.append(self.fitted(part, other, len(parts))[low - first : high - first])
        if not pieces:
            return None
        if self.is_muon:  # padded, as each rank keeps it
            chunk, one = self.chunk_size(world_size), pieces[0]
            pieces.append(one.new_zeros((chunk - size, *one.shape[1:])))
        return torch.cat(pieces)
