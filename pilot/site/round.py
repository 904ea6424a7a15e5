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

from nanochat.acceleration import accelerated_block
from nanochat.gpt import GPT
from nanochat.gpus import settle_garbage
from nanochat.kernels.choices import training_seconds
from nanochat.layers import RunBlock
from nanochat.loss_eval import bpb_sums
from nanochat.memory import keep_freed_memory
from nanochat.optim import MuonAdamW
from nanochat.rows.stream import RowStream
from nanochat.trainer import Trainer, rank_slice
from pilot import plan
from pilot.config import RunConfig
from pilot.coordination.coordinator import ClientCoordinator, resolve_url
from pilot.rules.rounds import stuck_s
from pilot.segment import Score, Segment
from pilot.site.data import SiteData, open_data
from pilot.site.device import agree_on_device
from pilot.site.group import record_failure
from pilot.site.inner_state import InnerState, inner_state_dir
from pilot.site.meter import Meter, Seconds, progress_bar
from pilot.site.mirror import held_after, keeps_mirror
from pilot.site.notice import notice_files
from pilot.site.ranks import Ranks
from pilot.site.resident import Resident
from pilot.site.scores import finite, sums
from pilot.site.stop import Progress, StopWatcher
from pilot.site.update import Encoder, pseudo_gradient, rest_dir
from pilot.wire.messages import Part, StopReason, TrainOrder, TrainReply

log = logging.getLogger("pilot.site")


