"""Each attention kernel of this device, forward and backward, against float64."""

import torch
from torch import Tensor

from benchmarks.gpu_check.kit import relative_error
from benchmarks.gpu_check.variants import using
from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.kernels.attention import attention_by
from nanochat.kernels.choices import Kernel
from nanochat.kernels.flash3 import flash3_for
from nanochat.kernels.flex import prepare_flex

_OUT, _GRADIENT = 6e-3, 1.2e-2  # relative errors in bf16


def check(setup: Setup, verdict: Verdict) -> None:
    batch, length, heads, width = (2, 2048, 10, 128) if not setup.tiny else (1, 128, 4, 16)
    short = setup.size(512, 32)
    device = torch.device(setup.device)
    for kv_heads in (heads, heads // 2):
        q, k, v = inputs(batch, length, heads, kv_heads, width, device)
        weight = torch.randn_like(q)
        for window in (length, short):
            exact = _reference(q, k, v, weight, window)
            for form, kernel, variant in forms(window < length, device):
                name = f"{form}_{heads}_{kv_heads}_window_{window}"
                try:
                    with using(variant):
                        ours = _gradients(kernel, q, k, v, weight, window)
                except Exception as error:  # noqa: BLE001 - the other kernels are still to be seen
                    reason = str(error).splitlines()[0][:200]
                    verdict.that(False, f"{name}: {type(error).__name__}: {reason}")
                    continue
                for part, (mine, theirs) in zip(
                    ("out", "dq", "dk", "dv"), zip(ours, exact, strict=True), strict=True
                ):
                    bound = _OUT if part == "out" else _GRADIENT
                    verdict.at_most(f"{name}_{part}", relative_error(mine, theirs), bound)
            del exact


def forms(windowed: bool, device: torch.device) -> list[tuple[str, Kernel, dict[str, str]]]:
    """(name, kernel, variants) of all that this device could be given for a window, or for none."""
    if device.type != "cuda":
        kernels = (Kernel.BLOCKED, Kernel.MASK) if windowed else (Kernel.CAUSAL,)
        return [(kernel.name.lower(), kernel, {}) for kernel in kernels]
    found: list[tuple[str, Kernel, dict[str, str]]] = []
    if flash3_for(device) is not None:
        found.append(("flash3", Kernel.FLASH3, {}))
    if windowed:
        return [*found, ("flex", Kernel.FLEX, {}), ("mask", Kernel.MASK, {})]
    return [*found, *((name, Kernel.CAUSAL, {"sdpa": name}) for name in ("flash", "cudnn"))]


def inputs(
    batch: int, length: int, heads: int, kv_heads: int, width: int, device: torch.device
) -> list[Tensor]:
    """Queries and keys of RMS 1, as QK norm leaves them; values too."""
    generator = torch.Generator(device).manual_seed(2)
    shapes = [(batch, length, h, width) for h in (heads, kv_heads, kv_heads)]
    drawn = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    return [torch.nn.functional.rms_norm(t, (width,)).bfloat16() for t in drawn]


def callable_kernel(kernel: Kernel, length: int, window: int, device: torch.device):  # type: ignore[no-untyped-def]  # a partial of attention_by
    """The kernel as training calls it: FlexAttention is one only where it is compiled."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_by(kernel, q, k, v, window=window)

    if kernel is not Kernel.FLEX:
        return run
    prepare_flex(length, window, device)
    return torch.compile(run, dynamic=False)


def _gradients(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: int
) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    y = callable_kernel(kernel, q.size(1), window, q.device)(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight)]


def _reference(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, window: int) -> list[Tensor]:
    """[out, dq, dk, dv] in float64 by an explicit mask, a row of the batch at a time."""
    parts = []
    for row in range(q.size(0)):
        leaves = [t[row : row + 1].double().requires_grad_() for t in (q, k, v)]
        queries, keys, values = (t.transpose(1, 2) for t in leaves)
        group = q.size(2) // k.size(2)
        keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
        scores = queries @ keys.mT / q.size(-1) ** 0.5
        steps = torch.arange(q.size(1), device=q.device)
        distance = steps[:, None] - steps
        hidden = (distance < 0) | (distance > window)
        y = (scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ values).transpose(1, 2)
        gradients = torch.autograd.grad(y, leaves, weight[row : row + 1].double())
        parts.append([y.detach(), *gradients])
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
