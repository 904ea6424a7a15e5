"""The training step: from an array of rows to new weights, the same on one process and on many."""

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


def rank_slice(num_rows: int, *, rank: int, world_size: int) -> slice:
    """The contiguous part of a global micro-batch that belongs to a rank: sizes differ by at most one."""
    return slice(rank * num_rows // world_size, (rank + 1) * num_rows // world_size)


class Trainer:
    """Takes optimizer steps with `model` on `device`, as one of `world_size` ranks of a group.

    All ranks pass the same rows to `step`. A global micro-batch is `device_batch_rows` *
    `world_size` consecutive rows (fewer at the end), of which each rank takes its slice: the rows
    consumed are always a prefix of what was passed, for any number of ranks. `run_block` is
    used for micro-batches of the usual size; a short one is not worth compiling for.
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
        self.micro_steps = 0  # begun so far, those of a step that was dropped included
        self._run_block = run_block
        self._usual_rows = 0  # of the first micro-batch: only those of its size are compiled for
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
        optimizer are as before.
        """
        num_rows, num_targets = rows.shape[0], rows.shape[0] * (rows.shape[1] - 1)
        assert num_targets > 0, "a step needs at least one target"
        # The optimizer takes the mean over the ranks, but the loss is a sum over them.
        scale = self.world_size / num_targets
        nats = torch.zeros((), device=self.device)
        for first in range(0, num_rows, self.micro_batch_rows):
            if should_stop is not None and should_stop():
                self.optimizer.zero_grad(set_to_none=True)
                return None
            self.micro_steps += 1
            micro = rows[first : first + self.micro_batch_rows]
            mine = micro[rank_slice(len(micro), rank=self.rank, world_size=self.world_size)]
            if len(mine):
                nats += self._backward(mine, scale)
        self._apply(hyper)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return nats

    def _backward(self, rows: np.ndarray, scale: float) -> Tensor:
        """Add the gradient of scale * the sum of nats of `rows`; returns that sum."""
        if self._batches is None:
            self._batches = Batches(len(rows), rows.shape[1], device=self.device)
            self._usual_rows = len(rows)
        ids = self._batches.load(rows)
        run = self._run_block if len(rows) == self._usual_rows else run_block
        loss: Tensor = self.model(ids[:, :-1], ids[:, 1:], loss_reduction="sum", run_block=run)
        (loss * scale).backward()
        return loss.detach()

    def _apply(self, hyper: Hyper) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * hyper.lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = hyper.momentum
                group["weight_decay"] = hyper.weight_decay
