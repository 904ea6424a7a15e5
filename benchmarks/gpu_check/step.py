"""Tokens per second of the training step, where its milliseconds go, and what memory it takes."""

import time
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.fp8 import has_fp8
from benchmarks.gpu_check.kit import Stages, memory_gb, synchronize
from benchmarks.gpu_check.profile import profile_step
from benchmarks.gpu_check.variants import using
from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat import gpt
from nanochat.acceleration import accelerated_block
from nanochat.common import compile_cache
from nanochat.gpt import build_gpt, config_for_depth
from nanochat.gpus import peak_flops, prepare_device
from nanochat.kernels import head
from nanochat.param_groups import make_optimizer
from nanochat.schedule import Hyper, learning_rates, scale_lr_for_batch
from nanochat.trainer import Trainer

HYPER = Hyper(lr_multiplier=1.0, momentum=0.9, weight_decay=0.1)
_STEP_TOKENS = 131_072
_WARM_STEPS = 2
_LONG_RUN_S = 1e6
# of one H100: tokens per second, MFU in percent, peak memory in GB (10^9), by bench
_BOUNDS = {
    "d20-b8": (125e3, 44.0, 26.0),
    "d20-b32": (140e3, 49.0, 74.0),
    "d12-b32": (410e3, 42.0, 30.0),
    "d20-b8-eager": (95e3, 33.0, 30.0),
    "d20-b8-modern": (65e3, 20.0, 60.0),
}


def check(setup: Setup, verdict: Verdict) -> None:
    with using(setup.options):
        _check(setup, verdict)


def _check(setup: Setup, verdict: Verdict) -> None:
    began = time.monotonic()
    trainer, rows = make_trainer(setup)
    device = trainer.device
    stages = _watch(trainer)
    for _ in range(_WARM_STEPS):
        nats = _step(trainer, rows)
        if "start_s" not in verdict.figures:
            synchronize(device)
            verdict.note("start_s", time.monotonic() - began)
    stages.take()
    times = []
    for _ in range(setup.size(int(setup.options.get("steps", "6")), 2)):
        began = time.perf_counter()
        nats = _step(trainer, rows)
        synchronize(device)
        times.append(time.perf_counter() - began)
    spent = {name: ms / len(times) for name, ms in stages.take().items()}
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    seconds = sorted(times)[len(times) // 2]
    rate = tokens / seconds
    flops = trainer.model.estimate_flops()
    bench = setup.options["bench"].removesuffix("-fp8")
    tokens_bound, mfu_bound, memory_bound = _BOUNDS[bench]
    varied = bool({"head", "sdpa", "fp8"} & setup.options.keys())  # they are compared, not judged
    judge = verdict.note if varied else None
    mfu = 100 * rate * flops / (peak_flops(device) or float("inf"))
    memory = memory_gb(device)
    if judge:
        judge("tokens_per_s", round(rate))
        judge("mfu", mfu)
        judge("peak_gb", memory["peak_gb"])
    else:
        verdict.h100_at_least("tokens_per_s", round(rate), tokens_bound)
        verdict.h100_at_least("mfu", mfu, mfu_bound)
        verdict.h100_at_most("peak_gb", memory["peak_gb"], memory_bound)
    verdict.note("reserved_gb", memory["reserved_gb"])
    verdict.note("step_ms", 1e3 * seconds)
    verdict.note("micro_rows", trainer.micro_batch_rows)
    verdict.note("stages_ms", spent)
    share = 100 * spent.get("head_passes", 0.0) / (1e3 * seconds)
    verdict.note("head_passes_percent", share)
    verdict.that(bool(nats.isfinite()), "the loss is not finite")
    if setup.options.get("profile"):
        profile_step(lambda: _step(trainer, rows), verdict, device)


def make_trainer(setup: Setup) -> tuple[Trainer, np.ndarray]:
    """The bench's model, ready to train, and rows of random tokens for one step."""
    options, device = setup.options, torch.device(setup.device)
    prepare_device(device, cache=compile_cache())
    length, vocab = setup.size(2048, 64), setup.size(65536, 304)
    depth, rows = (int(options["depth"]), int(options["rows"])) if not setup.tiny else (2, 2)
    arch = options.get("arch", "classic")
    width = setup.size(128, 64)
    config = config_for_depth(
        depth, vocab_size=vocab, sequence_len=length, arch=arch, head_dim=width
    )
    model = build_gpt(config, device=device, seed=0)
    if options.get("fp8") == "on" and has_fp8(setup):
        model.use_fp8()
    mode = options.get("compile", "on" if setup.cuda else "off")
    run, chosen = accelerated_block(mode, model=model, run_s=_LONG_RUN_S)
    print(chosen, flush=True)
    step_tokens = setup.size(int(options.get("step_tokens", _STEP_TOKENS)), 4 * length)
    rates = learning_rates(arch).scaled(scale_lr_for_batch(step_tokens))
    trainer = Trainer(
        model,
        make_optimizer(model, rates, weight_decay=0.1),
        device=device,
        device_batch_rows=rows,
        run_block=run,
    )
    shape = (step_tokens // length, length + 1)
    return trainer, np.random.default_rng(0).integers(0, vocab, shape, dtype=np.uint16)


def _step(trainer: Trainer, rows: np.ndarray) -> torch.Tensor:
    nats = trainer.step(rows, hyper=HYPER)
    assert nats is not None
    return nats


def _watch(trainer: Trainer) -> Stages:
    """Events around the stages of the trainer's own step."""
    stages = Stages(trainer.device)
    model: Any = trainer.model
    model._hidden = stages.wrap("blocks_forward", model._hidden)
    module: Any = gpt
    module.head_loss = stages.wrap("head", gpt.head_loss)
    passes: Any = head
    passes._passes = stages.wrap("head_passes", head._passes)
    optimizer: Any = trainer.optimizer
    optimizer.step = stages.wrap("optimizer", optimizer.step)
    tensor: Any = torch.Tensor
    tensor.backward = stages.wrap("backward", tensor.backward)
    return stages
