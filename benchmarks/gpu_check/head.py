"""The head's loss and gradients against float64 on the same device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.kit import relative_error
from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.kernels.head import head_loss

# relative errors: of the loss, of the gradients
_BOUNDS = {torch.bfloat16: (1e-3, 1e-2), torch.float32: (2e-6, 1e-5)}
_REFERENCE_ROWS = 512  # of float64 logits at once: the plain chain holds several times that


def check(setup: Setup, verdict: Verdict) -> None:
    """4,096 rows are one chunk of logits on a GPU: 7 more are a short second one."""
    rows, vocab, width = (4096 + 7, 65536, 1280) if not setup.tiny else (67, 300, 32)
    device = torch.device(setup.device)
    torch.set_float32_matmul_precision("highest")
    for dtype, (loss_bound, gradient_bound) in _BOUNDS.items():
        name = str(dtype).removeprefix("torch.")
        x, weight, targets = _inputs(rows, vocab, width, dtype, device)
        exact_loss, exact_x, exact_weight = _reference(x, weight, targets)
        for reduction in ("sum", "mean"):
            scale = 1.0 if reduction == "sum" else 1.0 / int((targets >= 0).sum())
            leaf, head = x.clone().requires_grad_(), weight.clone().requires_grad_()
            loss = head_loss(leaf, head, targets, vocab_size=vocab, reduction=reduction)
            grad_x, grad_weight = torch.autograd.grad(loss, (leaf, head))
            error = abs(float(loss.detach()) / (scale * exact_loss) - 1)
            verdict.at_most(f"{name}_{reduction}_loss", error, loss_bound)
            error = relative_error(grad_x, scale * exact_x)
            verdict.at_most(f"{name}_{reduction}_grad_x", error, gradient_bound)
            error = relative_error(grad_weight, scale * exact_weight)
            verdict.at_most(f"{name}_{reduction}_grad_weight", error, gradient_bound)
            verdict.that(
                not bool(grad_x[targets < 0].any()), "an ignored token has a gradient of its own"
            )
        with torch.inference_mode():
            nats = head_loss(x, weight, targets, vocab_size=vocab, reduction="none")
        error = abs(float(nats.double().sum()) / exact_loss - 1)
        verdict.at_most(f"{name}_none_loss", error, loss_bound)


def _inputs(
    rows: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows, and weights that give logits of about 3, as a trained head's are."""
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn((rows, width), generator=generator, device=device)
    x = F.rms_norm(x, (width,)).to(dtype)
    weight = torch.randn((vocab, width), generator=generator, device=device) * (3 / width**0.5)
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    targets[::17] = -1
    return x, weight, targets


def _reference(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, Tensor, Tensor]:
    """(sum of nats, gradient of x, gradient of weight) in float64, some rows at a time.

    The weight is rounded as the matmul's operand is: what is checked is the kernel, not the cast.
    """
    wide = (weight * (2 / 15)).to(x.dtype).double() * (15 / 2)
    wide.requires_grad_()
    total, gradients = 0.0, []
    for piece, target in zip(x.split(_REFERENCE_ROWS), targets.split(_REFERENCE_ROWS), strict=True):
        leaf = piece.double().requires_grad_()
        logits = 15 * torch.tanh(leaf @ wide.T / 15)
        loss = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
        loss.backward()
        total += float(loss.detach())
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert wide.grad is not None
    return total, torch.cat(gradients), wide.grad
