"""The model: names, sizes, initial values, and what it computes, for both architectures."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, build_gpt, config_for_depth
from nanochat.param_groups import make_optimizer
from nanochat.schedule import learning_rates

CPU = torch.device("cpu")
ARCHITECTURES = ["classic", "modern"]


def _meta(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config, compute_dtype=torch.float32)


def _config(arch: str, **changes: object) -> GPTConfig:
    # T = 160 makes S windows of 128 tokens bite; 70 tokens are padded to 128 rows
    values: dict[str, object] = {
        "sequence_len": 160,
        "vocab_size": 70,
        "n_layer": 3,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 32,
        "window_pattern": "SL",
        "arch": arch,
    }
    return GPTConfig(**{**values, **changes})  # type: ignore[arg-type]


def _random(arch: str, **changes: object) -> GPT:
    """A model with no tensor at a value that would hide its effect."""
    model = build_gpt(_config(arch, **changes), device=CPU, seed=0, compute_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.dim() > 1 else 0.5))
    return model


def _ids(model: GPT, rows: int = 2, length: int = 160) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator)


def _norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def _reference_logits(model: GPT, idx: Tensor) -> Tensor:
    """The documented model in float64, one head at a time, on the model's weights by their names."""
    c = model.config
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    modern = c.arch == "modern"
    T, D = idx.size(1), c.n_embd // c.n_head
    base = 100_000.0 if modern else 10_000.0
    angle = torch.arange(T)[:, None].double() * base ** (-torch.arange(0, D, 2).double() / D)
    cos, sin = angle.cos(), angle.sin()
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]

    def rotate(x: Tensor) -> Tensor:  # (B, T, D)
        x1, x2 = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], dim=-1)

    x = _norm(w["transformer.wte.weight"][idx])
    if modern:
        gate = torch.sigmoid(x[:, 1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat([x[:, :1], x[:, 1:] + w["smear_lambda"] * gate * x[:, :-1]], dim=1)
    x0 = kept = x
    for i in range(c.n_layer):
        if modern:
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        prefix = f"transformer.h.{i}."
        short = -(-c.sequence_len // 4 // 128) * 128
        letter = "SL"[i % 2] if i < c.n_layer - 1 else "L"
        window = short if letter == "S" else c.sequence_len
        n = _norm(x)
        outputs = []
        for h in range(c.n_head):
            kv = h // (c.n_head // c.n_kv_head)
            heads = {"q": h, "k": kv, "v": kv}
            parts = {
                name: n @ w[f"{prefix}attn.c_{name}.weight"][head * D : (head + 1) * D].T
                for name, head in heads.items()
            }
            v = parts["v"]
            if modern and i % 2 == (c.n_layer - 1) % 2:
                gates = 3 * torch.sigmoid(n[..., :12] @ w[f"{prefix}attn.ve_gate.weight"].T)
                table = w[f"value_embeds.{i}.weight"][idx]
                v = v + gates[..., kv : kv + 1] * table[..., kv * D : (kv + 1) * D]
            scale = 1.2 if modern else 1.0
            q, k = _norm(rotate(parts["q"])) * scale, _norm(rotate(parts["k"])) * scale
            scores = q @ k.mT / math.sqrt(D)
            hidden = (distance < 0) | (distance > window)
            outputs.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v)
        x = x + torch.cat(outputs, dim=-1) @ w[prefix + "attn.c_proj.weight"].T
        inner = F.relu(_norm(x) @ w[prefix + "mlp.c_fc.weight"].T).square()
        x = x + inner @ w[prefix + "mlp.c_proj.weight"].T
        if i == c.n_layer // 2:
            kept = x
    if modern:
        x = x - w["backout_lambda"] * kept
    z = (_norm(x) @ w["lm_head.weight"].T)[..., : c.vocab_size]
    return 15 * torch.tanh(z / 15)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("n_layer", [1, 3, 4])
def test_forward_computes_the_formulas(arch: str, n_layer: int) -> None:
    model = _random(arch, n_layer=n_layer)
    idx = _ids(model)
    logits = model(idx)
    assert logits.shape == (2, 160, 70) and logits.dtype == torch.float32
    reference = _reference_logits(model, idx)
    torch.testing.assert_close(logits.double(), reference, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loss_is_the_cross_entropy_of_the_logits(arch: str) -> None:
    model = _random(arch)
    idx = _ids(model, length=20)
    targets = _ids(model, length=20).roll(3, dims=1)
    targets[0, :5] = -1
    expected = F.cross_entropy(
        _reference_logits(model, idx).flatten(0, 1),
        targets.flatten(),
        ignore_index=-1,
        reduction="none",
    )
    for reduction, value in (
        ("none", expected),
        ("sum", expected.sum()),
        ("mean", expected.sum() / 35),
    ):
        loss = model(idx, targets, loss_reduction=reduction)
        torch.testing.assert_close(loss.double(), value, atol=1e-4, rtol=1e-4)


def test_depth_20_classic_model_has_560988160_parameters() -> None:
    model = _meta(config_for_depth(20, vocab_size=65536, sequence_len=2048))
    assert sum(p.numel() for p in model.parameters()) == 560_988_160
    assert model.num_scaling_params()["total"] == 560_988_160
    assert model.data_ratio_params() == 560_988_160


def test_depth_20_modern_model_has_896_million_parameters() -> None:
    model = _meta(config_for_depth(20, vocab_size=32768, sequence_len=2048, arch="modern"))
    counts = model.num_scaling_params()
    assert round(counts["total"] / 1e6, 1) == 896.5
    assert sum(v for k, v in counts.items() if k != "total") == counts["total"]
    assert model.data_ratio_params() == counts["transformer_matrices"] + counts["lm_head"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_state_dict_keys_are_the_interchange_names(arch: str) -> None:
    model = _meta(config_for_depth(5, vocab_size=1000, sequence_len=64, arch=arch))
    names = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    expected = {f"transformer.h.{i}.{name}.weight" for i in range(5) for name in names}
    expected |= {"transformer.wte.weight", "lm_head.weight"}
    if arch == "modern":
        expected |= {"resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda"}
        expected |= {"backout_lambda"}
        expected |= {f"value_embeds.{i}.weight" for i in (0, 2, 4)}
        expected |= {f"transformer.h.{i}.attn.ve_gate.weight" for i in (0, 2, 4)}
    state = model.state_dict()
    assert set(state) == expected
    assert state["lm_head.weight"].shape == (1024, 384)
    if arch == "modern":
        assert state["smear_gate.weight"].shape == (1, 24)
        assert state["transformer.h.0.attn.ve_gate.weight"].shape == (3, 12)
        assert state["value_embeds.0.weight"].shape == (1024, 384)
        assert state["resid_lambdas"].shape == state["x0_lambdas"].shape == (5,)


def test_width_follows_depth_in_whole_heads() -> None:
    for depth, heads in ((1, 1), (4, 2), (5, 3), (12, 6), (20, 10)):
        config = config_for_depth(depth, vocab_size=300, sequence_len=64)
        assert (config.n_head, config.n_embd) == (heads, heads * 128)


def test_meta_data_has_upstreams_keys_and_arch_only_if_classic() -> None:
    seven = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"}
    seven |= {"window_pattern"}
    modern, classic = GPTConfig(arch="modern").to_meta(), GPTConfig().to_meta()
    assert set(modern) == seven and modern["window_pattern"] == "SSSL"
    assert set(classic) == seven | {"arch"} and classic["arch"] == "classic"
    assert classic["window_pattern"] == "L"


@pytest.mark.parametrize(
    "changes",
    [
        {"arch": "new"},
        {"window_pattern": "SX"},
        {"n_head": 3},
        {"n_kv_head": 3},
        {"n_layer": 0},
        {"arch": "modern", "n_embd": 16},
    ],
)
def test_impossible_shapes_are_user_errors(changes: dict[str, object]) -> None:
    with pytest.raises(UserError):
        _config(**{"arch": "classic", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_initial_values(arch: str) -> None:
    config = config_for_depth(3, vocab_size=2000, sequence_len=32, arch=arch)
    model = build_gpt(config, device=CPU, seed=3, compute_dtype=torch.float32)
    modern = arch == "modern"
    s = math.sqrt(3) * config.n_embd**-0.5

    def is_uniform(tensor: Tensor, low: float, high: float) -> None:
        assert low <= tensor.min() and tensor.max() <= high
        assert float(tensor.mean()) == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert float(tensor.std()) == pytest.approx((high - low) / math.sqrt(12), rel=0.02)

    wte, head = model.transformer.wte.weight.data, model.lm_head.weight.data
    assert float(wte.std()) == pytest.approx(0.8 if modern else 1.0, rel=0.02)
    assert float(head.std()) == pytest.approx(0.001, rel=0.02)
    for name, tensor in model.state_dict().items():
        if name.endswith(("c_q.weight", "c_k.weight", "c_v.weight")):
            is_uniform(tensor, -s, s)
        elif name.endswith("c_fc.weight"):
            factor = 0.4 if modern else 1.0
            is_uniform(tensor, -factor * s, factor * s)
        elif name.endswith("c_proj.weight"):
            assert not tensor.any()
        elif name.startswith("value_embeds"):
            is_uniform(tensor, -s, s)
        elif name.endswith("_gate.weight"):
            assert tensor.min() >= 0 and tensor.max() <= 0.02 and tensor.any()
    if modern:
        torch.testing.assert_close(model.resid_lambdas.data, torch.tensor([1.15, 1.10, 1.05]))
        torch.testing.assert_close(model.x0_lambdas.data, torch.tensor([0.2, 0.125, 0.05]))
        assert model.smear_lambda.item() == 0.0
        assert model.backout_lambda.item() == pytest.approx(0.2)


def test_a_seed_makes_the_weights_and_the_dtype_only_rounds_them() -> None:
    config = _config("modern")
    a, b = (build_gpt(config, device=CPU, seed=5, compute_dtype=torch.float32) for _ in range(2))
    rounded = build_gpt(config, device=CPU, seed=5, compute_dtype=torch.bfloat16)
    other = build_gpt(config, device=CPU, seed=6, compute_dtype=torch.float32)
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name])
        stored = rounded.state_dict()[name]
        table = "wte" in name or "value_embeds" in name
        assert stored.dtype == (torch.bfloat16 if table else torch.float32)
        assert torch.equal(tensor.to(stored.dtype), stored)
    assert not torch.equal(a.lm_head.weight, other.lm_head.weight)


def test_fp16_keeps_its_tables_in_fp32() -> None:
    with torch.device("meta"):
        model = GPT(_config("modern"), compute_dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bf16_model_is_close_to_fp32_and_has_fp32_logits(arch: str) -> None:
    config = _config(arch)
    exact = build_gpt(config, device=CPU, seed=0, compute_dtype=torch.float32)
    rough = build_gpt(config, device=CPU, seed=0, compute_dtype=torch.bfloat16)
    idx = _ids(exact)
    logits = rough(idx)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact(idx), atol=3e-3, rtol=0.1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bf16_has_the_loss_and_the_gradients_of_fp32_within_its_rounding(arch: str) -> None:
    """With every weight at work; 8 bits of mantissa are 0.4 % a number, and errors add up."""
    exact = _random(arch)
    with torch.no_grad():
        exact.lm_head.weight.mul_(0.3)  # logits of the size of trained ones
    rough = build_gpt(exact.config, device=CPU, seed=0, compute_dtype=torch.bfloat16)
    rough.load_state_dict(exact.state_dict())
    ids = _ids(exact)
    losses = []
    for model in (exact, rough):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    for (name, one), other in zip(exact.named_parameters(), rough.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        error = (other.grad.double() - one.grad.double()).norm() / one.grad.double().norm()
        assert float(error) < 0.12, f"{name}: {float(error):.3f}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_training_in_bf16_follows_training_in_fp32(arch: str) -> None:
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_gpt(_config(arch), device=CPU, seed=0, compute_dtype=dtype)
        rates = learning_rates(arch).scaled(0.1)  # a small batch's: else single steps jump
        optimizer = make_optimizer(model, rates, weight_decay=0.0)
        ids, losses = _ids(model, 4, 40) % 9, []
        for _ in range(20):
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] - 0.5  # it learns
    assert curves[1] == pytest.approx(curves[0], rel=0.01)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_generation_takes_the_likeliest_token_each_time(arch: str) -> None:
    model = _random(arch)
    tokens = [1, 2, 3]
    for token in model.generate([1, 2, 3], 4, temperature=0.0):
        assert token == int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) == 7


def test_sampling_is_a_function_of_its_seed_and_top_k_1_is_greedy() -> None:
    model = _random("classic")
    one, again = (list(model.generate([1], 8, seed=7)) for _ in range(2))
    assert one == again
    assert list(model.generate([1], 8, top_k=1)) == list(model.generate([1], 8, temperature=0.0))


def test_flops_count_matmul_weights_and_visible_keys() -> None:
    model = _meta(config_for_depth(2, vocab_size=128, sequence_len=1024, window_pattern="SL"))
    weights = 2 * 12 * 128 * 128 + 128 * 128
    assert model.estimate_flops() == 6 * weights + 12 * 1 * 128 * (256 + 1024)
