"""A run on one machine before its first step: what it is given, what that comes to, what trains it.

`plan_run` finds every mistake that can be found without work; `build` makes model and optimizer, and
loads the step from which the run continues.
"""

import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat.acceleration import accelerated_block
from nanochat.builtin import open_source
from nanochat.common import get_base_dir, print0
from nanochat.core_bundle import Task, check_items, ensure_bundle, load_tasks
from nanochat.data_spec import DataSpec, check_footers, count_train_shards
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, build_gpt
from nanochat.gpus import device_rows
from nanochat.kernels.choices import default_compute_dtype, training_seconds
from nanochat.kernels.fp8 import check_fp8
from nanochat.layers import RunBlock
from nanochat.optim import MuonAdamW
from nanochat.param_groups import make_optimizer
from nanochat.resume import LATEST, WORLD_SIZE, SavedStep, TrainingState, find_saved, restore_run
from nanochat.rows.cache import RowCache
from nanochat.run_plan import batch_tokens, model_config, run_schedule, step_count
from nanochat.schedule import LearningRates, Schedule, learning_rates, scale_lr_for_batch
from nanochat.settings import Settings
from nanochat.source import default_packing
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer, tokenizer_name
from nanochat.trainer import Trainer

_WANDB_ID = "wandb_id"  # in a checkpoint's `user_config`

