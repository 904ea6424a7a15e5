"""What travels between server, client and worker: dataclasses, their JSON, and named byte parts.

A message is a header (JSON) and parts (tensors as bytes). The same pair goes through Flower's records
(`records.py`) and through the Unix socket of a worker group (`frames.py`), so a ClientApp only
moves it. Standard library only.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pilot.config import Scalar

Header = dict[str, Any]

LEASE_USED_UP = "lease used up"  # TrainReply.stopped_by of a client that could go on with more rows

_INT64 = range(-(2**63), 2**63)  # Flower's integers


def _metric(default: int | float) -> Any:
    """A number that is only told to people: one that isn't a number is no reason to lose a reply."""
    return field(default=default, metadata={"metric": True})


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
    the client's own share of the federation's token rate, 0..1. `merged` is the last fence of this
    client that was merged, as [term, round, lease] (empty: none yet). `final`: the run is over.
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
    merged: list[int] = field(default_factory=list)
    final: bool = False


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
    steps: int = _metric(0)
    batches: int = _metric(0)
    tokens: int = 0
    loss_nats: float = _metric(0.0)
    eval_nats: float = _metric(0.0)
    eval_bytes: int = _metric(0)
    eval_rows: int = _metric(0)
    train_s: float = _metric(0.0)
    total_s: float = _metric(0.0)
    consumed: list[list[int]] = field(default_factory=list)
    row_counts: list[list[int]] = field(default_factory=list)


def to_header(message: HelloOrder | HelloReply | TrainOrder | TrainReply) -> Header:
    """`message` as JSON values, with its type's name under "kind"."""
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
    if "fence" in values:
        values["fence"] = dataclasses.asdict(values["fence"])
    return {"kind": type(message).__name__, **values}


def from_header(header: Header) -> HelloOrder | HelloReply | TrainOrder | TrainReply:
    """The message of a header. Raises ValueError if it is not one: the network may carry anything.

    Keys that the message doesn't have are left aside, and a metric that is no number becomes NaN (0
    for a count): no metric is a reason to lose a reply.
    """
    kinds = {kind.__name__: kind for kind in (HelloOrder, HelloReply, TrainOrder, TrainReply)}
    if not isinstance(header, dict) or str(header.get("kind")) not in kinds:
        raise ValueError("not a Pilot message: its header says no kind")
    kind = kinds[str(header["kind"])]
    try:
        values = {f.name: _field(f, header[f.name]) for f in _fields(kind) if f.name in header}
        return kind(**values)
    except TypeError as error:  # something is missing
        raise ValueError(f"not a Pilot message: {error}") from error


def _fields(kind: Any) -> tuple["dataclasses.Field[Any]", ...]:
    return dataclasses.fields(kind)


def _field(declared: "dataclasses.Field[Any]", value: Any) -> Any:
    try:
        return _conform(value, declared.type)
    except ValueError as error:
        if declared.metadata.get("metric"):
            return math.nan if declared.type is float else 0
        raise ValueError(f"not a Pilot message: {declared.name} {error}") from error


def _conform(value: Any, kind: Any) -> Any:
    """`value`, as JSON gave it, as a `kind`; raises ValueError if it isn't one."""
    if kind is Fence and isinstance(value, dict):
        return Fence(**{f.name: _conform(value.get(f.name), f.type) for f in _fields(Fence)})
    if get_origin(kind) is list and isinstance(value, list):
        return [_conform(item, get_args(kind)[0]) for item in value]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {str(key): _conform(item, get_args(kind)[1]) for key, item in value.items()}
    if type(value) is int and value not in _INT64:
        raise ValueError("is an integer of more than 64 bits")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind or (kind == Scalar and isinstance(value, Scalar)):
        return value
    raise ValueError(f"is a {type(value).__name__}")


def header_text(header: Mapping[Any, Any]) -> str:
    """`header` as JSON. Takes anything, raises nothing: what JSON has no form for becomes text."""
    return "{" + ", ".join(f"{_json(_text(k))}: {_json(v)}" for k, v in header.items()) + "}"


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=plain)
    except (TypeError, ValueError, RecursionError):  # odd keys, cycles, an endless integer
        return json.dumps(_text(value))


def plain(value: Any) -> Scalar | None:
    """`value` as something that every transport takes: a bool, int, float, str or None.

    Takes anything, raises nothing: one odd metric must not cost an hour of training. Tensors and numpy
    scalars of one element become numbers; what has no better form becomes text.
    """
    try:
        item = value.item() if hasattr(value, "item") else value
        for kind in (bool, int, float):
            if isinstance(item, kind):
                return kind(item)
    except Exception:  # noqa: BLE001 - a foreign type's own methods may raise anything
        item = value
    return None if item is None else _text(item)


def _text(value: Any) -> str:
    """`value` for people, in characters that UTF-8 has."""
    try:
        text = str(value) if isinstance(value, str) else repr(value)
        return text.encode("utf-8", "replace").decode("utf-8")
    except Exception:  # noqa: BLE001 - a foreign type's own methods may raise anything
        return f"<{type(value).__name__}>"


def split_metrics(values: Mapping[Any, Any]) -> tuple[dict[str, int | float], dict[str, str]]:
    """(numbers, strings) of `values`: Flower's metrics take numbers only, its configs strings too.

    None is left out; NaN and infinities are numbers.
    """
    numbers: dict[str, int | float] = {}
    strings: dict[str, str] = {}
    for key, raw in values.items():
        name, value = _text(key), plain(raw)
        if isinstance(value, bool):
            numbers[name] = int(value)
        elif isinstance(value, float) or (isinstance(value, int) and value in _INT64):
            numbers[name] = value
        elif value is not None:
            strings[name] = _text(value)
    return numbers, strings


@cache
def package_hash() -> str:
    """Hex SHA-256 of this copy of the `pilot` package: a bundle and a worker compare theirs."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
