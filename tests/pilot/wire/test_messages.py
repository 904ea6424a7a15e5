"""Messages take anything and lose nothing: no metric fails a reply, no garbage more than its sender."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilot.config import DEFAULTS
from pilot.segment import Segment
from pilot.wire.code_hashes import code_hashes, package_hash
from pilot.wire.jsonable import header_text
from pilot.wire.messages import (
    MAX_NAME_CHARS,
    MAX_TEXT_CHARS,
    ContentError,
    Fence,
    Heartbeat,
    HelloOrder,
    HelloReply,
    TrainOrder,
    TrainReply,
    from_header,
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
        step_rows=3,
        eval_first_row=0,
        eval_end_row=9,
    ),
    TrainReply(
        fence=FENCE, client="c", tokens=5, consumed=[Segment(0, 1, 2, 3)], row_counts={1: 2}
    ),
]
REPLY = MESSAGES[-1]


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
    unknown = {"loss_nats": None, "eval_nats": None, "train_s": 0.0}
    assert getattr(taken, name) == unknown.get(name, 0)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("loss_nats", math.nan, None),
        ("loss_nats", math.inf, None),
        ("loss_nats", 1e300, None),
        ("loss_nats", -1.0, None),
        ("loss_nats", 7, 7.0),
        ("eval_nats", 1e300, None),
        ("eval_nats", -math.inf, None),
        ("eval_bytes", -3, 0),
        ("eval_rows", 2**60, 0),
        ("steps", 2**53 + 1, 0),
        ("train_s", 5e-324, 0.0),
        ("train_s", 1e-7, 0.0),
        ("train_s", -1.0, 0.0),
        ("train_s", 0.5, 0.5),
        ("total_s", math.nan, 0.0),
    ],
)
def test_number_that_cannot_be_is_none_behind_the_parser(name: str, value: Any, kept: Any) -> None:
    taken = from_header(json.loads(header_text(to_header(REPLY) | {name: value})))
    assert getattr(taken, name) == kept and type(getattr(taken, name)) is type(kept)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("error", MAX_TEXT_CHARS),
        ("warning", MAX_TEXT_CHARS),
        ("host", MAX_NAME_CHARS),
        ("device_name", MAX_NAME_CHARS),
    ],
)
def test_text_of_megabytes_is_cut(name: str, most: int) -> None:
    taken = from_header(to_header(HelloReply()) | {name: "x" * 5_000_000})
    text = getattr(taken, name)
    assert len(text) == most and text.endswith("x …")


def test_text_is_one_line_that_every_log_takes() -> None:
    taken = from_header(to_header(REPLY) | {"error": "no\x1b[2J\r\nfake line\u2028\ud800 é"})
    assert taken.error == "no [2J  fake line   é"


def test_texts_of_orders_stay_as_they_are() -> None:
    config = {"source": "/data/a\u00a0b\n" + "x" * 3000, "seed": 2**63 - 1, "lr": 1e300}
    order = HelloOrder(run="r", config=config, redis_url="redis://h\u00e9")
    assert from_header(json.loads(header_text(to_header(order)))) == order


@pytest.mark.parametrize("devices", [0, -1, 4097, 2**53])
def test_hello_of_impossible_devices_is_refused(devices: int) -> None:
    with pytest.raises(ContentError, match=r"devices is .* not from 1 to 4096"):
        from_header(to_header(HelloReply()) | {"devices": devices})


@pytest.mark.parametrize(
    "digest", ["x", "A" * 64, "0" * 63, "0" * 65, "../" * 21 + "a", "٠" * 64, "0" * 5_000_000, 7]
)
def test_what_is_no_digest_of_a_model_is_refused_with_a_sentence(digest: Any) -> None:
    order = next(message for message in MESSAGES if isinstance(message, TrainOrder))
    for message, name, value in (
        (HelloReply(), "mirror", digest),
        (REPLY, "mirror", digest),
        (order, "digest", digest),
        (order, "steps", ["0" * 64, digest]),
    ):
        with pytest.raises(ValueError, match=f"^not a Pilot message: {name} is ") as caught:
            from_header(to_header(message) | {name: value})
        assert len(str(caught.value)) < 100
    with pytest.raises(ValueError, match="steps has 1001 items, more than 1000"):
        from_header(to_header(order) | {"steps": ["0" * 64] * 1001})


def test_hashes_and_their_names_are_cut_too() -> None:
    hello = from_header(to_header(HelloReply()) | {"fingerprints": {"k" * 900: "v" * 900}})
    ((key, value),) = hello.fingerprints.items()
    assert len(key) == len(value) == MAX_NAME_CHARS


@given(
    values=st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(Heartbeat)]),
        st.text() | st.integers().map(str) | st.floats().map(str) | st.just("9" * 5000),
    )
)
def test_heartbeat_is_finite_and_bounded_whatever_redis_holds(values: dict[str, str]) -> None:
    beat = Heartbeat.from_redis(values)
    assert len(beat.state) <= 40 and beat.state.isprintable()
    numbers = [value for value in dataclasses.astuple(beat) if not isinstance(value, str)]
    assert all(-1 <= value <= 2**53 for value in numbers)


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


def test_package_hash_is_that_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_package" / "rows").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for name, text in (("__init__.py", ""), ("rows/optim.py", "a = 1"), ("rows/optim.py", "a = 2")):
        (tmp_path / "some_package" / name).write_text(text)
        package_hash.cache_clear()
        hashes.append(package_hash("some_package"))
    assert len(set(hashes)) == 3 and all(len(one) == 64 for one in hashes)
    assert package_hash("no_such_package") == ""


def test_hashes_of_code_are_those_of_both_packages_here() -> None:
    assert code_hashes() == {
        "pilot package": package_hash(),
        "nanochat package": package_hash("nanochat"),
    }
    assert len({len(one) for one in code_hashes().values()} | {64}) == 1


@pytest.mark.parametrize("said", [True, False, None])
def test_hello_says_whether_redis_is_reached_and_an_old_one_says_nothing(said: bool | None) -> None:
    assert from_header(to_header(HelloReply(redis=said))) == HelloReply(redis=said)
    old = to_header(HelloReply())
    del old["redis"]
    assert from_header(old) == HelloReply(redis=None)
    with pytest.raises(ValueError, match="redis is a str"):
        from_header(old | {"redis": "yes"})
