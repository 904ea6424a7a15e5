"""What a round refuses, why, and what becomes of what was refused."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pilot.run.events import read_events
from pilot.run.quarantine import MAX_KEPT
from pilot.segment import Segment
from pilot.server.mailbox import Answer
from pilot.server.open_round import MAX_FRUITLESS_ORDERS
from pilot.wire.codec import decode, encode
from pilot.wire.messages import Fence, Part, to_header

from .round_kit import CONFIG, ROW_TOKENS, Round, said


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"error": "no GPU here"}, "no GPU here"),
        ({"needs_model": True}, "the whole model, which it was sent"),
        ({"fence": Fence("r", 1, 2, 1)}, "its fence is"),
        ({"fence": Fence("r", 2, 3, 1)}, "its fence is"),
        ({"tokens": 5 * ROW_TOKENS}, "reports 40 tokens for 4 rows"),
        ({"tokens": -32}, "reports -32 tokens"),
        ({"tokens": 0}, "tensors are not the model's|reports 0 tokens"),
        ({"consumed": []}, "tokens for 0 rows"),
        ({"consumed": [[0, 1, 0, 4]]}, "before it|start"),
        ({"consumed": [[0, 0, 0]]}, "3 numbers in a place of 4"),
        ({"row_counts": {0: 3}}, "goes beyond"),
        ({"row_counts": {77: 3}}, "shard 77"),
    ],
    ids=str,
)
def test_bad_reply_is_refused_and_its_rows_go_back(
    one: Round, changes: dict[str, Any], reason: str
) -> None:
    lease_id = one.orders["a"].fence.lease_id
    assert one.accept("a", **changes)
    assert one.open.accepted == [] and "a" in one.open.failures and lease_id not in one.rows_open
    (told,) = one.refusals()
    assert re.search(reason, told), told
    one.state.ledger.register("d", {0})
    again = one.state.ledger.lease("d", 4)
    assert again is not None and again.segments[0].first_row == 0


def test_update_far_above_the_norms_of_earlier_rounds_is_refused_whoever_was_first(
    tmp_path: Path,
) -> None:
    for number, order in enumerate(("abc", "cab")):
        (tmp_path / str(number)).mkdir()
        one = Round(tmp_path / str(number))
        one.state.admission.merged([1.0, 2.0, 3.0])
        for name in order:
            one.accept(name, 100.0 if name == "c" else 1.0)  # of seven coordinates: norm 264.6
        assert {one_.reply.client for one_ in one.open.accepted} == {"a", "b"}
        assert "132.3 times the median of the last 3" in one.refusals()[0]
        assert [one_.norm for one_ in one.open.in_lease_order()] == [7**0.5, 7**0.5]


def test_norms_of_this_round_judge_nobody_in_it(one: Round) -> None:
    one.state.admission.merged([1.0, 1.0])
    for name, value in zip("abc", (1.0, 1.0, 1e6), strict=True):
        one.accept(name, value)
    assert len(one.open.accepted) == 3


@pytest.mark.parametrize("wire", ["bfloat16", "int8", "int4", "sparse"])
def test_update_in_another_form_than_the_runs_is_refused(one: Round, wire: str) -> None:
    reply = one.reply("a")
    update = {key: torch.ones_like(t) for key, t in one.state.weights.items()}
    parts = encode(update | {"w": torch.ones(64, 64)}, wire=wire)
    one.open.handle_answer(said("m-a", to_header(reply), parts))
    assert one.refusals() == [f"w came as {wire}, not float32"]


@pytest.mark.parametrize("wire", ["bfloat16", "int8", "int4", "sparse"])
def test_coded_update_is_decoded_and_checked_as_any_other(one: Round, wire: str) -> None:
    one.state.config = replace(CONFIG, wire_up=wire, quarantine=True)
    one.state.weights["w"] = torch.zeros(64, 64)
    others = {key: torch.ones_like(t) for key, t in one.state.weights.items() if key != "w"}
    good = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for name, value in (("a", good), ("b", torch.full((64, 64), math.nan)), ("c", 1e9 * good)):
        one.state.admission.merged([60.0] * 3)
        parts = encode(others | {"w": value.clone()}, wire=wire)
        if name == "a":
            sent = decode(parts, shapes={k: t.shape for k, t in one.state.weights.items()})
        one.open.handle_answer(said(f"m-{name}", to_header(one.reply(name)), parts))
    (accepted,) = one.open.accepted
    assert accepted.reply.client == "a"
    spilled = load_file(accepted.path)
    assert all(torch.equal(spilled[key], tensor) for key, tensor in sent.items())
    nan, large = one.refusals()
    assert nan == (
        "w is not finite" if wire == "bfloat16" else "w has a scale that is negative or not finite"
    )
    assert "times the median of the last" in large
    assert one.open.rejected == 2


def test_coded_update_of_a_shape_that_is_not_the_models_is_refused_unread(one: Round) -> None:
    one.state.config = replace(CONFIG, wire_up="sparse")
    one.state.weights["w"] = torch.zeros(64, 64)
    part, other = encode({"w": torch.ones(64, 64), "b": torch.ones(2, 2)}, wire="sparse")
    for name, shape in (("a", (64, 1 << 40)), ("b", (1 << 40, 64)), ("c", (128, 64))):
        parts = [replace(part, shape=shape), other]
        one.open.handle_answer(said(f"m-{name}", to_header(one.reply(name)), parts))
    assert one.refusals() == [
        f"w has shape {shape}, not (64, 64)" for shape in ((64, 1 << 40), (1 << 40, 64), (128, 64))
    ]


def test_refused_content_is_counted_and_what_a_site_is_not_to_blame_for_is_not(one: Round) -> None:
    one.accept("a", math.nan)
    one.accept("b", error="the GPU fell off the bus")
    one.open.handle_answer(Answer("m-c", 0, error="its node is gone", lost=True))
    assert one.open.rejected == 1
    assert one.state.admission.in_a_row == {"a": 1}


@pytest.mark.parametrize(
    "changes", [{"consumed": [[0, 0, 0]]}, {"row_counts": [[0, 3, 1]]}], ids=str
)
def test_content_of_which_no_reply_can_be_made_counts_against_its_sender(
    one: Round, changes: dict[str, Any]
) -> None:
    one.state.config = replace(CONFIG, quarantine=True)
    header = to_header(one.reply("a")) | changes
    one.open.handle_answer(said("m-a", header))
    assert (one.open.rejected, one.state.admission.in_a_row) == (1, {"a": 1})
    assert not one.open.may_have_order("a")


def test_reply_of_another_fence_is_no_mark_against_its_content(one: Round) -> None:
    one.accept("a", fence=Fence("r", 1, 2, 1))
    assert (one.open.rejected, one.state.admission.in_a_row) == (0, {})


def test_accepted_reply_forgives_earlier_refusals_and_an_empty_one_does_not(one: Round) -> None:
    one.state.admission.in_a_row.update(a=2, b=2)
    one.accept("a")
    one.accept("b", rows=0)
    assert one.state.admission.in_a_row == {"b": 2}


def test_third_refusal_in_a_row_is_told_with_what_follows(one: Round) -> None:
    one.state.admission.in_a_row.update(a=2)
    one.accept("a", math.nan)
    (told,) = [e for e in read_events(one.events) if e["event"] == "client_cooling"]
    assert (told["client"], told["refused"]) == ("a", 3) and "300 s" in told["message"]


@pytest.mark.parametrize("keep", [True, False])
def test_refused_update_is_kept_on_request_with_its_reason(one: Round, keep: bool) -> None:
    one.state.config = replace(CONFIG, quarantine=keep)
    one.accept("a", math.inf, loss_nats=math.nan)
    kept = one.spool.parent / "quarantine"
    if not keep:
        assert not kept.exists()
        return
    name = f"round-000003-a-lease-{one.orders['a'].fence.lease_id:08d}"
    facts = json.loads((kept / f"{name}.json").read_text())
    assert facts["client"] == "a" and "is not finite" in facts["reason"]
    assert facts["reply"]["tokens"] == 4 * ROW_TOKENS and facts["reply"]["loss_nats"] is None
    tensors = load_file(kept / f"{name}.safetensors")
    assert tensors.keys() == one.state.weights.keys() and bool(torch.isinf(tensors["w"]).all())


def test_reply_that_has_no_tensors_is_kept_without_them_under_a_name_of_ours(one: Round) -> None:
    one.state.config = replace(CONFIG, quarantine=True)
    name = "../../etc/a b"
    one.order(name, 3, {0})
    broken = Part("w", "float32", (3,), b"short")
    one.open.handle_answer(said(f"m-{name}", to_header(one.reply(name)), [broken]))
    (path,) = (one.spool.parent / "quarantine").iterdir()
    assert path.name.endswith(".json") and ".._.._etc_a_b" in path.name


def test_disk_that_takes_no_quarantine_costs_a_warning_only(
    one: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.state.config = replace(CONFIG, quarantine=True)
    (one.spool.parent / "quarantine").write_text("a file is in the way")
    one.accept("a", math.nan)
    assert one.open.rejected == 1


def test_quarantine_is_kept_small(one: Round, caplog: pytest.LogCaptureFixture) -> None:
    one.state.config = replace(CONFIG, quarantine=True)
    kept = one.spool.parent / "quarantine"
    kept.mkdir()
    for number in range(MAX_KEPT):
        (kept / f"{number}.json").touch()
    one.accept("a", math.nan)
    assert len(list(kept.iterdir())) == MAX_KEPT and one.open.rejected == 1
    assert f"holds {MAX_KEPT} already" in caplog.text


def test_tensor_name_that_no_file_takes_costs_its_sender_only(one: Round) -> None:
    one.state.config = replace(CONFIG, quarantine=True)
    part = Part("__metadata__", "float32", (1,), b"abcd")
    one.open.handle_answer(said("m-a", to_header(one.reply("a")), [part]))
    assert "not the model's" in one.refusals()[0] and one.open.rejected == 1
    assert one.accept("b") and len(one.open.accepted) == 1


def test_reply_of_more_runs_of_rows_than_were_leased_is_refused_unread(one: Round) -> None:
    one.accept("a", consumed=[Segment(0, 0, 0, 0)] * 5000, tokens=0)
    assert one.refusals() == ["it consumed 5000 runs of rows of 2"]


def test_site_that_uses_up_leases_without_training_is_not_asked_for_ever(one: Round) -> None:
    for again in range(MAX_FRUITLESS_ORDERS):
        assert one.accept("a", rows=0, stopped_by="lease used up")
        assert one.open.may_have_order("a") == (again + 1 < MAX_FRUITLESS_ORDERS)
        one.order("a", 0, {0})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_reply_that_is_not_finite_is_refused(one: Round, value: float) -> None:
    one.accept("a", value)
    assert one.open.merged() is None and "is not finite" in one.refusals()[0]


@pytest.mark.parametrize(
    "answer",
    [
        Answer("m-a", 0, error="Flower error 5: gone"),
        said("m-a", {}),
        said("m-a", {"kind": "HelloReply"}),
    ],
    ids=str,
)
def test_answer_that_is_no_reply_is_refused(one: Round, answer: Answer) -> None:
    assert one.open.handle_answer(answer) and len(one.refusals()) == 1
    assert one.orders["a"].fence.lease_id not in one.rows_open


def test_sizes_that_two_replies_disagree_about_cost_the_second_one_only(one: Round) -> None:
    one.order("d", 3, {0})  # in the second epoch
    assert one.accept("a", row_counts={0: 10})
    assert one.accept("d", row_counts={0: 9})
    assert [one_.reply.client for one_ in one.open.accepted] == ["a"]
    assert "shard 0 has 10 rows in the books, not 9" in one.refusals()[0]
    for one_ in one.open.in_lease_order():
        reply = one_.reply
        one.state.ledger.commit(reply.fence.lease_id, reply.consumed, reply.row_counts)


def test_rows_beyond_a_size_that_another_reply_tells_are_refused(one: Round) -> None:
    one.order("d", 3, {0})
    assert one.accept("a", rows=3, row_counts={0: 3})
    assert one.accept("d", rows=4)
    assert [one_.reply.client for one_ in one.open.accepted] == ["a"]


def test_size_below_rows_that_another_reply_trained_on_is_refused(one: Round) -> None:
    one.order("d", 3, {0})
    assert one.accept("a", rows=4)
    assert one.accept("d", rows=3, row_counts={0: 3})
    assert [one_.reply.client for one_ in one.open.accepted] == ["a"]


def test_who_is_still_out_at_the_end_of_the_grace_is_refused_and_its_rows_go_back(
    one: Round,
) -> None:
    one.accept("a")
    one.open.give_up("no reply", {"c": "its client is silent"})
    assert one.open.lost == {"b": "no reply", "c": "its client is silent"}
    assert one.open.failures == {} and one.rows_open == {one.orders["a"].fence.lease_id}
    assert not one.accept("b"), "a late reply isn't this round's any more"
    assert len(one.refusals()) == 2


def test_reply_in_the_name_of_another_client_is_refused_and_costs_that_one_nothing(
    one: Round,
) -> None:
    assert one.accept("a", client="b")
    assert one.refusals() == ['it is in the name of "b", not of a']
    assert one.open.accepted == [] and one.state.admission.in_a_row == {}
    assert one.accept("b")
    assert [accepted.reply.client for accepted in one.open.accepted] == ["b"]
    assert one.open.clients["b"].failure == "" and "not of a" in one.open.clients["a"].failure
