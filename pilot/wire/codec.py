"""Tensors ↔ parts on the wire, in one of the forms of `wire-up`.

`float32` is lossless for our fp32 masters, and the form of the global model; the other forms are the codes of
`codes.py`. Raw little-endian bytes only: nothing that comes over the network is unpickled, and sizes are
checked before a tensor is made of them.

*Error feedback.* What a code could not say of an update is its *rest*. It stays with the client and is added,
times the code's decay, to that client's next update before that is encoded. A row that an update did not touch
is not sent for the sake of its rest, which waits.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pilot.tensor_file import pieces
from pilot.wire.codes import CODES, CodecError, rows_with_values, size_of
from pilot.wire.codes import decode as decode_code
from pilot.wire.codes import encode as encode_code
from pilot.wire.messages import Part

__all__ = [
    "DECAY",
    "CodecError",
    "Loss",
    "decode",
    "decoded",
    "encode",
    "form_of",
    "message_bytes",
]

# Form → what of a rest is added to the next update. Sparse: 0.95, as in SparseLoCo (arXiv 2508.15706). The
# rounding of bfloat16 is too small to be remembered.
DECAY: Mapping[str, float] = {"int8": 1.0, "int4": 1.0, "sparse": 0.95}
_SMALL = 4096  # values, of which fp32 costs nothing beside those of a matrix


@dataclass
class Loss:
    """What parts were to say and what they could not, as sums of squares over all tensors."""

    whole: float = 0.0
    rest: float = 0.0

    @property
    def share(self) -> float | None:
        """The length of the rest over that of the whole: 0 where nothing was lost; None if it is no number."""
        share = self.rest / self.whole if self.whole > 0 else self.rest
        return math.sqrt(share) if math.isfinite(share) else None


def form_of(wire: str, shape: Sequence[int]) -> str:
    """How a tensor of `shape` travels: as `wire`, or as float32 if it is a vector or small."""
    return wire if len(shape) > 1 and math.prod(shape) >= _SMALL else "float32"


def message_bytes(shapes: Iterable[Sequence[int]], *, wire: str = "float32") -> int:
    """Bytes of the parts of tensors of `shapes`, if each row has values: those without cost a bit in a code."""
    total = 0
    for shape in shapes:
        form = form_of(wire, shape)
        total += 4 * math.prod(shape) if form == "float32" else size_of(CODES[form], shape)
    return total


def encode(
    tensors: Mapping[str, Tensor],
    *,
    wire: str = "float32",
    rest: Callable[[str], Tensor | None] = lambda name: None,
    decay: float | None = None,
    device: torch.device | None = None,
    loss: Loss | None = None,
) -> list[Part]:
    """Parts in the order of `tensors`, of the forms that `form_of` says.

    Tensors of another form than float32 must be contiguous fp32. They are left with their rest: what their
    parts do not say of them and of `rest`, which gives that of the update before, by name (None: there is
    none); `decay` of it counts, by default that of the form. They are encoded on `device`, by default where
    they are. What is lost is added to `loss`.
    """
    parts = []
    for name, tensor in tensors.items():
        form = form_of(wire, tensor.shape)
        if form == "float32":
            if loss is not None:
                loss.whole += _square(tensor.detach())
            said = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1)
            said = said.view(torch.uint8)
        else:
            kept = DECAY.get(form, 1.0) if decay is None else decay
            said = _encode(tensor, rest(name), kept, form, device or tensor.device, loss)
        parts.append(Part(name, form, tuple(tensor.shape), said.numpy().data))
    return parts


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _encode(
    tensor: Tensor,
    rest: Tensor | None,
    decay: float,
    form: str,
    device: torch.device,
    loss: Loss | None,
) -> Tensor:
    values = tensor.detach().to(device)
    rows = rows_with_values(values)
    if rest is not None and rest.shape == tensor.shape:
        values.add_(rest.to(device), alpha=decay)
    whole = _square(values) if loss is not None else 0.0
    said = encode_code(values, CODES[form], rows=rows).cpu()
    if loss is not None:
        loss.whole, loss.rest = loss.whole + whole, loss.rest + _square(values)
    if values.device != tensor.device:
        tensor.copy_(values)
    return said


def decode(
    parts: Iterable[Part], *, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """fp32 tensors by name.

    `shapes` are those that are expected, by name. Parts of another form than float32 are only taken with them,
    since their bytes do not tell how large a tensor they are of. Raises CodecError for an unknown form, a wrong
    size, a name twice, or another shape than expected.
    """
    return {part.name: _decode(part) for part in _checked(parts, shapes)}


def decoded(
    parts: Iterable[Part], *, shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, int, Tensor]]:
    """(name, first row, rows): what `decode` gives, bit by bit, so that it need not be in memory at once.

    float32 comes in pieces, as `tensor_file.pieces` has them, other forms in whole tensors. Raises CodecError.
    """
    for part in _checked(parts, shapes):
        if part.dtype != "float32":
            yield part.name, 0, _decode(part)
            continue
        data, row = memoryview(part.data), 4 * (part.shape[-1] if len(part.shape) > 1 else 1)
        for first, end in pieces(part.shape):
            some = data[first * row : end * row] if len(part.shape) > 1 else data
            yield part.name, first, torch.frombuffer(bytearray(some), dtype=torch.float32)


def _checked(parts: Iterable[Part], shapes: Mapping[str, Sequence[int]] | None) -> Iterator[Part]:
    """The parts, each looked at before its bytes are. Raises CodecError."""
    seen = set[str]()
    for part in parts:
        if part.dtype != "float32" and (shapes is None or part.dtype not in CODES):
            raise CodecError(f"{part.name} has unknown wire form {part.dtype!r}")
        if part.name in seen or not _is_shape(part.shape):
            raise CodecError(f"{part.name} has a bad shape {part.shape} or comes twice")
        if part.dtype != "float32" and shapes is not None:
            if part.name not in shapes:
                raise CodecError(f"{part.name} has no place in the model")
            if tuple(part.shape) != (expected := tuple(shapes[part.name])):
                raise CodecError(f"{part.name} has shape {tuple(part.shape)}, not {expected}")
        if part.dtype == "float32" and len(part.data) != math.prod(part.shape) * 4:
            raise CodecError(f"{part.name} has {len(part.data)} bytes, not those of {part.shape}")
        seen.add(part.name)
        yield part


def _decode(part: Part) -> Tensor:
    """Raises CodecError."""
    # a bytearray, since torch tensors are writable
    buffer = part.data if isinstance(part.data, bytearray) else bytearray(part.data)
    said = (
        torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8)
    )
    if part.dtype == "float32":
        return said.view(torch.float32).reshape(part.shape)
    try:
        return decode_code(said, CODES[part.dtype], part.shape)
    except CodecError as error:
        raise CodecError(f"{part.name} {error}") from error


def _is_shape(shape: Sequence[int]) -> bool:
    """Whether torch can have a tensor of that shape: it also multiplies the sizes of an empty one."""
    return all(size >= 0 for size in shape) and math.prod(size or 1 for size in shape) < 1 << 48
