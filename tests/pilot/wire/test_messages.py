"""Messages take anything and lose nothing: no metric fails a reply, no garbage more than its sender."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilot.config import DEFAULTS
from pilot.segment import Segment
from pilot.wire.jsonable import header_text
from pilot.wire.messages import (
    Fence,
    HelloOrder,
    HelloReply,
    TrainOrder,
    TrainReply,
    from_header,
    package_hash,
    to_header,
)


class Rude:
    """Nothing about it works."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def item(self) -> Any:
        raise KeyError("no")


class NotText:
    def __repr__(self) -> Any:
        return 7


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
NUMBERS: list[tuple[Any, Any]] = [
    (1, 1),
    (1.5, 1.5),
    (True, 1),
    (np.float32(0.5), 0.5),
    (np.float64(0.5), 0.5),
    (np.int64(-3), -3),
    (np.bool_(True), 1),
    (np.array([2.0]), 2.0),
    (torch.tensor(1.5), 1.5),
    (torch.tensor([3]), 3),
    (torch.tensor(1.5, requires_grad=True), 1.5),
    (torch.tensor(1.5).bfloat16(), 1.5),
    (2**63 - 1, 2**63 - 1),
    (-(2**63), -(2**63)),
    (math.inf, math.inf),
    (-math.inf, -math.inf),
]
TEXTS: list[Any] = [
    "text",
    "",
    "\ud800 alone",
    np.str_("numpy"),
    2**63,
    -(2**64),
    10**5000,
    1 + 2j,
    np.complex64(1),
    torch.ones(2),
    torch.empty(0),
    torch.empty((), device="meta"),
    np.arange(3),
    np.datetime64("2026-01-01"),
    b"\xff",
    object(),
    {"a": {1, 2}},
    [None],
    CYCLE,
    {("a", 1): 2},
    Rude(),
    NotText(),
    Rude,
]
FENCE = Fence("run", 1, 2, 3)
MESSAGES = [
    HelloOrder(run="r", config=dict(DEFAULTS), redis_url="unix:///x"),
    HelloReply(shards=[1, 2], fingerprints={"a": "b"}),
    TrainOrder(
        fence=FENCE,
        client="c",
        config=dict(DEFAULTS),
        redis_url="",
        processes=2,
        segments=[Segment(0, 1, 2, None)],
        lease_is_tail=True,
        last_merged_fence=Fence("run", 1, 1, 2),
        seconds_left=1.5,
        committed_tokens=1,
        total_tokens=2,
        share=0.5,
        eval_first_row=0,
        eval_end_row=9,
    ),
    TrainReply(
        fence=FENCE, client="c", tokens=5, consumed=[Segment(0, 1, 2, 3)], row_counts={1: 2}
    ),
]


@pytest.mark.parametrize(("value", "number"), NUMBERS, ids=lambda v: type(v).__name__)
def test_a_value_that_is_one_number_travels_as_a_number(value: Any, number: float) -> None:
    assert json.loads(header_text({"x": value})) == {"x": number}


@pytest.mark.parametrize("value", TEXTS, ids=lambda v: type(v).__name__)
def test_a_value_that_json_has_no_form_for_travels_as_text(value: Any) -> None:
    (arrived,) = json.loads(header_text({"x": value})).values()
    if not isinstance(value, (dict, list, int)):
        assert isinstance(arrived, str)
    json.dumps(arrived, ensure_ascii=False).encode("utf-8", "surrogatepass")


def test_nan_stays_a_number_and_none_stays_none() -> None:
    values = {"nan": math.nan, "tensor": torch.tensor(math.nan), "none": None}
    arrived = json.loads(header_text(values))
    assert math.isnan(arrived["nan"]) and math.isnan(arrived["tensor"]) and arrived["none"] is None


@pytest.mark.parametrize("value", [v for v, _ in NUMBERS] + TEXTS, ids=lambda v: type(v).__name__)
def test_every_value_has_a_form_in_a_header(value: Any) -> None:
    json.loads(header_text({"x": value, "nested": {"deep": [value]}}))
    assert len(json.loads(header_text({value if isinstance(value, (str, int)) else "k": 1}))) == 1


@pytest.mark.parametrize("key", [1, None, ("a", 1), "\ud800"])
def test_every_key_has_a_form_in_a_header(key: Any) -> None:
    assert list(json.loads(header_text({key: 1})).values()) == [1]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_survive_their_header(message: Any) -> None:
    assert from_header(json.loads(header_text(to_header(message)))) == message


@pytest.mark.parametrize(
    "value",
    [None, "many", [1], {}, True, 10**5000, "\ud800", "NaN"],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("name", ["loss_nats", "train_s", "batches", "eval_nats", "eval_rows"])
def test_odd_metric_never_fails_a_reply(name: str, value: Any) -> None:
    reply = MESSAGES[-1]
    header = json.loads(header_text(to_header(reply) | {name: value}))
    taken = from_header(header)
    assert isinstance(taken, TrainReply)
    kept = replace(taken, **{name: getattr(reply, name)})
    assert kept == reply
    metric = getattr(taken, name)
    assert type(metric) is type(getattr(reply, name))
    assert metric == value or math.isnan(metric) or metric == 0


def test_tensor_as_a_metric_arrives_as_its_number() -> None:
    reply = replace(MESSAGES[-1], loss_nats=torch.tensor(1.5, requires_grad=True))  # type: ignore[type-var]
    taken = from_header(json.loads(header_text(to_header(reply))))
    assert isinstance(taken, TrainReply) and taken.loss_nats == 1.5


def test_keys_that_nobody_knows_are_left_aside() -> None:
    header = to_header(MESSAGES[-1]) | {"node_name": "x", "gpu": 7}
    assert from_header(header) == MESSAGES[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": None},
        {"kind": "Part"},
        {"kind": ["TrainReply"]},
        {"fence": None},
        {"fence": 3},
        {"fence": {"run": "r"}},
        {"fence": {"run": "r", "term": "1", "round_number": 2, "lease_id": 3}},
        {"client": None},
        {"tokens": "5"},
        {"tokens": True},
        {"tokens": 2**63},
        {"error": 1},
        {"consumed": 5},
        {"consumed": [5]},
        {"consumed": [["a"]]},
        {"consumed": [[0, 1, 2, 10**30]]},
        {"consumed": [[0, 1, 2]]},
        {"row_counts": {"1": 2}},
        {"row_counts": [[1]]},
        {"row_counts": [[1, 2, 3]]},
        {"row_counts": [["1", 2]]},
    ],
    ids=str,
)
def test_message_whose_essentials_are_wrong_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a Pilot message"):
        from_header(to_header(MESSAGES[-1]) | changes)


def test_message_without_its_essentials_is_refused() -> None:
    for name in ("kind", "fence", "client"):
        header = to_header(MESSAGES[-1])
        del header[name]
        with pytest.raises(ValueError, match="not a Pilot message"):
            from_header(header)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["kind", "fence", "client", "tokens", "consumed", "config", "run", "share"])
KINDS = st.sampled_from(["HelloOrder", "HelloReply", "TrainOrder", "TrainReply"])


@given(header=JSON, changes=st.dictionaries(NAMES, JSON | KINDS))
def test_garbage_raises_value_error_only(header: Any, changes: dict[str, Any]) -> None:
    for garbage in (header, changes, to_header(MESSAGES[2]) | changes):
        try:
            message = from_header(garbage)
        except ValueError:
            continue
        assert from_header(to_header(message)) is not None


def test_package_hash_is_that_of_the_files() -> None:
    assert package_hash() == package_hash() and len(package_hash()) == 64
