"""Codes: a tensor of fp32 as few bytes, and what they could not say left in its place.

Pure functions of tensors, on the device where these are. `bfloat16` rounds; `int8` and `int4` give 64 values in
a row one scale and 8 or 4 bits each; `sparse` sends the 64 largest of each 4,096 values and their places.

    bytes = bitmap of rows, an even number | sections of the code
    bfloat16   2 bytes a value
    int8, int4 scales (bf16, one a block of 64) | blocks
    sparse     scales (bf16, one a chunk of 4,096) | places (12 bits each, ascending) | values (`bits` each)

Rows that are not sent (those of an embedding that saw no token) cost one bit, and the others follow one
another as if they were all. An integer is q·scale, exact in fp32 (7 bits times bf16's 8): every machine decodes
to the same bits. A tensor is read in slabs: what is needed besides it is a slab, and its bytes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pilot.errors import PilotError

BLOCK = 64
CHUNK = 4096
PLACE_BITS = 12  # of a place in a chunk
# Values at once: on a CPU what its caches hold, on a GPU enough to be busy.
_SLAB, _GPU_SLAB = 1 << 18, 1 << 24
_SMALLEST = torch.finfo(torch.float32).tiny  # a scale below has no finite reciprocal
_GLANCE = 8  # values of a row that tell of most rows whether they are zero
_FINALISTS = 8  # groups of a chunk in which its largest values are looked for, see `_largest`


class CodecError(PilotError, ValueError):
    """Bytes from the wire are not what their header says."""


class Code(Protocol):
    """How the values of a tensor become bytes, slab by slab."""

    def sections(self, count: int) -> tuple[int, ...]:
        """Bytes of each section that `count` values take."""

    def encode(self, values: Tensor, sections: Sequence[Tensor], first: int) -> None:
        """Write `values` (1-D fp32, the `first`-th and those behind it) into uint8 `sections`; they become
        what was not said of them."""

    def decode(self, values: Tensor, sections: Sequence[Tensor], first: int) -> None:
        """The same the other way round. Raises CodecError."""


@dataclass(frozen=True)
class Bfloat16:
    """Rounded to 8 bits of mantissa."""

    def sections(self, count: int) -> tuple[int, ...]:
        return (2 * count,)

    def encode(self, values: Tensor, sections: Sequence[Tensor], first: int) -> None:
        said = sections[0].view(torch.bfloat16)[first : first + len(values)]
        said.copy_(values)
        values.sub_(said)

    def decode(self, values: Tensor, sections: Sequence[Tensor], first: int) -> None:
        values.copy_(sections[0].view(torch.bfloat16)[first : first + len(values)])


@dataclass(frozen=True)
class Integers:
    """Blocks of 64 values as symmetric integers of 8 or 4 `bits`; an error is half a scale at most."""

    bits: int

    def sections(self, count: int) -> tuple[int, ...]:
        blocks = -(-count // BLOCK)
        return (2 * blocks, blocks * BLOCK * self.bits // 8)

    def encode(self, values: Tensor, sections: Sequence[Tensor], first: int) -> None:
        blocks = _in_rows(values, BLOCK)
        most = 2.0 ** (self.bits - 1) - 1
        scales = _rows(sections[0].view(torch.bfloat16), 1, first // BLOCK, len(blocks))
        scales.copy_(blocks.abs().amax(dim=1, keepdim=True).div_(most))
        wide = scales.float()
        whole = (blocks * _reciprocals(wide)).round_()  # bf16's rounding keeps it within `most`
        packed = _rows(sections[1], BLOCK * self.bits // 8, first // BLOCK, len(blocks))
        if self.bits == 8:
            packed.view(torch.int8).copy_(whole)
        else:
            # the second half of a block is in the high bits: one conversion for two values
            packed.copy_(
                torch.add(whole[:, : BLOCK // 2], whole[:, BLOCK // 2 :], alpha=16).add_(136)
            )
        blocks.addcmul_(whole, wide, value=-1)
        if blocks.data_ptr() != values.data_ptr():
            values.copy_(blocks.view(-1)[: len(values)])

    def decode(self, values: Tensor, sections: Sequence[Tensor], first: int) -> None:
        count = -(-len(values) // BLOCK)
        scales = _checked(_rows(sections[0].view(torch.bfloat16), 1, first // BLOCK, count))
        packed = _rows(sections[1], BLOCK * self.bits // 8, first // BLOCK, count)
        full = len(values) % BLOCK == 0
        blocks = values.view(-1, BLOCK) if full else values.new_empty(count, BLOCK)
        whole = packed.view(torch.int8)
        if self.bits == 4:
            both = packed.new_empty(count, BLOCK)
            torch.bitwise_and(packed, 15, out=both[:, : BLOCK // 2])
            torch.bitwise_right_shift(packed, 4, out=both[:, BLOCK // 2 :])
            whole = both.view(torch.int8).sub_(8)
        torch.mul(whole, scales, out=blocks)
        if not full:
            values.copy_(blocks.view(-1)[: len(values)])


@dataclass(frozen=True)
class Sparse:
    """The `most` largest of each 4,096 values, in `bits` bits each: (2q + 1)·scale, so none of them is zero.

    A value that is sent is wrong by a scale at most, one that is not by itself. A last chunk of fewer values
    sends its share of `most`.
    """

    most: int = 64
    bits: int = 4

    def sections(self, count: int) -> tuple[int, ...]:
        chunks, rest = divmod(count, CHUNK)
        sizes = [chunks * size for size in self._sizes(CHUNK)]
        if rest:
            sizes = [size + more for size, more in zip(sizes, self._sizes(rest), strict=True)]
        return tuple(sizes)

    def encode(self, values: Tensor, sections: Sequence[Tensor], first: int) -> None:
        for chunks, said in self._chunks(values, sections, first):
            places = _largest(chunks, self._sent(chunks.shape[1]))
            sent = chunks.gather(1, places)
            said[0].copy_(sent.abs().amax(dim=1, keepdim=True).div_(2.0**self.bits - 1))
            wide = said[0].float()
            whole = (sent * (_reciprocals(wide) / 2)).floor_()
            whole.clamp_(-(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1)
            said[1].copy_(_pack(places, PLACE_BITS))
            said[2].copy_(_pack(whole.long() + (1 << (self.bits - 1)), self.bits))
            chunks.scatter_(1, places, sent.addcmul_(whole.mul_(2).add_(1), wide, value=-1))

    def decode(self, values: Tensor, sections: Sequence[Tensor], first: int) -> None:
        values.zero_()
        for chunks, said in self._chunks(values, sections, first):
            length = chunks.shape[1]
            sent = self._sent(length)
            scales = _checked(said[0])
            places = _unpack(said[1], PLACE_BITS, sent)
            if bool((places >= length).any()) or bool((places.diff(dim=1) <= 0).any()):
                raise CodecError("has places out of range, or not in ascending order")
            whole = _unpack(said[2], self.bits, sent) - (1 << (self.bits - 1))
            chunks.scatter_(1, places, (2 * whole + 1).float() * scales)

    def _sent(self, length: int) -> int:
        """Values that a chunk of `length` sends."""
        return -(-self.most * length // CHUNK)

    def _sizes(self, length: int) -> tuple[int, int, int]:
        sent = self._sent(length)
        return 2, -(-sent * PLACE_BITS // 8), -(-sent * self.bits // 8)

    def _chunks(
        self, values: Tensor, sections: Sequence[Tensor], first: int
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """(chunks, length) of whole chunks and then of the last, shorter one, with the bytes of each."""
        sections = [sections[0].view(torch.bfloat16), *sections[1:]]
        before, (whole, rest) = first // CHUNK, divmod(len(values), CHUNK)
        sizes = [1, *self._sizes(CHUNK)[1:]]
        if whole:
            said = [_rows(s, n, before, whole) for s, n in zip(sections, sizes, strict=True)]
            yield values[: whole * CHUNK].view(whole, CHUNK), said
        if rest:
            last = [
                section[(before + whole) * size :].view(1, -1)
                for section, size in zip(sections, sizes, strict=True)
            ]
            yield values[whole * CHUNK :].view(1, rest), last


CODES: Mapping[str, Code] = {
    "bfloat16": Bfloat16(),
    "int8": Integers(8),
    "int4": Integers(4),
    "sparse": Sparse(),
}


def encode(tensor: Tensor, code: Code, *, rows: Tensor | None = None) -> Tensor:
    """The bytes (1-D uint8) of `tensor` (R, ...), contiguous fp32, which is left with what they do not say.

    `rows` (R,) bool: those that are sent, by default those that are not all zero. What is not finite in a
    block makes its scale so, and is refused where it is decoded.
    """
    table = _as_table(tensor)
    if rows is None:
        rows = rows_with_values(table)
    head = _head(len(table))
    count = int(rows.sum()) * table.shape[1]
    sizes = code.sections(count)
    said = torch.empty(head + sum(sizes), dtype=torch.uint8, device=tensor.device)
    said[:head] = _pack(_padded(rows.long(), 16).view(1, -1), 1).view(-1)
    sections = said[head:].split(list(sizes))
    for first, slab, taken in _slabs(table, rows, count):
        code.encode(slab.view(-1), sections, first)
        if taken is not None:
            table[taken] = slab
    return said


def decode(said: Tensor, code: Code, shape: Sequence[int]) -> Tensor:
    """The fp32 tensor of `shape` that `said` (1-D uint8) is the bytes of; nothing else is allocated.

    The caller knows that there is such a tensor. Raises CodecError, which begins with "has", if the bytes are
    none of that shape.
    """
    length = shape[0] if shape else 1
    head = _head(length)
    if len(said) < head:
        raise CodecError(f"has {len(said)} bytes, too few for a bit of each of its {length} rows")
    bits = _unpack(said[:head].view(1, -1), 1, 8 * head).view(-1)
    if bool(bits[length:].any()):
        raise CodecError(f"has rows beyond its {length}")
    rows = bits[:length].bool()
    count = int(rows.sum()) * math.prod(shape[1:])
    sizes = code.sections(count)
    if len(said) != head + sum(sizes):
        raise CodecError(f"has {len(said)} bytes, not the {head + sum(sizes)} of its rows")
    sections = said[head:].split(list(sizes))
    full = count == math.prod(shape)
    new = torch.empty if full else torch.zeros
    tensor = new(tuple(shape), dtype=torch.float32, device=said.device)
    table = _as_table(tensor)
    for first, slab, taken in _slabs(table, rows, count):
        code.decode(slab.view(-1), sections, first)
        if taken is not None:
            table[taken] = slab
    return tensor


def size_of(code: Code, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape` (R, ...) if all of its rows are sent."""
    return _head(shape[0]) + sum(code.sections(math.prod(shape)))


