"""Tokens/s and peak RSS of the training step, as ratios to the plain configuration.

python -m benchmarks.train_step [--configs plain,eager,default]

`plain` is the straightforward step: eager, fp32, all logits at once, a T x T mask for a window, torch's
own gradients and memory settings.
`default` is what a long run gets by itself; `eager` and `compiled` are the same without and with compiled
blocks. Each configuration has a process of its own, so that its peak RSS is its own; they take turns, so
that other load on the machine affects all alike. Compiling comes first and is reported as `start_s`. The
last line is JSON: `ratio_4096`, `ratio_32768` (tokens/s, default to plain), `rss_ratio_32768`, and the parts.
`cpu_ratio_*` are of CPU seconds, which a busy machine falsifies less.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import gpt, optim
from nanochat.acceleration import accelerated_block
from nanochat.common import ArgumentParser, run_command_line
from nanochat.gpt import build_gpt, config_for_depth
from nanochat.kernels import attention, cpu
from nanochat.kernels.head import softcap
from nanochat.layers import RunBlock, run_block
from nanochat.memory import keep_freed_memory
from nanochat.param_groups import make_optimizer
from nanochat.schedule import Hyper, learning_rates, scale_lr_for_batch
from nanochat.trainer import Trainer
from nanochat.update_rules import AdamWRule

STAGES = ("forward", "head", "backward", "optimizer")
_LONG_RUN_S = 1e6
HYPER = Hyper(lr_multiplier=1.0, momentum=0.9, weight_decay=0.1)


def main() -> None:
    parser = ArgumentParser(
        prog="benchmarks.train_step", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--vocab", type=_numbers, default=[4096, 32768])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--sequence-len", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--arch", default="modern", choices=["classic", "modern"])
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each")
    parser.add_argument("--configs", default="plain,default", help="the first is the reference")
    parser.add_argument("--child", help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments)
        return
    names = arguments.configs.split(",")
    report: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    for vocab in arguments.vocab:
        results = _measure(arguments, names, vocab)
        for name, result in results.items():
            print(json.dumps({"vocab": vocab, "config": name, **result}), flush=True)
        plain, best = results[names[0]], results[names[-1]]
        report[f"ratio_{vocab}"] = round(best["tokens_per_s"] / plain["tokens_per_s"], 2)
        cpu = plain["ms"]["cpu"] / best["ms"]["cpu"]
        report[f"cpu_ratio_{vocab}"] = round(cpu, 2)
        report[f"rss_ratio_{vocab}"] = round(best["peak_rss_mb"] / plain["peak_rss_mb"], 2)
        report[f"parts_{vocab}"] = results
    print(json.dumps(report))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _measure(arguments: Namespace, names: list[str], vocab: int) -> dict[str, Any]:
    """Medians of each configuration's steps; the configurations take turns."""
    shared = ["--vocab", str(vocab), "--depth", str(arguments.depth), "--arch", arguments.arch]
    shared += ["--sequence-len", str(arguments.sequence_len)]
    shared += ["--batch-tokens", str(arguments.batch_tokens)]
    children: dict[str, subprocess.Popen[str]] = {}
    try:
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        starts = {}
        for name in names:
            children[name] = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.train_step", "--child", name, *shared],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            starts[name] = _ask(children[name], "start")
        for _ in range(arguments.steps):
            for name in names:
                steps[name].append(_ask(children[name], "step"))
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    results = {}
    for name in names:
        medians = {
            part: round(1e3 * statistics.median(step[part] for step in steps[name]), 1)
            for part in (*STAGES, "whole", "cpu")
        }
        results[name] = {
            "tokens_per_s": round(1e3 * arguments.batch_tokens / medians["whole"]),
            "peak_rss_mb": round(steps[name][-1]["peak_rss_mb"]),
            "start_s": round(starts[name]["whole"], 1),
            "dtype": starts[name]["dtype"],
            "compiled": starts[name]["compiled"],
            "ms": medians,
        }
    return results


