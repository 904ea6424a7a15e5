"""Headers and parts through Flower's records, serialised as Flower does."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from pilot.wire.messages import Fence, Part, TrainReply, from_header, to_header
from pilot.wire.records import from_records, to_records

REPLY = TrainReply(fence=Fence("run", 1, 2, 3), client="c", tokens=7)


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def through_flower(records: RecordDict) -> RecordDict:
    return recorddict_from_proto(
        type(recorddict_to_proto(records)).FromString(
            recorddict_to_proto(records).SerializeToString()
        )
    )


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        "",
        "\ud800",
        math.nan,
        math.inf,
        2**64,
        10**5000,
        True,
        b"\xff",
        [1, "a", None],
        {"a": object()},
        torch.tensor(1.5),
        torch.ones(3),
        np.float32(2),
        np.int64(3),
        np.arange(2),
        1 + 2j,
        Rude(),
        object(),
    ],
    ids=lambda v: type(v).__name__,
)
def test_metric_of_any_type_never_fails_a_reply(value: Any) -> None:
    header = to_header(REPLY) | {"odd": value, "loss_nats": value}
    received, parts = from_records(through_flower(to_records(header, [])))
    reply = from_header(received)
    assert isinstance(reply, TrainReply) and reply.tokens == 7 and parts == []
    assert reply.loss_nats is None or 0 <= reply.loss_nats <= 1e15


def test_a_header_travels_once_and_whole() -> None:
    header = {"loss": 1.5, "n": 3, "who": "x", "header": "mine", "nested": {"a": [1]}}
    records = through_flower(to_records(header, []))
    assert set(records) == {"config", "parts"} and set(records["config"]) == {"header"}
    assert from_records(records)[0] == header


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_parts_travel_unchanged_and_in_order(kind: type) -> None:
    parts = [
        Part("z", "bfloat16", (2, 1), kind(b"\x00\x01\xfe\xff")),
        Part("a", "float32", (), kind(b"abcd")),
        Part("empty", "float32", (0, 3), kind(b"")),
    ]
    _, received = from_records(through_flower(to_records({}, parts)))
    assert [(p.name, p.dtype, p.shape, bytes(p.data)) for p in received] == [
        (p.name, p.dtype, p.shape, bytes(p.data)) for p in parts
    ]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"config": ConfigRecord({"header": "{}"})}),
        RecordDict({"config": ConfigRecord({"header": "{"}), "parts": ArrayRecord()}),
        RecordDict({"config": ConfigRecord({"header": "[1]"}), "parts": ArrayRecord()}),
        RecordDict({"config": ConfigRecord({"header": "[" * 99999}), "parts": ArrayRecord()}),
        RecordDict({"config": ConfigRecord({"header": b"\xff"}), "parts": ArrayRecord()}),
        RecordDict({"config": MetricRecord({"header": 1}), "parts": ArrayRecord()}),
        RecordDict({"config": ConfigRecord({"header": "{}"}), "parts": MetricRecord()}),
    ],
    ids=lambda _: "",
)
def test_foreign_message_is_refused(content: RecordDict) -> None:
    with pytest.raises(ValueError, match="not a Pilot message"):
        from_records(content)
