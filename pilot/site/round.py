"""One round, as each process of a worker group runs it.

Rank 0 speaks with the ClientApp and reads the stop sources; its decisions reach the others in
collectives, so all ranks do the same thing at the same micro-step.
"""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nanochat.acceleration import accelerated_block
from nanochat.gpt import GPT
from nanochat.gpus import settle_garbage
from nanochat.kernels.choices import training_seconds
from nanochat.layers import RunBlock, run_block
from nanochat.loss_eval import bpb_sums
from nanochat.memory import keep_freed_memory
from nanochat.rows.stream import RowStream
from nanochat.rows.stream import Segment as RowSegment
from nanochat.trainer import Trainer, rank_slice
from pilot import plan
from pilot.config import RunConfig
from pilot.coordination.coordinator import ClientCoordinator, resolve_url
from pilot.site.data import SiteData, open_data
from pilot.site.device import agree_on_device
from pilot.site.group import last_words
from pilot.site.inner_state import InnerState, inner_state_dir
from pilot.site.notice import notice_files
from pilot.site.ranks import Ranks
from pilot.site.stop import Progress, StopWatcher
from pilot.wire.messages import LEASE_USED_UP, TrainOrder, TrainReply

_LOSS_EMA = 0.9
_BEYOND = 1 << 40  # a row number that no shard has
_LOG_EVERY_S = 1.0  # reading the loss waits for the device: not oftener than this

log = logging.getLogger("pilot.site")


