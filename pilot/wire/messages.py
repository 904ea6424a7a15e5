"""What travels between server, client and worker: dataclasses, their JSON, and named byte parts.

A message is a header (JSON) and parts (tensors as bytes). The same pair goes through Flower's records
(`records.py`) and through the Unix socket of a worker group (`frames.py`), so a ClientApp only
moves it. Every field has bounds, kept by `from_header`: what a client says is typed, finite and short, or
it is refused. Standard library only.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, get_args, get_origin

from pilot.config import Scalar
from pilot.segment import Score, Segment
from pilot.wire.digests import check_digests

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


# No integer is larger than a float can hold exactly: sums, products and quotients of a few stay finite.
MAX_INTEGER = 2**53
_INT64 = 2**63 - 1  # of a run-config key: Flower's integers
MAX_NUMBER = 1e15
MAX_TEXT_CHARS = 2000  # of a sentence, such as an error
MAX_NAME_CHARS = 200  # of what names a thing: a host, a device, a hash
MAX_DEVICES = 4096
MAX_STEPS = 1000  # in an order
_SHORTEST_S = 1e-6  # a duration below it was not measured; rates are quotients by durations


def plain(text: str, most_chars: int = MAX_TEXT_CHARS) -> str:
    """`text` on one line, in characters that any log, file and terminal takes, and not longer than that."""
    kept = text[:most_chars]
    if not kept.isprintable():
        kept = "".join(char if char.isprintable() else " " for char in kept)
    return kept if len(text) <= most_chars else kept[: most_chars - 2] + " …"


def _metric(default: int | float | None, *, low: float = 0.0) -> Any:
    """A number that only people read: if it is none of at least `low`, that is no reason to lose a reply; the
    field keeps its default."""
    return field(default=default, metadata={"metric": True, "low": low})


def _digest(default: str | None) -> Any:
    """The digest of a global model (`steps.digest_of`), or ""; whatever else is no message of ours."""
    return field(default=default, metadata={"digest": True})


def _text(most_chars: int = MAX_TEXT_CHARS) -> Any:
    """A text, empty by default, of which more than `most_chars` characters are cut off."""
    return field(default="", metadata={"most_chars": most_chars})


@dataclass(frozen=True)
class Part:
    """One tensor on the wire: raw little-endian bytes in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview


def drained(parts: list[Part]) -> Iterator[Part]:
    """The parts in order; the list lets go of each before the next one is asked for."""
    parts.reverse()
    while parts:
        yield parts.pop()


@dataclass(frozen=True)
class Fence:
    """What a reply must carry to be looked at: which run, server start, round and lease it answers."""

    run: str
    term: int
    round_number: int
    lease_id: int


_SCALARS = frozenset({int, float, str, bool})
_MAX_BEAT_CHARS = 40  # of a state or a number in a heartbeat
_MOST: dict[Any, float] = {int: MAX_INTEGER, float: MAX_NUMBER}


@dataclass(frozen=True)
class Heartbeat:
    """How far a client is: what it tells Redis about itself, and what the server reads there."""

    state: str = ""  # starting | evaluating | packing | training | sending
    step: int = 0
    tokens: int = 0
    loss: float = 0.0  # nats per token, smoothed
    tokens_per_s: float = 0.0
    mfu: float = 0.0  # share of the devices' arithmetic; 0: nothing says what they can do
    shard: int = -1  # -1: none yet
    shard_row: int = 0
    shard_rows: int = 0  # 0: not known yet

    @staticmethod
    def from_redis(values: Mapping[str, str]) -> "Heartbeat":
        """What Redis holds, which may be anything: a value that can't be one keeps its default."""
        known: dict[str, Any] = {}
        for declared in dataclasses.fields(Heartbeat):
            with contextlib.suppress(KeyError, ValueError, OverflowError):
                text = plain(values[declared.name], _MAX_BEAT_CHARS)
                value: Any = text if declared.type is str else declared.type(text)  # type: ignore[operator]
                low = -1 if declared.name == "shard" else 0
                if declared.type is str or low <= value <= _MOST[declared.type]:
                    known[declared.name] = value
        return Heartbeat(**known)


@dataclass(frozen=True, kw_only=True)
class HelloOrder:
    """The question to a new node: who are you, what do you have, do we agree?

    `note` is a sentence for the people of the site: why its last answer was refused, if it was. `client` is
    what the node calls itself: the server does not know, and its ClientApp tells the worker.
    """

    run: str
    config: dict[str, Scalar]
    redis_url: str
    note: str = _text()
    client: str = _text(MAX_NAME_CHARS)


