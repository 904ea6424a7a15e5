"""Writing a run's state so that a later process continues it bit for bit, and reading it again.

The state is the weights, each rank's shard of the optimizer, the step, and the position in the data.
All ranks write their shards before rank 0 writes the meta file: a step that has one is whole.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from nanochat.agreement import Agreement, PeerFailed
from nanochat.checkpoint_manager import (
    load_checkpoint,
    load_meta,
    load_optimizer_shards,
    not_finite,
    optimizer_ranks,
    save_checkpoint,
    save_optimizer,
    whole_steps,
)
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.run_directory import remove_step

LATEST = "latest"
WORLD_SIZE = "world_size"  # in a checkpoint's `user_config`: whose optimizer shards it has
_NO_BPB = sys.float_info.max  # upstream begins with infinity, which JSON does not have

Meta = dict[str, Any]
T = TypeVar("T")


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
    ) -> "TrainingState":
        """After `step` steps, at `EpochStream.position`; its validation is still to come."""
        epoch, shard, row, _ = position
        return replace(self, step=step, epoch=epoch, shard=shard, row=row, val_bpb=None)

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


class NotSaved(UserError):
    """The disk did not take a checkpoint; what is there of other steps is whole."""


def save_run(
    directory: Path,
    model: GPT,
    optimizer: MuonAdamW,
    meta: Meta,
    *,
    rank: int,
    agreement: Agreement,
) -> None:
    """Write the step `meta["step"]`, all ranks together; NotSaved, on all of them, if that fails."""
    step = meta["step"]

    def finish() -> None:
        save_checkpoint(directory, step, model.state_dict(), None, meta)

    try:
        agreement.together(lambda: save_optimizer(directory, step, optimizer.state_dict(), rank))
        if_first(rank, finish, agreement)
    except PeerFailed as error:
        raise NotSaved(f"another process cannot write the checkpoint of step {step}") from error
    except OSError as error:
        raise NotSaved(
            f"cannot write the checkpoint of step {step} to {directory} ({error.strerror}): make "
            "room there"
        ) from error


def save_weights(directory: Path, model: GPT, meta: Meta) -> None:
    """Write the step `meta["step"]` without the optimizer; by one process. Raises OSError."""
    remove_step(directory, meta["step"])
    save_checkpoint(directory, meta["step"], model.state_dict(), None, meta)


def if_first(rank: int, action: Callable[[], T], agreement: Agreement) -> T | None:
    """Do it on rank 0, whose failure is everybody's; None on the others."""
    return agreement.together(lambda: action() if rank == 0 else None)


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """A step from which a run continues; `ranks` kept its optimizer."""

    directory: Path
    step: int
    meta: Meta
    ranks: int

    @property
    def user_config(self) -> Meta:
        return _user_config(self.meta)

    def check_same(self, same: Meta) -> None:
        """Raise UserError, naming what differs, unless the meta data holds the values of `same`: a
        mapping of values per key."""
        for key, values in same.items():
            for name, value in values.items():
                saved = self.meta.get(key, {}).get(name)
                if saved != value:
                    raise UserError(
                        f"the run in {self.directory} was started with {name} {saved!r}, not "
                        f"{value!r}: continue it with that, or start another one with --run"
                    )


def find_saved(directory: Path, wanted: str | None) -> SavedStep | None:
    """The step that `wanted` names, a number or "latest"; None for None, and for "latest" if there is none.

    So the same command line starts a run and continues it, as a restarted job needs. "latest" is the
    last step that has its optimizer.
    """
    if wanted is None:
        return None
    if wanted == LATEST:
        found = (_saved(directory, step) for step in reversed(whole_steps(directory)))
        return next((one for one in found if one.ranks), None)
    if not re.fullmatch("[0-9]{1,18}", wanted):
        raise UserError(f"--resume-from-step is {wanted!r}: give a number or {LATEST}")
    return _saved(directory, int(wanted))


def _saved(directory: Path, step: int) -> SavedStep:
    meta = load_meta(directory, step)
    ranks = _user_config(meta).get(WORLD_SIZE)
    if ranks is None:  # files of older versions, and upstream's: they are counted
        ranks = len(optimizer_ranks(directory, step))
    return SavedStep(directory=directory, step=step, meta=meta, ranks=ranks)


def _user_config(meta: Meta) -> Meta:
    config: Meta = meta.get("user_config") or {}
    return config


def restore_run(
    saved: SavedStep, model: GPT, optimizer: MuonAdamW, *, rank: int, world_size: int
) -> TrainingState:
    """Put the weights and this rank's optimizer state back; returns where the run stands.

    The run may have had another number of ranks: the optimizer's shards are cut again. Raises UserError
    if anything does not fit, and for weights that are not finite.
    """
    state = TrainingState.from_meta(saved.meta)
    directory, step = saved.directory, saved.step
    alike = saved.ranks in (0, world_size)  # 0: the file that is missing is named
    weights, shard, _ = load_checkpoint(
        directory, step, model.get_device(), load_optimizer=alike, rank=rank
    )
    if name := not_finite(weights):
        raise UserError(
            f"the weights of step {step} in {directory} are not finite ({name}): continue from an "
            "earlier step"
        )
    try:
        model.load_state_dict(weights)
        if shard is None:
            shards = load_optimizer_shards(directory, step, saved.ranks)
            shard = optimizer.recut(shards, rank=rank, world_size=world_size)
        optimizer.load_state_dict(shard)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"step {step} in {directory} does not fit this model ({str(error).splitlines()[0]}): "
            "continue from another step"
        ) from error
    return state
