"""The training step: from an array of rows to new weights, the same on one process and on many."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanochat.batches import Batches
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.layers import RunBlock, run_block
from nanochat.optim import MuonAdamW
from nanochat.schedule import Hyper

_LOG = logging.getLogger(__name__)


def rank_slice(num_rows: int, *, rank: int, world_size: int) -> slice:
    """The contiguous part of a global micro-batch that belongs to a rank: sizes differ by at most one."""
    return slice(rank * num_rows // world_size, (rank + 1) * num_rows // world_size)


class Trainer:
    """Takes optimizer steps with `model` on `device`, as one of `world_size` ranks of a group.

    All ranks pass the same rows to `step`. A global micro-batch is `device_batch_rows` *
    `world_size` consecutive rows (fewer at the end), of which each rank takes its slice: the rows
    consumed are always a prefix of what was passed, for any number of ranks. `run_block` is
    used for micro-batches of the usual size; a short one is not worth compiling for.

    A rank whose device has no memory for its slice takes it in smaller pieces: the ranks meet in the
    optimizer only, so each finds out for itself, in its first micro-batch, without a word to the others.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: MuonAdamW,
        *,
        device: torch.device,
        device_batch_rows: int,
        rank: int = 0,
        world_size: int = 1,
        run_block: RunBlock = run_block,
    ) -> None:
        if device_batch_rows < 1:
            raise ValueError(f"device_batch_rows must be at least 1, not {device_batch_rows}")
        if model.compute_dtype == torch.float16:
            raise UserError(
                "training in float16 needs loss scaling, which is not implemented: "
                "set NANOCHAT_DTYPE to bfloat16 or float32"
            )
        self.model, self.optimizer, self.device = model, optimizer, device
        self.rank, self.world_size = rank, world_size
        self.micro_batch_rows = device_batch_rows * world_size
        self.piece_rows = 0  # that this device takes at once; 0: not known before the first step
        self.updating = False  # or a step failed while it changed weights: they are of no step
        self.micro_steps = 0  # begun so far, those of a step that was dropped included
        self._run_block = run_block
        self._batches: Batches | None = None

    def step(
        self,
        rows: np.ndarray,
        *,
        hyper: Hyper,
        should_stop: Callable[[], bool] | None = None,
    ) -> Tensor | None:
        """One optimizer step over `rows` (n, T+1); returns this rank's nats, on the device.

        The gradient is that of the mean over all n * T targets, for any number of ranks and for a
        short step too. `should_stop` is asked before every micro-step on every rank, so it may be a
        collective; when it says True the gradients are dropped and None is returned: weights and
        optimizer are as before. Raises UserError if the device has no memory for it.
        """
        num_rows, num_targets = rows.shape[0], rows.shape[0] * (rows.shape[1] - 1)
        assert num_targets > 0, "a step needs at least one target"
        # The optimizer takes the mean over the ranks, but the loss is a sum over them.
        scale = self.world_size / num_targets
        nats = torch.zeros((), device=self.device)
        try:
            for first in range(0, num_rows, self.micro_batch_rows):
                if should_stop is not None and should_stop():
                    self.optimizer.zero_grad(set_to_none=True)
                    return None
                self.micro_steps += 1
                micro = rows[first : first + self.micro_batch_rows]
                mine = micro[rank_slice(len(micro), rank=self.rank, world_size=self.world_size)]
                if len(mine):
                    nats += self._micro_step(mine, scale)
            self.updating = True
            self._apply(hyper)
            self.optimizer.step()
            self.updating = False
        except torch.OutOfMemoryError as error:
            raise UserError(self._no_memory(rows.shape[1] - 1)) from error
        self.optimizer.zero_grad(set_to_none=True)
        return nats

    def _micro_step(self, rows: np.ndarray, scale: float) -> Tensor:
        """The gradients of one micro-batch's slice, in pieces that this device has memory for."""
        if not self.piece_rows:
            return self._first_micro_step(rows, scale)
        nats = torch.zeros((), device=self.device)
        for first in range(0, len(rows), self.piece_rows):
            nats += self._backward(rows[first : first + self.piece_rows], scale)
        return nats

    def _first_micro_step(self, rows: np.ndarray, scale: float) -> Tensor:
        """Find out how many rows fit: no gradients are there yet, so a failure can be dropped whole.

        Beside it the memory is taken that later micro-steps will lack: that of the gradients, which
        these find there, and of the optimizer's state, which its first step makes.
        """
        self.piece_rows = len(rows)
        while True:
            try:
                reserve: Tensor | None = self._reserve()
                nats = self._micro_step(rows, scale)
                del reserve
                return nats
            except torch.OutOfMemoryError:
                reserve = None  # freed before the next try
                if self.piece_rows == 1:
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            self._batches = None
            torch.cuda.empty_cache()
            fewer = -(-self.piece_rows // 2)
            _LOG.warning(
                "%d rows of %d tokens at once are more than %s has memory for: it takes %d",
                *(self.piece_rows, rows.shape[1] - 1, self.device, fewer),
            )
            self.piece_rows = fewer

    def _reserve(self) -> Tensor:
        """Memory of gradients and optimizer state that are still to come; none on a CPU, which has no
        such limit."""
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        if not self.optimizer.state:
            size += self.optimizer.state_bytes(self.world_size)
        if self.device.type == "cpu":
            size = 0
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _no_memory(self, length: int) -> str:
        at_once = f"{self.piece_rows or 1} x {length:,} tokens"
        return (
            f"the memory of {self.device} is too small to train this model with {at_once} at once: "
            "set a smaller device-batch-size, end what else uses the device, or train a smaller model"
        )

    def _backward(self, rows: np.ndarray, scale: float) -> Tensor:
        """Add the gradient of scale * the sum of nats of `rows`; returns that sum."""
        if self._batches is None:
            self._batches = Batches(len(rows), rows.shape[1], device=self.device)
        ids = self._batches.load(rows)
        run = self._run_block if len(rows) == self.piece_rows else run_block
        loss: Tensor = self.model(ids[:, :-1], ids[:, 1:], loss_reduction="sum", run_block=run)
        (loss * scale).backward()
        return loss.detach()

    def _apply(self, hyper: Hyper) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * hyper.lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = hyper.momentum
                group["weight_decay"] = hyper.weight_decay