def _ask(child: "subprocess.Popen[str]", what: str) -> Any:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(what + "\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    if not answer:
        raise SystemExit("a measured process has ended: see its error above")
    return json.loads(answer)


# -- what is measured, in a process of its own -------------------------------------------------


def _child(arguments: Namespace) -> None:
    """Answer `start` and `step` on standard input, one line of JSON each."""
    trainer, facts = _trainer(arguments)
    T = arguments.sequence_len
    rows = np.random.default_rng(0).integers(
        0, arguments.vocab[0], (arguments.batch_tokens // T, T + 1), dtype=np.uint16
    )
    spent = _watch_stages(trainer)
    for line in sys.stdin:
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(2 if line.strip() == "start" else 1):
            spent.update(dict.fromkeys(STAGES, 0.0))
            nats = trainer.step(rows, hyper=HYPER)
            assert nats is not None and bool(nats.isfinite())
        whole = time.perf_counter() - began
        usage = resource.getrusage(resource.RUSAGE_SELF)
        answer = {**spent, "whole": whole, "cpu": time.process_time() - cpu_began}
        answer |= {"peak_rss_mb": usage.ru_maxrss / 1024, **facts}
        print(json.dumps(answer), flush=True)


def _trainer(arguments: Namespace) -> tuple[Trainer, dict[str, Any]]:
    return make_trainer(
        arguments.child,
        depth=arguments.depth,
        arch=arguments.arch,
        vocab=arguments.vocab[0],
        sequence_len=arguments.sequence_len,
        batch_tokens=arguments.batch_tokens,
    )


def make_trainer(
    name: str,
    *,
    depth: int,
    arch: str,
    vocab: int,
    sequence_len: int,
    batch_tokens: int,
    seed: int = 0,
) -> tuple[Trainer, dict[str, Any]]:
    """The configuration `name` (plain, eager, default or compiled) of this process, and what it chose."""
    if name == "plain":
        gpt.head_loss = _plain_head_loss
        attention.blocked_attention = _plain_windowed_attention
        cpu._plain = lambda _: True
        optim.adamw_update = _plain_adamw
    else:
        keep_freed_memory()  # as every process that trains does
    config = config_for_depth(depth, vocab_size=vocab, sequence_len=sequence_len, arch=arch)
    device = torch.device("cpu")
    run: RunBlock = run_block
    dtype = torch.float32 if name == "plain" else None
    model = build_gpt(config, device=device, seed=seed, compute_dtype=dtype)
    if name in ("default", "compiled"):
        mode = "auto" if name == "default" else "on"
        run, _ = accelerated_block(mode, model=model, run_s=_LONG_RUN_S)
    rates = learning_rates(arch).scaled(scale_lr_for_batch(batch_tokens))
    trainer = Trainer(
        model,
        make_optimizer(model, rates, weight_decay=0.1),
        device=device,
        device_batch_rows=batch_tokens // sequence_len,
        run_block=run,
    )
    chosen = str(model.compute_dtype).removeprefix("torch.")
    return trainer, {"dtype": chosen, "compiled": run is not run_block}


def _watch_stages(trainer: Trainer) -> dict[str, float]:
    """Seconds of each stage of the trainer's own step, added up where they are spent."""
    spent = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **options)
            spent[stage] += time.perf_counter() - began
            return result

        return wrapper

    model: Any = trainer.model
    model._hidden = timed("forward", model._hidden)
    gpt.head_loss = timed("head", gpt.head_loss)
    optimizer: Any = trainer.optimizer
    optimizer.step = timed("optimizer", optimizer.step)
    tensor: Any = Tensor
    tensor.backward = timed("backward", tensor.backward)
    return spent


def _plain_head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, reduction: str, fp8: bool
) -> Tensor:
    assert not fp8
    logits = softcap(F.linear(x, weight[:vocab_size].to(x.dtype)))
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def _plain_adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    rule: AdamWRule,
) -> None:
    """AdamW as its paper writes it (arXiv 1711.05101), one operation after another."""
    lr, (beta1, beta2) = rule.lr, rule.betas
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    deviation = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(rule.eps)
    weight.mul_(1 - lr * rule.weight_decay)
    weight.addcdiv_(exp_avg, deviation, value=-lr / (1 - beta1**step))


def _plain_windowed_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = attention._window_mask(q.size(2), window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


if __name__ == "__main__":
    run_command_line(main)
