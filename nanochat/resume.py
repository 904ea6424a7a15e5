"""Writing a run's state so that a later process continues it bit for bit, and reading it again.

The state is the weights, each rank's shard of the optimizer, the step, and the position in the data.
All ranks write their shards before rank 0 writes the meta file: a step that has one is whole.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nanochat.checkpoint_manager import (
    find_last_step,
    load_checkpoint,
    optimizer_ranks,
    save_checkpoint,
    save_optimizer,
)
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW

LATEST = "latest"
_NO_BPB = sys.float_info.max  # upstream begins with infinity, which JSON does not have

Meta = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A run after `step` steps: position in the data and figures, besides weights and optimizer."""

    step: int = 0
    epoch: int = 0
    shard: int | None = None  # None: the first of the epoch
    row: int = 0
    val_bpb: float | None = None
    min_val_bpb: float | None = None
    train_loss: float | None = None
    training_time_s: float = 0.0

    def moved(
        self,
        step: int,
        position: tuple[int, int, int, int | None],
        train_loss: float | None,
        training_time_s: float,
    ) -> "TrainingState":
        """After `step` steps, at `EpochStream.position`."""
        epoch, shard, row, _ = position
        return replace(
            self,
            step=step,
            epoch=epoch,
            shard=shard,
            row=row,
            train_loss=train_loss,
            training_time_s=training_time_s,
        )

    def validated(self, val_bpb: float) -> "TrainingState":
        """The same place with a new validation; what JSON cannot hold (no bytes: inf) is left out."""
        if not math.isfinite(val_bpb):
            return replace(self, val_bpb=None)
        best = val_bpb if self.min_val_bpb is None else min(val_bpb, self.min_val_bpb)
        return replace(self, val_bpb=val_bpb, min_val_bpb=best)

    def to_meta(self) -> Meta:
        """Under upstream's names; its loader counts files (pq_idx) and row groups (rg_idx)."""
        return {
            "step": self.step,
            "val_bpb": self.val_bpb,
            "dataloader_state_dict": {
                "epoch": self.epoch,
                "pq_idx": self.shard,
                "rg_idx": 0,
                "row": self.row,
            },
            "loop_state": {
                # upstream compares and multiplies them: never null
                "min_val_bpb": _NO_BPB if self.min_val_bpb is None else self.min_val_bpb,
                "smooth_train_loss": self.train_loss or 0.0,
                "total_training_time": self.training_time_s,
            },
        }

    @staticmethod
    def from_meta(meta: Meta) -> "TrainingState":
        """Raises UserError for the checkpoint of a program that keeps no row."""
        try:
            place, loop = meta["dataloader_state_dict"], meta["loop_state"]
            least = loop["min_val_bpb"]
            return TrainingState(
                step=meta["step"],
                epoch=place["epoch"],
                shard=place["pq_idx"],
                row=place["row"],
                val_bpb=meta["val_bpb"],
                min_val_bpb=None if least is None or least >= _NO_BPB else least,
                train_loss=loop["smooth_train_loss"] or None,
                training_time_s=loop["total_training_time"],
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                f"this checkpoint does not record its position in the data (no {error}): only runs "
                "of scripts.base_train can be continued"
            ) from error


def save_run(
    directory: Path, model: GPT, optimizer: MuonAdamW, meta: Meta, *, rank: int, world_size: int
) -> None:
    """Write the step `meta["step"]`, all ranks together; UserError when the disk is full."""
    step = meta["step"]
    try:
        if rank == 0:  # of an earlier run here: killed now, it must not look whole
            (directory / f"meta_{step:06d}.json").unlink(missing_ok=True)
        _wait_for_all(world_size)
        save_optimizer(directory, step, optimizer.state_dict(), rank)
        _wait_for_all(world_size)
        if rank == 0:
            save_checkpoint(directory, step, model.state_dict(), None, meta)
    except OSError as error:
        raise UserError(
            f"cannot write the checkpoint of step {step} to {directory} ({error.strerror}): make "
            f"room there and continue with --resume-from-step {LATEST}"
        ) from error


def _wait_for_all(world_size: int) -> None:
    if world_size > 1:
        dist.barrier()


def resolve_step(directory: Path, wanted: str) -> int | None:
    """The step that `wanted` names, a number or "latest"; None for "latest" if there is none yet.

    So the same command line starts a run and continues it, as a restarted job needs.
    """
    if wanted == LATEST:
        try:
            return find_last_step(directory)
        except UserError:
            return None
    if not wanted.isdigit():
        raise UserError(f"--resume-from-step is {wanted!r}: give a number or {LATEST}")
    return int(wanted)


def restore_run(
    directory: Path,
    step: int,
    model: GPT,
    optimizer: MuonAdamW,
    *,
    same: Meta,
    rank: int,
    world_size: int,
) -> TrainingState:
    """Put the weights and this rank's optimizer shard back; returns where the run stands.

    same: what the checkpoint's meta data must hold for this to be the same run, a value or a
    mapping of values per key. Raises UserError, naming what differs, and for another number of ranks.
    """
    ranks = optimizer_ranks(directory, step)
    if ranks and ranks != list(range(world_size)):
        raise UserError(
            f"step {step} in {directory} holds the optimizer of {len(ranks)} processes and this "
            f"run has {world_size}: continue it with {len(ranks)}"
        )
    weights, shard, meta = load_checkpoint(
        directory, step, model.get_device(), load_optimizer=True, rank=rank
    )
    state = TrainingState.from_meta(meta)
    for key, values in same.items():
        for name, value in values.items():
            saved = meta.get(key, {}).get(name)
            if saved != value:
                raise UserError(
                    f"the run in {directory} was started with {name} {saved!r}, not {value!r}: "
                    "continue it with that, or start another one with --run"
                )
    try:
        model.load_state_dict(weights)
        assert shard is not None
        optimizer.load_state_dict(shard)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"step {step} in {directory} does not fit this model ({str(error).splitlines()[0]}): "
            "continue from another step"
        ) from error
    return state
