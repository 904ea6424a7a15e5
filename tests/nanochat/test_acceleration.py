"""What is compiled computes what the plain block does."""

import logging

import pytest
import torch
from functorch.compile import nop
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from nanochat import acceleration
from nanochat.acceleration import CompiledBlock
from nanochat.gpt import GPT, GPTConfig, build_gpt, config_for_depth
from nanochat.kernels import attention
from nanochat.kernels.attention import _window_mask
from nanochat.kernels.blocked import banded_attention
from nanochat.kernels.choices import Kernel
from nanochat.kernels.flex import prepare_flex
from nanochat.layers import RunBlock, run_block


def test_a_toolchain_that_is_broken_means_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        def run(*_: object) -> object:
            raise RuntimeError("g++: internal compiler error")

        return run

    monkeypatch.setattr(acceleration.torch, "compile", broken)
    assert acceleration.compiled_block(torch.device("cpu")) is None


def _tiny(arch: str = "modern", *, layers: int = 2, seed: int = 0) -> GPT:
    config = config_for_depth(layers, vocab_size=64, sequence_len=64, arch=arch, head_dim=32)
    device = torch.device("cpu")
    return build_gpt(config, device=device, seed=seed, compute_dtype=torch.float32)


def _gradients(model: GPT, run: RunBlock) -> list[Tensor]:
    ids = torch.randint(64, (2, 65), generator=torch.Generator().manual_seed(2))
    model.zero_grad(set_to_none=True)
    model(ids[:, :-1], ids[:, 1:], run_block=run).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("where", ["fw_compiler", "bw_compiler"])
def test_a_graph_that_cannot_be_compiled_means_eager_and_one_warning(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Backward graphs too: they are compiled while there still is a choice."""

    def broken(*_: object) -> object:
        raise RuntimeError("ptxas: out of registers")

    compilers = {"fw_compiler": nop, "bw_compiler": nop, where: broken}
    run = CompiledBlock(torch.device("cpu"), aot_autograd(**compilers))
    model = _tiny("classic")
    with caplog.at_level(logging.WARNING):
        ours = _gradients(model, run)
    for mine, plain in zip(ours, _gradients(model, run_block), strict=True):
        assert torch.equal(mine, plain)
    (record,) = caplog.records
    assert "ptxas: out of registers" in record.getMessage()
    assert "eagerly" in record.getMessage()


def test_a_second_model_finds_the_first_ones_graphs() -> None:
    """A resident group compiles nothing in its later rounds."""
    torch._dynamo.reset()
    counters.clear()
    for seed in range(2):
        run = CompiledBlock(torch.device("cpu"), "aot_eager")
        _gradients(_tiny("classic", seed=seed), run)
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


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
