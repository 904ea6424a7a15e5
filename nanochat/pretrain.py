"""Pretraining on one machine, from settings to a checkpoint: what the training scripts call.

The same rows, step, schedule and validation as a federation's site, without the federation.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanochat.acceleration import accelerated_block
from nanochat.builtin import open_source
from nanochat.common import get_base_dir, print0
from nanochat.core_bundle import Task, ensure_bundle, evaluate_core, load_tasks
from nanochat.data_spec import DataSpec, count_train_shards, validation_rows
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, build_gpt
from nanochat.gpus import device_rows, peak_flops, settle_garbage
from nanochat.interrupt import stop_on_signals
from nanochat.kernels.choices import training_seconds
from nanochat.layers import RunBlock
from nanochat.loss_eval import bits_per_byte, bpb_sums, sum_over_ranks
from nanochat.memory import keep_freed_memory
from nanochat.optim import MuonAdamW
from nanochat.param_groups import make_optimizer
from nanochat.progress import ProgressLog
from nanochat.prompts import sample_texts
from nanochat.resume import TrainingState, resolve_step, restore_run, save_run
from nanochat.rows.cache import RowCache
from nanochat.rows.stream import EpochStream
from nanochat.run_plan import batch_tokens, model_config, run_schedule, step_count
from nanochat.schedule import Schedule, learning_rates, scale_lr_for_batch
from nanochat.settings import Settings
from nanochat.source import default_packing
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer, tokenizer_name
from nanochat.trainer import Trainer, rank_slice

# what may change where a run continues: how it is watched, kept and (but for rounding) computed
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


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process trains: one of `world_size` ranks."""

    device: torch.device
    rank: int
    world_size: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a run needs from this machine."""

    config: GPTConfig
    cache: RowCache
    tokenizer: RustBPETokenizer
    spec: DataSpec
    num_shards: int
    core_tasks: list[Task]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run that is ready to train; `settings` with what was computed filled in."""

    settings: Settings
    place: Place
    inputs: Inputs
    num_steps: int
    schedule: Schedule
    model: GPT
    optimizer: MuonAdamW
    trainer: Trainer

    @property
    def directory(self) -> Path:
        """Of the run's checkpoints."""
        return get_base_dir() / "base_checkpoints" / self.settings.tag

    @property
    def user_config(self) -> dict[str, Any]:
        """The settings as a checkpoint keeps them."""
        return {**asdict(self.settings), "num_shards": self.inputs.num_shards}


