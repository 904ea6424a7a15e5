"""The head's loss and gradients, against the plain chain of full logits in float64."""

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels import head
from nanochat.kernels.choices import HeadPasses
from nanochat.kernels.head import head_loss, softcap

VOCAB, PADDED, WIDTH = 70, 128, 24


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 rows a matmul and 3 a pass: both end in a short rest."""
    monkeypatch.setattr(head, "_MATMUL_ELEMENTS", {"cpu": 7 * VOCAB})
    monkeypatch.setattr(head, "_PASS_ELEMENTS_CPU", 3 * VOCAB)
    monkeypatch.setattr(head, "_CAST_ELEMENTS", 9 * WIDTH)


def _inputs(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((33, WIDTH), generator=generator)
    weight = scale * torch.randn((PADDED, WIDTH), generator=generator)
    targets = torch.randint(VOCAB, (33,), generator=generator)
    targets[[0, 8, 32]] = -1
    return x, weight, targets


def _reference(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> list[Tensor]:
    """[loss, gradient of x, gradient of weight] in float64, of the sum if the loss is of tokens."""
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    logits = 15 * torch.tanh(x @ weight[:VOCAB].T / 15)
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)
    return [loss, *torch.autograd.grad(loss.sum(), (x, weight))]


def _ours(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> list[Tensor]:
    x, weight = (t.clone().requires_grad_() for t in (x, weight))
    loss = head_loss(x, weight, targets, vocab_size=VOCAB, reduction=reduction)
    return [loss, *torch.autograd.grad(loss.sum(), (x, weight))]


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])  # the last one saturates the softcap
def test_loss_and_gradients_are_those_of_full_logits(reduction: str, scale: float) -> None:
    inputs = _inputs(scale)
    for ours, exact in zip(_ours(*inputs, reduction), _reference(*inputs, reduction), strict=True):
        bound = 3e-6 * float(exact.detach().abs().max())
        torch.testing.assert_close(ours.double(), exact, atol=bound, rtol=3e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_losses_without_gradients_are_the_same(reduction: str) -> None:
    x, weight, targets = _inputs()
    with torch.inference_mode():
        loss = head_loss(x, weight, targets, vocab_size=VOCAB, reduction=reduction)
    exact = _reference(x, weight, targets, reduction)[0].detach()
    torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=1e-6)


def test_bfloat16_stays_within_its_rounding_of_float32() -> None:
    x, weight, targets = _inputs(0.3)
    exact = _reference(x.bfloat16(), weight, targets, "sum")
    for ours, expected in zip(_ours(x.bfloat16(), weight, targets, "sum"), exact, strict=True):
        bound = 0.02 * float(expected.detach().abs().max())
        torch.testing.assert_close(ours.double(), expected, atol=bound, rtol=0.02)
    assert _ours(x.bfloat16(), weight, targets, "sum")[2].dtype == torch.float32


def test_the_gradient_scales_with_what_comes_after_the_loss() -> None:
    x, weight, targets = _inputs()
    weight.requires_grad_()
    loss = head_loss(x, weight, targets, vocab_size=VOCAB, reduction="sum")
    (ours,) = torch.autograd.grad(0.125 * loss, weight)
    expected = 0.125 * _reference(x, weight, targets, "sum")[2]
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


def test_padding_and_ignored_tokens_get_no_gradient() -> None:
    x, weight, targets = _inputs()
    _, grad_x, grad_weight = _ours(x, weight, targets, "sum")
    assert not grad_weight[VOCAB:].any()
    assert not grad_x[targets < 0].any()


def test_the_softcap_bounds_any_logit() -> None:
    logits = torch.tensor([-1e30, -1.0, 0.0, 1.0, 1e30])
    torch.testing.assert_close(softcap(logits), 15 * torch.tanh(logits / 15))


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="choose sum, mean or none"):
        head_loss(*_inputs(), vocab_size=VOCAB, reduction="max")


def test_the_gpus_kernel_computes_what_the_passes_do() -> None:
    """Interpreted, so its rounding to bf16 is coarser than a GPU's."""
    pytest.importorskip("triton")
    worker, root = Path(__file__).with_name("fused_head_worker.py"), Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, str(worker)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name, (nats, gradient) in json.loads(done.stdout).items():
        assert nats < 1e-5, name
        assert gradient < (1e-2 if "bfloat16" in name else 1e-6), name


def test_a_kernel_that_cannot_be_compiled_means_plain_passes_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # in place of the module itself, which imports Triton
    fused = types.ModuleType("nanochat.kernels.fused_head")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("ptxas: out of registers")

    def choose(*, device_type: str, missing: str) -> HeadPasses:
        return HeadPasses.EAGER if missing or head._Fused.reason else HeadPasses.FUSED

    monkeypatch.setattr(head._Fused, "reason", None)
    monkeypatch.setattr(head, "choose_head_passes", choose)
    vars(fused)["fused_passes"] = broken
    monkeypatch.setitem(sys.modules, fused.__name__, fused)
    x, weight, targets = _inputs()
    with caplog.at_level(logging.WARNING):
        ours = _ours(x, weight, targets, "sum")
    for mine, exact in zip(ours, _reference(x, weight, targets, "sum"), strict=True):
        bound = 3e-6 * float(exact.detach().abs().max())
        torch.testing.assert_close(mine.double(), exact, atol=bound, rtol=3e-6)
    (record,) = caplog.records
    assert "ptxas" in record.getMessage()
