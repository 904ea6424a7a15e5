"""Tensors ↔ bytes on the wire.

`float32` is lossless for our fp32 masters; `bfloat16` halves the
bytes of a pseudo-gradient at 8 bits of mantissa. Raw little-endian bytes only: nothing that comes over
the network is unpickled, and sizes are checked before a tensor is made of them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pilot.errors import PilotError
from pilot.wire.messages import Part

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CodecError(PilotError, ValueError):
    """Bytes from the wire are not what their header says."""


def encode(tensors: Mapping[str, Tensor], *, dtype: str = "float32") -> list[Part]:
    """Parts in the order of `tensors`, whose values are cast to `dtype` ("float32"|"bfloat16")."""
    parts = []
    for name, tensor in tensors.items():
        flat = tensor.detach().to("cpu", _DTYPES[dtype]).contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().data
        parts.append(Part(name, dtype, tuple(tensor.shape), data))
    return parts


def decode(parts: Iterable[Part]) -> dict[str, Tensor]:
    """fp32 tensors by name. Raises CodecError for an unknown dtype, a wrong size or a name twice."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if part.dtype not in _DTYPES:
            raise CodecError(f"{part.name} has unknown wire dtype {part.dtype!r}")
        dtype = _DTYPES[part.dtype]
        if part.name in tensors or not _is_shape(part.shape):
            raise CodecError(f"{part.name} has a bad shape {part.shape} or comes twice")
        if len(part.data) != math.prod(part.shape) * dtype.itemsize:
            raise CodecError(f"{part.name} has {len(part.data)} bytes, not those of {part.shape}")
        # a bytearray, since torch tensors are writable
        buffer = part.data if isinstance(part.data, bytearray) else bytearray(part.data)
        flat = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
        tensors[part.name] = flat.reshape(part.shape).float()
    return tensors


def _is_shape(shape: Sequence[int]) -> bool:
    """Whether torch can have a tensor of that shape: it also multiplies the sizes of an empty one."""
    return all(size >= 0 for size in shape) and math.prod(size or 1 for size in shape) < 1 << 48
