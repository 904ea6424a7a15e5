"""What travels between server, client and worker: dataclasses, their JSON, and named byte parts.

A message is a header (JSON) and parts (tensors as bytes). The same pair goes through Flower's records
(`records.py`) and through the Unix socket of a worker group (`worker/wire.py`), so a ClientApp only
moves it. Standard library only.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pilot.config import Scalar

Header = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One tensor on the wire: raw little-endian bytes in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview


@dataclass(frozen=True)
class Fence:
    """What a reply must carry to be looked at: which run, server start, round and lease it answers."""

    run: str
    term: int
    round_number: int
    lease_id: int


@dataclass(frozen=True, kw_only=True)
class HelloOrder:
    """The question to a new node: who are you, what do you have, do we agree?"""

    run: str
    config: dict[str, Scalar]
    redis_url: str


@dataclass(frozen=True, kw_only=True)
class HelloReply:
    """A site's answer; `error` is a sentence when it cannot take part.

    `fingerprints` maps what all sites must agree on (tokenizer, rows, validation rows, corpus, pilot)
    to hex SHA-256; `shards` are the training shards on its disk; `devices` the processes it can run.
    """

    error: str = ""
    warning: str = ""
    devices: int = 1
    device_name: str = "cpu"
    host: str = ""
    shards: list[int] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainOrder:
    """One client's work in one round; `segments` as `ledger.Segment.to_list`.

    An order without segments only evaluates. `seconds_left` counts on the client's own monotonic
    clock from receipt. `committed_tokens`, `share` and `total_tokens` are the schedule's inputs:
    the client's own share of the federation's token rate, 0..1.
    """

    fence: Fence
    client: str
    config: dict[str, Scalar]
    redis_url: str
    processes: int
    segments: list[list[int]]
    last: bool
    seconds_left: float
    committed_tokens: int
    total_tokens: int
    share: float
    eval_first_row: int
    eval_end_row: int


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """What a client did; the pseudo-gradient travels as parts.

    `consumed` are closed segments, a prefix of the lease; `row_counts` the sizes of shards that the
    client has packed, as [shard, rows]; `loss_nats` the sum over the tokens trained on; `eval_*` the sums
    over its slice of validation rows for the model that it received.
    """

    fence: Fence
    client: str
    error: str = ""
    stopped_by: str = ""
    steps: int = 0
    batches: int = 0
    tokens: int = 0
    loss_nats: float = 0.0
    eval_nats: float = 0.0
    eval_bytes: int = 0
    eval_rows: int = 0
    train_s: float = 0.0
    total_s: float = 0.0
    consumed: list[list[int]] = field(default_factory=list)
    row_counts: list[list[int]] = field(default_factory=list)


def to_header(message: HelloOrder | HelloReply | TrainOrder | TrainReply) -> Header:
    """`message` as JSON values, with its type's name under "kind"."""
    return {"kind": type(message).__name__, **dataclasses.asdict(message)}


def from_header(header: Header) -> HelloOrder | HelloReply | TrainOrder | TrainReply:
    """The message of a header. Raises ValueError if it is not one: the network may carry anything.

    Keys that the message doesn't have are left aside: a metric more is no reason to lose a reply.
    """
    kinds = {kind.__name__: kind for kind in (HelloOrder, HelloReply, TrainOrder, TrainReply)}
    kind = header.get("kind")
    try:
        made = kinds[str(kind)]
        values = {f.name: header[f.name] for f in dataclasses.fields(made) if f.name in header}
        if "fence" in values:
            values["fence"] = Fence(**values["fence"])
        return made(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a Pilot message: kind {kind!r}, {error}") from error


def plain(value: Any) -> Scalar | None:
    """`value` as something that every transport takes: a bool, int, float, str or None.

    Takes anything, raises nothing: one odd metric must not cost an hour of training. Tensors and numpy
    scalars of one element become numbers; what has no better form becomes text.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        item = value.item()
    except (AttributeError, ValueError, RuntimeError, TypeError):
        return repr(value)
    return item if isinstance(item, (bool, int, float, str)) else repr(item)


def split_metrics(values: dict[str, Any]) -> tuple[dict[str, int | float], dict[str, str]]:
    """(numbers, strings) of `values`: Flower's metrics take numbers only, its configs strings too.

    None is left out; NaN and infinities are numbers.
    """
    numbers: dict[str, int | float] = {}
    strings: dict[str, str] = {}
    for name, raw in values.items():
        value = plain(raw)
        if isinstance(value, str):
            strings[name] = value
        elif isinstance(value, float) or (value is not None and -(2**63) <= value < 2**63):
            numbers[name] = int(value) if isinstance(value, bool) else value
        elif value is not None:
            strings[name] = str(value)  # Flower's integers are 64 bits wide
    return numbers, strings


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None


@cache
def package_hash() -> str:
    """Hex SHA-256 of this copy of the `pilot` package: a bundle and a worker compare theirs."""
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
