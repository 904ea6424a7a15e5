"""Headers and parts ↔ Flower's records, at both ends of Flower.

The header is one JSON text in a ConfigRecord: Flower's MetricRecord takes numbers only, and nested values
need no rules of their own this way.
"""

import json
from collections.abc import Iterable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from pilot.wire.jsonable import header_text
from pilot.wire.messages import MAX_NAME_CHARS, Header, Part

_STYPE = "pilot.raw"
# A lease of ten thousand shards has a header of a quarter of this.
MAX_HEADER_CHARS = 4 << 20
MAX_DIMENSIONS = 8


def to_records(header: Header, parts: Iterable[Part] | ArrayRecord) -> RecordDict:
    """The content of a Flower message. Never raises for what stands in `header`.

    `parts` are copied, unless they come as a record of `to_arrays`: messages may share one.
    """
    return RecordDict(
        {
            "config": ConfigRecord({"header": header_text(header)}),
            "parts": parts if isinstance(parts, ArrayRecord) else to_arrays(parts),
        }
    )


def to_arrays(parts: Iterable[Part], *, borrow: bool = False) -> ArrayRecord:
    """The parts as Flower's record: a copy, one tensor after another.

    `borrow`: no copy, for a message that has left before anything changes the parts' memory.
    """
    record = ArrayRecord()
    for part in parts:
        array = Array(part.dtype, tuple(part.shape), _STYPE, b"")
        record[part.name] = array
        # an Array is made of `bytes` and nothing else, but only slices what it holds
        array.data = memoryview(part.data).cast("B") if borrow else bytes(part.data)  # type: ignore[assignment]
    return record


def num_bytes(parts: Iterable[Part | Array]) -> int:
    """Of the tensors of a message, without its header and Flower's own."""
    return sum(len(part.data) for part in parts)


def from_records(content: RecordDict) -> tuple[Header, list[Part]]:
    """The header and the parts of a message. Raises ValueError if it is not one of ours."""
    try:
        text = content["config"]["header"]
        arrays = content["parts"]
        if not isinstance(text, str) or len(text) > MAX_HEADER_CHARS:
            raise ValueError("its header is no text, or an endless one")
        header: Any = json.loads(text)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a Pilot message: {error}") from error
    if not isinstance(header, dict) or not isinstance(arrays, ArrayRecord):
        raise ValueError("not a Pilot message: its header is no table")
    return header, [_part(name, array) for name, array in arrays.items()]


def _part(name: str, array: Array) -> Part:
    """Raises ValueError for what could not be a tensor of a model."""
    shape = tuple(array.shape)
    if max(len(name), len(array.dtype)) > MAX_NAME_CHARS or len(shape) > MAX_DIMENSIONS:
        raise ValueError("not a Pilot message: the name, dtype or shape of a tensor is endless")
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise ValueError("not a Pilot message: the shape of a tensor is not made of sizes")
    return Part(name, array.dtype, shape, array.data)