class Round:
    """One client's work in one round; `run` reads as step 3 of docs/protocol.md."""

    def __init__(
        self, order: TrainOrder, ranks: Ranks, received: float, *, resident: bool = False
    ) -> None:
        self.order, self.ranks, self.received = order, ranks, received
        self._resident = resident  # whether these processes may have further rounds
        self.config = RunConfig.from_mapping(order.config)
        self.progress = Progress()
        self.batches = 0
        self._device_rows = 1  # that a device takes at once, once all ranks know it
        self.leaving = False  # after `run`: whether this site was told to leave
        fence = order.fence
        self.inner = InnerState(inner_state_dir(fence.run, order.client), ranks)

    def run(self, weights: dict[str, Tensor]) -> tuple[TrainReply, dict[str, Tensor]]:
        """The reply and, on rank 0, the pseudo-gradient. `weights`: the global model, on rank 0."""
        with self._stop_watcher() as stop:
            if self.ranks.agree(stop.should_stop()):
                return self._reply(stop.reason), {}
            if self.ranks.device.type == "cpu":
                keep_freed_memory()
            self._limit_threads()
            data = open_data(self.config)
            compute_dtype, self._device_rows = agree_on_device(self.config, self.ranks)
            model = plan.build_model(
                self.config, device=self.ranks.device, compute_dtype=compute_dtype
            )
            self.ranks.load_weights(model.state_dict().items(), weights)
            nats, num_bytes = self._evaluate(model, data, stop)
            reply = self._steps(model, data, stop)
            if self.order.final:
                self.inner.forget()
            reply |= {
                "eval_nats": nats,
                "eval_bytes": num_bytes,
                "eval_rows": num_bytes and self.order.eval_end_row - self.order.eval_first_row,
            }
            update = self._pseudo_gradient(model, weights) if reply["tokens"] else {}
            return self._reply(stop.reason, **reply), update

    @contextlib.contextmanager
    def _stop_watcher(self) -> Iterator[StopWatcher]:
        """Rank 0 watches Redis, SIGTERM and the clock; the others are told."""
        fence, url = self.order.fence, resolve_url(self.order.redis_url)
        coordinator = None
        if self.ranks.first and url:
            coordinator = ClientCoordinator(
                url,
                fence.run,
                client=self.order.client,
                term=fence.term,
                round_number=fence.round_number,
            )
        elapsed_s = time.monotonic() - self.received
        with StopWatcher(
            coordinator,
            self.progress,
            seconds_left=self.order.seconds_left - elapsed_s,
            heartbeat_s=self.config.heartbeat,
            notices=notice_files(self.config.preempt_file),
            drain_deadline_s=self.config.drain_deadline,
            overdue=_give_up,
            watches=self.ranks.first,
        ) as stop:
            signal.signal(signal.SIGTERM, lambda *_: self._drain(stop))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # one may be waiting
            yield stop
            self.leaving = bool(stop.leaving)

    def _drain(self, stop: StopWatcher) -> None:
        """SIGTERM to any rank: rank 0 decides, and the supervisor passes it on to rank 0."""
        if self.ranks.first:
            stop.drain("SIGTERM")
        else:
            os.kill(os.getppid(), signal.SIGTERM)

    def _limit_threads(self) -> None:
        """A fair share of the cores a process; OMP_NUM_THREADS counts as all of them."""
        torch.set_num_threads(self.config.client_threads or self.ranks.threads)

    def _evaluate(self, model: GPT, data: SiteData, stop: StopWatcher) -> tuple[float, int]:
        """Sums of nats and bytes of the model that was received, over this client's slice.

        A site that is to leave gives up: 0 of 0 bytes.
        """
        self.progress.state = "evaluating"
        first, end = self.order.eval_first_row, self.order.eval_end_row
        if first >= end:
            return 0.0, 0
        mine = rank_slice(end - first, rank=self.ranks.rank, world_size=self.ranks.world_size)
        rows = data.validation_rows(first, end)[mine]
        batches = self._batches(rows, -(-(end - first) // self.ranks.world_size), stop)
        # of the tokenizer that the sites agree on, not of a file beside it
        token_bytes = torch.tensor(data.tokenizer.token_bytes(), device=self.ranks.device)
        nats, num_bytes = self.ranks.sum(list(bpb_sums(model, batches, token_bytes)))
        return (0.0, 0) if self.ranks.agree(bool(stop.leaving)) else (nats, int(num_bytes))

    def _batches(self, rows: np.ndarray, longest: int, stop: StopWatcher) -> Iterator[np.ndarray]:
        """Batches of this rank's rows, as many steps as the rank with the most (`longest`) takes: all
        ranks end together, early when the site is to leave."""
        size = self._device_rows
        for i in range(0, longest, size):
            if self.ranks.agree(bool(stop.leaving)):
                return
            if len(batch := rows[i : i + size]):
                yield batch

    def _steps(self, model: GPT, data: SiteData, stop: StopWatcher) -> dict[str, Any]:
        """Whole optimizer steps until the round ends, the steps are done or the lease is used up."""
        config, progress = self.config, self.progress
        optimizer = plan.make_optimizer(config, model)
        keeps = config.inner_state == "keep" and bool(self.order.segments)
        if keeps:
            self.inner.restore(optimizer, self.order.merged, self.order.fence)
        trainer = Trainer(
            model,
            optimizer,
            device=self.ranks.device,
            device_batch_rows=self._device_rows,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            run_block=self._run_block(model) if self.order.segments else run_block,
        )
        segments = [_row_segment(values) for values in self.order.segments]
        stream = RowStream(data.rows, segments)
        schedule = plan.schedule(config, total_tokens=self.order.total_tokens)
        nats = torch.zeros((), dtype=torch.float64)
        pending = torch.zeros((), device=self.ranks.device)  # nats not yet read from the device
        pending_tokens = 0
        progress.state = "training"
        began = read_at = time.monotonic()
        with self._bar() as bar:
            while self.order.segments and not (0 < config.round_steps <= progress.step):
                if (rows := self._read(stream, stop)) is None:
                    break
                if len(rows) < config.batch_rows and not (len(rows) and self.order.last):
                    stop.stop(LEASE_USED_UP)
                    break
                hyper = schedule.at(self._global_step())
                step_nats = trainer.step(
                    rows, hyper=hyper, should_stop=lambda: self._should_stop(stop)
                )
                if step_nats is None:
                    break
                pending += step_nats
                pending_tokens += len(rows) * config.sequence_len
                if progress.step == 0:
                    settle_garbage()
                progress.step += 1
                progress.rows += len(rows)
                progress.tokens += len(rows) * config.sequence_len
                if time.monotonic() - read_at >= _LOG_EVERY_S or progress.step == 1:
                    nats += self._show(bar, stream, pending, pending_tokens, began)
                    pending.zero_()
                    pending_tokens, read_at = 0, time.monotonic()
            nats += pending.cpu().double()  # float64 does not exist on MPS
        train_s = time.monotonic() - began
        row_counts = self._row_counts(data, stream, stop)
        stop.tell("sending")
        if keeps and progress.step:
            self.inner.keep(optimizer, self.order.fence)
        if not stop.reason:
            stop.stop("steps done" if self.order.segments else "nothing leased")
        if self.ranks.first and self.order.segments:
            round_number = self.order.fence.round_number
            text = "Stop signal received (END ROUND %d) after batch %d: %s"
            log.info(text, round_number, self.batches, stop.reason)
        return {
            "steps": progress.step,
            "batches": self.batches,
            "tokens": progress.tokens,
            "loss_nats": self.ranks.sum([float(nats)])[0],
            "train_s": train_s,
            "consumed": [_as_list(segment) for segment in stream.consumed(progress.rows)],
            "row_counts": row_counts,
        }

    def _run_block(self, model: GPT) -> RunBlock:
        """The form of a block that the work ahead repays: a function of the configuration and the machine."""
        config = self.config

        def seconds(tokens: int) -> float:
            return training_seconds(
                model.estimate_flops() * tokens,
                self.ranks.device.type,
                threads=torch.get_num_threads(),
                devices=self.ranks.world_size,
            )

        of_round = config.round_steps * config.total_batch_size or config.target_tokens
        total = self.order.total_tokens
        total_s, round_s = seconds(total), seconds(of_round or total)
        block, choices = accelerated_block(
            config.compile,
            model=model,
            run_s=total_s,
            process_s=total_s if self._resident else min(config.round_max_duration, round_s),
        )
        if self.ranks.first and (choices.compiling.on or self.order.fence.round_number == 1):
            log.info("%s", choices)
        return block

    def _read(self, stream: RowStream, stop: StopWatcher) -> np.ndarray | None:
        """The rows of the next step, on all ranks; None if the round ends while they are packed.

        Rank 0 waits for them, since only it hears the stop; once it has them, so have the others.
        """
        size, self.progress.state = self.config.batch_rows, "packing"
        rows = stream.read(size, should_stop=stop.should_stop) if self.ranks.first else None
        self.progress.state = "training"
        if self.ranks.agree(stop.should_stop()):
            return None
        return stream.read(size) if rows is None else rows

    def _row_counts(self, data: SiteData, stream: RowStream, stop: StopWatcher) -> list[list[int]]:
        """Sizes of the leased shards that are packed by now.

        With fixed steps: of those that were read from, waited for. What the books learn then depends on
        the work alone, so that a resumed run leases what an uninterrupted one would have.
        """
        if not self.ranks.first or stream.position is None:
            return []
        shards = [values[1] for values in self.order.segments]
        if self.config.round_steps:
            epoch, shard, _, _ = stream.position
            at = [values[:2] for values in self.order.segments].index([epoch, shard])
            shards = shards[: at + 1]
            for shard in shards:
                # a row behind the end comes, as nothing, when the end is known
                data.rows.rows(shard).read(_BEYOND, _BEYOND + 1, should_stop=stop.should_stop)
        known = stream.known_rows
        return [[shard, known[shard]] for shard in sorted({*shards}) if shard in known]

    def _should_stop(self, stop: StopWatcher) -> bool:
        """The one decision of all ranks, before each micro-step."""
        stopping = self.ranks.agree(stop.should_stop())
        self.batches += not stopping
        return stopping

    def _global_step(self) -> float:
        """Where in the run the next step is, as the schedule counts (docs/protocol.md)."""
        own = self.progress.tokens / self.order.share
        return (self.order.committed_tokens + own) / self.config.total_batch_size

    @contextlib.contextmanager
    def _bar(self) -> Iterator["tqdm[object]"]:
        """The site's own progress bar, where somebody sits before a terminal."""
        hidden = not (self.ranks.first and sys.stderr.isatty())
        description = f"{self.order.client} [ROUND {self.order.fence.round_number}]"
        with tqdm(desc=description, unit="tok", unit_scale=True, disable=hidden) as bar:
            yield bar

    def _show(
        self, bar: "tqdm[object]", stream: RowStream, nats: Tensor, tokens: int, began: float
    ) -> Tensor:
        """Read the loss from the device, tell it to whoever watches, and return the nats read."""
        read = nats.cpu().double()
        progress = self.progress
        # rank 0 has about 1/n of the tokens; what the heartbeat shows need not be exact
        loss = float(read) * self.ranks.world_size / tokens
        before = progress.loss or loss
        smoothed = _LOSS_EMA * before + (1 - _LOSS_EMA) * loss
        progress.loss = smoothed
        progress.tokens_per_s = progress.tokens / max(1e-9, time.monotonic() - began)
        _, progress.shard, progress.shard_row, shard_rows = stream.position or (0, -1, 0, None)
        progress.shard_rows = shard_rows or 0
        share = progress.shard_row / shard_rows if shard_rows else 0.0
        bar.set_postfix_str(
            f"loss={smoothed:.4f} shard={progress.shard} shard_progress={share:.1%}", refresh=False
        )
        bar.update(progress.tokens - bar.n)
        return read

    def _pseudo_gradient(self, model: GPT, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Global minus local weights, fp32, on rank 0.

        The start is rounded as the model's own tensors are: a bf16 table that was not trained has a
        pseudo-gradient of exactly zero.
        """
        if not self.ranks.first:
            return {}
        update = {}
        for name, local in model.state_dict().items():
            start = weights[name].to(local.dtype).float()
            update[name] = start.sub_(local.detach().float().cpu())
        return update

    def _reply(self, stopped_by: str, **values: Any) -> TrainReply:
        return TrainReply(
            fence=self.order.fence,
            client=self.order.client,
            stopped_by=stopped_by,
            total_s=time.monotonic() - self.received,
            **values,
        )


def _give_up(sentence: str) -> None:
    """End this rank, and with it the group, at once; the handle is told why."""
    last_words(Path(sys.argv[1]), sentence)
    os._exit(1)


def _row_segment(values: list[int]) -> RowSegment:
    epoch, shard, first_row, end_row = values
    return RowSegment(epoch, shard, first_row, None if end_row < 0 else end_row)


def _as_list(segment: RowSegment) -> list[int]:
    assert segment.end_row is not None
    return [segment.epoch, segment.shard, segment.first_row, segment.end_row]
