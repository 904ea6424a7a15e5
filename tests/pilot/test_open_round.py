"""One round's books: what is taken, what is refused and why, and what it sums to."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pilot import open_round as module
from pilot.codec import encode
from pilot.config import RunConfig
from pilot.ledger import Ledger, Segment
from pilot.mailbox import Answer
from pilot.messages import Fence, HelloReply, Part, TrainReply, to_header
from pilot.open_round import OpenRound, Work
from pilot.run_state import RunState
from pilot.sites import Site
from pilot.snapshot import SnapshotError
from pilot.telemetry import Telemetry, read_events

ROW_TOKENS, SHARD_ROWS = 8, 10
CONFIG = RunConfig(
    run_name="r", sequence_len=ROW_TOKENS, total_batch_size=4 * ROW_TOKENS, num_shards=6
)


class Round:
    """A round of three sites that have two shards of ten rows each, and what tests do with it."""

    def __init__(self, directory: Path) -> None:
        ledger = Ledger(num_shards=6, epochs=2, shard_order=lambda _: range(6))
        weights = {"w": torch.zeros(3), "b": torch.zeros(2, 2)}
        self.state = RunState(CONFIG, weights, ledger, total_tokens=10**6)
        self.spool, self.events = directory / "spool", directory / "events.jsonl"
        self.telemetry = Telemetry(
            directory, config_dict={}, wandb_mode="disabled", wandb_project="", run_name="r"
        )
        self.open = OpenRound(3, self.state, self.telemetry, spool=self.spool, opened_at_s=0.0)
        self.works = {}
        for number, name in enumerate("abc"):
            self.order(name, number, {2 * number, 2 * number + 1})

    def order(self, name: str, number: int, shards: set[int]) -> None:
        self.state.ledger.register(name, shards)
        lease = self.state.ledger.lease(name, 4)
        assert lease is not None
        fence = Fence("r", 1, 3, lease.lease_id)
        work = Work(f"m-{name}", Site(name, number, HelloReply()), fence, lease)
        self.works[name] = work
        self.open.add(work)

    def reply(self, name: str, rows: int = 4, **changes: Any) -> TrainReply:
        work = self.works[name]
        assert work.lease is not None
        first = work.lease.segments[0]
        consumed = [[first.epoch, first.shard, 0, rows]] if rows else []
        reply = TrainReply(
            fence=work.fence,
            client=name,
            steps=1,
            tokens=rows * ROW_TOKENS,
            loss_nats=2.0 * rows * ROW_TOKENS,
            eval_nats=10.0,
            eval_bytes=5,
            eval_rows=2,
            train_s=2.0,
            consumed=consumed,
        )
        return replace(reply, **changes)

    def answer(self, name: str, reply: TrainReply, value: float = 1.0) -> Answer:
        update = {key: torch.full_like(t, value) for key, t in self.state.weights.items()}
        return Answer(f"m-{name}", 0, to_header(reply), encode(update) if reply.tokens else [])

    def take(self, name: str, value: float = 1.0, **changes: Any) -> bool:
        """Whether the answer was to this round, taken or refused."""
        answer = self.answer(name, self.reply(name, **changes), value)
        return self.open.take(answer) is not None

    def refusals(self) -> list[str]:
        return [e["reason"] for e in read_events(self.events) if e["event"] == "reply_refused"]

    @property
    def rows_open(self) -> set[int]:
        return set(self.state.ledger.open)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Round]:
    round_ = Round(tmp_path)
    yield round_
    books = round_.state.ledger
    assert books.rows_leased == books.rows_committed + books.rows_returned + books.rows_open


def test_replies_are_folded_in_lease_order_weighted_by_tokens(one: Round) -> None:
    for name, rows, value in (("c", 2, 8.0), ("a", 4, 1.0), ("b", 6, 4.0)):
        assert one.take(name, value, rows=rows)
    assert [taken.reply.client for taken in one.open.in_lease_order()] == ["a", "b", "c"]
    assert one.open.tokens == 12 * ROW_TOKENS and not one.open.pending
    mean = one.open.mean()
    assert mean is not None
    torch.testing.assert_close(mean["w"], torch.full((3,), (4 * 1 + 6 * 4 + 2 * 8) / 12))


def test_who_was_first_makes_no_difference_to_the_bit(tmp_path: Path) -> None:
    means = []
    for number, order in enumerate(("abc", "cba", "bca")):
        directory = tmp_path / str(number)
        directory.mkdir()
        round_ = Round(directory)
        for name in order:
            round_.take(name, value=0.1 + ord(name) / 7)
        mean = round_.open.mean()
        assert mean is not None
        means.append(mean)
    for other in means[1:]:
        torch.testing.assert_close(other, means[0], rtol=0, atol=0)


def test_memory_is_one_model_since_replies_lie_on_disk_until_the_close(one: Round) -> None:
    one.take("a")
    one.take("b")
    assert len(list(one.spool.iterdir())) == 2
    assert not any(
        isinstance(v, torch.Tensor) for t in one.open.taken for v in vars(t.reply).values()
    )
    one.open.close()
    assert not one.spool.exists()


def test_spool_of_a_dead_server_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "lease-00000099.safetensors").write_bytes(b"old")
    assert list(Round(tmp_path).spool.iterdir()) == []


def test_answer_to_something_else_is_left_to_others(one: Round) -> None:
    assert not one.open.take(Answer("foreign", 0, {}, []))
    assert len(one.open.pending) == 3


def test_reply_that_comes_twice_counts_once(one: Round) -> None:
    assert one.take("a") and not one.take("a")
    assert one.open.tokens == 4 * ROW_TOKENS


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"error": "no GPU here"}, "no GPU here"),
        ({"fence": Fence("r", 1, 2, 1)}, "its fence is"),
        ({"fence": Fence("r", 2, 3, 1)}, "its fence is"),
        ({"tokens": 5 * ROW_TOKENS}, "reports 40 tokens for 4 rows"),
        ({"tokens": -32}, "reports -32 tokens"),
        ({"tokens": 0}, "tensors are not the model's|reports 0 tokens"),
        ({"consumed": []}, "tokens for 0 rows"),
        ({"consumed": [[0, 1, 0, 4]]}, "before it|start"),
        ({"consumed": [[0, 0, 0]]}, "not enough values"),
        ({"row_counts": [[0, 3]]}, "goes beyond"),
        ({"row_counts": [[77, 3]]}, "shard 77"),
        ({"row_counts": [[0, 3, 1]]}, "too many values"),
    ],
    ids=str,
)
def test_bad_reply_is_refused_and_its_rows_go_back(
    one: Round, changes: dict[str, Any], reason: str
) -> None:
    lease_id = one.works["a"].fence.lease_id
    assert one.take("a", **changes)
    assert one.open.taken == [] and "a" in one.open.failures and lease_id not in one.rows_open
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
            one.take(name, 100.0 if name == "c" else 1.0)  # of seven coordinates: norm 264.6
        assert {taken.reply.client for taken in one.open.taken} == {"a", "b"}
        assert "132.3 times the median of the last 3" in one.refusals()[0]
        assert [taken.norm for taken in one.open.in_lease_order()] == [7**0.5, 7**0.5]


def test_norms_of_this_round_judge_nobody_in_it(one: Round) -> None:
    one.state.admission.merged([1.0, 1.0])
    for name, value in zip("abc", (1.0, 1.0, 1e6), strict=True):
        one.take(name, value)
    assert len(one.open.taken) == 3


def test_update_in_another_dtype_than_the_runs_is_refused(one: Round) -> None:
    reply = one.reply("a")
    update = {key: torch.ones_like(t) for key, t in one.state.weights.items()}
    parts = encode(update, dtype="bfloat16")
    one.open.take(Answer("m-a", 0, to_header(reply), parts))
    assert one.refusals() == ["its tensors came as bfloat16, not float32"]


def test_refused_content_is_counted_and_what_a_site_is_not_to_blame_for_is_not(one: Round) -> None:
    one.take("a", math.nan)
    one.take("b", error="the GPU fell off the bus")
    one.open.take(Answer("m-c", 0, {}, [], "its node is gone", lost=True))
    assert one.open.rejected == 1
    assert one.state.admission.in_a_row == {"a": 1}


def test_reply_of_another_fence_is_no_mark_against_its_content(one: Round) -> None:
    one.take("a", fence=Fence("r", 1, 2, 1))
    assert (one.open.rejected, one.state.admission.in_a_row) == (0, {})


def test_accepted_reply_forgives_earlier_refusals_and_an_empty_one_does_not(one: Round) -> None:
    one.state.admission.in_a_row.update(a=2, b=2)
    one.take("a")
    one.take("b", rows=0)
    assert one.state.admission.in_a_row == {"b": 2}


def test_third_refusal_in_a_row_is_told_with_what_follows(one: Round) -> None:
    one.state.admission.in_a_row.update(a=2)
    one.take("a", math.nan)
    (told,) = [e for e in read_events(one.events) if e["event"] == "client_cooling"]
    assert (told["client"], told["refused"]) == ("a", 3) and "300 s" in told["message"]


@pytest.mark.parametrize("method", ["median", "trimmed-mean"])
def test_aggregation_is_the_configured_one(one: Round, method: str) -> None:
    one.state.config = replace(CONFIG, aggregation=method)
    for name, value in zip("abc", (1.0, 2.0, 600.0), strict=True):
        one.take(name, value)
    mean = one.open.mean()
    assert mean is not None
    torch.testing.assert_close(mean["w"], torch.full((3,), 2.0))


@pytest.mark.parametrize("keep", [True, False])
def test_refused_update_is_kept_on_request_with_its_reason(one: Round, keep: bool) -> None:
    one.state.config = replace(CONFIG, quarantine=keep)
    one.take("a", math.inf, loss_nats=math.nan)
    kept = one.spool.parent / "quarantine"
    if not keep:
        assert not kept.exists()
        return
    name = f"round-000003-a-lease-{one.works['a'].fence.lease_id:08d}"
    facts = json.loads((kept / f"{name}.json").read_text())
    assert facts["client"] == "a" and "is not finite" in facts["reason"]
    assert facts["reply"]["tokens"] == 4 * ROW_TOKENS and facts["reply"]["loss_nats"] is None
    tensors = load_file(kept / f"{name}.safetensors")
    assert tensors.keys() == one.state.weights.keys() and bool(torch.isinf(tensors["w"]).all())


def test_reply_that_has_no_tensors_is_kept_without_them_under_a_name_of_ours(one: Round) -> None:
    one.state.config = replace(CONFIG, quarantine=True)
    one.works["a"].site.name = "../../etc/a b"
    broken = Part("w", "float32", (3,), b"short")
    one.open.take(Answer("m-a", 0, to_header(one.reply("a")), [broken]))
    (path,) = (one.spool.parent / "quarantine").iterdir()
    assert path.name.endswith(".json") and ".._.._etc_a_b" in path.name


def test_disk_that_takes_no_quarantine_costs_a_warning_only(
    one: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.state.config = replace(CONFIG, quarantine=True)
    (one.spool.parent / "quarantine").write_text("a file is in the way")
    one.take("a", math.nan)
    assert one.open.rejected == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_reply_that_is_not_finite_is_refused(one: Round, value: float) -> None:
    one.take("a", value)
    assert one.open.mean() is None and "is not finite" in one.refusals()[0]


@pytest.mark.parametrize(
    "answer",
    [
        Answer("m-a", 0, {}, [], "Flower error 5: gone"),
        Answer("m-a", 0, {}, []),
        Answer("m-a", 0, {"kind": "HelloReply"}, []),
    ],
    ids=str,
)
def test_answer_that_is_no_reply_is_refused(one: Round, answer: Answer) -> None:
    assert one.open.take(answer) and len(one.refusals()) == 1
    assert one.works["a"].fence.lease_id not in one.rows_open


def test_sizes_that_two_replies_disagree_about_cost_the_second_one_only(one: Round) -> None:
    one.order("d", 3, {0})  # in the second epoch
    assert one.take("a", row_counts=[[0, 10]])
    assert one.take("d", row_counts=[[0, 9]])
    assert [taken.reply.client for taken in one.open.taken] == ["a"]
    assert "shard 0 has 10 rows in the books, not 9" in one.refusals()[0]
    for taken in one.open.in_lease_order():
        one.state.ledger.commit(taken.work.fence.lease_id, taken.consumed, taken.row_counts)


def test_rows_beyond_a_size_that_another_reply_tells_are_refused(one: Round) -> None:
    one.order("d", 3, {0})
    assert one.take("a", rows=3, row_counts=[[0, 3]])
    assert one.take("d", rows=4)
    assert [taken.reply.client for taken in one.open.taken] == ["a"]


def test_size_below_rows_that_another_reply_trained_on_is_refused(one: Round) -> None:
    one.order("d", 3, {0})
    assert one.take("a", rows=4)
    assert one.take("d", rows=3, row_counts=[[0, 3]])
    assert [taken.reply.client for taken in one.open.taken] == ["a"]


def test_rows_that_a_reply_did_not_use_are_free_before_the_round_is_over(one: Round) -> None:
    assert one.take("a", rows=4)
    one.order("d", 3, {0})
    assert one.works["d"].lease is not None
    assert one.works["d"].lease.segments[0] == Segment(0, 0, 4, None)


def test_reply_without_a_step_gives_its_rows_back_but_its_shards_sizes_count(one: Round) -> None:
    assert one.take("a", rows=0, row_counts=[[0, 3], [1, 2]])
    assert one.open.taken == [] and one.open.failures == {} and one.refusals() == []
    assert one.state.ledger.row_counts == {0: 3, 1: 2}
    again = one.state.ledger.lease("a", 4)
    assert again is not None and sum(segment.rows or 0 for segment in again.segments) == 4


def test_evaluations_add_up_to_one_bpb_and_broken_ones_are_left_out(one: Round) -> None:
    one.take("a", eval_nats=10.0, eval_bytes=5, eval_rows=2)
    one.take("b", eval_nats=math.nan, eval_bytes=5, eval_rows=2)
    one.take("c", eval_nats=20.0, eval_bytes=7, eval_rows=3)
    assert one.open.eval_rows == 5
    assert one.open.val_bpb == pytest.approx(30.0 / (math.log(2) * 12))


def test_sums_of_evaluation_and_loss_are_the_same_whoever_was_first(tmp_path: Path) -> None:
    said = []
    for number, order in enumerate(("abc", "cba", "bca")):
        (tmp_path / str(number)).mkdir()
        one = Round(tmp_path / str(number))
        for name in order:
            third = (ord(name) - 96) / 3 + 10.0 ** (ord(name) - 96)
            one.take(name, eval_nats=third, loss_nats=third)
        said.append((one.open.val_bpb, one.open.train_loss))
    assert said[0] == said[1] == said[2]


def test_evaluation_that_overflows_is_none(one: Round) -> None:
    one.take("a", eval_nats=1e308)
    one.take("b", eval_nats=1e308)
    assert one.open.val_bpb is None, "state.json takes no infinity"


@pytest.mark.parametrize("changes", [{"eval_bytes": 0}, {"eval_rows": 0}, {"eval_bytes": -1}])
def test_evaluation_over_nothing_counts_nothing(one: Round, changes: dict[str, int]) -> None:
    one.take("a", **changes)
    assert one.open.val_bpb is None and one.open.eval_rows == 0


def test_round_that_has_no_loss_says_none(one: Round) -> None:
    assert one.open.train_loss is None and one.open.mean() is None
    one.take("a", loss_nats=math.nan)
    assert one.open.train_loss is None
    one.open.taken.clear()
    one.take("b")
    assert one.open.train_loss == pytest.approx(2.0)


def test_who_is_still_out_at_the_end_of_the_grace_is_refused_and_its_rows_go_back(
    one: Round,
) -> None:
    one.take("a")
    one.open.give_up("no reply", silent={"c"})
    assert one.open.lost == {"b": "no reply", "c": "its client is silent"}
    assert one.open.failures == {} and one.rows_open == {one.works["a"].fence.lease_id}
    assert not one.take("b"), "a late reply isn't this round's any more"
    assert len(one.refusals()) == 2


def test_who_has_not_answered_is_no_failure_of_its_site_but_its_rows_go_back(one: Round) -> None:
    lost = one.open.take(Answer("m-a", 0, {}, [], "its node is gone", lost=True))
    refused = one.open.take(Answer("m-b", 1, {}, [], "Flower error 2: it raised"))
    assert lost is not None and refused is not None
    assert lost.reply is None and refused.reply is None
    assert (set(one.open.lost), set(one.open.failures)) == ({"a"}, {"b"})
    assert one.rows_open == {one.works["c"].fence.lease_id} and one.open.answered == 0


def test_a_client_whose_lease_did_not_last_may_have_another_one_and_both_count(one: Round) -> None:
    one.take("a", 1.0, stopped_by="lease used up")
    assert one.open.used_up == {"a"} and one.open.answered == 1
    lease = one.state.ledger.lease("a", 4)
    assert lease is not None
    one.works["a"] = replace(
        one.works["a"], lease=lease, fence=replace(one.works["a"].fence, lease_id=lease.lease_id)
    )
    one.open.add(one.works["a"])
    segment = lease.segments[0]
    first = segment.first_row
    again = one.reply("a", consumed=[[segment.epoch, segment.shard, first, first + 4]])
    assert one.open.take(one.answer("a", again, 3.0)) is not None
    mean = one.open.mean()
    assert mean is not None and [taken.work.site.name for taken in one.open.taken] == ["a", "a"]
    torch.testing.assert_close(mean["w"], torch.full((3,), 2.0))


def test_disk_that_is_full_ends_the_run_with_a_sentence(
    one: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", no_space)
    with pytest.raises(SnapshotError, match=r"lease-00000001.*No space left"):
        one.take("a")
