"""How fast the head and the attention kernels are, alone on the device."""

import torch

from benchmarks.gpu_check.attention import callable_kernel, forms, inputs
from benchmarks.gpu_check.head import _inputs as head_inputs
from benchmarks.gpu_check.kit import milliseconds
from benchmarks.gpu_check.variants import head_variants, using
from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.kernels import head

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

    for name in head_variants(setup.device):
        with using({"head": name}):
            ms = milliseconds(passes, device)
            verdict.note(f"head_passes_{name}_ms", ms)
            verdict.note(f"head_passes_{name}_tb_per_s", _PASS_BYTES * logits.numel() / ms / 1e9)
            ms = milliseconds(whole, device, repeat=5)
            verdict.note(f"head_{name}_us_per_token", 1e3 * ms / len(x))


def _attention(setup: Setup, verdict: Verdict, device: torch.device) -> None:
    batch, length, heads, width = (8, 2048, 10, 128) if not setup.tiny else (1, 128, 4, 16)
    q, k, v = (t.requires_grad_() for t in inputs(batch, length, heads, heads, width, device))
    weight = torch.randn_like(q)
    times: dict[str, float] = {}
    for window in (length, length // 4):  # all of it, and modern's short one
        for name, kernel, variant in forms(window < length, device):
            function = callable_kernel(kernel, length, window, q.device)

            def both(function=function) -> None:  # type: ignore[no-untyped-def]
                torch.autograd.grad(function(q, k, v), (q, k, v), weight)

            try:
                with using(variant):
                    ms = times[name] = milliseconds(both, device)
            except Exception as error:  # noqa: BLE001 - the other kernels are still to be seen
                verdict.that(False, f"{name}: {type(error).__name__}: {str(error)[:200]}")
                continue
            verdict.note(f"attention_{name}_{window}_ms", ms)
            seen = window * length - window * window / 2  # pairs of positions that see one another
            flops = 7 * 2 * batch * heads * width * seen  # two matmuls forward, five backward
            verdict.note(f"attention_{name}_{window}_tflops", flops / ms / 1e9)
    if times.keys() >= {"cudnn", "flash", "flex"}:
        verdict.h100_at_least("cudnn_over_flash", times["flash"] / times["cudnn"], 1.2)
        verdict.h100_at_most("flex_over_flash", times["flex"] / times["flash"], 0.6)
