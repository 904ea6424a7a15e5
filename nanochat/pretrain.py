"""Pretraining on one machine, from settings to a checkpoint: what the training scripts call.

The same rows, step, schedule and validation as a federation's site, without the federation. What is
trained is on disk before anything begins that may fail; what fails without warning is met by `_rescue`.
"""

import contextlib
import math
import sys
from dataclasses import replace

import numpy as np
import torch

from nanochat.agreement import Agreement, PeerFailed
from nanochat.common import print0
from nanochat.data_spec import validation_rows
from nanochat.gpus import peak_flops, settle_garbage
from nanochat.interrupt import Interrupted, StopRequest, stop_on_signals
from nanochat.memory import keep_freed_memory
from nanochat.progress import Diverged, ProgressLog
from nanochat.resume import LATEST, NotSaved, if_first
from nanochat.rows.stream import EpochStream
from nanochat.run_directory import check_room, own
from nanochat.run_setup import Place, Setup, build, plan_run
from nanochat.saving import Saver
from nanochat.settings import Settings
from nanochat.watch import Watch, due


def pretrain(
    settings: Settings, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> float:
    """Train a model and leave its checkpoint in `base_checkpoints/<tag>`; returns its last bpb.

    All ranks of a process group call it together. Raises UserError before any long work, and
    KeyboardInterrupt for a run that was asked to stop.
    """
    settings.check()
    if device.type == "cpu":
        keep_freed_memory()
    plan = plan_run(settings, Place(device=device, rank=rank, world_size=world_size))
    agreement = Agreement()
    with contextlib.ExitStack() as held:
        held.callback(plan.inputs.cache.close)
        for name in (
            if_first(rank, lambda: held.enter_context(own(plan.directory)), agreement) or ()
        ):
            print0(f"removed {name}, which a killed save had left in {plan.directory}")
        setup = build(plan)
        if_first(rank, lambda: check_room(plan.directory, setup.checkpoint_bytes), agreement)
        val_rows = agreement.together(
            lambda: validation_rows(plan.inputs.cache, plan.settings.eval_rows)
        )
        logger = _open_log(setup)
        run = _Run(setup, val_rows, logger, agreement)
        try:
            stopped = run.train()
        except Exception:  # for W&B: the run has failed
            logger.close(exit_code=1)
            raise
        logger.close()
    if stopped:
        raise KeyboardInterrupt
    bpb = run.state.val_bpb
    return math.nan if bpb is None else bpb  # None: it was not finite


def _open_log(setup: Setup) -> ProgressLog:
    plan = setup.plan
    return ProgressLog(
        plan.settings,
        num_steps=plan.num_steps,
        rank=plan.place.rank,
        done=setup.state.step,
        training_time_s=setup.state.training_time_s,
        token_flops=setup.model.estimate_flops(),
        peak_flops=peak_flops(plan.place.device, plan.place.world_size),
        wandb_id=plan.wandb_id,
    )


class _Run:
    """All steps of a run, with what is due after each; `state` says where it stands."""

    def __init__(
        self, setup: Setup, val_rows: np.ndarray, logger: ProgressLog, agreement: Agreement
    ) -> None:
        self.state = setup.state
        self._setup, self._plan, self._settings = setup, setup.plan, setup.plan.settings
        self._logger, self._agreement = logger, agreement
        self._watch = Watch(setup, val_rows, logger, agreement)
        self._saver = Saver(setup, agreement, logger.say)
        self._stream = EpochStream(
            setup.plan.inputs.cache,
            num_shards=setup.plan.inputs.num_shards,
            seed=setup.plan.settings.seed,
            epoch=self.state.epoch,
            shard=self.state.shard,
            row=self.state.row,
        )
        self._together = True  # what fails now fails on all ranks

    def train(self) -> bool:
        """Train to the end; True if a signal stopped it before. What is trained is saved either way."""
        self._saver.announce()
        with stop_on_signals(self._agreement) as stop:
            try:
                while self.state.step < self._plan.num_steps:
                    rows = self._next_rows(stop)
                    if rows is None:
                        self._stop()
                        return True
                    self._step(rows)
                    with self._logger.paused():
                        if self._after_step(stop):
                            return True
                return False
            except (Diverged, NotSaved):
                raise  # nothing to save, or nowhere
            except Exception:  # whatever it is, what is trained is worth more
                self._rescue()
                raise

    def _next_rows(self, stop: StopRequest) -> np.ndarray | None:
        """The rows of the next step; None once the run was asked to stop."""
        num_rows = self._settings.total_batch_size // self._settings.max_seq_len
        rows = self._agreement.together(
            lambda: self._stream.read(num_rows, should_stop=lambda: stop.asked)
        )
        return None if stop.agreed() else rows

    def _step(self, rows: np.ndarray) -> None:
        """One optimizer step; `state` moves with the weights."""
        setup, step = self._setup, self.state.step
        hyper = self._plan.schedule.at(step)
        self._together = False
        nats = setup.trainer.step(rows, hyper=hyper)
        assert nats is not None
        done = step + 1
        self.state = self.state.moved(done, self._stream.position)
        if step == setup.state.step:
            settle_garbage()
        read = due(self._settings.save_every, done, done == self._plan.num_steps)
        position, logger = self._stream.position, self._logger
        logger.step(done, nats, hyper.lr_multiplier, position, read=read)
        self.state = replace(
            self.state, train_loss=logger.loss, training_time_s=logger.training_time_s
        )
        self._together = True

    def _after_step(self, stop: StopRequest) -> bool:
        """Save, then evaluate, if due; whether the run ends here, before its last evaluation."""
        done, last = self.state.step, self.state.step == self._plan.num_steps
        if last:
            self._saver.keep(self.state)
        elif due(self._settings.save_every, done, last):
            self._saver.save(self.state)
        if not self._watch.due(done, last=last):
            return False
        asked = stop.agreed()
        try:
            if not asked:
                self._evaluate(stop, last=last)
        except Exception as error:  # on all ranks together, so all of them ask here
            asked = stop.agreed()
            if not asked:
                raise
            if not isinstance(error, Interrupted | PeerFailed):  # else it was given up for that
                _tell(f"stopping; the evaluation had failed before: {error}")
        if asked and last:
            tag = self._settings.tag
            self._logger.say(
                "stopped before the last evaluation, which this makes up for: "
                f"python -m scripts.base_eval --checkpoint {tag}"
            )
        return asked and last  # else the next rows are not read

    def _evaluate(self, stop: StopRequest, *, last: bool) -> None:
        validated = self._watch.validate(self.state, last=last, tick=stop.check)
        if validated is not self.state:
            self.state = validated
            if self._saver.saved == validated.step:
                self._saver.amend(validated)
        self._watch.look(self.state.step, last=last, tick=stop.check)

    def _stop(self) -> None:
        """The run was asked to stop: save what it has."""
        with self._logger.paused():
            if self._saver.saved < self.state.step:
                self._saver.keep(self.state)
        self._logger.say(f"stopped after step {self.state.step}{self._how_to_continue}")

    @property
    def _how_to_continue(self) -> str:
        if not self.state.step or not self._saver.whole:
            return ""
        return f": continue with --resume-from-step {LATEST}"

    def _rescue(self) -> None:
        """Save what is trained, as a stop does, before an error ends the run."""
        step, place = self.state.step, self._plan.place
        if self._saver.saved >= step:
            return
        if self._setup.trainer.updating:
            _tell(f"step {step + 1} failed while it changed the weights: they are not saved")
            return
        together = self._together or place.world_size == 1
        try:
            if together:
                self._saver.keep(self.state)
            elif not self._saver.keep_alone(self.state):
                return
            if place.rank == 0 or not together:
                _tell(f"saved step {step} before the end{self._how_to_continue}")
        except Exception as another:  # noqa: BLE001 - the first one is what people must see
            _tell(f"step {step} could not be saved: {another}")


def _tell(line: str) -> None:
    """On stderr: after a failure stdout may be what failed."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
