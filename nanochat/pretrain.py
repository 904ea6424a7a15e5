"""Pretraining on one machine, from settings to a checkpoint: what the training scripts call.

The same rows, step, schedule and validation as a federation's site, without the federation.
"""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import UserError, get_base_dir, print0
from nanochat.dataloader import RowCache
from nanochat.gpt import GPT, GPTConfig, build_gpt, config_for_depth
from nanochat.loss_eval import bits_per_byte, bpb_sums, sum_over_ranks
from nanochat.progress import WANDB_MODES, ProgressLog
from nanochat.schedule import (
    SCHEDULE_KINDS,
    Schedule,
    learning_rates,
    make_schedule,
    scale_lr_for_batch,
    scale_weight_decay,
    scale_weight_decay_for_tokens,
)
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.trainer import Trainer, rank_slice
from nanochat.training_data import (
    DataSpec,
    EpochStream,
    count_train_shards,
    default_packing,
    open_source,
    validation_rows,
)

_DEFAULT_WEIGHT_DECAY = {"pilot": 0.2, "upstream": 0.28}
_REFERENCE_DEPTH = 12  # upstream scales its weight decay relative to a model of this depth


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a run on one machine can be told; None means: follows from the rest."""

    run: str = ""  # names the checkpoint directory; "": d<depth>
    depth: int = 20
    arch: str = "classic"
    window_pattern: str | None = None
    source: str = "fineweb-edu"
    num_shards: int | None = None  # None: all that are here
    tokenizer: str = "tokenizer"
    packing: str | None = None
    max_seq_len: int = 2048
    batch_size: int = 8  # rows a device takes at once
    total_batch_size: int = 524288  # tokens of an optimizer step
    num_iterations: int | None = None
    target_param_data_ratio: float = 20.0
    lr: float | None = None
    embedding_lr: float | None = None
    unembedding_lr: float | None = None
    scalar_lr: float | None = None
    weight_decay: float | None = None
    schedule: str = "pilot"
    warmup_steps: float | None = None
    warmdown_ratio: float | None = None
    final_lr_fraction: float | None = None
    eval_every: int = 250  # steps; 0: only at the end
    eval_rows: int = 512
    save_every: int = 0  # steps; 0: only at the end
    log_every: int = 10  # steps between readings of the loss, each of which waits for the device
    wandb_project: str = ""
    wandb_mode: str = "auto"
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for a value that can be seen to be wrong without looking at any file."""
        if self.run and not re.fullmatch(r"[\w][\w.-]*", self.run):
            raise UserError(f"--run is {self.run!r}: use letters, digits, '.', '-' and '_' only")
        for name in ("max_seq_len", "batch_size", "total_batch_size", "eval_rows", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{_flag(name)} is {getattr(self, name)}: it must be at least 1")
        for name in ("eval_every", "save_every", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{_flag(name)} is {getattr(self, name)}: it must not be negative")
        if self.num_iterations is not None and self.num_iterations < 1:
            raise UserError(f"--num-iterations is {self.num_iterations}: it must be at least 1")
        if self.num_iterations is None and self.target_param_data_ratio <= 0:
            raise UserError(
                f"--target-param-data-ratio is {self.target_param_data_ratio}: it must be above 0"
            )
        if self.total_batch_size % self.max_seq_len:
            raise UserError(
                f"--total-batch-size {self.total_batch_size} must be a multiple of "
                f"--max-seq-len {self.max_seq_len}"
            )
        for name, choices in (("schedule", SCHEDULE_KINDS), ("wandb_mode", WANDB_MODES)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{_flag(name)} is {getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )

    @property
    def tag(self) -> str:
        return self.run or f"d{self.depth}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def pretrain(
    settings: Settings, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> float:
    """Train a model and leave its checkpoint in `base_checkpoints/<tag>`; returns its last bpb.

    All ranks of a process group call it together. Raises UserError before any long work.
    """
    settings.check()
    config, cache, tokenizer, spec, num_shards = _open(settings)
    with torch.device("meta"):
        params = GPT(config, compute_dtype=torch.float32)
    num_steps = _num_steps(settings, params)
    schedule = _schedule(settings, params, num_steps)
    print0(
        f"{config.arch} model of depth {settings.depth}: "
        f"{params.num_scaling_params()['total']:,} parameters, "
        f"{num_steps} steps of {settings.total_batch_size:,} tokens on {world_size} x {device.type}"
    )

    model = build_gpt(config, device=device, seed=settings.seed)
    rates = learning_rates(
        config.arch,
        lr=settings.lr,
        embedding_lr=settings.embedding_lr,
        unembedding_lr=settings.unembedding_lr,
        scalar_lr=settings.scalar_lr,
    ).scaled(scale_lr_for_batch(settings.total_batch_size))
    optimizer = model.make_optimizer(rates, weight_decay=schedule.weight_decay)
    trainer = Trainer(
        model,
        optimizer,
        device=device,
        device_batch_rows=settings.batch_size,
        rank=rank,
        world_size=world_size,
    )
    stream = EpochStream(cache, num_shards=num_shards, seed=settings.seed)
    val_rows = validation_rows(cache, settings.eval_rows)
    token_bytes = torch.tensor(tokenizer.token_bytes(), device=device)
    logger = ProgressLog(
        num_steps=num_steps,
        step_tokens=settings.total_batch_size,
        log_every=settings.log_every,
        rank=rank,
        run=settings.tag,
        wandb_project=settings.wandb_project,
        wandb_mode=settings.wandb_mode,
        config=asdict(settings),
    )

    step_rows = settings.total_batch_size // settings.max_seq_len
    val_bpb = math.nan
    for step in range(num_steps):
        rows = stream.read(step_rows)
        hyper = schedule.at(step)
        nats = trainer.step(rows, hyper=hyper)
        assert nats is not None
        done, last = step + 1, step + 1 == num_steps
        logger.step(done, nats, hyper.lr_multiplier, stream.position)
        if last or (settings.eval_every and done % settings.eval_every == 0):
            val_bpb = _evaluate(model, val_rows, token_bytes, settings.batch_size, rank, world_size)
            logger.evaluation(done, val_bpb)
        if last or (settings.save_every and done % settings.save_every == 0):
            directory = get_base_dir() / "base_checkpoints" / settings.tag
            meta = _meta(settings, config, spec, done, val_bpb)
            optimizer_state = optimizer.state_dict()
            save_checkpoint(directory, done, model.state_dict(), optimizer_state, meta, rank)
            logger.say(f"wrote {directory / f'model_{done:06d}.pt'}")
    logger.close()
    cache.close()
    return val_bpb


def _open(
    settings: Settings,
) -> tuple[GPTConfig, RowCache, RustBPETokenizer, DataSpec, int]:
    """Look at all that the run needs from this machine."""
    source = open_source(settings.source)
    num_shards = count_train_shards(source, settings.num_shards)
    tokenizer = get_tokenizer(settings.tokenizer)
    config = config_for_depth(
        settings.depth,
        vocab_size=tokenizer.get_vocab_size(),
        sequence_len=settings.max_seq_len,
        arch=settings.arch,
        window_pattern=settings.window_pattern,
    )
    spec = DataSpec(
        source=source.name,
        tokenizer=settings.tokenizer,
        tokenizer_sha256=tokenizer.fingerprint(),
        sequence_len=settings.max_seq_len,
        packing=settings.packing or default_packing(source),
        eval_rows=settings.eval_rows,
        val_shard=source.val_shard,
    )
    cache = RowCache(source, tokenizer, sequence_len=settings.max_seq_len, packing=spec.packing)
    return config, cache, tokenizer, spec, num_shards


def _num_steps(settings: Settings, params: GPT) -> int:
    if settings.num_iterations is not None:
        return settings.num_iterations
    tokens = settings.target_param_data_ratio * params.data_ratio_params()
    steps = int(tokens // settings.total_batch_size)
    if steps < 1:
        raise UserError(
            f"--target-param-data-ratio {settings.target_param_data_ratio} of this model is less "
            f"than one step of {settings.total_batch_size} tokens: choose a greater ratio"
        )
    return steps


def _schedule(settings: Settings, params: GPT, num_steps: int) -> Schedule:
    kind, batch_tokens = settings.schedule, settings.total_batch_size
    given = settings.weight_decay
    weight_decay = _DEFAULT_WEIGHT_DECAY[kind] if given is None else given
    if kind == "pilot":
        scaled = scale_weight_decay(weight_decay, settings.depth)
    else:
        reference = config_for_depth(
            _REFERENCE_DEPTH,
            vocab_size=params.config.vocab_size,
            sequence_len=settings.max_seq_len,
            arch=settings.arch,
        )
        with torch.device("meta"):
            reference_params = GPT(reference, compute_dtype=torch.float32).data_ratio_params()
        # both are trained on the same number of tokens a parameter, so parameters stand for tokens
        scaled = scale_weight_decay_for_tokens(
            weight_decay,
            total_batch_tokens=batch_tokens,
            train_tokens=params.data_ratio_params(),
            reference_tokens=reference_params,
        )
    print0(
        f"Scaling weight decay from {weight_decay:.6f} to {scaled:.6f} for depth {settings.depth}"
    )
    print0(f"Scaling learning rates by {scale_lr_for_batch(batch_tokens):.6f} for the batch size")
    return make_schedule(
        kind,
        total_steps=num_steps,
        weight_decay=scaled,
        warmup_steps=settings.warmup_steps,
        warmdown_ratio=settings.warmdown_ratio,
        final_lr_fraction=settings.final_lr_fraction,
    )


def _evaluate(
    model: GPT,
    val_rows: np.ndarray,
    token_bytes: Tensor,
    batch_rows: int,
    rank: int,
    world_size: int,
) -> float:
    mine = val_rows[rank_slice(len(val_rows), rank=rank, world_size=world_size)]
    batches = (mine[i : i + batch_rows] for i in range(0, len(mine), batch_rows))
    sums = bpb_sums(model, batches, token_bytes)
    return bits_per_byte(*sum_over_ranks(*sums, device=model.get_device()))


def _meta(
    settings: Settings, config: GPTConfig, spec: DataSpec, step: int, val_bpb: float
) -> dict[str, Any]:
    """A checkpoint's meta data: upstream's keys, and what our evaluation needs."""
    return {
        "step": step,
        "val_bpb": val_bpb if math.isfinite(val_bpb) else None,
        "model_config": config.to_meta(),
        "data": spec.to_meta(),
        "user_config": asdict(settings),
        "device_batch_size": settings.batch_size,
        "max_seq_len": settings.max_seq_len,
        "total_batch_size": settings.total_batch_size,
    }
