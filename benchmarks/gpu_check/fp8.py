"""Products in fp8 against float64: of a layer and of the head, and how much faster than in bf16."""

import torch
import torch.nn.functional as F

from benchmarks.gpu_check.head import _inputs, _reference
from benchmarks.gpu_check.kit import milliseconds, relative_error
from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.errors import UserError
from nanochat.kernels.fp8 import check_fp8, fp8_linear
from nanochat.kernels.head import head_loss

# Relative errors. e4m3 rounds by 2.6 % of a value on average, e5m2 by 5.2 %; both factors count
_OUTPUT, _GRADIENTS, _LOSS = 0.05, 0.08, 5e-3


def has_fp8(setup: Setup) -> bool:
    """Whether this device trains in fp8; a CPU runs the same code."""
    if not setup.cuda:
        return True
    try:
        check_fp8(torch.device("cuda"), torch.bfloat16, sequence_len=2048, vocab_size=65536)
    except UserError as error:
        print(error, flush=True)
        return False
    return True


def check(setup: Setup, verdict: Verdict) -> None:
    verdict.note("has_fp8", has_fp8(setup))
    if has_fp8(setup):
        _layer(setup, verdict)
        _head(setup, verdict)


def _layer(setup: Setup, verdict: Verdict) -> None:
    """The first matrix of depth 20's MLP, for 8 rows of 2,048 tokens."""
    rows, width, wide = (16384, 1280, 5120) if not setup.tiny else (64, 32, 128)
    device = torch.device(setup.device)
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn((rows, width), generator=generator, device=device).bfloat16().requires_grad_()
    weight = torch.randn((wide, width), generator=generator, device=device).mul_(width**-0.5)
    weight.requires_grad_()
    grad = torch.randn((rows, wide), generator=generator, device=device).bfloat16()
    ours = fp8_linear(x, weight)
    gradients = torch.autograd.grad(ours, (x, weight), grad)
    exact = x.double() @ weight.double().T
    exact_gradients = torch.autograd.grad(exact, (x, weight), grad.double())
    verdict.at_most("layer_output", relative_error(ours, exact), _OUTPUT)
    for name, one, true in zip(("x", "weight"), gradients, exact_gradients, strict=True):
        verdict.at_most(f"layer_grad_{name}", relative_error(one, true), _GRADIENTS)
    if setup.cuda:
        fast = torch.compile(fp8_linear, dynamic=False)
        for name, function in (("fp8", fast), ("bf16", _plain)):

            def both(function=function) -> None:  # type: ignore[no-untyped-def]
                torch.autograd.grad(function(x, weight), (x, weight), grad)

            verdict.note(f"layer_{name}_ms", milliseconds(both, device))


def _plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype))


def _head(setup: Setup, verdict: Verdict) -> None:
    rows, vocab, width = (4096 + 16, 65536, 1280) if not setup.tiny else (64, 304, 32)
    device = torch.device(setup.device)
    x, weight, targets = _inputs(rows, vocab, width, torch.bfloat16, device)
    exact_loss, exact_x, exact_weight = _reference(x, weight, targets)
    x, weight = x.requires_grad_(), weight.requires_grad_()

    def loss(fp8: bool) -> torch.Tensor:
        return head_loss(x, weight, targets, vocab_size=vocab, reduction="sum", fp8=fp8)

    ours = loss(True)
    grad_x, grad_weight = torch.autograd.grad(ours, (x, weight))
    verdict.at_most("head_loss", abs(float(ours.detach()) / exact_loss - 1), _LOSS)
    verdict.at_most("head_grad_x", relative_error(grad_x, exact_x), _GRADIENTS)
    verdict.at_most("head_grad_weight", relative_error(grad_weight, exact_weight), _GRADIENTS)
    for name, fp8 in (("fp8", True), ("bf16", False)):

        def whole(fp8: bool = fp8) -> None:
            torch.autograd.grad(loss(fp8), (x, weight))

        ms = milliseconds(whole, device, repeat=5)
        verdict.note(f"head_{name}_us_per_token", 1e3 * ms / rows)