# what may change where a run continues: how it is watched, kept and (but for rounding) computed
_FREE_TO_CHANGE = {
    *("compile", "run", "tokenizer", "batch_size", "eval_every", "eval_rows", "eval_tokens"),
    *(
        "core_every",
        "core_max_per_task",
        "sample_every",
        "save_every",
        "save_keep",
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
class RunPlan:
    """What a run comes to; `settings` with what was computed filled in."""

    settings: Settings
    place: Place
    inputs: Inputs
    num_steps: int
    schedule: Schedule
    rates: LearningRates
    saved: SavedStep | None  # from which it continues
    wandb_id: str

    @property
    def directory(self) -> Path:
        """Of the run's checkpoints."""
        return _directory(self.settings)

    @property
    def user_config(self) -> dict[str, Any]:
        """The settings as a checkpoint keeps them."""
        return {**asdict(self.settings), "num_shards": self.inputs.num_shards}

    def meta(self, state: TrainingState, *, ranks: int) -> dict[str, Any]:
        """A checkpoint's meta data: upstream's keys, and `data`, which our evaluation needs.

        ranks: how many wrote their shard of the optimizer.
        """
        more: dict[str, Any] = {WORLD_SIZE: ranks}
        if self.settings.wandb_project:
            more[_WANDB_ID] = self.wandb_id
        return {
            **state.to_meta(),
            "model_config": self.inputs.config.to_meta(),
            "data": self.inputs.spec.to_meta(),
            "user_config": {**self.user_config, **more},
            "device_batch_size": self.settings.batch_size,
            "max_seq_len": self.settings.max_seq_len,
            "total_batch_size": self.settings.total_batch_size,
        }


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run that is ready to train from `state` on."""

    plan: RunPlan
    model: GPT
    optimizer: MuonAdamW
    trainer: Trainer
    state: TrainingState

    @property
    def checkpoint_bytes(self) -> int:
        """Of one step on disk, the optimizer of all ranks included."""
        weights = sum(one.numel() * one.element_size() for one in self.model.state_dict().values())
        return weights + self.optimizer.state_bytes()


def plan_run(settings: Settings, place: Place) -> RunPlan:
    """Open the data and plan the run; prints what was decided. UserError for whatever cannot be."""
    saved = find_saved(_directory(settings), settings.resume_from_step)
    if saved is not None and settings.num_shards is None:  # shards may have arrived since
        settings = replace(settings, num_shards=saved.user_config.get("num_shards"))
    inputs = _open(settings)
    config = inputs.config
    if settings.fp8:
        check_fp8(
            place.device,
            default_compute_dtype(place.device.type),
            sequence_len=config.sequence_len,
            vocab_size=config.vocab_size,
        )
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
    rates = learning_rates(
        config.arch,
        lr=settings.lr,
        matrix_lr=settings.matrix_lr,
        embedding_lr=settings.embedding_lr,
        unembedding_lr=settings.unembedding_lr,
        scalar_lr=settings.scalar_lr,
    ).scaled(scale_lr_for_batch(settings.total_batch_size))
    plan = RunPlan(
        settings=settings,
        place=place,
        inputs=inputs,
        num_steps=num_steps,
        schedule=schedule,
        rates=rates,
        saved=saved,
        wandb_id=(saved.user_config.get(_WANDB_ID) if saved else None) or secrets.token_hex(4),
    )
    _check_continues(plan)
    return plan


def _check_continues(plan: RunPlan) -> None:
    """Raise UserError unless the saved step is one of the run that is planned."""
    saved, spec = plan.saved, plan.inputs.spec
    if saved is None:
        return
    kept = {k: v for k, v in plan.user_config.items() if k not in _FREE_TO_CHANGE}
    if "fp8" not in saved.user_config and not plan.settings.fp8:
        del kept["fp8"]  # of a run that began before there was any
    data = {"tokenizer_sha256": spec.tokenizer_sha256, "val_shard": spec.val_shard}
    config = plan.inputs.config.to_meta()
    saved.check_same({"model_config": config, "data": data, "user_config": kept})
    if saved.step >= plan.num_steps:
        raise UserError(
            f"the run in {plan.directory} is over: it has done its {plan.num_steps} steps"
        )


def build(plan: RunPlan) -> Setup:
    """Model and optimizer at the step where the run begins."""
    settings, place = plan.settings, plan.place
    try:
        model = build_gpt(plan.inputs.config, device=place.device, seed=settings.seed)
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for a CPU's memory
        if (
            isinstance(error, RuntimeError)
            and "alloc" not in str(error)
            and "out of memory" not in str(error)
        ):
            raise
        raise UserError(
            f"the memory of {place.device} is too small for this model: choose a smaller --depth"
        ) from error
    if settings.fp8:
        model.use_fp8()
    optimizer = make_optimizer(model, plan.rates, weight_decay=plan.schedule.weight_decay)
    trainer = Trainer(
        model,
        optimizer,
        device=place.device,
        device_batch_rows=settings.batch_size,
        rank=place.rank,
        world_size=place.world_size,
        run_block=_run_block(settings, model, plan.num_steps, place.world_size),
    )
    state = TrainingState()
    if plan.saved is not None:
        state = restore_run(
            plan.saved, model, optimizer, rank=place.rank, world_size=place.world_size
        )
        print0(f"continuing {plan.directory} from step {state.step}")
    elif settings.resume_from_step == LATEST:
        print0(f"beginning: {plan.directory} holds no step to continue from")
    return Setup(plan=plan, model=model, optimizer=optimizer, trainer=trainer, state=state)


def _directory(settings: Settings) -> Path:
    return get_base_dir() / "base_checkpoints" / settings.tag


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


def _open(settings: Settings) -> Inputs:
    """Open all that the run needs from this machine; UserError if something is missing."""
    source = open_source(settings.source)
    num_shards = count_train_shards(source, settings.num_shards)
    print0(
        f"data: shards 0..{num_shards - 1} of {source.name} ({len(source.present_train())} training "
        f"shards are here), validation shard {source.val_shard}"
    )
    check_footers(source, [*range(num_shards), source.val_shard])
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
    tasks = load_tasks(ensure_bundle()) if settings.core_every > 0 else []
    check_items(tasks, settings.core_max_per_task)
    cache = RowCache(source, tokenizer, sequence_len=settings.max_seq_len, packing=spec.packing)
    return Inputs(
        config=config,
        cache=cache,
        tokenizer=tokenizer,
        spec=spec,
        num_shards=num_shards,
        core_tasks=tasks,
    )