@dataclass(frozen=True, kw_only=True)
class HelloReply:
    """A client's answer; `error` is a sentence when it cannot take part.

    `fingerprints` maps what all clients must agree on (tokenizer, rows, validation rows, corpus, code)
    to hex SHA-256; `versions` what may differ, with a warning; `shards` are the training shards on its disk;
    `devices` the processes it can run; `redis`: whether it reaches the run's Redis (None: it does not say).
    `mirror`: the digest of the global model that it holds on disk, "" if it holds none.
    """

    error: str = _text()
    warning: str = _text()
    devices: int = field(default=1, metadata={"low": 1, "high": MAX_DEVICES})
    device_name: str = field(default="cpu", metadata={"most_chars": MAX_NAME_CHARS})
    host: str = _text(MAX_NAME_CHARS)
    shards: list[int] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    redis: bool | None = None
    mirror: str = _digest("")


@dataclass(frozen=True, kw_only=True)
class TrainOrder:
    """One client's work in one round; without segments it only evaluates.

    `seconds_left` counts on the client's own monotonic clock from receipt. `committed_tokens`, `share` and
    `total_tokens` are the schedule's inputs, `share` being the client's share of the federation's token
    rate, 0..1; `step_rows`: rows of each of its optimizer steps (`rules/batch.py`). `lease_is_tail`: nothing
    was left to lease behind `segments`, so one short step may end them. `eval_pieces`: [first row, end row] of
    validation rows to score apart; empty: the slice as a whole. `last_merged_fence`: of this client's last
    reply that was merged; `upload_s`: what its last reply took from the end of the round, in seconds (0: not
    measured yet). `run_is_over`: no order follows. `note`: a sentence for the people of the site. `digest`: of
    the global model to train from ("": of a server that does not say). The parts are that model, or, unless
    `whole`, steps towards it: `steps` are the digests before each of them, and the parts of the i-th are named
    "i/tensor".
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
    step_rows: int = field(metadata={"low": 1, "high": MAX_INTEGER})
    eval_first_row: int
    eval_end_row: int
    eval_pieces: list[list[int]] = field(default_factory=list)
    last_merged_fence: Fence | None = None
    upload_s: float = 0.0
    run_is_over: bool = False
    note: str = _text()
    digest: str = _digest("")
    whole: bool = True
    steps: list[str] = field(
        default_factory=list, metadata={"digest": True, "most_items": MAX_STEPS}
    )


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """What a client did; the pseudo-gradient travels as parts.

    `consumed` are closed segments, a prefix of the lease; `row_counts` the rows of each shard that the
    client has packed; `loss_nats` the sum over the tokens trained on, `eval_*` the sums over its slice of
    validation rows for the model that it received, `scores` the same for each piece. A sum of nats is None
    if it is no number. Of the `total_s` seconds from the order's receipt to the reply, `ready_s` passed until
    the first heartbeat, `eval_s` in evaluation, `train_s` in training, `pack_s` of these in waiting for rows,
    `encode_s` in encoding. `mfu`: which share of the devices' arithmetic training used (`nanochat.gpus.mfu`);
    None where no data sheet says what they can do, as for CPUs. `code_lost`: the length of what the form of
    `wire-up` could not say of the update, over that of what it was to say; None without an update. `mirror`:
    the digest of the global model that the client holds now (None: it does not say). `needs_model`: nothing was
    done, since the steps of the order do not begin with the mirror that it has.
    """

    fence: Fence
    client: str = field(metadata={"most_chars": MAX_NAME_CHARS})
    error: str = _text()
    stopped_by: str = _text(MAX_NAME_CHARS)
    steps: int = _metric(0)
    batches: int = _metric(0)
    tokens: int = 0
    loss_nats: float | None = _metric(None)
    eval_nats: float | None = _metric(None)
    eval_bytes: int = _metric(0)
    eval_rows: int = _metric(0)
    train_s: float = _metric(0.0, low=_SHORTEST_S)
    total_s: float = _metric(0.0, low=_SHORTEST_S)
    ready_s: float = _metric(0.0)
    eval_s: float = _metric(0.0)
    pack_s: float = _metric(0.0)
    encode_s: float = _metric(0.0)
    mfu: float | None = _metric(None)
    code_lost: float | None = _metric(None)
    consumed: list[Segment] = field(default_factory=list)
    row_counts: dict[int, int] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list, metadata={"metric": True})
    mirror: str | None = _digest(None)
    needs_model: bool = False


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
    if isinstance(value, Segment | Score):
        return value.to_list()
    if isinstance(value, Fence):
        return dataclasses.asdict(value)
    if isinstance(value, list):
        return [_jsoned(item) for item in value]
    return value


def from_header(header: Header) -> AnyMessage:
    """The message of a header. Raises ValueError if it is not one: the network may carry anything.

    Keys that the message doesn't have are left aside, texts are cut to their bound, and a metric that is no
    number keeps its default: no metric is a reason to lose a reply.
    """
    kinds = {kind.__name__: kind for kind in (HelloOrder, HelloReply, TrainOrder, TrainReply)}
    if not isinstance(header, dict) or str(header.get("kind"))[:MAX_NAME_CHARS] not in kinds:
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
    bounds = declared.metadata
    try:
        conformed = _conform(value, declared.type, bounds.get("most_chars"))
        if bounds.get("digest"):
            check_digests(conformed, bounds.get("most_items", 1))
        if isinstance(conformed, int | float) and not isinstance(conformed, bool):
            low, high = bounds.get("low", -math.inf), bounds.get("high", math.inf)
            if not low <= conformed <= high:
                raise ContentError(f"is {conformed}, not from {low:g} to {high:g}")
        return conformed
    except ValueError as error:
        if bounds.get("metric"):
            return [] if declared.default is dataclasses.MISSING else declared.default
        raise type(error)(f"not a Pilot message: {declared.name} {error}") from error


def _conform(value: Any, kind: Any, most_chars: int | None = None) -> Any:
    """`value`, as JSON gave it, as a `kind`, within the bounds of all numbers.

    Raises ValueError if it isn't one.
    Texts are made plain and cut to `most_chars`; without it they stay as they are.
    """
    if kind in _SCALARS:  # most of them, and to compare with the others takes ten times as long
        return _conform_scalar(value, kind, most_chars)
    if kind in (Fence | None, float | None, bool | None, str | None):
        return None if value is None else _conform(value, get_args(kind)[0])
    if kind is Fence and isinstance(value, dict):
        names = _fields(Fence)
        return Fence(**{f.name: _conform(value.get(f.name), f.type, MAX_NAME_CHARS) for f in names})
    if kind is Segment:
        return Segment.from_list(_integers(value, 4))
    if kind is Score:
        return _score(value)
    if kind == dict[int, int]:
        if not isinstance(value, list):
            raise ValueError(f"is a {type(value).__name__}")
        pairs = [_integers(pair, 2) for pair in value]
        return {key: number for key, number in pairs}  # noqa: C416 - dict() wants tuples
    if get_origin(kind) is list and isinstance(value, list):
        return [_conform(item, get_args(kind)[0]) for item in value]
    if get_origin(kind) is dict and isinstance(value, dict):
        inner = get_args(kind)[1]
        most_chars = MAX_NAME_CHARS if inner is str else None
        return {
            _conform(k, str, most_chars): _conform(v, inner, most_chars) for k, v in value.items()
        }
    return _conform_scalar(value, kind, most_chars)


def _conform_scalar(value: Any, kind: Any, most_chars: int | None) -> Any:
    if type(value) is int and abs(value) > (_INT64 if kind == Scalar else MAX_INTEGER):
        raise ValueError("is too large an integer")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is float and not abs(value) <= (
        sys.float_info.max if kind == Scalar else MAX_NUMBER
    ):
        raise ValueError(f"is {value}")
    if type(value) is str and most_chars is not None:
        value = plain(value, most_chars)
    if type(value) is kind or (kind == Scalar and isinstance(value, Scalar)):
        return value
    raise ValueError(f"is a {type(value).__name__}")


def _score(value: Any) -> Score:
    if not isinstance(value, list) or len(value) != 4:
        raise ContentError("has no four numbers in a score")
    kinds = (int, int, float, int)
    numbers = [_conform(item, kind) for item, kind in zip(value, kinds, strict=True)]
    try:
        return Score.from_list(numbers)
    except ValueError as error:
        raise ContentError(f"has a score that none is: {error}") from error


def _integers(value: Any, count: int) -> list[int]:
    values: list[int] = _conform(value, list[int])
    if len(values) != count:
        raise ContentError(f"has {len(values)} numbers in a place of {count}")
    return values
