"""The scripts as a person runs them: a run that is stopped and continues, its evaluation, its text."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from benchmarks.gpu_check import data
from benchmarks.gpu_check.runner import environment
from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.engine import Engine
from nanochat.gpt import build_gpt, config_for_depth
from nanochat.kernels import attention
from nanochat.tokenizer import RustBPETokenizer

_STEP = re.compile(r"step=(\d+)/\d+ loss=([\d.]+).*?tokens_per_s=([\d,]+)")
_BPB = re.compile(r"val_bpb=([\d.]+)")
_LIMIT_S, _TINY_LIMIT_S = 100.0, 600.0  # of one command; on a CPU that is busy with other tests


def check(setup: Setup, verdict: Verdict) -> None:
    data.make(setup)
    whole = _finished(setup, _start(setup, "whole"), verdict)
    stopped = _start(setup, "stopped")
    _stop_after(stopped, steps=3)
    said = stopped.communicate(timeout=_TINY_LIMIT_S if setup.tiny else _LIMIT_S)[0]
    verdict.that("--resume-from-step" in said, f"SIGTERM did not stop it: {said[-500:]}")
    resumed = _finished(setup, _start(setup, "stopped", "--resume-from-step", "latest"), verdict)
    ours, theirs = (dict(_losses(text)) for text in (resumed, whole))
    verdict.that(bool(ours) and ours.keys() < theirs.keys(), "it did not go on in the middle")
    worst = max((abs(ours[step] - theirs[step]) for step in ours.keys() & theirs.keys()), default=9)
    # lines show four digits; on a GPU attention's backward pass adds in an order of its own
    verdict.at_most("loss_after_resuming", worst, 5e-3 if setup.cuda else 1e-4)
    rates = _STEP.findall(whole)
    verdict.note("tokens_per_s", int(rates[-1][2].replace(",", "")) if rates else 0)
    verdict.note("last_line", next((x for x in reversed(whole.splitlines()) if "eta=" in x), ""))
    _evaluate(setup, whole, verdict)
    _generate(setup, verdict)


def _start(setup: Setup, run: str, *more: str) -> "subprocess.Popen[str]":
    length, rows = setup.size(1024, 64), setup.size(32, 4)
    command = [sys.executable, "-m", "scripts.base_train", "--device-type", setup.device]
    command += ["--run", run, "--depth", str(setup.size(6, 1)), "--max-seq-len", str(length)]
    command += ["--source", str(data.shard_dir(setup)), "--packing", "stream"]
    command += ["--tokenizer", str(data.tokenizer_dir(setup)), "--eval-rows", str(rows)]
    command += [
        "--total-batch-size",
        str(rows * length),
        "--num-iterations",
        str(setup.size(40, 12)),
    ]
    command += ["--log-every", "1", "--eval-every", "0", "--wandb-mode", "disabled", *more]
    return subprocess.Popen(
        command,
        env=environment(setup.directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finished(setup: Setup, process: "subprocess.Popen[str]", verdict: Verdict) -> str:
    said, _ = process.communicate(timeout=_TINY_LIMIT_S if setup.tiny else _LIMIT_S)
    verdict.that(
        process.returncode == 0, f"base_train ended with {process.returncode}: {said[-500:]}"
    )
    return said


def _stop_after(process: "subprocess.Popen[str]", *, steps: int) -> None:
    """SIGTERM once it has logged some steps."""
    assert process.stdout is not None
    while True:
        line = process.stdout.readline()
        found = _STEP.search(line)
        if not line or (found and int(found.group(1)) >= steps):
            break
    process.send_signal(signal.SIGTERM)


def _losses(text: str) -> list[tuple[int, float]]:
    return [(int(step), float(loss)) for step, loss, _ in _STEP.findall(text)]


def _evaluate(setup: Setup, trained: str, verdict: Verdict) -> None:
    """base_eval agrees with the run's own last bits per byte."""
    command = [sys.executable, "-m", "scripts.base_eval", "--checkpoint", "whole", "--json"]
    command += ["--device-type", setup.device]
    done = subprocess.run(
        command,
        env=environment(setup.directory),
        capture_output=True,
        text=True,
        timeout=_TINY_LIMIT_S if setup.tiny else _LIMIT_S,
        check=False,
    )
    verdict.that(
        done.returncode == 0, f"base_eval ended with {done.returncode}: {done.stderr[-500:]}"
    )
    own = _BPB.findall(trained)
    if done.returncode or not own:
        return
    bpb = json.loads(done.stdout.strip().splitlines()[-1])["val_bpb"]
    verdict.note("bpb", bpb)
    verdict.at_most("bpb_apart", abs(bpb - float(own[-1])), 1e-4)


def _speed(setup: Setup, tokenizer: RustBPETokenizer, verdict: Verdict) -> None:
    """Tokens/s of one sample at depth 12: as it is, and with cuDNN's attention, which plans each length."""
    device = torch.device(setup.device)
    config = config_for_depth(
        setup.size(12, 2), vocab_size=data.vocab_size(setup), sequence_len=setup.size(2048, 64)
    )
    engine = Engine(build_gpt(config, device=device, seed=0), tokenizer)
    kernels: Any = attention
    own, number = kernels._OF_ANY_LENGTH, setup.size(100, 8)
    for name, order in (("", own), ("_by_cudnn", [SDPBackend.CUDNN_ATTENTION, *own])):
        kernels._OF_ANY_LENGTH = order
        for warm in (True, False):
            began = time.monotonic()
            prompt = list(
                range(200, 216 if warm else 217)
            )  # lengths that the other one has not had
            done = len(list(engine.generate(prompt, max_tokens=4 if warm else number)))
            rate = done / (time.monotonic() - began)
        verdict.note(f"generated_per_s{name}", rate)
    kernels._OF_ANY_LENGTH = own


def _generate(setup: Setup, verdict: Verdict) -> None:
    """With a cache the same tokens as without, in fp32 and at temperature 0; and how fast in bf16."""
    torch.set_float32_matmul_precision("highest")
    device = torch.device(setup.device)
    tokenizer = RustBPETokenizer.from_directory(Path(data.tokenizer_dir(setup)))
    _speed(setup, tokenizer, verdict)
    for arch in ("classic", "modern"):
        config = config_for_depth(
            setup.size(6, 2),
            vocab_size=data.vocab_size(setup),
            sequence_len=setup.size(512, 64),
            arch=arch,
        )
        model = build_gpt(config, device=device, seed=0, compute_dtype=torch.float32)
        generator = torch.Generator(device).manual_seed(7)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.05, generator=generator)
        prompt = tokenizer.encode("the law of", prepend="<|bos|>")
        number = setup.size(64, 8)
        plain = list(model.generate(prompt, number, temperature=0.0))
        columns = Engine(model, tokenizer).generate(
            prompt, num_samples=8, max_tokens=number, temperature=0.0
        )
        rows = list(zip(*(tokens for tokens, _ in columns), strict=True))
        verdict.that(len(rows) == 8, f"{arch}: {len(rows)} samples")
        stops = tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()
        for row in rows:
            same = all(a == b or a in stops for a, b in zip(row, plain, strict=False))
            verdict.that(same, f"{arch}: the cache changes the tokens")
