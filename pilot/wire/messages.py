"""What travels between server, client and worker: dataclasses, their JSON, and named byte parts.

A message is a header (JSON) and parts (tensors as bytes). The same pair goes through Flower's records
(`records.py`) and through the Unix socket of a worker group (`frames.py`), so a ClientApp only
moves it. Standard library only.
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pilot.config import Scalar
from pilot.segment import Segment

Header = dict[str, Any]


class ContentError(ValueError):
    """A message in form, whose content cannot be what it says: that counts against its sender."""


class StopReason(StrEnum):
    """Why a client stopped of itself. `TrainReply.stopped_by` is one of these, or words from outside: the
    end reason of the round, a signal's name, what a notice or a `stop:` key says."""

    STEPS_DONE = "steps done"  # the round's fixed number of optimizer steps
    LEASE_USED_UP = "lease used up"  # it could train on with more rows
    NOTHING_LEASED = "nothing leased"  # the order was to evaluate only
    DEADLINE = "deadline"  # the seconds that its order gave it are over
    LATER_ROUND = "a later round"  # Redis names one: this round is over
    LEAVING = "leaving"  # the order came when this client was on its way out


_INT64 = range(-(2**63), 2**63)  # Flower's integers


def _metric(default: int | float) -> Any:
    """A number that only people read: if it is not one, that is no reason to lose a reply."""
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


@dataclass(frozen=True)
class Heartbeat:
    """How far a client is: what it tells Redis about itself, and what the server reads there."""

    state: str = ""  # starting | evaluating | packing | training | sending
    step: int = 0
    tokens: int = 0
    loss: float = 0.0  # nats per token, smoothed
    tokens_per_s: float = 0.0
    shard: int = -1  # -1: none yet
    shard_row: int = 0
    shard_rows: int = 0  # 0: not known yet

    @staticmethod
    def from_redis(values: Mapping[str, str]) -> "Heartbeat":
        """What Redis holds, which may be anything: a value that is no finite number keeps its default."""
        known: dict[str, Any] = {}
        for declared in dataclasses.fields(Heartbeat):
            with contextlib.suppress(KeyError, ValueError, OverflowError):
                value = declared.type(values[declared.name])  # type: ignore[operator]
                if isinstance(value, str) or math.isfinite(value):
                    known[declared.name] = value
        return Heartbeat(**known)


@dataclass(frozen=True, kw_only=True)
class HelloOrder:
    """The question to a new node: who are you, what do you have, do we agree?"""

    run: str
    config: dict[str, Scalar]
    redis_url: str


@dataclass(frozen=True, kw_only=True)
class HelloReply:
    """A client's answer; `error` is a sentence when it cannot take part.

    `fingerprints` maps what all clients must agree on (tokenizer, rows, validation rows, corpus, pilot)
    to hex SHA-256; `shards` are the training shards on its disk; `devices` the processes it can run.
    """

    error: str = ""
    warning: str = ""
    devices: int = 1
    device_name: str = "cpu"
    host: str = ""
    shards: list[int] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainOrder:
    """One client's work in one round; without segments it only evaluates.

    `seconds_left` counts on the client's own monotonic clock from receipt. `committed_tokens`, `share` and
    `total_tokens` are the schedule's inputs, `share` being the client's share of the federation's token
    rate, 0..1. `lease_is_tail`: nothing was left to lease behind `segments`, so one short step may end
    them. `last_merged_fence`: of this client's last reply that was merged. `run_is_over`: no order follows.
    """

    fence: Fence
    client: str
    config: dict[str, Scalar]
    redis_url: str
    processes: int
    segments: list[Segment]
    lease_is_tail: bool
    seconds_left: float
    committed_tokens: int
    total_tokens: int
    share: float
    eval_first_row: int
    eval_end_row: int
    last_merged_fence: Fence | None = None
    run_is_over: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """What a client did; the pseudo-gradient travels as parts.

    `consumed` are closed segments, a prefix of the lease; `row_counts` the rows of each shard that the
    client has packed; `loss_nats` the sum over the tokens trained on; `eval_*` the sums over its slice of
    validation rows for the model that it received.
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
    consumed: list[Segment] = field(default_factory=list)
    row_counts: dict[int, int] = field(default_factory=dict)


AnyMessage = HelloOrder | HelloReply | TrainOrder | TrainReply


def to_header(message: AnyMessage) -> Header:
    """`message` as JSON values, with its type's name under "kind"."""
    return {"kind": type(message).__name__, **to_json(message)}


def to_json(message: AnyMessage) -> dict[str, Any]:
    """The fields of `message` as JSON values: a segment is a list of four integers, a map of integers a
    list of pairs."""
    pairs = [f.name for f in _fields(type(message)) if f.type == dict[int, int]]
    values = {f.name: _jsoned(getattr(message, f.name)) for f in _fields(type(message))}
    return values | {name: [list(pair) for pair in sorted(values[name].items())] for name in pairs}


def _jsoned(value: Any) -> Any:
    if isinstance(value, Segment):
        return value.to_list()
    if isinstance(value, Fence):
        return dataclasses.asdict(value)
    if isinstance(value, list):
        return [_jsoned(item) for item in value]
    return value


def from_header(header: Header) -> AnyMessage:
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
        raise type(error)(f"not a Pilot message: {declared.name} {error}") from error


def _conform(value: Any, kind: Any) -> Any:
    """`value`, as JSON gave it, as a `kind`; raises ValueError if it isn't one."""
    if kind == Fence | None:
        return None if value is None else _conform(value, Fence)
    if kind is Fence and isinstance(value, dict):
        return Fence(**{f.name: _conform(value.get(f.name), f.type) for f in _fields(Fence)})
    if kind is Segment:
        return Segment.from_list(_integers(value, 4))
    if kind == dict[int, int]:
        if not isinstance(value, list):
            raise ValueError(f"is a {type(value).__name__}")
        pairs = [_integers(pair, 2) for pair in value]
        return {key: number for key, number in pairs}  # noqa: C416 - dict() wants tuples
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


def _integers(value: Any, count: int) -> list[int]:
    values: list[int] = _conform(value, list[int])
    if len(values) != count:
        raise ContentError(f"has {len(values)} numbers in a place of {count}")
    return values


@cache
def package_hash() -> str:
    """Hex SHA-256 of this copy of the `pilot` package: a bundle and a worker compare theirs."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
