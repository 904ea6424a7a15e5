"""Attention against an explicit mask in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanochat.kernels import flash3, flex
from nanochat.kernels.attention import (
    apply_rotary,
    attention_by,
    cached_attention,
    causal_attention,
    layer_windows,
    rotary_tables,
)
from nanochat.kernels.choices import Kernel


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """One query at a time, in float64; q (B, T, H, D), k and v (B, T, H_kv, D)."""
    B, T, H, D = q.shape
    repeat = H // k.size(2)
    out = torch.zeros(B, T, H, D, dtype=torch.float64)
    for h in range(H):
        keys, values = k[:, :, h // repeat].double(), v[:, :, h // repeat].double()
        for t in range(T):
            first = max(0, t - window)
            scores = keys[:, first : t + 1] @ q[:, t, h].double().unsqueeze(-1) / math.sqrt(D)
            weights = scores.softmax(dim=1)
            out[:, t, h] = (weights * values[:, first : t + 1]).sum(dim=1)
    return out


@pytest.mark.parametrize("window", [0, 1, 7, 22, 23, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_sees_itself_and_its_window(window: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(window)
    q = torch.randn(2, 24, 4, 8, generator=generator)
    k = torch.randn(2, 24, kv_heads, 8, generator=generator)
    v = torch.randn(2, 24, kv_heads, 8, generator=generator)
    y = causal_attention(q, k, v, window=window)
    torch.testing.assert_close(y.double(), _reference(q, k, v, window), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("window", [0, 1, 7, 22])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", [Kernel.MASK, Kernel.BLOCKED, Kernel.FLEX])
def test_every_kernel_for_windows_computes_the_same(
    kernel: Kernel, kv_heads: int, window: int
) -> None:
    generator = torch.Generator().manual_seed(window)
    q, k, v = (torch.randn(2, 24, h, 8, generator=generator) for h in (4, kv_heads, kv_heads))
    if kernel is Kernel.FLEX:  # without a compiler it computes all scores
        flex.prepare_flex(24, window, q.device)
    y = attention_by(kernel, q, k, v, window=window)
    torch.testing.assert_close(y.double(), _reference(q, k, v, window), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("with_lse", [True, False])
def test_flash_attention_3_is_asked_for_a_causal_window_of_keys_before(
    with_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flash_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> object:
        """Its signature: (B, T, H, D), a window of keys before and after each query."""
        assert causal and window_size[1] == 0 and softmax_scale is None
        y = _reference(q, k, v, window_size[0]).float()
        return (y, None) if with_lse else y

    monkeypatch.setattr("nanochat.kernels.attention.flash3_for", lambda device: flash_attn_func)
    q, k = torch.randn(1, 12, 4, 8), torch.randn(1, 12, 2, 8)
    for window in (3, 12):
        y = attention_by(Kernel.FLASH3, q, k, k, window=window)
        torch.testing.assert_close(y.double(), _reference(q, k, k, window), atol=1e-5, rtol=1e-5)


def test_flash_attention_3_is_for_hopper_with_the_package_and_its_absence_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hopper, others = (9, 0), [(8, 0), (8, 9), (10, 0), (12, 0)]
    asked: list[str] = []

    class Kernels:
        flash_attn_func = staticmethod(lambda q, k, v: None)

        @classmethod
        def get_kernel(cls, repository: str, *, version: int) -> object:
            asked.append(repository)
            return cls

    monkeypatch.setattr(flash3.importlib.util, "find_spec", lambda name: None)
    assert flash3.load_flash3(hopper) is None
    monkeypatch.setattr(flash3.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(flash3.importlib, "import_module", lambda name: Kernels)
    assert [flash3.load_flash3(capability) for capability in others] == [None] * 4 and not asked
    assert flash3.load_flash3(hopper) is Kernels.flash_attn_func

    def offline(*args: object, **options: object) -> object:
        raise OSError("offline\nas ever")

    monkeypatch.setattr(Kernels, "get_kernel", offline)
    assert flash3.load_flash3(hopper) is None
    assert caplog.messages[-1].endswith("uses torch's kernels (offline)")
    assert flash3.flash3_for(torch.device("cpu")) is None


@pytest.mark.parametrize("window", [0, 3, 9, 40])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("piece", [1, 2, 5, 24])
def test_cached_attention_in_pieces_is_that_of_the_whole(
    piece: int, kv_heads: int, window: int
) -> None:
    generator = torch.Generator().manual_seed(piece)
    q, k, v = (torch.randn(2, 24, h, 8, generator=generator) for h in (4, kv_heads, kv_heads))
    keys, values = (torch.full((2, 30, kv_heads, 8), float("nan")) for _ in range(2))
    parts = [
        cached_attention(
            *(x[:, pos : pos + piece] for x in (q, k, v)), keys, values, pos=pos, window=window
        )
        for pos in range(0, 24, piece)
    ]
    y = torch.cat(parts, dim=1)
    torch.testing.assert_close(y.double(), _reference(q, k, v, window), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("window", [0, 30, 64, 70, 140])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windowed_attention_and_its_gradients_are_those_of_a_mask(
    window: int, kv_heads: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(window)
    inputs = [torch.randn(2, 150, h, 16, generator=generator) for h in (4, kv_heads, kv_heads, 4)]
    inputs[:2] = [F.rms_norm(x, (16,)) for x in inputs[:2]]
    q, k, v, grad = (x.to(dtype) for x in inputs)

    distance = torch.arange(150)[:, None] - torch.arange(150)
    mask = (distance >= 0) & (distance <= window)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    y = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in exact), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    expected = [y, *torch.autograd.grad(y, exact, grad.double())]

    ours = [x.requires_grad_() for x in (q, k, v)]
    y = causal_attention(*ours, window=window)
    bound = 5e-6 if dtype == torch.float32 else 0.05
    for found, reference in zip([y, *torch.autograd.grad(y, ours, grad)], expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), reference, atol=bound, rtol=bound)


def test_float16_on_a_cpu_survives_scores_whose_exp_it_cannot_hold() -> None:
    q, v = torch.full((1, 80, 1, 144), 1.2), torch.randn(1, 80, 1, 144)  # scores of 17
    y = causal_attention(q.half(), q.half(), v.half(), window=16)
    torch.testing.assert_close(y.double(), _reference(q, q, v, 16), rtol=0, atol=1e-2)


def test_a_mask_made_in_an_evaluation_serves_in_training() -> None:
    for kernel in (Kernel.MASK, Kernel.BLOCKED):
        q = torch.randn(1, 37, 2, 8)
        with torch.inference_mode():
            attention_by(kernel, q, q, q, window=5)
        q.requires_grad_()
        attention_by(kernel, q, q, q, window=5).sum().backward()
        assert q.grad is not None


def test_windows_tile_the_pattern_and_the_last_layer_sees_all() -> None:
    assert layer_windows("SSSL", 7, 2048) == (512, 512, 512, 2048, 512, 512, 2048)
    assert layer_windows("S", 2, 2049)[0] == 640  # a quarter, rounded up to a multiple of 128
    assert layer_windows("S", 2, 512)[0] == 128
    assert layer_windows("L", 3, 64) == (64, 64, 64)
    assert layer_windows("SL", 3, 64, full=640) == (128, 640, 640)


def test_rotary_rotates_halves_by_position_times_frequency() -> None:
    cos, sin = rotary_tables(50, 8, base=10_000.0, device=torch.device("cpu"), dtype=torch.float32)
    x = torch.randn(1, 50, 2, 8)
    y = apply_rotary(x, cos, sin).double()
    for t, i in ((0, 0), (3, 1), (49, 3)):
        angle = t / 10_000.0 ** (2 * i / 8)
        x1, x2 = x[0, t, :, i].double(), x[0, t, :, i + 4].double()
        expected1 = x1 * math.cos(angle) + x2 * math.sin(angle)
        expected2 = -x1 * math.sin(angle) + x2 * math.cos(angle)
        torch.testing.assert_close(y[0, t, :, i], expected1, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(y[0, t, :, i + 4], expected2, atol=1e-5, rtol=1e-5)
