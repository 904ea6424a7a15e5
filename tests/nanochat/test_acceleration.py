"""What is compiled computes what the plain block does."""

import pytest
import torch
from torch import Tensor

from nanochat import acceleration
from nanochat.gpt import GPTConfig, build_gpt
from nanochat.kernels import attention
from nanochat.kernels.attention import _window_mask
from nanochat.kernels.blocked import banded_attention
from nanochat.kernels.choices import Kernel
from nanochat.kernels.flex import prepare_flex
from nanochat.layers import run_block


def test_a_toolchain_that_is_broken_means_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        def run(*_: object) -> object:
            raise RuntimeError("g++: internal compiler error")

        return run

    monkeypatch.setattr(acceleration.torch, "compile", broken)
    assert acceleration.compiled_block(torch.device("cpu")) is None


def _reference(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """In float64, with an explicit mask."""
    group = q.size(2) // k.size(2)
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = q @ k.mT / q.size(-1) ** 0.5
    scores = scores.masked_fill(~_window_mask(q.size(2), window, q.device), -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(("length", "window"), [(200, 70), (128, 64), (130, 1), (64, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_banded_attention_and_its_gradients_are_those_of_a_mask(
    length: int, window: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((2, length, heads, 16), generator=generator).to(dtype) for heads in (4, 2, 2)
    )
    weight = torch.randn((2, length, 4, 16), generator=generator)
    results = []
    for function in (banded_attention, _reference):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        y = (
            function(*leaves, window=window)
            if function is banded_attention
            else function(*leaves, window)
        )
        results.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    bound = 1e-5 if dtype == torch.float32 else 5e-2
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(
            ours.double(), exact.double(), atol=bound * float(exact.detach().abs().max()), rtol=0
        )


def test_a_block_that_goes_through_the_compilers_front_computes_the_same() -> None:
    """Traced in one graph, windows and value embeddings too, and run without generated code."""
    config = GPTConfig(
        sequence_len=160, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, arch="modern"
    )
    model = build_gpt(config, device=torch.device("cpu"), seed=0, compute_dtype=torch.float32)
    for parameter in model.transformer.h.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(64, (2, 161), generator=torch.Generator().manual_seed(2))
    traced = torch.compile(run_block, backend="aot_eager", dynamic=False, fullgraph=True)
    gradients = []
    for run in (run_block, traced):
        model.zero_grad(set_to_none=True)
        model(ids[:, :-1], ids[:, 1:], run_block=run).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(
            fast, plain, atol=1e-5 * float(plain.abs().max()) + 1e-9, rtol=1e-4
        )


def test_flex_attention_is_traced_into_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, but run without generated code: its mask is found, and nothing breaks the graph."""
    config = GPTConfig(
        sequence_len=160, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, arch="modern"
    )
    model = build_gpt(config, device=torch.device("cpu"), seed=0, compute_dtype=torch.float32)
    ids = torch.randint(64, (2, 161), generator=torch.Generator().manual_seed(2))
    plain = model(ids[:, :-1], ids[:, 1:]).item()

    def as_on_cuda(*, window: int, length: int, **_: object) -> Kernel:
        return Kernel.FLEX if window < length - 1 else Kernel.CAUSAL

    monkeypatch.setattr(attention, "choose_kernel", as_on_cuda)
    for window in model.windows:
        prepare_flex(160, window, torch.device("cpu"))
    traced = torch.compile(run_block, backend="eager", dynamic=False, fullgraph=True)
    with torch.no_grad():
        fast = model(ids[:, :-1], ids[:, 1:], run_block=traced)
    assert float(fast) == pytest.approx(plain, rel=1e-5)