def pretrain(
    settings: Settings, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> float:
    """Train a model and leave its checkpoint in `base_checkpoints/<tag>`; returns its last bpb.

    All ranks of a process group call it together. Raises UserError before any long work.
    """
    settings.check()
    if device.type == "cpu":
        keep_freed_memory()
    setup = prepare(settings, Place(device=device, rank=rank, world_size=world_size))
    state = _resumed(setup)
    stream = EpochStream(
        setup.inputs.cache,
        num_shards=setup.inputs.num_shards,
        seed=settings.seed,
        epoch=state.epoch,
        shard=state.shard,
        row=state.row,
    )
    val_rows = validation_rows(setup.inputs.cache, setup.settings.eval_rows)
    logger = ProgressLog(
        setup.settings,
        num_steps=setup.num_steps,
        rank=rank,
        done=state.step,
        training_time_s=state.training_time_s,
        token_flops=setup.model.estimate_flops(),
        peak_flops=world_size * (peak_flops(device) or 0.0),
    )
    state, stopped = _train(setup, state, stream, _Watch(setup, val_rows, logger), logger)
    logger.close()
    setup.inputs.cache.close()
    if stopped:
        raise KeyboardInterrupt
    return math.nan if state.val_bpb is None else state.val_bpb  # None: it was not finite


def prepare(settings: Settings, place: Place) -> Setup:
    """Open the data, plan the run and build what trains; prints what was decided."""
    inputs = _open(settings)
    config = inputs.config
    with torch.device("meta"):
        params = GPT(config, compute_dtype=torch.float32)
    settings = replace(
        settings,
        total_batch_size=batch_tokens(settings, params),
        eval_rows=inputs.spec.eval_rows,
    )
    settings = replace(settings, batch_size=_device_rows(settings, place))
    num_steps = step_count(settings, params)
    schedule = run_schedule(settings, params, num_steps)
    print0(
        f"{config.arch} model of depth {settings.depth}: "
        f"{params.num_scaling_params()['total']:,} parameters, "
        f"{num_steps} steps of {settings.total_batch_size:,} tokens on "
        f"{place.world_size} x {place.device.type}"
    )
    model = build_gpt(config, device=place.device, seed=settings.seed)
    rates = learning_rates(
        config.arch,
        lr=settings.lr,
        matrix_lr=settings.matrix_lr,
        embedding_lr=settings.embedding_lr,
        unembedding_lr=settings.unembedding_lr,
        scalar_lr=settings.scalar_lr,
    ).scaled(scale_lr_for_batch(settings.total_batch_size))
    optimizer = make_optimizer(model, rates, weight_decay=schedule.weight_decay)
    trainer = Trainer(
        model,
        optimizer,
        device=place.device,
        device_batch_rows=settings.batch_size,
        rank=place.rank,
        world_size=place.world_size,
        run_block=_run_block(settings, model, num_steps, place.world_size),
    )
    return Setup(
        settings=settings,
        place=place,
        inputs=inputs,
        num_steps=num_steps,
        schedule=schedule,
        model=model,
        optimizer=optimizer,
        trainer=trainer,
    )


def _resumed(setup: Setup) -> TrainingState:
    """Where the run begins; with `resume_from_step` that checkpoint is loaded into it."""
    wanted, state = setup.settings.resume_from_step, TrainingState()
    if wanted is None:
        return state
    directory, spec = setup.directory, setup.inputs.spec
    step = resolve_step(directory, wanted)
    if step is not None:
        kept = {k: v for k, v in setup.user_config.items() if k not in _FREE_TO_CHANGE}
        data = {"tokenizer_sha256": spec.tokenizer_sha256, "val_shard": spec.val_shard}
        same = {"model_config": setup.inputs.config.to_meta(), "data": data, "user_config": kept}
        state = restore_run(
            directory,
            step,
            setup.model,
            setup.optimizer,
            same=same,
            rank=setup.place.rank,
            world_size=setup.place.world_size,
        )
    print0(f"continuing {directory} from step {state.step}")
    if state.step >= setup.num_steps:
        raise UserError(f"the run in {directory} is over: it has done its {setup.num_steps} steps")
    return state


def _train(
    setup: Setup, state: TrainingState, stream: EpochStream, watch: "_Watch", logger: ProgressLog
) -> tuple[TrainingState, bool]:
    """All steps with what is due after each; (where the run stands, whether a signal stopped it)."""
    settings = setup.settings
    step_rows = settings.total_batch_size // settings.max_seq_len
    stopping = False
    with stop_on_signals() as stop:
        for step in range(state.step, setup.num_steps):
            rows = stream.read(step_rows)
            hyper = setup.schedule.at(step)
            nats = setup.trainer.step(rows, hyper=hyper)
            assert nats is not None
            if step == state.step:
                settle_garbage()
            done, last = step + 1, step + 1 == setup.num_steps
            logger.step(done, nats, hyper.lr_multiplier, stream.position)
            state = state.moved(done, stream.position, logger.loss, logger.training_time_s)
            stopping = stop.agreed() and not last
            with logger.paused():
                if not stopping:
                    state = watch.after(state, last=last)
                if stopping or _due(settings.save_every, done, last):
                    _save(setup, state)
                    logger.say(f"wrote {setup.directory / f'model_{done:06d}.pt'}")
            if stopping:
                logger.say(f"stopped after step {done}: continue with --resume-from-step latest")
                break
    return state, stopping


def _save(setup: Setup, state: TrainingState) -> None:
    save_run(
        setup.directory,
        setup.model,
        setup.optimizer,
        _meta(setup, state),
        rank=setup.place.rank,
        world_size=setup.place.world_size,
    )


def _run_block(settings: Settings, model: GPT, num_steps: int, world_size: int) -> RunBlock:
    """How a block is computed in training, chosen by the work of the whole run; prints the choice."""
    flops = float(num_steps * settings.total_batch_size * model.estimate_flops())
    threads, device_type = torch.get_num_threads(), model.get_device().type
    seconds = training_seconds(flops, device_type, threads=threads, devices=world_size)
    run_block, choices = accelerated_block(settings.compile, model=model, run_s=seconds)
    print0(choices)
    return run_block


def _device_rows(settings: Settings, place: Place) -> int:
    """Rows that each device takes at once: the least of what the ranks have room for."""
    step_rows = settings.total_batch_size // settings.max_seq_len
    rows = device_rows(
        settings.batch_size,
        device=place.device,
        sequence_len=settings.max_seq_len,
        rank_rows=-(-step_rows // place.world_size),
    )
    if place.world_size > 1:
        least = torch.tensor(rows, device=place.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        rows = int(least)
    return rows


def _due(every: int, done: int, last: bool) -> bool:
    return last or (every > 0 and done % every == 0)


class _Watch:
    """The evaluations of a run: bits per byte, CORE, samples. All ranks call it together."""

    def __init__(self, setup: Setup, val_rows: np.ndarray, logger: ProgressLog) -> None:
        self._model, self._settings = setup.model, setup.settings
        self._tokenizer, self._core_tasks = setup.inputs.tokenizer, setup.inputs.core_tasks
        self._logger, self._rank = logger, setup.place.rank
        mine = rank_slice(len(val_rows), rank=self._rank, world_size=setup.place.world_size)
        self._val_rows = val_rows[mine]
        token_bytes = self._tokenizer.token_bytes()
        self._token_bytes = torch.tensor(token_bytes, device=self._model.get_device())

    def after(self, state: TrainingState, *, last: bool) -> TrainingState:
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


def _open(settings: Settings) -> Inputs:
    """Open all that the run needs from this machine; UserError if something is missing."""
    source = open_source(settings.source)
    num_shards = count_train_shards(source, settings.num_shards)
    print0(
        f"data: shards 0..{num_shards - 1} of {source.name} ({len(source.present_train())} training "
        f"shards are here), validation shard {source.val_shard}"
    )
    tokenizer = get_tokenizer(settings.tokenizer)
    config = model_config(settings, settings.depth, tokenizer.get_vocab_size())
    spec = DataSpec(
        source=source.name,
        tokenizer=tokenizer_name(settings.tokenizer),
        tokenizer_sha256=tokenizer.fingerprint(),
        sequence_len=settings.max_seq_len,
        packing=settings.packing or default_packing(source),
        eval_rows=settings.validation_rows,
        val_shard=source.val_shard,
    )
    cache = RowCache(source, tokenizer, sequence_len=settings.max_seq_len, packing=spec.packing)
    return Inputs(
        config=config,
        cache=cache,
        tokenizer=tokenizer,
        spec=spec,
        num_shards=num_shards,
        core_tasks=load_tasks(ensure_bundle()) if settings.core_every > 0 else [],
    )


def _meta(setup: Setup, state: TrainingState) -> dict[str, Any]:
    """A checkpoint's meta data: upstream's keys, and `data`, which our evaluation needs."""
    return {
        **state.to_meta(),
        "model_config": setup.inputs.config.to_meta(),
        "data": setup.inputs.spec.to_meta(),
        "user_config": setup.user_config,
        "device_batch_size": setup.settings.batch_size,
        "max_seq_len": setup.settings.max_seq_len,
        "total_batch_size": setup.settings.total_batch_size,
    }
