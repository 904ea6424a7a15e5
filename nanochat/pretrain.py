"""Pretraining on one machine, from settings to a checkpoint: what the training scripts call.

The same rows, step, schedule and validation as a federation's site, without the federation.
"""

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanochat.acceleration import accelerated_block
from nanochat.common import get_base_dir, print0
from nanochat.core_bundle import Task, ensure_bundle, evaluate_core, load_tasks
from nanochat.data_spec import DataSpec, count_train_shards, open_source, validation_rows
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, build_gpt, config_for_depth
from nanochat.gpus import device_rows, peak_flops, settle_garbage
from nanochat.interrupt import stop_on_signals
from nanochat.kernels.choices import training_seconds
from nanochat.layers import RunBlock
from nanochat.loss_eval import bits_per_byte, bpb_sums, sum_over_ranks
from nanochat.memory import keep_freed_memory
from nanochat.progress import ProgressLog
from nanochat.resume import RunState, resolve_step, restore_run, save_run
from nanochat.rows.cache import RowCache
from nanochat.rows.stream import EpochStream
from nanochat.samples import sample_texts
from nanochat.schedule import (
    REFERENCE_BATCH_TOKENS,
    Schedule,
    learning_rates,
    make_schedule,
    scale_lr_for_batch,
    scale_weight_decay,
    scale_weight_decay_for_tokens,
)
from nanochat.settings import Settings
from nanochat.source import default_packing
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.trainer import Trainer, rank_slice

_DEFAULT_WEIGHT_DECAY = {"pilot": 0.2, "upstream": 0.28}
_BATCH_EXPONENT = 0.383
_REFERENCE_DEPTH = 12  # upstream scales its weight decay relative to a model of this depth
# what may change where a run is continued: how it is watched, held and (but for rounding) computed
_FREE_TO_CHANGE = {
    *("compile", "run", "tokenizer", "batch_size", "eval_every", "eval_rows", "eval_tokens"),
    *(
        "core_every",
        "core_max_per_task",
        "sample_every",
        "save_every",
        "resume_from_step",
        "log_every",
    ),
    *("wandb_project", "wandb_mode"),
}


def pretrain(
    settings: Settings, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> float:
    """Train a model and leave its checkpoint in `base_checkpoints/<tag>`; returns its last bpb.

    All ranks of a process group call it together. Raises UserError before any long work.
    """
    settings.check()
    if device.type == "cpu":
        keep_freed_memory()
    config, cache, tokenizer, spec, num_shards = _open(settings)
    core_tasks = load_tasks(ensure_bundle()) if settings.core_every > 0 else []
    with torch.device("meta"):
        params = GPT(config, compute_dtype=torch.float32)
    batch_tokens = _batch_tokens(settings, params)
    settings = replace(settings, total_batch_size=batch_tokens, eval_rows=spec.eval_rows)
    settings = replace(settings, batch_size=_device_rows(settings, device, world_size))
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
        matrix_lr=settings.matrix_lr,
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
        run_block=_run_block(settings, model, num_steps, world_size),
    )
    directory = get_base_dir() / "base_checkpoints" / settings.tag
    user_config = {**asdict(settings), "num_shards": num_shards}
    state = RunState()
    if settings.resume_from_step is not None:
        first = resolve_step(directory, settings.resume_from_step)
        if first is not None:
            kept = {k: v for k, v in user_config.items() if k not in _FREE_TO_CHANGE}
            data = {"tokenizer_sha256": spec.tokenizer_sha256, "val_shard": spec.val_shard}
            same = {"model_config": config.to_meta(), "data": data, "user_config": kept}
            state = restore_run(
                directory, first, model, optimizer, same=same, rank=rank, world_size=world_size
            )
        print0(f"continuing {directory} from step {state.step}")
        if state.step >= num_steps:
            raise UserError(f"the run in {directory} is over: it has done its {num_steps} steps")
    stream = EpochStream(
        cache,
        num_shards=num_shards,
        seed=settings.seed,
        epoch=state.epoch,
        shard=state.shard,
        row=state.row,
    )
    val_rows = validation_rows(cache, settings.eval_rows)
    logger = ProgressLog(
        num_steps=num_steps,
        step_tokens=settings.total_batch_size,
        log_every=settings.log_every,
        rank=rank,
        run=settings.tag,
        wandb_project=settings.wandb_project,
        wandb_mode=settings.wandb_mode,
        config=asdict(settings),
        done=state.step,
        training_time_s=state.training_time_s,
        token_flops=model.estimate_flops(),
        peak_flops=world_size * (peak_flops(device) or 0.0),
    )

    watch = _Watch(
        model,
        tokenizer,
        settings,
        val_rows=val_rows,
        core_tasks=core_tasks,
        logger=logger,
        rank=rank,
        world_size=world_size,
    )

    step_rows = settings.total_batch_size // settings.max_seq_len
    with stop_on_signals() as stop:
        for step in range(state.step, num_steps):
            rows = stream.read(step_rows)
            hyper = schedule.at(step)
            nats = trainer.step(rows, hyper=hyper)
            assert nats is not None
            if step == state.step:
                settle_garbage()
            done, last = step + 1, step + 1 == num_steps
            logger.step(done, nats, hyper.lr_multiplier, stream.position)
            state = state.moved(done, stream.position, logger.loss, logger.training_time_s)
            stopping = stop.agreed() and not last
            with logger.paused():
                if not stopping:
                    state = watch.after(state, last=last)
                if stopping or _due(settings.save_every, done, last):
                    meta = _meta(user_config, settings, config, spec, state)
                    save_run(directory, model, optimizer, meta, rank=rank, world_size=world_size)
                    logger.say(f"wrote {directory / f'model_{done:06d}.pt'}")
            if stopping:
                logger.say(f"stopped after step {done}: --resume-from-step latest goes on there")
                break
    logger.close()
    cache.close()
    if stopping:
        raise KeyboardInterrupt
    return math.nan if state.val_bpb is None else state.val_bpb  # None: it was not finite


