"""What a run on one machine shows: a progress bar, lines, Weights & Biases."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nanochat.common import get_base_dir
from nanochat.core_bundle import CoreResult
from nanochat.errors import UserError
from nanochat.gpus import mfu
from nanochat.settings import Settings
from nanochat.wandb_run import WandbRun


class Diverged(UserError):
    """Loss or weights are not finite: there is nothing to go on with, and nothing to save."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}, the run has diverged: start another one with a lower --lr (checkpoints written "
            "before are kept)"
        )


class ProgressLog:
    """Progress bar, lines and W&B of rank 0; a loss is read from the device every few steps only."""

    def __init__(
        self,
        settings: Settings,
        *,
        num_steps: int,
        rank: int,
        done: int = 0,
        training_time_s: float = 0.0,
        token_flops: float = 0.0,
        peak_flops: float | None = None,
        wandb_id: str = "",
    ) -> None:
        """For a run of `num_steps` of which `done` are done, after `training_time_s` of training.

        `token_flops`: of training on one token; `peak_flops`: FLOP/s of all devices, None if unknown;
        `wandb_id`: of the W&B run, which a resumed run continues.
        """
        self.loss: float | None = None  # the last one that was read
        self.training_time_s = training_time_s  # without evaluations and checkpoints
        self._num_steps, self._step_tokens = num_steps, settings.total_batch_size
        self._log_every, self._rank = settings.log_every, rank
        # None: no bar without a terminal; the lines say the same
        quiet = None if rank == 0 else True
        self._bar = tqdm(total=num_steps, initial=done, unit="step", disable=quiet)
        self._wandb = _open_wandb(settings, wandb_id) if rank == 0 else None
        self._pending: list[Tensor] = []
        self._token_flops, self._peak_flops = token_flops, peak_flops
        self._since = time.monotonic()

    def step(
        self,
        done: int,
        nats: Tensor,
        lr_multiplier: float,
        position: tuple[int, int, int, int | None],
        *,
        read: bool = False,
    ) -> None:
        """Record a step whose nats, those of this rank, are still on the device.

        `read`: look at the loss now, due or not. Raises Diverged when one that is read is not finite.
        """
        self._bar.update()
        self._pending.append(nats)
        if done % self._log_every and done != self._num_steps and not read:
            return
        total = torch.stack(self._pending).sum()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        tokens = len(self._pending) * self._step_tokens
        self.loss = loss = float(total) / tokens  # waits for the device
        if not math.isfinite(loss):  # the same on all ranks: they stop together
            raise Diverged(f"the loss is {loss} at step {done}")
        now = time.monotonic()
        elapsed_s = max(now - self._since, 1e-9)
        rate, self._since, self._pending = tokens / elapsed_s, now, []
        self.training_time_s += elapsed_s
        epoch, shard, row, shard_rows = position
        progress = f"{100 * row / shard_rows:.1f}%" if shard_rows else f"{row} rows"
        self._bar.set_postfix_str(f"loss={loss:.4f} shard={shard} shard_progress={progress}")
        self.say(
            f"step={done}/{self._num_steps} loss={loss:.4f} lrm={lr_multiplier:.3f} "
            f"tokens_per_s={rate:,.0f} {self._speed(done, rate)}"
            f"epoch={epoch} shard={shard} shard_progress={progress}"
        )
        values = {"train/loss": loss, "train/lrm": lr_multiplier, "train/tok_per_s": rate}
        if (share := self._mfu(rate)) is not None:
            values["train/mfu"] = share
        self._record(done, values)

    def _speed(self, done: int, rate: float) -> str:
        """What share of the devices' arithmetic is used, where that is known, and the time left."""
        left_s = (self._num_steps - done) * self._step_tokens / rate
        share = self._mfu(rate)
        used = "" if share is None else f"mfu={share:.1%} "
        return f"{used}eta={_clock(left_s)} "

    def _mfu(self, rate: float) -> float | None:
        return mfu(rate, token_flops=self._token_flops, peak=self._peak_flops)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The block is not training: it counts neither in speed nor in time."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def evaluation(self, done: int, val_bpb: float) -> None:
        self.say(f"step={done} val_bpb={val_bpb:.6f}")
        self._record(done, {"val/bpb": val_bpb})

    def core(self, done: int, result: CoreResult) -> None:
        self.say(f"step={done} core={result.core:.6f}")
        tasks = {f"core/{label}": value for label, value in result.centred.items()}
        self._record(done, {"core": result.core, **tasks})

    def samples(self, done: int, texts: list[str]) -> None:
        for text in texts:
            self.say(f"step={done} sample: {text!r}")

    def say(self, line: str) -> None:
        """Print a line, if it can be: a log on a full disk, or nobody who reads, ends no training."""
        if self._rank == 0:
            with contextlib.suppress(OSError):
                self._bar.write(line)

    def close(self, *, exit_code: int = 0) -> None:
        self._bar.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)

    def _record(self, done: int, values: dict[str, float]) -> None:
        if self._wandb is not None:
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            self._wandb.log({"step": done, **finite}, step=done)


def _clock(seconds: float) -> str:
    """As 1:05:00 or 5:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _open_wandb(settings: Settings, run_id: str) -> WandbRun | None:
    """A W&B run, or None without a project."""
    if not settings.wandb_project:
        return None
    return WandbRun(
        mode=settings.wandb_mode,
        project=settings.wandb_project,
        name=settings.tag,
        run_id=run_id,
        directory=get_base_dir(),
        config=asdict(settings),
        warn=lambda text: print(f"warning: {text}", file=sys.stderr, flush=True),
        quiet=False,
    )
