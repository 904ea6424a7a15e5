"""Training in fp8: against float64, the same tensors, the same loss; and where it is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.acceleration import CompiledBlock
from nanochat.errors import UserError
from nanochat.gpt import GPT, build_gpt, config_for_depth
from nanochat.gpus import _Known
from nanochat.kernels import fp8, head
from nanochat.kernels.fp8 import check_fp8, fp8_linear
from nanochat.kernels.head import head_loss
from nanochat.param_groups import make_optimizer
from nanochat.schedule import Hyper, learning_rates
from nanochat.trainer import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# e4m3 rounds a value by up to 1/16, e5m2 by up to 1/8: 2.6 and 5.2 % of one on average
OUTPUT, GRADIENT = 0.05, 0.08


def _error(ours: Tensor, exact: Tensor) -> float:
    exact = exact.detach().double()
    return float((ours.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layer_and_its_gradients_are_those_of_float64_at_any_scale(
    dtype: torch.dtype, scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((4, 32, 64), generator=generator).to(dtype).requires_grad_()
    weight = (scale * torch.randn((48, 64), generator=generator)).requires_grad_()
    grad = (scale * torch.randn((4, 32, 48), generator=generator)).to(dtype)
    ours = fp8_linear(x, weight)
    assert ours.dtype == dtype and ours.shape == grad.shape
    exact = x.double() @ weight.double().T
    found = torch.autograd.grad(ours, (x, weight), grad)
    true = torch.autograd.grad(exact, (x, weight), grad.double())
    assert [one.dtype for one in found] == [dtype, torch.float32]
    assert 0.01 < _error(ours, exact) < OUTPUT
    assert 0.01 < _error(found[0], true[0]) < GRADIENT
    assert 0.01 < _error(found[1], true[1]) < GRADIENT


def test_largest_values_are_neither_lost_nor_infinite_and_no_number_stays_none() -> None:
    x = torch.full((16, 16), 3.0, requires_grad=True)
    x.data[0, 0] = 1e30
    assert float(fp8_linear(x, torch.eye(16))[0, 0].detach()) == pytest.approx(1e30, rel=1e-6)
    assert not fp8_linear(torch.zeros(16, 16), torch.zeros(16, 16)).any()
    x.data[0, 0] = torch.nan
    assert fp8_linear(x, torch.eye(16)).isnan().any()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_heads_loss_and_gradients_are_those_of_float64(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = 80
    monkeypatch.setattr(head, "_MATMUL_ELEMENTS", {"cpu": 32 * vocab})  # a short rest at the end
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((80, 48), generator=generator).requires_grad_()
    weight = (0.3 * torch.randn((128, 48), generator=generator)).requires_grad_()
    targets = torch.randint(vocab, (80,), generator=generator)
    targets[::9] = -1
    wide_x, wide = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = 15 * torch.tanh(wide_x @ wide[:vocab].T / 15)
    exact = F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)
    ours = head_loss(x, weight, targets, vocab_size=vocab, reduction=reduction, fp8=True)
    found = torch.autograd.grad(ours, (x, weight))
    true = torch.autograd.grad(exact, (wide_x, wide))
    assert 0 < _error(ours, exact) < 5e-3
    assert 0.005 < _error(found[0], true[0]) < GRADIENT
    assert 0.005 < _error(found[1], true[1]) < GRADIENT
    assert not found[0][targets < 0].any() and not found[1][vocab:].any()


def _model(arch: str, *, in_fp8: bool, seed: int = 0) -> GPT:
    config = config_for_depth(2, vocab_size=64, sequence_len=32, arch=arch, head_dim=32)
    model = build_gpt(config, device=CPU, seed=seed, compute_dtype=torch.float32)
    if in_fp8:
        model.use_fp8()
    return model


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_checkpoint_is_the_same_and_evaluation_is_not_in_fp8(arch: str) -> None:
    model, plain = _model(arch, in_fp8=True), _model(arch, in_fp8=False)
    for parameter in plain.transformer.h.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    before, ours = plain.state_dict(), model.state_dict()
    assert [(n, t.dtype, t.shape) for n, t in ours.items()] == [
        (n, t.dtype, t.shape) for n, t in before.items()
    ]
    model.load_state_dict(before)
    ids = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(2))
    exact = plain(ids[:, :-1], ids[:, 1:])
    rounded = model(ids[:, :-1], ids[:, 1:])
    assert 0 < abs(float((rounded - exact).detach())) < 0.05, "training rounds"
    with torch.no_grad():
        assert float(model(ids[:, :-1], ids[:, 1:])) == float(exact.detach()), "evaluation does not"


def test_compiled_blocks_multiply_in_fp8_as_plain_ones_do() -> None:
    model = _model("modern", in_fp8=True)
    random = torch.Generator().manual_seed(0)
    for parameter in model.transformer.h.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=random)
    ids = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(2))
    compiled = CompiledBlock(CPU, "aot_eager")
    found = []
    for options in ({}, {"run_block": compiled}):
        model.zero_grad(set_to_none=True)
        model(ids[:, :-1], ids[:, 1:], **options).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert compiled.is_compiled
    for plain, ours in zip(*found, strict=True):
        # a value may be rounded to its other neighbour; products of other numbers differ by a twentieth
        assert (ours - plain).norm() <= 5e-3 * plain.norm() + 1e-6


def test_training_in_fp8_comes_to_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of `benchmarks.gpu_check losses`: the mean of the last ten steps, within 0.03 nats."""
    products = 0
    whole = torch._scaled_mm

    def counted(*given: object, **options: object) -> Tensor:
        nonlocal products
        products += 1
        return whole(*given, **options)

    monkeypatch.setattr(fp8.torch, "_scaled_mm", counted)
    rows = np.tile(np.arange(33) * 7 % 64, (8, 1)).astype(np.uint16)
    rows = (rows + np.arange(8)[:, None] * 5).astype(np.uint16) % 64
    curves = []
    for in_fp8 in (False, True):
        model = _model("classic", in_fp8=in_fp8)
        rates = learning_rates("classic").scaled(0.1)
        trainer = Trainer(
            model,
            make_optimizer(model, rates, weight_decay=0.0),
            device=CPU,
            device_batch_rows=4,
        )
        hyper = Hyper(lr_multiplier=1.0, momentum=0.9, weight_decay=0.0)
        curves.append([float(trainer.step(rows, hyper=hyper)) / (8 * 32) for _ in range(40)])
    exact, ours = (float(np.mean(curve[-10:])) for curve in curves)
    assert exact < 0.6 * curves[0][0], "it learns"
    assert abs(ours - exact) < 0.03
    # per micro-step: three for each of the 12 matrices of two blocks, two for the head
    assert products == 40 * 2 * (3 * 12 + 2)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "sizes", "words"),
    [
        (CPU, (0, 0), torch.bfloat16, (2048, 65536), "needs an NVIDIA GPU .* trains on cpu"),
        (CUDA, (8, 0), torch.bfloat16, (2048, 65536), "8.9 or newer .* has 8.0"),
        (CUDA, (9, 0), torch.float32, (2048, 65536), "NANOCHAT_DTYPE"),
        (
            CUDA,
            (9, 0),
            torch.bfloat16,
            (2040, 65536),
            "tokens per row is 2040, choose 2032 or 2048",
        ),
        (CUDA, (8, 9), torch.bfloat16, (2048, 50257), "vocabulary is 50257, choose 50256 or 50272"),
    ],
)
def test_where_it_cannot_work_it_is_refused_in_a_sentence(
    device: torch.device,
    capability: tuple[int, int],
    dtype: torch.dtype,
    sizes: tuple[int, int],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_Known, "capability", capability)
    with pytest.raises(UserError, match=words) as caught:
        check_fp8(device, dtype, sequence_len=sizes[0], vocab_size=sizes[1])
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(_Known, "capability", (9, 0))
    check_fp8(CUDA, torch.bfloat16, sequence_len=2048, vocab_size=65536)
