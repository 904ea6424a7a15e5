"""One round on one process, within this one: what is trained, consumed, counted and replied."""

import json
import math
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.kernels.choices import Choices, CompileChoice, choose_compile, training_seconds
from nanochat.layers import run_block
from nanochat.loss_eval import bpb_sums
from nanochat.rows.stream import RowStream
from nanochat.tokenizer import get_token_bytes, tokenizer_dir
from pilot import plan
from pilot.config import RunConfig
from pilot.overrides import load_run_config
from pilot.segment import Score
from pilot.site import meter as meter_module
from pilot.site import round as round_module
from pilot.site.data import SiteData, hello, open_data
from pilot.site.handle import ERROR_NAME
from pilot.site.ranks import Ranks
from pilot.site.round import Round
from pilot.wire.code_hashes import code_hashes
from pilot.wire.codec import decode
from pilot.wire.jsonable import header_text
from pilot.wire.messages import HelloOrder, TrainReply, from_header, to_header

from ..worker_kit import (
    BATCH_ROWS,
    ENDLESS,
    VAL_SHARD,
    T,
    first_weights,
    lists,
    site_config,
    train_order,
)

ROOT = Path(__file__).resolve().parents[3]
ALONE = Ranks(0, 1, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def _sigterm_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    threads = torch.get_num_threads()
    yield
    signal.signal(signal.SIGTERM, before)
    torch.set_num_threads(threads)


def run(
    config: RunConfig, segments: list[list[int]], **values: Any
) -> tuple[TrainReply, dict[str, torch.Tensor]]:
    order = train_order(config, segments, **values)
    reply, parts = Round(order, ALONE, time.monotonic()).run(first_weights(config))
    return reply, decode(parts)


def sizes(config: RunConfig) -> dict[int, int]:
    data = open_data(config)
    counts = {}
    for shard in range(VAL_SHARD + 1):
        counts[shard] = data.rows.wait_packed(shard) or 0
    data.rows.close()
    return counts


# -- steps and rows ------------------------------------------------------------------------------


def test_fixed_steps_take_exactly_their_rows_in_lease_order(site: Path) -> None:
    config = site_config(site, round_steps=2)
    counts = sizes(config)
    first = counts[0] - BATCH_ROWS - 2  # the second step goes over into the next segment
    reply, update = run(config, [[0, 0, first, counts[0]], [0, 1, 3, -1]])
    assert (reply.steps, reply.tokens) == (2, 2 * BATCH_ROWS * T)
    assert lists(reply.consumed) == [[0, 0, first, counts[0]], [0, 1, 3, 3 + BATCH_ROWS - 2]]
    assert reply.batches == 2 * 4 and reply.stopped_by == "steps done"
    assert reply.loss_nats / reply.tokens == pytest.approx(np.log(config.vocab_size), rel=0.2)
    assert reply.train_s > 0 and reply.total_s >= reply.train_s
    assert update.keys() == first_weights(config).keys()
    assert all(bool(tensor.any()) for tensor in update.values()), "everything was trained"
    json.dumps(to_header(reply))


def test_a_reply_says_what_its_seconds_were_spent_on(site: Path) -> None:
    config = site_config(site, round_steps=2)
    reply, _ = run(config, [[0, 0, 0, -1]], eval_end_row=4)
    assert min(reply.ready_s, reply.eval_s, reply.pack_s, reply.encode_s) > 0
    assert reply.pack_s < reply.train_s
    parts_s = reply.ready_s + reply.eval_s + reply.train_s + reply.encode_s
    assert parts_s <= reply.total_s, "they do not overlap"


def test_lease_that_is_used_up_ends_the_round_at_a_whole_step(site: Path) -> None:
    config = site_config(site, round_steps=0)
    reply, _ = run(config, [[0, 0, 0, 2 * BATCH_ROWS + 3]])
    assert (reply.steps, reply.stopped_by) == (2, "lease used up")
    assert lists(reply.consumed) == [[0, 0, 0, 2 * BATCH_ROWS]]


def test_last_lease_ends_with_one_short_step(site: Path) -> None:
    config = site_config(site, round_steps=0)
    reply, _ = run(config, [[0, 0, 0, 2 * BATCH_ROWS + 3]], lease_is_tail=True)
    assert (reply.steps, reply.tokens) == (3, (2 * BATCH_ROWS + 3) * T)
    assert lists(reply.consumed) == [[0, 0, 0, 2 * BATCH_ROWS + 3]]
    assert reply.stopped_by == "lease used up"


def test_lease_too_small_for_a_step_trains_nothing_but_tells_its_shards_sizes(site: Path) -> None:
    config = site_config(site, round_steps=1, total_batch_size=10_000 * T)
    counts = sizes(config)
    reply, update = run(config, [[0, 0, 0, -1], [0, 1, 0, -1]])
    assert (reply.steps, reply.tokens, reply.consumed, update) == (0, 0, [], {})
    assert dict(reply.row_counts) == {0: counts[0], 1: counts[1]}


def test_sizes_told_after_fixed_steps_depend_on_the_work_alone(site: Path, tmp_path: Path) -> None:
    config = site_config(site, round_steps=1)
    counts = sizes(config)  # now everything is packed: an eager client could tell both
    reply, _ = run(config, [[0, 1, 0, -1], [0, 0, 0, -1]])
    assert reply.row_counts == {1: counts[1]}
    with pytest.MonkeyPatch.context() as patch:  # and here nothing is
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
        fresh = site_config(site, round_steps=1, tokenizer=str(site / "bytes"))
        again, _ = run(fresh, [[0, 1, 0, -1], [0, 0, 0, -1]])
    assert again.row_counts == reply.row_counts


def test_order_without_rows_only_evaluates(site: Path) -> None:
    reply, update = run(site_config(site), [], eval_first_row=0, eval_end_row=5)
    assert (reply.steps, reply.tokens, reply.consumed, update) == (0, 0, [], {})
    assert reply.stopped_by == "nothing leased" and reply.eval_rows == 5


# -- ends ----------------------------------------------------------------------------------------


def test_time_that_is_up_is_a_reply_without_training(site: Path) -> None:
    reply, update = run(site_config(site), [[0, 0, 0, -1]], seconds_left=0.0)
    assert (reply.tokens, reply.steps, reply.stopped_by, update) == (0, 0, "deadline", {})


def test_time_ruled_round_trains_until_its_time_is_up(site: Path) -> None:
    reply, update = run(site_config(site, round_steps=0), ENDLESS, seconds_left=1.5)
    assert reply.stopped_by == "deadline" and reply.steps > 0 and update
    rows = sum(segment.rows or 0 for segment in reply.consumed)
    assert rows * T == reply.tokens == reply.steps * BATCH_ROWS * T


def test_site_that_is_to_leave_gives_up_evaluating_and_packing(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notice = tmp_path / "notice"
    config = site_config(site, round_steps=0, preempt_file=str(notice))
    evaluated = 0

    def appears(model: Any, batches: Iterator[np.ndarray], token_bytes: Any) -> Any:
        def one_by_one() -> Iterator[np.ndarray]:
            nonlocal evaluated
            for batch in batches:
                yield batch
                evaluated += 1
                notice.touch()
                time.sleep(0.3)

        return bpb_sums(model, one_by_one(), token_bytes)

    def never(self: RowStream, num_rows: int, should_stop: Any = lambda: False) -> np.ndarray:
        notice.touch()
        while not should_stop():
            time.sleep(0.01)
        return np.empty((0, T + 1), dtype=np.int64)

    with monkeypatch.context() as patch:
        patch.setattr(round_module, "bpb_sums", appears)
        reply, update = run(config, ENDLESS, eval_end_row=12)
    assert 0 < evaluated < 6
    assert (reply.stopped_by, reply.eval_rows, reply.eval_bytes) == (f"preempt-file {notice}", 0, 0)
    assert (reply.tokens, reply.consumed, update) == (0, [], {})
    notice.unlink()
    monkeypatch.setattr(RowStream, "read", never)
    reply, update = run(config, ENDLESS, eval_end_row=12)
    assert (reply.stopped_by, reply.eval_rows) == (f"preempt-file {notice}", 12)
    assert (reply.tokens, reply.consumed, update) == (0, [], {})


def test_site_that_is_not_done_by_the_drain_deadline_ends_with_a_sentence(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notice = tmp_path / "notice"
    config = site_config(site, preempt_file=str(notice), drain_deadline=1.0)
    gave_up = threading.Event()
    sentences: list[str] = []

    def hangs(config: RunConfig) -> SiteData:
        notice.touch()
        assert gave_up.wait(30)
        return open_data(config)

    monkeypatch.setattr(round_module, "open_data", hangs)
    monkeypatch.setattr(
        round_module, "_give_up", lambda text: (sentences.append(text), gave_up.set())
    )
    run(config, ENDLESS)
    assert str(notice) in sentences[0] and "drain-deadline" in sentences[0]
    monkeypatch.undo()

    monkeypatch.setattr(sys, "argv", ["rank", str(tmp_path)])
    child = multiprocessing.get_context("fork").Process(
        target=round_module._give_up, args=(sentences[0],)
    )
    child.start()
    child.join()
    assert child.exitcode == 1 and (tmp_path / ERROR_NAME).read_text() == sentences[0]


# -- speed ---------------------------------------------------------------------------------------


def test_speed_and_share_of_the_cards_arithmetic_are_in_heartbeat_and_reply(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = site_config(site, round_steps=2)
    reply, _ = run(config, [[0, 0, 0, -1]])
    assert reply.mfu is None, "no data sheet says what a CPU can do"
    monkeypatch.setattr(meter_module, "peak_flops", lambda device, world_size: 1e12 * world_size)
    task = Round(train_order(config, [[0, 0, 0, -1]]), ALONE, time.monotonic())
    reply, _ = task.run(first_weights(config))
    model = plan.build_model(config, device=torch.device("meta"), compute_dtype=torch.float32)
    token_flops = model.estimate_flops()
    assert reply.mfu == pytest.approx(reply.tokens / reply.train_s * token_flops / 1e12)
    beat = task.progress.heartbeat
    assert beat.mfu == pytest.approx(beat.tokens_per_s * token_flops / 1e12) and beat.mfu > 0
    assert from_header(json.loads(header_text(to_header(reply)))) == reply


# -- evaluation ----------------------------------------------------------------------------------


def test_slices_of_the_evaluation_add_up_to_the_whole(site: Path) -> None:
    config = site_config(site)
    replies = [
        run(config, [], eval_first_row=first, eval_end_row=end)[0]
        for first, end in ((0, 12), (0, 5), (5, 6), (6, 12), (3, 3))
    ]
    whole, *parts = replies
    assert whole.eval_rows == 12 and sum(reply.eval_rows for reply in parts) == 12
    assert sum(reply.eval_bytes for reply in parts) == whole.eval_bytes > 0
    assert sum(reply.eval_nats for reply in parts) == pytest.approx(whole.eval_nats, rel=1e-6)
    model = plan.build_model(config, device=ALONE.device, compute_dtype=torch.float32)
    model.load_state_dict(first_weights(config))
    rows = open_data(config).validation_rows(0, 12)
    token_bytes = get_token_bytes(tokenizer_dir(config.tokenizer), "cpu")
    nats, num_bytes = bpb_sums(model, [rows], token_bytes)
    assert (whole.eval_nats, whole.eval_bytes) == (pytest.approx(nats, rel=1e-6), num_bytes)


def test_pieces_are_scored_apart_and_those_of_another_slice_are_not_in_the_sums(site: Path) -> None:
    config = site_config(site)
    whole = run(config, [], eval_first_row=0, eval_end_row=8)[0]
    assert whole.scores == [Score(0, 8, whole.eval_nats or 0.0, whole.eval_bytes)]
    pieces = [[0, 3], [3, 8], [8, 10]]
    reply = run(config, [], eval_first_row=0, eval_end_row=8, eval_pieces=pieces)[0]
    assert [list(score.piece) for score in reply.scores] == pieces
    assert (reply.eval_rows, reply.eval_bytes) == (8, whole.eval_bytes)
    assert reply.eval_nats == pytest.approx(whole.eval_nats, rel=1e-6)
    other = run(config, [], eval_first_row=8, eval_end_row=10)[0]
    assert reply.scores[2].nats == pytest.approx(other.eval_nats, rel=1e-6)
    assert reply.scores[2].num_bytes == other.eval_bytes


def test_ruined_model_is_a_very_bad_one_and_no_reason_to_lose_a_reply(site: Path) -> None:
    config = site_config(site)
    weights = {n: t * math.inf for n, t in first_weights(config).items()}
    order = train_order(config, [], eval_end_row=4)
    reply, _ = Round(order, ALONE, time.monotonic()).run(weights)
    assert reply.scores[0].nats == 1e12
    assert from_header(json.loads(header_text(to_header(reply)))) == reply


def test_model_is_evaluated_as_it_was_received_whatever_is_trained_after(site: Path) -> None:
    config = site_config(site)
    only, _ = run(config, [], eval_first_row=0, eval_end_row=6)
    both, _ = run(config, [[0, 0, 0, -1]], eval_first_row=0, eval_end_row=6)
    assert both.eval_nats == only.eval_nats and both.steps == 2


# -- what a site has -----------------------------------------------------------------------------


def test_validation_shard_is_no_training_shard_whatever_is_on_the_disk(site: Path) -> None:
    for num_shards in (1, 2):
        data = open_data(site_config(site, num_shards=num_shards))
        assert data.train_shards == list(range(num_shards)) and data.source.val_shard == VAL_SHARD
    with pytest.raises(UserError, match="only 2"):
        open_data(site_config(site, num_shards=3))


def test_hello_says_what_sites_must_agree_on(site: Path) -> None:
    config = site_config(site)
    reply = hello(HelloOrder(run="r", config=config.to_mapping(), redis_url=""))
    assert reply.error == "" and reply.shards == [0, 1] and reply.devices == 1
    assert code_hashes().items() <= reply.fingerprints.items() and reply.warning == ""
    assert reply.redis is False, "it was told of none"
    assert reply.versions == {"torch": torch.__version__}
    again = hello(HelloOrder(run="r", config=config.to_mapping(), redis_url=""))
    assert again == reply
    changed = site_config(site, packing="bestfit").to_mapping()
    other = hello(HelloOrder(run="r", config=changed, redis_url=""))
    differing = {k for k, v in other.fingerprints.items() if reply.fingerprints[k] != v}
    assert differing == {"packing", "validation rows"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": "nowhere"}, "tokenizer"),
        ({"source": "climbmix"}, "python -m nanochat.dataset"),
        ({"source": "/nowhere/at/all"}, "no data source"),
        ({"vocab_size": 301}, "vocab-size"),
        ({"num_shards": 3}, "num-shards"),
        ({"eval_rows": 10_000}, "eval-rows"),
    ],
)
def test_site_that_lacks_something_says_so_in_a_sentence(
    site: Path, changes: dict[str, Any], words: str
) -> None:
    config = site_config(site, **changes)
    reply = hello(HelloOrder(run="r", config=config.to_mapping(), redis_url=""))
    assert words in reply.error and "\n" not in reply.error and reply.host


def test_site_that_cannot_reach_redis_warns_and_takes_part(site: Path) -> None:
    order = HelloOrder(run="r", config=site_config(site).to_mapping(), redis_url="unix:///no.sock")
    reply = hello(order)
    assert "cannot reach Redis" in reply.warning and reply.error == ""
    assert reply.redis is False


def test_too_few_validation_rows_are_told_with_their_number(site: Path) -> None:
    data: SiteData = open_data(site_config(site))
    rows = sizes(site_config(site))[VAL_SHARD]
    assert len(data.validation_rows(2, rows)) == rows - 2
    with pytest.raises(UserError, match=f"only {rows} rows"):
        data.validation_rows(2, rows + 1)


# -- compiling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "round_tokens"),
    [
        ({"round_steps": 3}, 3 * BATCH_ROWS * T),
        ({"round_steps": 0, "target_tokens": 5000}, 5000),
        ({"round_steps": 0}, 100_000),
    ],
)
def test_whether_a_round_compiles_follows_from_the_configuration_alone(
    site: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], round_tokens: int
) -> None:
    asked: list[dict[str, Any]] = []

    def accelerated(mode: str, **seconds: Any) -> tuple[Any, Choices]:
        asked.append({"mode": mode, **seconds})
        return run_block, Choices(torch.float32, (), CompileChoice(False, "a test"))

    monkeypatch.setattr(round_module, "accelerated_block", accelerated)
    config = site_config(site, **values, compile="on", round_max_duration=1e9, worker_idle=0.0)
    run(config, [[0, 0, 0, BATCH_ROWS]], seconds_left=0.5)
    run(config, [], run_is_over=True)
    (once,) = asked
    assert once["mode"] == "on"
    assert once["process_s"] / once["run_s"] == pytest.approx(round_tokens / 100_000)


def test_the_first_run_of_a_newcomer_is_not_compiled() -> None:
    config = RunConfig.from_mapping(load_run_config([str(ROOT / "configs" / "tiny.toml")]))
    with torch.device("meta"):
        model = GPT(plan.model_config(config), compute_dtype=torch.float32)
    flops = model.estimate_flops() * plan.total_tokens(config)
    seconds = training_seconds(flops, "cpu", threads=1)
    assert not choose_compile(
        "auto", device_type="cuda", missing="", run_s=seconds, process_s=seconds
    ).on
