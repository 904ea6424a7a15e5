"""Named fp32 tensors in a file (safetensors), read and written a piece at a time.

A server holds a model once. Whatever else is as large as a model (the outer optimizer's state, each reply)
lies on disk, and is read and written here in pieces of whole rows. Nothing is mapped: the pages of a mapping
count as this process's memory for as long as it stands, and there is one file per client.
"""

import hashlib
import json
import math
import os
import struct
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LENGTH = struct.Struct("<Q")
_MOST_HEADER_BYTES = 100 << 20  # safetensors' own limit
_PIECE = 1 << 18  # values at once, about: 1 MB
# Rows are taken in multiples of about this many values, which `rules/lengths.py` squares at once
_UNIT = 1 << 16

Shapes = Mapping[str, Sequence[int]]


def pieces(shape: Sequence[int], *, values: int = _PIECE) -> Iterator[tuple[int, int]]:
    """(first row, end row) of pieces of a tensor of `shape` (..., n), in order, of about `values` values.

    A row is what the last dimension holds; a vector is one row, and so is a scalar.
    """
    rows, columns = _table(shape)
    unit = max(1, _UNIT // max(1, columns))
    step = unit * max(1, values // (unit * max(1, columns)))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def rows_of(tensors: Mapping[str, Tensor], name: str, first: int, end: int) -> Tensor:
    """Rows of one of `tensors`: (end - first, n), of a file a copy; of a vector or a scalar all of it.

    Raises KeyError for a name that is not there.
    """
    if isinstance(tensors, TensorFile):
        return tensors.rows(name, first, end)
    tensor = tensors[name]
    return tensor if tensor.dim() < 2 else tensor.reshape(_table(tensor.shape))[first:end]


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file; each look reads, into memory of its own.

    The file stays open, so that it can be read when it has another name, or none. Raises OSError, or
    ValueError for what is no such file.
    """

    def __init__(self, path: Path, *, sha256: str = "") -> None:
        self.path, self.sha256 = path, sha256
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        self._start, self._places = _read_header(self._fd, path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in self._places.items()}

    def __getitem__(self, name: str) -> Tensor:
        shape, begin = self._places[name]
        return self._read(begin, math.prod(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """As `rows_of`."""
        shape, begin = self._places[name]
        if len(shape) < 2:
            return self[name]
        columns = shape[-1]
        found = self._read(begin + 4 * first * columns, (end - first) * columns)
        return found.view(end - first, columns)

    def _read(self, begin: int, count: int) -> Tensor:
        values = torch.empty(count, dtype=torch.float32)
        left, offset = values.numpy().data.cast("B"), self._start + begin
        while left:
            read = os.preadv(self._fd, [left], offset)
            if read == 0:
                raise ValueError(f"{self.path} ends too early")
            left, offset = left[read:], offset + read
        return values


class TensorWriter:
    """A file of tensors of `shapes`, whose rows are written in any order; `close` when all are.

    If it is `hashed`, its SHA-256 is known then; that costs a second reading only if something was not written
    in order. A name that is in use is replaced. Raises OSError where the disk refuses.
    """

    def __init__(self, path: Path, shapes: Shapes, *, hashed: bool = True) -> None:
        self.path = path
        header, self._start, self._places = _header(shapes)
        self._digest = hashlib.sha256() if hashed else None
        self._next, self._in_order = 0, True  # where the next byte in order belongs
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._close = weakref.finalize(self, os.close, self._fd)
        self._write(memoryview(header), 0)

    def write(self, name: str, values: Tensor, first: int = 0) -> None:
        """Write fp32 `values` of one tensor, from its row `first` on."""
        shape, begin = self._places[name]
        offset = self._start + begin + 4 * first * (shape[-1] if shape else 1)
        values = values.detach().contiguous().reshape(-1)
        if values.dtype != torch.float32:
            raise TypeError(f"{name} is of {values.dtype}, and only fp32 is written")
        if values.numel():
            self._write(values.numpy().data.cast("B"), offset)

    def close(self, *, sync: bool = False) -> str:
        """The file is whole (and durable, if `sync`). Returns its SHA-256, in hex; "" if it is not `hashed`."""
        if sync:
            os.fsync(self._fd)
        self._close()
        if self._digest is None:
            return ""
        if self._in_order:
            return self._digest.hexdigest()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _write(self, data: memoryview, offset: int) -> None:
        self._in_order = self._in_order and offset == self._next
        if self._in_order and self._digest is not None:
            self._digest.update(data)
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written
        self._next = offset


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors` (fp32) to `path`, durably; the file's SHA-256, in hex.

    What is hashed is what is written, so that nothing is read again.
    """
    shapes = tensors.shapes if isinstance(tensors, TensorFile) else _shapes(tensors)
    writer = TensorWriter(path, shapes)
    for name, shape in shapes.items():
        for first, end in pieces(shape):
            writer.write(name, rows_of(tensors, name, first, end), first)
    return writer.close(sync=True)


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _table(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a tensor of `shape`."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, math.prod(shape))


# -- the form of the file ----------------------------------------------------------------------------

_Places = dict[str, tuple[tuple[int, ...], int]]  # name → shape, and where its bytes begin


def _header(shapes: Shapes) -> tuple[bytes, int, _Places]:
    """The bytes before the first tensor, their number, and where each tensor lies behind them."""
    assert sys.byteorder == "little"
    listed, places, end = {}, _Places(), 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        places[name] = tuple(shape), begin
        listed[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of 8
    return _LENGTH.pack(len(text)) + text, _LENGTH.size + len(text), places


def _read_header(fd: int, path: Path) -> tuple[int, _Places]:
    """Raises ValueError if the file is not what its header says."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, _LENGTH.size, 0)
    length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
    start = _LENGTH.size + length
    if not 2 <= length <= min(_MOST_HEADER_BYTES, size - _LENGTH.size):
        raise ValueError(f"{path} is no file of tensors")
    listed: dict[str, Any] = json.loads(os.pread(fd, length, _LENGTH.size))
    places = _Places()
    for name, one in listed.items():
        if name == "__metadata__":
            continue
        shape, (begin, end) = tuple(one["shape"]), one["data_offsets"]
        if one["dtype"] != "F32" or end - begin != 4 * math.prod(shape) or start + end > size:
            raise ValueError(f"{path} does not hold {name} in fp32")
        places[name] = shape, begin
    return start, places