def _run_block(settings: Settings, model: GPT, num_steps: int, world_size: int) -> RunBlock:
    """A block as it is computed in training, chosen by the work of the whole run; one line says how."""
    flops = float(num_steps * settings.total_batch_size * model.estimate_flops())
    threads, device_type = torch.get_num_threads(), model.get_device().type
    seconds = training_seconds(flops, device_type, threads=threads, devices=world_size)
    run_block, choices = accelerated_block(settings.compile, model=model, run_s=seconds)
    print0(choices)
    return run_block


def _device_rows(settings: Settings, device: torch.device, world_size: int) -> int:
    """Rows that each device takes at once: the least of what the ranks have room for."""
    step_rows = settings.total_batch_size // settings.max_seq_len
    rows = device_rows(
        settings.batch_size,
        device=device,
        sequence_len=settings.max_seq_len,
        rank_rows=-(-step_rows // world_size),
    )
    if world_size > 1:
        least = torch.tensor(rows, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        rows = int(least)
    return rows


def _due(every: int, done: int, last: bool) -> bool:
    return last or (every > 0 and done % every == 0)


class _Watch:
    """The evaluations of a run: bits per byte, CORE, samples. All ranks call it together."""

    def __init__(
        self,
        model: GPT,
        tokenizer: RustBPETokenizer,
        settings: Settings,
        *,
        val_rows: np.ndarray,
        core_tasks: list[Task],
        logger: ProgressLog,
        rank: int,
        world_size: int,
    ) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._core_tasks, self._logger, self._rank = core_tasks, logger, rank
        self._val_rows = val_rows[rank_slice(len(val_rows), rank=rank, world_size=world_size)]
        self._token_bytes = torch.tensor(tokenizer.token_bytes(), device=model.get_device())

    def after(self, state: RunState, *, last: bool) -> RunState:
        """Do what is due after a step; `state` with the newest bpb."""
        settings, done = self._settings, state.step
        if _due(settings.eval_every, done, last):
            bpb = self._bpb()
            self._logger.evaluation(done, bpb)
            state = state.validated(bpb)
        if settings.core_every > 0 and _due(settings.core_every, done, last):
            device, items = self._model.get_device(), settings.core_max_per_task
            result = evaluate_core(
                self._model, self._tokenizer, device, self._core_tasks, max_per_task=items
            )
            self._logger.core(done, result)
        sample = settings.sample_every > 0 and _due(settings.sample_every, done, last)
        if sample and self._rank == 0:  # the others wait in their next collective
            self._logger.samples(done, sample_texts(Engine(self._model, self._tokenizer)))
        return state

    def _bpb(self) -> float:
        rows, at_once = self._val_rows, self._settings.batch_size
        batches = (rows[i : i + at_once] for i in range(0, len(rows), at_once))
        sums = bpb_sums(self._model, batches, self._token_bytes)
        return bits_per_byte(*sum_over_ranks(*sums, device=self._model.get_device()))


def _open(
    settings: Settings,
) -> tuple[GPTConfig, RowCache, RustBPETokenizer, DataSpec, int]:
    """Look at all that the run needs from this machine."""
    source = open_source(settings.source)
    num_shards = count_train_shards(source, settings.num_shards)
    tokenizer = get_tokenizer(settings.tokenizer)
    config = _config(settings, settings.depth, tokenizer.get_vocab_size())
    spec = DataSpec(
        source=source.name,
        tokenizer=settings.tokenizer,
        tokenizer_sha256=tokenizer.fingerprint(),
        sequence_len=settings.max_seq_len,
        packing=settings.packing or default_packing(source),
        eval_rows=settings.validation_rows,
        val_shard=source.val_shard,
    )
    cache = RowCache(source, tokenizer, sequence_len=settings.max_seq_len, packing=spec.packing)
    return config, cache, tokenizer, spec, num_shards


def _config(settings: Settings, depth: int, vocab_size: int) -> GPTConfig:
    return config_for_depth(
        depth,
        vocab_size=vocab_size,
        sequence_len=settings.max_seq_len,
        arch=settings.arch,
        head_dim=settings.head_dim,
        aspect_ratio=settings.aspect_ratio,
        window_pattern=settings.window_pattern,
    )


def _reference_params(settings: Settings, params: GPT) -> int:
    """What `data_ratio_params` is at the depth that upstream's rules were fitted at."""
    reference = _config(settings, _REFERENCE_DEPTH, params.config.vocab_size)
    with torch.device("meta"):
        return GPT(reference, compute_dtype=torch.float32).data_ratio_params()


def _batch_tokens(settings: Settings, params: GPT) -> int:
    """Tokens of a step; for -1 upstream's rule: they grow as the run's tokens to the power of 0.383
    (arXiv 2505.13738), from 2^19 at depth 12, to the nearest power of two."""
    if settings.total_batch_size != -1:
        return settings.total_batch_size
    # all are trained on the same number of tokens a parameter, so parameters stand for tokens
    growth = params.data_ratio_params() / _reference_params(settings, params)
    tokens = 2 ** round(math.log2(REFERENCE_BATCH_TOKENS * growth**_BATCH_EXPONENT))
    rows = max(1, round(tokens / settings.max_seq_len))
    print0(f"Steps of {rows * settings.max_seq_len:,} tokens fit the length of this run")
    return rows * settings.max_seq_len


def _num_steps(settings: Settings, params: GPT) -> int:
    if settings.given_iterations is not None:
        return settings.given_iterations
    if settings.given_flops is not None:
        return max(
            1, round(settings.given_flops / params.estimate_flops() / settings.total_batch_size)
        )
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
        # both are trained on the same number of tokens a parameter, so parameters stand for tokens
        scaled = scale_weight_decay_for_tokens(
            weight_decay,
            total_batch_tokens=batch_tokens,
            train_tokens=params.data_ratio_params(),
            reference_tokens=_reference_params(settings, params),
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


def _meta(
    user_config: dict[str, Any],
    settings: Settings,
    config: GPTConfig,
    spec: DataSpec,
    state: RunState,
) -> dict[str, Any]:
    """A checkpoint's meta data: upstream's keys, and `data`, which our evaluation needs."""
    return {
        **state.to_meta(),
        "model_config": config.to_meta(),
        "data": spec.to_meta(),
        "user_config": user_config,
        "device_batch_size": settings.batch_size,
        "max_seq_len": settings.max_seq_len,
        "total_batch_size": settings.total_batch_size,
    }