class Round:
    """One client's work in one round; `run` reads as step 3 of docs/protocol.md."""

    def __init__(
        self,
        order: TrainOrder,
        ranks: Ranks,
        received: float,
        *,
        resident: bool = False,
        kept: Resident | None = None,
    ) -> None:
        self.order, self.ranks, self.received = order, ranks, received
        self._resident = resident  # whether these processes may have further rounds
        self._kept = kept or Resident()  # of earlier ones
        self.config = RunConfig.from_mapping(order.config)
        self.progress = Progress()
        self.seconds = Seconds()
        self._device_rows = 1  # per device and forward pass, once all ranks know it
        self.leaving = False  # after `run`: whether this client is leaving
        fence = order.fence
        self.inner = InnerState(inner_state_dir(fence.run, order.client), ranks)
        self._trained: MuonAdamW | None = None  # whose state is still to be kept
        self.encoder = Encoder(rest_dir(fence.run, order.client), self.config.wire_up)

    def run(self, weights: dict[str, Tensor]) -> tuple[TrainReply, list[Part]]:
        """The reply and, on rank 0, the parts of the pseudo-gradient.

        `weights`: the global model, on rank 0; their memory is used for the pseudo-gradient, unless they are
        this client's mirror.
        """
        if self.order.note and self.ranks.first:
            log.warning("The server of run %s says: %s", self.order.fence.run, self.order.note)
        with self._stop_watcher() as stop:
            if self._agree(stop):
                return self._reply(stop.reason), []
            if self.ranks.device.type == "cpu":
                keep_freed_memory()
            self._limit_threads()
            data = open_data(self.config)
            compute_dtype, self._device_rows = agree_on_device(
                self.config, self.ranks, step_rows=self.order.step_rows
            )
            model = self._kept.model(
                self.config,
                device=self.ranks.device,
                compute_dtype=compute_dtype,
                device_rows=self._device_rows,
            )
            self.ranks.load_weights(model.state_dict().items(), weights)
            with self.seconds.of("eval_s"):
                scores = self._evaluate(model, data, stop)
            reply = self._steps(model, data, stop)
            parts: list[Part] = []
            if reply["tokens"] and self.ranks.first:
                with self.seconds.of("encode_s"):
                    update = pseudo_gradient(model, weights, keep=keeps_mirror(self.config))
                    parts = self.encoder.encode(update, self.order, self.ranks.device)
                reply["code_lost"] = self.encoder.lost
                if not self._resident and not stop.leaving:
                    self.encoder.keep()
            if self.order.run_is_over:
                self._trained = None
                self.inner.forget()
                self.encoder.forget()
            reply |= sums(self.order, scores) | self.seconds.by_field
            return self._reply(stop.reason, **reply), parts

    def keep_state(self) -> None:
        """Write what this round leaves of the update and the inner optimizer; all ranks call it, after `run`.

        A resident group does so when the reply has gone out: writing takes seconds for big models, which a
        client that is leaving may not have, and the upload takes longer anyway.
        """
        self.encoder.keep()
        optimizer, self._trained = self._trained, None
        if optimizer is None:
            return
        self.inner.keep(optimizer, self.order.fence)
        self.ranks.sum([0.0])  # a group that ends does so once all have written

    @contextlib.contextmanager
    def _stop_watcher(self) -> Iterator[StopWatcher]:
        """Rank 0 watches Redis, SIGTERM and the clock; the others follow its decisions."""
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
        elapsed_s = self.seconds.by_field["ready_s"] = time.monotonic() - self.received
        with StopWatcher(
            coordinator,
            self.progress,
            seconds_left=self.order.seconds_left - elapsed_s,
            heartbeat_s=self.config.heartbeat,
            notices=notice_files(self.config.preempt_file),
            drain_deadline_s=self.config.drain_deadline,
            stuck_s=stuck_s(self.config.grace_max),
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
        """A fair share of the cores per process; OMP_NUM_THREADS counts as all of them."""
        torch.set_num_threads(self.config.client_threads or self.ranks.threads)

    def _evaluate(self, model: GPT, data: SiteData, stop: StopWatcher) -> list[Score]:
        """What the model that was received makes of the validation rows that the order names, piece by piece.

        A client that is leaving gives up: it has scored nothing.
        """
        self.progress.update(state="evaluating")
        pieces = self.order.eval_pieces
        if not pieces and self.order.eval_first_row < self.order.eval_end_row:
            pieces = [[self.order.eval_first_row, self.order.eval_end_row]]
        # of the tokenizer that the clients agree on, not of a file beside it
        token_bytes = torch.tensor(data.tokenizer.token_bytes(), device=self.ranks.device)
        scores = []
        for first, end in pieces:
            mine = rank_slice(end - first, rank=self.ranks.rank, world_size=self.ranks.world_size)
            rows = data.validation_rows(first, end)[mine]
            batches = self._batches(rows, -(-(end - first) // self.ranks.world_size), stop)
            nats, num_bytes = self.ranks.sum(list(bpb_sums(model, batches, token_bytes)))
            scores.append(Score(first, end, finite(nats), int(num_bytes)))
        return [] if self.ranks.agree(bool(stop.leaving)) else scores

    def _batches(self, rows: np.ndarray, longest: int, stop: StopWatcher) -> Iterator[np.ndarray]:
        """Batches of this rank's rows, as many steps as the rank with the most (`longest`) takes: all
        ranks end together, early when the client is leaving."""
        size = self._device_rows
        for i in range(0, longest, size):
            if self.ranks.agree(bool(stop.leaving)):
                return
            if len(batch := rows[i : i + size]):
                yield batch

    def _steps(self, model: GPT, data: SiteData, stop: StopWatcher) -> dict[str, Any]:
        """Train until the round ends, the steps are done or the lease is used up; the reply's numbers."""
        config, progress = self.config, self.progress
        keeps = config.inner_state == "keep" and bool(self.order.segments)
        self._begin_with_inner_state(keeps=keeps)
        trainer = self._kept.trainer(self._trainer) if self.order.segments else None
        stream = RowStream(data.rows, self.order.segments)
        progress.update(state="training")
        began_s = time.monotonic()
        label = f"{self.order.client} [ROUND {self.order.fence.round_number}]"
        with progress_bar(label, shown=self.ranks.first) as bar:
            meter = Meter(self.ranks, progress, bar, token_flops=model.estimate_flops())
            if trainer is not None:
                self._train(trainer, stream, meter, stop)
            meter.read()
        train_s = time.monotonic() - began_s
        row_counts = self._row_counts(data, stream, stop)
        stop.enter("sending")
        if keeps and progress.heartbeat.step:
            self._trained = self._kept.optimizer()
            self._keep_before_reply(stop)
        if not stop.reason:
            done = StopReason.STEPS_DONE if self.order.segments else StopReason.NOTHING_LEASED
            stop.stop(done)
        if self.ranks.first and trainer is not None:
            round_number = self.order.fence.round_number
            text = "Stop signal received (END ROUND %d) after batch %d: %s"
            log.info(text, round_number, trainer.micro_steps, stop.reason)
        return {
            "steps": progress.heartbeat.step,
            "batches": trainer.micro_steps if trainer is not None else 0,
            "tokens": progress.heartbeat.tokens,
            "loss_nats": self.ranks.sum([float(meter.nats)])[0],
            "train_s": train_s,
            "mfu": meter.mfu(progress.heartbeat.tokens / max(1e-9, train_s)),
            "consumed": stream.consumed(progress.rows),
            "row_counts": row_counts,
        }

    def _begin_with_inner_state(self, *, keeps: bool) -> None:
        """Give the optimizer the state that the order says, from memory if it is there."""
        merged, kept = self.order.last_merged_fence, self._kept
        if not self.order.segments:
            return  # nothing is trained
        kept.take_share(min(1.0, self.order.step_rows / self.config.batch_rows))
        found = keeps and self.inner.restore(
            kept.optimizer(), merged, self.order.fence, holds=kept.holds
        )
        if found:
            kept.holds = merged
        else:
            kept.forget_state()

    def _trainer(self, model: GPT, optimizer: MuonAdamW) -> Trainer:
        return Trainer(
            model,
            optimizer,
            device=self.ranks.device,
            device_batch_rows=self._device_rows,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            run_block=self._run_block(model),
        )

    def _keep_before_reply(self, stop: StopWatcher) -> None:
        """A temporary group is ended once it has replied: it writes before, or not at all if it is leaving."""
        if self._resident:
            return
        if self.ranks.agree(bool(stop.leaving)):
            self._trained = None
            log.info("The inner optimizer's state of this round is not kept: the client is leaving")
            return
        self.keep_state()

    def _train(
        self, trainer: Trainer, stream: "RowStream[Segment]", meter: Meter, stop: StopWatcher
    ) -> None:
        """Whole optimizer steps; every decision to stop is rank 0's, and all ranks take it together."""
        config, progress = self.config, self.progress
        schedule = plan.schedule(config, total_tokens=self.order.total_tokens)
        while not 0 < config.round_steps <= progress.heartbeat.step:
            if (rows := self._read(stream, stop)) is None:
                return
            if len(rows) < self.order.step_rows and not (len(rows) and self.order.lease_is_tail):
                stop.stop(StopReason.LEASE_USED_UP)
                return
            hyper = schedule.at(self._global_step())
            step_nats = trainer.step(rows, hyper=hyper, should_stop=lambda: self._agree(stop))
            if step_nats is None:
                return
            self._kept.holds = self.order.fence
            tokens = len(rows) * config.sequence_len
            if progress.heartbeat.step == 0:
                settle_garbage()
            progress.step_done(rows=len(rows), tokens=tokens)
            meter.add(step_nats, tokens, stream.position)

    def _agree(self, stop: StopWatcher) -> bool:
        """Whether to stop, as rank 0 sees it, on all ranks."""
        return self.ranks.agree(stop.should_stop())

    def _run_block(self, model: GPT) -> RunBlock:
        """Compiled blocks where the work ahead pays for them: a function of configuration and machine."""
        config = self.config

        def seconds(tokens: int) -> float:
            return training_seconds(
                model.estimate_flops() * tokens,
                self.ranks.device.type,
                threads=torch.get_num_threads(),
                devices=self.ranks.world_size,
            )

        of_step = self.order.step_rows * config.sequence_len
        of_round = config.round_steps * of_step or config.target_tokens
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
        size = self.order.step_rows
        self.progress.update(state="packing")
        with self.seconds.of("pack_s"):
            rows = stream.read(size, should_stop=stop.should_stop) if self.ranks.first else None
        self.progress.update(state="training")
        if self._agree(stop):
            return None
        return stream.read(size) if rows is None else rows

    def _row_counts(
        self, data: SiteData, stream: "RowStream[Segment]", stop: StopWatcher
    ) -> dict[int, int]:
        """Rows of the leased shards that are packed by now.

        With fixed steps: of those that were read from, waited for. What the books learn then depends on
        the work alone, so that a resumed run leases what an uninterrupted one would have.
        """
        if not self.ranks.first or stream.position is None:
            return {}
        shards = [segment.shard for segment in self.order.segments]
        if self.config.round_steps:
            epoch, shard, _, _ = stream.position
            at = [segment.key for segment in self.order.segments].index((epoch, shard))
            shards = shards[: at + 1]
            for shard in shards:
                data.rows.wait_packed(shard, should_stop=stop.should_stop)
        known = stream.known_rows
        return {shard: known[shard] for shard in sorted({*shards}) if shard in known}

    def _global_step(self) -> float:
        """Where in the run the next step is, as the schedule counts (docs/protocol.md)."""
        own = self.progress.heartbeat.tokens / self.order.share
        return (self.order.committed_tokens + own) / self.config.total_batch_size

    def _reply(self, stopped_by: str, **values: Any) -> TrainReply:
        return TrainReply(
            fence=self.order.fence,
            client=self.order.client,
            stopped_by=stopped_by,
            mirror=held_after(self.order, self.config),
            total_s=time.monotonic() - self.received,
            **values,
        )


def _give_up(sentence: str) -> None:
    """End this rank, and with it the group, at once; the handle finds the reason."""
    record_failure(Path(sys.argv[1]), sentence)
    os._exit(1)