def rows_with_values(tensor: Tensor) -> Tensor:
    """(R,) bool: which rows of `tensor` (R, ...) are not all zero; one that holds NaN isn't."""
    table = _as_table(tensor)
    found = table[:, :_GLANCE].any(dim=1)
    open_rows = found.logical_not().nonzero().view(-1)
    for some in open_rows.split(max(1, _slab_values(table) // max(1, table.shape[1]))):
        found[some] = table[some].any(dim=1)
    return found


def _head(length: int) -> int:
    """Bytes of the bitmap of `length` rows: an even number, since bf16 follows."""
    return 2 * -(-length // 16)


# -- slabs -------------------------------------------------------------------------------------------


def _as_table(tensor: Tensor) -> Tensor:
    """(R, C), the same memory."""
    length = tensor.shape[0] if tensor.dim() else 1
    return tensor.view(length, math.prod(tensor.shape[1:]))


def _slab_values(table: Tensor) -> int:
    return _SLAB if table.device.type == "cpu" else _GPU_SLAB


def _slabs(table: Tensor, rows: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(number of its first value, values, rows that they are a copy of) of the `rows` of `table`, slab by slab.

    All but the last are whole chunks, so that no code cares where a slab ends.
    """
    if not count:
        return
    columns = table.shape[1]
    if count == table.numel():
        flat, step = table.view(-1), _slab_values(table)
        for first in range(0, count, step):
            yield first, flat[first : first + step], None
        return
    kept = rows.nonzero().view(-1)
    unit = CHUNK // math.gcd(columns, CHUNK)  # rows that are whole chunks
    step = unit * max(1, _slab_values(table) // (unit * columns))
    for start in range(0, len(kept), step):
        taken = kept[start : start + step]
        yield start * columns, table[taken], taken


def _rows(section: Tensor, size: int, first: int, count: int) -> Tensor:
    """`count` rows of `size` from the `first`-th on."""
    return section[first * size : (first + count) * size].view(count, size)


# -- numbers -----------------------------------------------------------------------------------------


def _in_rows(values: Tensor, size: int) -> Tensor:
    """`values` as rows of `size`; a copy with zeros behind them if they don't fill the last one."""
    return _padded(values, size).view(-1, size)


def _padded(values: Tensor, size: int) -> Tensor:
    missing = -len(values) % size
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


def _reciprocals(scales: Tensor) -> Tensor:
    """1 / scale, 0 for a scale that is too small for one."""
    return torch.where(scales < _SMALLEST, 0.0, scales.reciprocal())


def _checked(scales: Tensor) -> Tensor:
    """fp32 of bf16 `scales`. Raises CodecError for what no scale is."""
    wide = scales.float()
    if not bool((torch.isfinite(wide) & (wide >= 0)).all()):
        raise CodecError("has a scale that is negative or not finite")
    return wide


def _largest(chunks: Tensor, most: int) -> Tensor:
    """(n, most) places of the `most` largest magnitudes of each of `chunks` (n, m), ascending.

    The largest lie in those `most` groups whose own largest values are the largest: so it is enough to choose
    groups, and then among their values.
    """
    sizes = chunks.abs()
    count, length = sizes.shape
    groups = length // _FINALISTS
    if length % _FINALISTS or groups <= most:
        return sizes.topk(most, dim=1, sorted=False).indices.sort(dim=1).values
    by_group = sizes.view(count, _FINALISTS, groups)
    best = by_group.amax(dim=1).topk(most, dim=1, sorted=False).indices
    left = by_group.gather(2, best[:, None, :].expand(-1, _FINALISTS, -1)).view(count, -1)
    chosen = left.topk(most, dim=1, sorted=False).indices
    places = best.gather(1, chosen % most) + chosen // most * groups
    return places.sort(dim=1).values


# -- bits --------------------------------------------------------------------------------------------


def _pack(values: Tensor, bits: int) -> Tensor:
    """(n, ceil(m · bits / 8)) bytes of `values` (n, m), int64 below 2**bits; the first in the lowest bits."""
    count = values.shape[1]
    group = 8 // math.gcd(8, bits)  # values that are whole bytes
    missing = -count % group
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    words = values.view(len(values), -1, group)
    packed = torch.zeros(words.shape[:2], dtype=torch.int64, device=values.device)
    for i in range(group):
        packed |= words[..., i] << (i * bits)
    said = packed.view(torch.uint8).view(len(values), -1, 8)[..., : group * bits // 8]
    return said.reshape(len(values), -1)[:, : -(-count * bits // 8)]


def _unpack(said: Tensor, bits: int, count: int) -> Tensor:
    """(n, count) int64 of the bytes that `_pack` made."""
    group = 8 // math.gcd(8, bits)
    size = group * bits // 8
    missing = -said.shape[1] % size
    if missing:
        said = torch.nn.functional.pad(said, (0, missing))
    by_group = said.reshape(len(said), -1, size).long()
    words = torch.zeros(by_group.shape[:2], dtype=torch.int64, device=said.device)
    for i in range(size):
        words |= by_group[..., i] << (8 * i)
    values = [(words >> (i * bits)) & ((1 << bits) - 1) for i in range(group)]
    return torch.stack(values, dim=-1).view(len(said), -1)[:, :count]
