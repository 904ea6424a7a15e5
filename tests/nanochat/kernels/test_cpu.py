"""Parts of a block with gradients by hand, against torch's own forms in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels import cpu
from nanochat.kernels.attention import apply_rotary, rotary_tables
from nanochat.kernels.cpu import norm, relu_squared_mlp, rotated_norm

HEADS, HEAD_DIM, LENGTH = 3, 8, 7


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces, the last of them short."""
    monkeypatch.setattr(cpu, "_PIECE", 4 * HEADS * HEAD_DIM)


def _tables(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rotary_tables(
        LENGTH, HEAD_DIM, base=100.0, device=torch.device("cpu"), dtype=torch.bfloat16
    )


def _compare(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], *leaves: Tensor, bound: float
) -> None:
    """Values and gradients, relative to the greatest of each."""
    results = []
    for function, dtype in ((ours, None), (exact, torch.float64)):
        inputs = [leaf.to(dtype or leaf.dtype).clone().requires_grad_() for leaf in leaves]
        y = function(*inputs)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
        results.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
    for mine, expected in zip(*results, strict=True):
        limit = bound * float(expected.detach().abs().max())
        torch.testing.assert_close(mine.double(), expected, atol=limit, rtol=0)


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


BOUNDS = [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)]


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_rms_norm_and_its_gradient(dtype: torch.dtype, bound: float) -> None:
    x = _draw(2, LENGTH, HEADS * HEAD_DIM).to(dtype)
    _compare(norm, lambda x: F.rms_norm(x, (x.size(-1),), eps=2**-23), x, bound=bound)


@pytest.mark.parametrize("scale", [1.0, 1.2])
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_norm_of_rotated_heads_and_its_gradient(
    dtype: torch.dtype, bound: float, scale: float
) -> None:
    cos, sin = _tables(dtype)

    def exact(x: Tensor) -> Tensor:
        rotated = apply_rotary(x, cos.double(), sin.double())
        return scale * F.rms_norm(rotated, (HEAD_DIM,), eps=2**-23)

    x = _draw(2, LENGTH, HEADS, HEAD_DIM).to(dtype)
    _compare(lambda x: rotated_norm(x, cos, sin, scale=scale), exact, x, bound=bound)


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_relu_squared_mlp_and_its_gradients(dtype: torch.dtype, bound: float) -> None:
    def exact(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        return F.relu(x @ inner.T).square() @ outer.T

    x, inner, outer = _draw(2, LENGTH, 12).to(dtype), _draw(48, 12), _draw(12, 48)
    _compare(relu_squared_mlp, exact, x, inner, outer, bound=bound)


def test_weights_get_gradients_in_their_own_dtype() -> None:
    inner, outer = _draw(48, 12).requires_grad_(), _draw(12, 48).requires_grad_()
    relu_squared_mlp(_draw(5, 12).bfloat16(), inner, outer).sum().backward()
    assert inner.grad is not None and inner.grad.dtype == torch.float32
    assert outer.grad is not None and outer.grad.dtype == torch.float32


def test_without_gradients_and_on_other_devices_the_plain_forms_are_taken() -> None:
    x = _draw(2, LENGTH, HEADS, HEAD_DIM)
    with torch.no_grad():
        assert norm(x).equal(F.rms_norm(x, (HEAD_DIM,)))
    assert norm(x.to("meta")).shape == x.shape
