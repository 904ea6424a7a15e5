"""A short training run by each way to compute it: the same rows must give the same losses."""

import time

import numpy as np
import torch

from benchmarks.gpu_check import data
from benchmarks.gpu_check.fp8 import has_fp8
from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.acceleration import accelerated_block
from nanochat.common import compile_cache
from nanochat.gpt import build_gpt, config_for_depth
from nanochat.gpus import prepare_device
from nanochat.kernels.choices import what_compiling_lacks
from nanochat.param_groups import make_optimizer
from nanochat.rows.cache import RowCache
from nanochat.schedule import Hyper, learning_rates, scale_lr_for_batch
from nanochat.source import get_source
from nanochat.trainer import Trainer

_CPU_THREADS = 4  # other checks run beside this one
_CPU_STEPS = 3  # of fp32 on the CPU, which takes its time
_TAIL = 10  # last steps whose mean is compared
_LONG_RUN_S = 1e6


def check(setup: Setup, verdict: Verdict) -> None:
    rows = _rows(setup)
    steps = setup.size(60, 6)
    prepare_device(torch.device(setup.device), cache=compile_cache())
    curves = {}
    compiled = "on" if setup.cuda and not what_compiling_lacks("cuda") else "off"
    ways = [
        ("bf16_compiled", torch.bfloat16, compiled, False),
        ("bf16_eager", torch.bfloat16, "off", False),
        ("fp32_eager", torch.float32, "off", False),
    ]
    if has_fp8(setup):
        ways.append(("fp8_compiled", torch.bfloat16, compiled, True))
    for name, dtype, mode, fp8 in ways:
        began = time.monotonic()
        curves[name] = _train(setup, setup.device, dtype, mode, rows, steps, fp8=fp8)
        verdict.note(f"{name}_s", time.monotonic() - began)
        verdict.note(f"{name}_last", float(np.mean(curves[name][-_TAIL:])))
    exact = float(np.mean(curves["fp32_eager"][-_TAIL:]))
    for name in curves.keys() - {"fp32_eager"}:
        difference = abs(float(np.mean(curves[name][-_TAIL:])) - exact)
        verdict.at_most(f"{name}_minus_fp32", difference, 0.03 if not setup.tiny else 0.2)
    verdict.that(curves["fp32_eager"][-1] < curves["fp32_eager"][0], "the loss does not fall")
    torch.set_float32_matmul_precision("highest")
    short = rows[:, : setup.size(129, 65)]  # an eighth of the tokens
    ours = _train(setup, setup.device, torch.float32, "off", short, _CPU_STEPS)
    torch.set_num_threads(min(_CPU_THREADS, torch.get_num_threads()))
    cpu = _train(setup, "cpu", torch.float32, "off", short, _CPU_STEPS)
    worst = max(abs(a - b) for a, b in zip(ours, cpu, strict=True))
    verdict.at_most("fp32_minus_cpu", worst, 1e-3)
    verdict.note("losses", {name: curve[:: max(1, steps // 6)] for name, curve in curves.items()})


def _rows(setup: Setup) -> np.ndarray:
    """The first rows of the generated shards."""
    tokenizer, shards = data.make(setup)
    length = setup.size(1024, 64)
    cache = RowCache(get_source(shards), tokenizer, sequence_len=length, packing="stream")
    rows = cache.rows(0).read(0, 8 * setup.size(60, 6))
    cache.close()
    return rows


def _train(
    setup: Setup,
    device_type: str,
    dtype: torch.dtype,
    mode: str,
    rows: np.ndarray,
    steps: int,
    *,
    fp8: bool = False,
) -> list[float]:
    """The mean nats of each step of 8 rows."""
    device = torch.device(device_type)
    config = config_for_depth(
        setup.size(6, 1),
        vocab_size=data.vocab_size(setup),
        sequence_len=rows.shape[1] - 1,
        head_dim=setup.size(128, 64),
    )
    model = build_gpt(config, device=device, seed=0, compute_dtype=dtype)
    if fp8:
        model.use_fp8()
    run, _ = accelerated_block(mode, model=model, run_s=_LONG_RUN_S)
    tokens = 8 * (rows.shape[1] - 1)
    rates = learning_rates("classic").scaled(scale_lr_for_batch(tokens))
    trainer = Trainer(
        model,
        make_optimizer(model, rates, weight_decay=0.0),
        device=device,
        device_batch_rows=4,
        run_block=run,
    )
    hyper = Hyper(lr_multiplier=1.0, momentum=0.9, weight_decay=0.0)
    losses = []
    for step in range(steps):
        nats = trainer.step(rows[8 * step : 8 * step + 8], hyper=hyper)
        assert nats is not None
        losses.append(nats / tokens)
    return [float(loss) for loss in losses]
