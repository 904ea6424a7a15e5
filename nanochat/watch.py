"""The evaluations of a run: bits per byte, CORE, samples."""

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from nanochat.agreement import Agreement
from nanochat.core_bundle import evaluate_core
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.loss_eval import bits_per_byte, bpb_sums, sum_over_ranks
from nanochat.progress import Diverged, ProgressLog
from nanochat.prompts import sample_texts
from nanochat.resume import TrainingState
from nanochat.run_setup import Setup
from nanochat.trainer import rank_slice


def due(every: int, done: int, last: bool) -> bool:
    """Whether what happens every a number of steps (0 or less: at the end only) happens after this one."""
    return last or (every > 0 and done % every == 0)


class Watch:
    """All ranks call it together, and it fails on all of them or on none."""

    def __init__(
        self, setup: Setup, val_rows: np.ndarray, logger: ProgressLog, agreement: Agreement
    ) -> None:
        self._model, self._settings = setup.model, setup.plan.settings
        inputs, place = setup.plan.inputs, setup.plan.place
        self._tokenizer, self._core_tasks = inputs.tokenizer, inputs.core_tasks
        self._logger, self._agreement, self._rank = logger, agreement, place.rank
        self._val_rows = val_rows[
            rank_slice(len(val_rows), rank=place.rank, world_size=place.world_size)
        ]
        token_bytes = self._tokenizer.token_bytes()
        self._token_bytes = torch.tensor(token_bytes, device=self._model.get_device())

    def due(self, done: int, *, last: bool) -> bool:
        """Whether anything is to be done after that step."""
        every = (self._settings.core_every, self._settings.sample_every)
        return due(self._settings.eval_every, done, last) or any(
            one > 0 and due(one, done, last) for one in every
        )

    def validate(
        self, state: TrainingState, *, last: bool, tick: Callable[[], None]
    ) -> TrainingState:
        """`state` with the newest bpb, if that is due.

        tick: called now and then; what it raises gives the evaluation up. Raises Diverged for a model
        that has no finite loss, and, as `look` does, UserError where the device has too little memory.
        """
        if not due(self._settings.eval_every, state.step, last):
            return state
        with self._memory():
            bpb = self._bpb(state.step, tick)
        self._logger.evaluation(state.step, bpb)
        return state.validated(bpb)

    def look(self, done: int, *, last: bool, tick: Callable[[], None]) -> None:
        """CORE and samples, if they are due."""
        settings = self._settings
        if settings.core_every > 0 and due(settings.core_every, done, last):
            with self._memory():
                result = evaluate_core(
                    self._model,
                    self._tokenizer,
                    self._model.get_device(),
                    self._core_tasks,
                    max_per_task=settings.core_max_per_task,
                    tick=tick,
                )
            self._logger.core(done, result)
        if settings.sample_every > 0 and due(settings.sample_every, done, last):
            with self._memory():
                texts = self._agreement.together(self._samples)
            self._logger.samples(done, texts)

    @contextlib.contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the memory of {self._model.get_device()} is too small for this evaluation: set a "
                "smaller --batch-size, or --core-every 0"
            ) from error

    def _samples(self) -> list[str]:
        """Of rank 0; the others wait for it."""
        return sample_texts(Engine(self._model, self._tokenizer)) if self._rank == 0 else []

    def _bpb(self, done: int, tick: Callable[[], None]) -> float:
        rows, at_once = self._val_rows, self._settings.batch_size

        def batch(first: int) -> np.ndarray:
            tick()
            return rows[first : first + at_once]

        batches = (batch(first) for first in range(0, len(rows), at_once))
        sums = self._agreement.together(lambda: bpb_sums(self._model, batches, self._token_bytes))
        nats, num_bytes = sum_over_ranks(*sums, device=self._model.get_device())
        if not math.isfinite(nats):
            raise Diverged(f"the validation loss is {nats} after step {done}")
        return bits_per_byte(nats, num_bytes)
