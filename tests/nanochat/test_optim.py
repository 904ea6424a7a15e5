"""MuonAdamW: each stage against float64, AdamW against torch's, state that survives saving."""

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanochat import update_rules
from nanochat.gpt import GPT, GPTConfig, build_gpt
from nanochat.optim import MuonAdamW
from nanochat.param_groups import make_optimizer
from nanochat.schedule import learning_rates
from nanochat.update_rules import (
    AdamWRule,
    MuonRule,
    adamw_update,
    equilibrate_rows,
    muon_update,
    polar_express,
    reduce_variance,
    snap_norm,
)

SHAPES = [(6, 6), (12, 5), (5, 12), (1, 8)]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_takes_the_steps_of_torchs(weight_decay: float) -> None:
    ours, theirs = (nn.Parameter(_random(7, 3)) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10}
    groups = [{"kind": "adamw", "params": [ours], "weight_decay": weight_decay, **options}]
    a, b = MuonAdamW(groups), torch.optim.AdamW([theirs], weight_decay=weight_decay, **options)
    for step in range(5):
        for optimizer, parameter in ((a, ours), (b, theirs)):
            parameter.grad = _random(7, 3, seed=step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_adamw_rounds_a_bf16_table_once() -> None:
    weight, grad = _random(50).bfloat16(), _random(50, seed=1).bfloat16()
    moments = [torch.zeros(50), torch.zeros(50)]
    exact, exact_moments = weight.float(), [torch.zeros(50), torch.zeros(50)]
    rule = AdamWRule(lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.01)
    adamw_update(weight, grad, *moments, step=1, rule=rule)
    adamw_update(exact, grad.float(), *exact_moments, step=1, rule=rule)
    assert torch.equal(weight, exact.bfloat16())
    assert torch.equal(moments[1], exact_moments[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_scaled_to_their_mean_norm(shape: tuple[int, int]) -> None:
    x = _random(3, *shape)
    x[0, 0] *= 100
    y = equilibrate_rows(x)
    norms = x.double().norm(dim=-1)
    expected = x.double() / norms[..., None] * norms.mean(dim=-1)[:, None, None]
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_applies_its_polynomials_to_the_singular_values(
    shape: tuple[int, int],
) -> None:
    x = _random(2, *shape)
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (1.01 * x.double().norm(dim=(-2, -1))[:, None] + 1e-6)
    for a, b, c in (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(polar_express(x).double(), u * s[:, None] @ v, atol=2e-4, rtol=2e-4)
    assert s.min() > 0.6 and s.max() < 1.3  # near enough to 1


def test_polar_express_in_bf16_is_near_the_fp32_one() -> None:
    x = _random(2, 32, 16)
    rough = polar_express(x, dtype=torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), polar_express(x), atol=0.05, rtol=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_is_snapped_to_that_of_an_orthogonal_matrix(shape: tuple[int, int]) -> None:
    norms = snap_norm(_random(4, *shape)).norm(dim=(-2, -1))
    torch.testing.assert_close(norms, torch.full((4,), math.sqrt(min(shape))))


@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_evens_the_longer_side_and_keeps_the_norm(shape: tuple[int, int]) -> None:
    rows_longer = shape[0] >= shape[1]
    dim = -1 if rows_longer else -2
    second = torch.zeros(2, shape[0], 1) if rows_longer else torch.zeros(2, 1, shape[1])
    moment = second.double()
    for step in range(3):
        x = _random(2, *shape, seed=step)
        y = reduce_variance(x, second, beta2=0.9)
        moment = 0.9 * moment + 0.1 * x.double().square().mean(dim=dim, keepdim=True)
        expected = x.double() / moment.sqrt()
        norm = x.double().norm(dim=(-2, -1), keepdim=True)
        expected *= norm / expected.norm(dim=(-2, -1), keepdim=True)
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second.double(), moment, atol=1e-6, rtol=1e-5)


def _muon_rule(*, lr: float, weight_decay: float) -> MuonRule:
    return MuonRule(
        lr=lr, momentum=0.9, beta2=0.9, weight_decay=weight_decay, polar_dtype=torch.float32
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_step_is_the_stages_in_order(shape: tuple[int, int]) -> None:
    weights = _random(2, *shape)
    buffer = torch.zeros_like(weights)
    rows_longer = shape[0] >= shape[1]
    second = torch.zeros(2, shape[0], 1) if rows_longer else torch.zeros(2, 1, shape[1])
    other_second = second.clone()
    average = torch.zeros_like(weights)
    for step in range(3):
        grads, before = _random(2, *shape, seed=10 + step), weights.clone()
        muon_update(
            weights,
            grads.clone(),
            buffer,
            second,
            _muon_rule(lr=0.02, weight_decay=0.3),
        )
        average = 0.9 * average + 0.1 * grads
        update = equilibrate_rows(0.1 * grads + 0.9 * average)
        update = snap_norm(polar_express(update))
        update = reduce_variance(update, other_second, beta2=0.9)
        lr = 0.02 * math.sqrt(max(1.0, shape[0] / shape[1]))
        decay = torch.where(update * before >= 0, 0.3 * before, torch.zeros(()))
        torch.testing.assert_close(weights, before - lr * (update + decay), atol=1e-6, rtol=1e-4)


def test_zero_gradients_move_nothing_but_decay_and_make_no_nan() -> None:
    weights = _random(2, 4, 3)
    before = weights.clone()
    muon_update(
        weights,
        torch.zeros_like(weights),
        torch.zeros_like(weights),
        torch.zeros(2, 4, 1),
        _muon_rule(lr=0.1, weight_decay=0.0),
    )
    assert torch.equal(weights, before)


def _model(arch: str, dtype: torch.dtype = torch.float32) -> GPT:
    config = GPTConfig(
        sequence_len=16, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, arch=arch
    )
    return build_gpt(config, device=torch.device("cpu"), seed=0, compute_dtype=dtype)


def _train(model: GPT, optimizer: MuonAdamW, steps: int) -> None:
    ids = torch.arange(17)[None] * 3 % 50
    for _ in range(steps):
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_every_parameter_is_trained_once_at_the_rates_of_its_role(arch: str) -> None:
    model = _model(arch)
    optimizer = model.setup_optimizer(weight_decay=0.2)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    of: dict[int, dict[str, Any]] = {
        id(p): group for group in optimizer.param_groups for p in group["params"]
    }
    width = (32 / 768) ** -0.5
    head, table = of[id(model.lm_head.weight)], of[id(model.transformer.wte.weight)]
    assert table["initial_lr"] == pytest.approx(0.3 * width)
    modern = arch == "modern"
    assert head["initial_lr"] == pytest.approx((0.008 if modern else 0.004) * width)
    assert head["betas"] == ((0.8, 0.96) if modern else (0.8, 0.95))
    assert head["weight_decay"] == (0.01 if modern else 0.0)
    for parameter in model.transformer.h.parameters():
        group = of[id(parameter)]
        assert (group["kind"], group["lr"], group["weight_decay"]) == ("muon", 0.02, 0.2)
    if modern:
        embeds = of[id(model.value_embeds["1"].weight)]
        assert embeds["initial_lr"] == pytest.approx(0.15 * width)
        assert (embeds["betas"], embeds["weight_decay"]) == ((0.8, 0.995), 0.01)
        assert (table["betas"], table["weight_decay"]) == ((0.8, 0.995), 0.001)
        resid, x0 = of[id(model.resid_lambdas)], of[id(model.x0_lambdas)]
        assert resid["lr"] == pytest.approx(0.005) and resid["weight_decay"] == 0.05
        assert (x0["lr"], x0["betas"], x0["weight_decay"]) == (0.5, (0.96, 0.95), 0.0)
        smear = of[id(model.smear_lambda)]
        assert smear is of[id(model.smear_gate.weight)] is of[id(model.backout_lambda)]
        assert (smear["lr"], smear["betas"]) == (0.2, (0.8, 0.95))


def test_rates_may_be_given_by_name() -> None:
    optimizer = _model("classic").setup_optimizer(
        unembedding_lr=0.1, embedding_lr=0.2, matrix_lr=0.3, weight_decay=0.0, scalar_lr=0.4
    )
    width = (32 / 768) ** -0.5
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.1 * width, 0.2 * width, 0.3, 0.3, 0.3])


@pytest.mark.parametrize("arch", ["classic", "modern"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_continues_bit_for_bit(arch: str, dtype: torch.dtype) -> None:
    rates = learning_rates(arch).scaled(0.1)
    model = _model(arch, dtype)
    optimizer = make_optimizer(model, rates, weight_decay=0.1)
    _train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    _train(model, optimizer, 2)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = _model(arch, dtype)
    resumed.load_state_dict(saved["model"])
    other = make_optimizer(resumed, learning_rates(arch), weight_decay=0.0)
    other.load_state_dict(saved["optimizer"])
    _train(resumed, other, 2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_muon_group_of_several_shapes_is_refused() -> None:
    params = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, 2))]
    with pytest.raises(ValueError, match="one shape"):
        MuonAdamW([{"kind": "muon", "params": params, "lr": 0.1}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_in_pieces_is_bit_for_bit_adamw_in_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(piece: int) -> list[torch.Tensor]:
        monkeypatch.setattr(update_rules, "_PIECE", piece)
        generator = torch.Generator().manual_seed(0)
        weight, grad = (torch.randn(103, generator=generator).to(dtype) for _ in range(2))
        moments = [torch.rand(103, generator=generator) for _ in range(2)]
        rule = AdamWRule(lr=0.1, betas=(0.8, 0.96), eps=1e-10, weight_decay=0.1)
        adamw_update(weight, grad, *moments, step=3, rule=rule)
        return [weight, *moments]

    # whole vectors of any CPU in each piece, and in the last one a rest
    for pieces, whole in zip(run(32), run(1024), strict=True):
        assert torch.equal(pieces, whole)
