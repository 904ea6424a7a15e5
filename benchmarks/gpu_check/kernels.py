"""How fast the head and the attention kernels are, alone on the device."""

import torch

from benchmarks.gpu_check.attention import callable_kernel, inputs, kernels
from benchmarks.gpu_check.head import _inputs as head_inputs
from benchmarks.gpu_check.kit import milliseconds
from benchmarks.gpu_check.variants import head_variants
from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.gpt_config import config_for_depth
from nanochat.kernels import head
from nanochat.kernels.choices import Kernel

_PASS_BYTES = 6  # of a bf16 logit: read, read again, written


def check(setup: Setup, verdict: Verdict) -> None:
    device = torch.device(setup.device)
    _ceilings(setup, verdict, device)
    _head(setup, verdict, device)
    _attention(setup, verdict, device)


def _ceilings(setup: Setup, verdict: Verdict, device: torch.device) -> None:
    """What a copy and a matmul reach on this card: nothing below can be faster."""
    source = torch.randn(setup.size(1 << 29, 1 << 16), device=device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), device)
    verdict.note("copy_tb_per_s", 2 * source.nbytes / ms / 1e9)
    side = setup.size(8192, 128)
    a, b = (torch.randn((side, side), device=device).bfloat16() for _ in range(2))
    ms = milliseconds(lambda: a @ b, device)
    verdict.note("matmul_tflops", 2 * side**3 / ms / 1e9)


def _head(setup: Setup, verdict: Verdict, device: torch.device) -> None:
    """The passes over a chunk of logits, and the whole head, by each form that is here."""
    rows, vocab, width = (4096, 65536, 1280) if not setup.tiny else (64, 300, 32)
    x, weight, targets = head_inputs(4 * rows, vocab, width, torch.bfloat16, device)
    x.requires_grad_()
    weight.requires_grad_()
    scale = torch.ones((), device=device)
    logits = torch.randn((rows, vocab), device=device).bfloat16()
    nats = torch.empty(rows, device=device)

    def passes() -> None:
        head._passes(logits, targets[:rows], nats, scale)

    def whole() -> None:
        loss = head.head_loss(x, weight, targets, vocab_size=vocab, reduction="sum")
        torch.autograd.grad(loss, (x, weight))

    for name, form in head_variants(setup.device).items():
        with form():
            ms = milliseconds(passes, device)
            verdict.note(f"head_passes_{name}_ms", ms)
            verdict.note(f"head_passes_{name}_tb_per_s", _PASS_BYTES * logits.numel() / ms / 1e9)
            ms = milliseconds(whole, device, repeat=5)
            verdict.note(f"head_{name}_us_per_token", 1e3 * ms / len(x))


def _attention(setup: Setup, verdict: Verdict, device: torch.device) -> None:
    batch, length, heads, width = (8, 2048, 10, 128) if not setup.tiny else (1, 128, 4, 16)
    short = config_window(setup)
    q, k, v = (t.requires_grad_() for t in inputs(batch, length, heads, heads, width, device))
    weight = torch.randn_like(q)
    times: dict[Kernel, float] = {}
    for window in (length, short):
        for kernel in kernels(setup.device, window < length, device):
            function = callable_kernel(kernel, length, window, device)

            def both(function=function) -> None:  # type: ignore[no-untyped-def]
                torch.autograd.grad(function(q, k, v), (q, k, v), weight)

            ms = times[kernel] = milliseconds(both, device)
            name = f"attention_{kernel.name.lower()}_{window}"
            verdict.note(f"{name}_ms", ms)
            # forward 2 matmuls, backward 5, half of each hidden by the mask
            visible = (
                batch * heads * (length * window - window * (window - 1) / 2 * (window < length))
            )
            visible = visible / 2 if window >= length else visible
            verdict.note(f"{name}_tflops", 7 * 2 * width * visible / ms / 1e9)
    if Kernel.CUDNN in times:
        ratio = times[Kernel.CAUSAL] / times[Kernel.CUDNN]
        verdict.h100_at_least("cudnn_over_flash", ratio, 1.0)
        verdict.h100_at_most("flex_over_flash", times[Kernel.FLEX] / times[Kernel.CAUSAL], 0.6)


def config_window(setup: Setup) -> int:
    """The short window of modern at this length."""
    length = setup.size(2048, 128)
    config = config_for_depth(4, vocab_size=300, sequence_len=length, arch="modern")
    return min(length // 4, config.sequence_len // 4)
