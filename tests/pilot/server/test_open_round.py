"""One round's books: what is one_, what it frees, and what it sums to."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pilot.run.snapshot import SnapshotError
from pilot.segment import Score, Segment
from pilot.server.mailbox import Answer
from pilot.server.orders import SentOrder
from pilot.server.roster import Client
from pilot.wire.messages import Fence, HelloReply

from .round_kit import CONFIG, ROW_TOKENS, Round


def test_replies_are_folded_in_lease_order_weighted_by_tokens(one: Round) -> None:
    for name, rows, value in (("c", 2, 8.0), ("a", 4, 1.0), ("b", 6, 4.0)):
        assert one.accept(name, value, rows=rows)
    assert [one_.reply.client for one_ in one.open.in_lease_order()] == ["a", "b", "c"]
    assert one.open.tokens == 12 * ROW_TOKENS and not one.open.pending
    mean = one.mean()
    assert mean is not None
    torch.testing.assert_close(mean["w"], torch.full((3,), (4 * 1 + 6 * 4 + 2 * 8) / 12))


def test_who_was_first_makes_no_difference_to_the_bit(tmp_path: Path) -> None:
    means = []
    for number, order in enumerate(("abc", "cba", "bca")):
        directory = tmp_path / str(number)
        directory.mkdir()
        round_ = Round(directory)
        for name in order:
            round_.accept(name, value=0.1 + ord(name) / 7)
        mean = round_.mean()
        assert mean is not None
        means.append(mean)
    for other in means[1:]:
        torch.testing.assert_close(other, means[0], rtol=0, atol=0)


def test_memory_is_one_model_since_replies_lie_on_disk_until_the_close(one: Round) -> None:
    one.accept("a")
    one.accept("b")
    assert len(list(one.spool.iterdir())) == 2
    assert not any(
        isinstance(v, torch.Tensor) for t in one.open.accepted for v in vars(t.reply).values()
    )
    one.open.close()
    assert not one.spool.exists()


def test_spool_of_a_dead_server_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "lease-00000099.safetensors").write_bytes(b"old")
    assert list(Round(tmp_path).spool.iterdir()) == []


def test_answer_to_something_else_is_left_to_others(one: Round) -> None:
    assert not one.open.handle_answer(Answer("foreign", 0))
    assert len(one.open.pending) == 3


def test_reply_that_comes_twice_counts_once(one: Round) -> None:
    assert one.accept("a") and not one.accept("a")
    assert one.open.tokens == 4 * ROW_TOKENS


@pytest.mark.parametrize("method", ["median", "trimmed-mean"])
def test_aggregation_is_the_configured_one(one: Round, method: str) -> None:
    one.state.config = replace(CONFIG, aggregation=method)
    for name, value in zip("abc", (1.0, 2.0, 600.0), strict=True):
        one.accept(name, value)
    mean = one.mean()
    assert mean is not None
    torch.testing.assert_close(mean["w"], torch.full((3,), 2.0))


def test_rows_that_a_reply_did_not_use_are_free_before_the_round_is_over(one: Round) -> None:
    assert one.accept("a", rows=4)
    one.order("d", 3, {0})
    assert one.orders["d"].lease is not None
    assert one.orders["d"].lease.segments[0] == Segment(0, 0, 4, None)


def test_reply_without_a_step_gives_its_rows_back_but_its_shards_sizes_count(one: Round) -> None:
    assert one.accept("a", rows=0, row_counts={0: 3, 1: 2})
    assert one.open.accepted == [] and one.open.failures == {} and one.refusals() == []
    assert one.state.ledger.row_counts == {0: 3, 1: 2}
    again = one.state.ledger.lease("a", 4)
    assert again is not None and sum(segment.rows or 0 for segment in again.segments) == 4


def test_evaluations_add_up_to_one_bpb_and_broken_ones_are_left_out(one: Round) -> None:
    one.accept("a", eval_nats=10.0, eval_bytes=5, eval_rows=2)
    one.accept("b", eval_nats=math.nan, eval_bytes=5, eval_rows=2)
    one.accept("c", eval_nats=20.0, eval_bytes=7, eval_rows=2)
    found = one.open.figure()
    assert found.rows == 4 and found.doubts == ()
    assert found.bpb == pytest.approx(30 / (math.log(2) * 12))


def test_rows_that_nobody_was_asked_to_score_do_not_count(one: Round) -> None:
    one.accept("a", eval_rows=2**40)
    one.accept("b", scores=[Score(0, 2, 5.0, 5)])
    assert one.open.figure().rows == 0
    assert one.open.figure().doubts == (
        "b scored validation rows that it was not asked for, or twice: its figure is left out",
    )


def test_what_a_client_left_unscored_is_there_for_another_once(one: Round) -> None:
    assert one.open.unscored("d").pieces == (), "they all may still score theirs"
    one.open.handle_answer(Answer("m-b", 1, error="gone", lost=True))
    one.accept("c", eval_bytes=0)
    assert one.open.unscored("d").own == (2, 4)
    assert one.open.unscored("c").own == (4, 6), "its own, if it is asked again"
    assert one.open.unscored("a").pieces == ()
    client = Client("d", 9, HelloReply())
    fence, asked = Fence("r", 1, 3, 0), one.open.unscored("d")
    one.open.add(SentOrder("m-d", client, fence, None, asked=asked, step_tokens=8))
    assert one.open.unscored("e").own == (4, 6)


def test_sums_of_evaluation_and_loss_are_the_same_whoever_was_first(tmp_path: Path) -> None:
    said = []
    for number, order in enumerate(("abc", "cba", "bca")):
        (tmp_path / str(number)).mkdir()
        one = Round(tmp_path / str(number))
        for name in order:
            third = (ord(name) - 96) / 3 + 10.0 ** (ord(name) - 96)
            one.accept(name, eval_nats=third, loss_nats=third)
        said.append((one.open.figure().bpb, one.open.train_loss))
    assert said[0] == said[1] == said[2]


def test_evaluation_that_overflows_is_none(one: Round) -> None:
    one.accept("a", eval_nats=1e308)
    one.accept("b", eval_nats=1e308)
    assert one.open.figure().bpb is None, "state.json takes no infinity"


@pytest.mark.parametrize("changes", [{"eval_bytes": 0}, {"eval_rows": 0}, {"eval_bytes": -1}])
def test_evaluation_over_nothing_counts_nothing(one: Round, changes: dict[str, int]) -> None:
    one.accept("a", **changes)
    assert one.open.figure().bpb is None and one.open.figure().rows == 0


def test_round_that_has_no_loss_says_none(one: Round) -> None:
    assert one.open.train_loss is None and one.open.merged() is None
    one.accept("a", loss_nats=math.nan)
    assert one.open.train_loss is None
    one.open.accepted.clear()
    one.accept("b")
    assert one.open.train_loss == pytest.approx(2.0)


def test_who_has_not_answered_is_no_failure_of_its_site_but_its_rows_go_back(one: Round) -> None:
    lost = one.open.handle_answer(Answer("m-a", 0, error="its node is gone", lost=True))
    refused = one.open.handle_answer(Answer("m-b", 1, error="Flower error 2: it raised"))
    assert lost is not None and refused is not None
    assert lost.reply is None and refused.reply is None
    assert (set(one.open.lost), set(one.open.failures)) == ({"a"}, {"b"})
    assert one.rows_open == {one.orders["c"].fence.lease_id} and one.open.answered == 0


def test_a_client_whose_lease_did_not_last_may_have_another_one_and_both_count(one: Round) -> None:
    one.accept("a", 1.0, stopped_by="lease used up")
    assert one.open.used_up_lease("a") and one.open.answered == 1
    lease = one.state.ledger.lease("a", 4)
    assert lease is not None
    one.orders["a"] = replace(
        one.orders["a"], lease=lease, fence=replace(one.orders["a"].fence, lease_id=lease.lease_id)
    )
    one.open.add(one.orders["a"])
    segment = lease.segments[0]
    first = segment.first_row
    again = one.reply("a", consumed=[replace(segment, first_row=first, end_row=first + 4)])
    assert one.open.handle_answer(one.answer("a", again, 3.0)) is not None
    mean = one.mean()
    assert mean is not None and [one_.order.client.name for one_ in one.open.accepted] == ["a", "a"]
    torch.testing.assert_close(mean["w"], torch.full((3,), 2.0))


def test_disk_that_is_full_ends_the_run_with_a_sentence(
    one: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_space)
    with pytest.raises(SnapshotError, match=r"lease-00000001.*No space left"):
        one.accept("a")
