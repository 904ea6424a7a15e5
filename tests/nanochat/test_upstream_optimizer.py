"""The optimizer's files move between us and upstream: the same keys, the same shapes on every rank.

Upstream's optimizers are torch's `Optimizer` with its own `load_state_dict`, over groups with these
keys; what they keep of a parameter is told by `_upstream_shapes`.
"""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanochat import optim, update_rules
from nanochat.gpt import GPT, GPTConfig, build_gpt
from nanochat.optim import MuonAdamW

KEYS = {
    "adamw": {"kind", "params", "lr", "betas", "eps", "weight_decay", "initial_lr"},
    "muon": {"kind", "params", "lr", "momentum", "ns_steps", "beta2", "weight_decay", "initial_lr"},
}


class Upstream(torch.optim.Optimizer):
    """What upstream's optimizers inherit; a step reads all keys of a group, and its state."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert set(group) == KEYS[group["kind"]]
            if group["kind"] == "muon":
                shape = torch.Size((len(group["params"]), *group["params"][0].shape))
                assert self.state[group["params"][0]]["momentum_buffer"].shape == shape
                assert group["ns_steps"] == 5
            else:
                for param in group["params"]:
                    state = self.state[param]
                    assert type(state["step"]) is int
                    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == param.shape
                    assert state["exp_avg"].dtype == param.dtype


def _model() -> GPT:
    config = GPTConfig(
        sequence_len=16, vocab_size=64, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, arch="modern"
    )
    device = torch.device("cpu")
    return build_gpt(config, device=device, seed=0, compute_dtype=torch.bfloat16)


def _upstream(model: GPT) -> Upstream:
    """Upstream's groups in their order, built as it does."""
    head, table = [model.lm_head.weight], [model.transformer.wte.weight]
    smear = [model.smear_gate.weight, model.smear_lambda, model.backout_lambda]
    groups: list[dict[str, Any]] = [
        {"kind": "adamw", "params": p, "lr": 0.1, "betas": b, "eps": 1e-10, "weight_decay": w}
        for p, b, w in (
            (head, (0.8, 0.96), 0.01),
            (table, (0.8, 0.995), 0.001),
            (list(model.value_embeds.parameters()), (0.8, 0.995), 0.01),
            ([model.resid_lambdas], (0.8, 0.95), 0.05),
            ([model.x0_lambdas], (0.96, 0.95), 0.0),
            (smear, (0.8, 0.95), 0.0),
        )
    ]
    matrices = list(model.transformer.h.parameters())
    for shape in sorted({p.shape for p in matrices}):
        params = [p for p in matrices if p.shape == shape]
        muon = {"kind": "muon", "params": params, "lr": 0.02, "momentum": 0.95, "ns_steps": 5}
        groups.append({**muon, "beta2": 0.9, "weight_decay": 0.1})
    optimizer = Upstream(groups, defaults={})
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _train(model: GPT, optimizer: MuonAdamW) -> None:
    ids = torch.arange(17)[None] * 3 % 64
    model(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


def _through_a_file(state_dict: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_upstream_steps_with_an_optimizer_file_of_ours_and_we_with_one_of_its() -> None:
    model = _model()
    ours = model.setup_optimizer(weight_decay=0.1)
    _train(model, ours)
    theirs = _upstream(_model())
    theirs.load_state_dict(_through_a_file(ours.state_dict()))
    theirs.step()

    other = _model()
    back = other.setup_optimizer(weight_decay=0.0)
    back.load_state_dict(_through_a_file(theirs.state_dict()))
    groups = zip(ours.param_groups, back.param_groups, strict=True)
    for group, loaded in groups:
        assert {**group, "params": None} == {**loaded, "params": None}
    _train(other, back)


def test_a_file_of_ours_from_before_ns_steps_still_loads() -> None:
    model = _model()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    _train(model, optimizer)
    old = _through_a_file(optimizer.state_dict())
    for group in old["param_groups"]:
        group.pop("ns_steps", None)
    optimizer.load_state_dict(old)
    _train(model, optimizer)
    assert all(set(group) == KEYS[group["kind"]] for group in optimizer.param_groups)


def test_muon_takes_as_many_polar_iterations_as_its_group_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    polar_express = update_rules.polar_express

    def recorded(x: Tensor, *, dtype: torch.dtype, steps: int) -> Tensor:
        asked.append(steps)
        return polar_express(x, dtype=dtype, steps=steps)

    monkeypatch.setattr(update_rules, "polar_express", recorded)
    model = _model()
    optimizer = model.setup_optimizer()
    for group in optimizer.param_groups:
        if group["kind"] == "muon":
            group["ns_steps"] = 3
    _train(model, optimizer)
    assert set(asked) == {3}
    x = torch.randn(2, 6, 4)
    assert not torch.equal(polar_express(x, steps=3), polar_express(x))


def _upstream_shapes(group: dict[str, Any], world_size: int) -> list[dict[str, tuple[int, ...]]]:
    """Of each parameter's state on a rank that has something to update."""
    if group["kind"] == "muon":
        m, n = group["params"][0].shape
        chunk = -(-len(group["params"]) // world_size)
        factored = (chunk, m, 1) if m >= n else (chunk, 1, n)
        first = {"momentum_buffer": (chunk, m, n), "second_momentum_buffer": factored}
        return [first, *({} for _ in group["params"][1:])]
    found = []
    for param in group["params"]:
        rows = param.shape[0] if param.numel() < 1024 else param.shape[0] // world_size
        shape = (rows, *param.shape[1:])
        found.append({"exp_avg": shape, "exp_avg_sq": shape})
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_rank_keeps_what_upstreams_keeps(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "_rank_and_world_size", lambda: (max(0, world_size - 2), world_size))
    _no_collectives(monkeypatch)
    model = _model()
    optimizer = model.setup_optimizer()
    _train(model, optimizer)
    for group in optimizer.param_groups:
        expected = _upstream_shapes(group, world_size)
        for param, shapes in zip(group["params"], expected, strict=True):
            state = optimizer.state.get(param, {})
            kept = {k: tuple(v.shape) for k, v in state.items() if k != "step"}
            assert kept == shapes or (group["kind"] == "muon" and not kept)  # none of its matrices


def _no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank alone: it hears zeros of the others."""

    class Done:
        def wait(self) -> None: ...

    def scatter(own: Tensor, whole: Tensor, **_: Any) -> Done:
        own.copy_(whole[: len(own)])
        return Done()

    def gather(whole: Tensor, own: Tensor, **_: Any) -> Done:
        whole.zero_()[: len(own)].copy_(own)
        return Done()

    monkeypatch.setattr(optim.dist, "reduce_scatter_tensor", scatter)
    monkeypatch.setattr(optim.dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(optim.dist, "all_reduce", lambda *_, **__: Done())


def _adamw(*shape: int) -> MuonAdamW:
    params = [nn.Parameter(torch.zeros(shape))]
    group = {"kind": "adamw", "params": params, "lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-10}
    return MuonAdamW([{**group, "weight_decay": 0.0}])


def _with_state(optimizer: MuonAdamW, moments: Tensor) -> dict[str, Any]:
    state = {"step": 1, "exp_avg": moments, "exp_avg_sq": moments}
    return {**optimizer.state_dict(), "state": {0: state}}


def test_a_flat_chunk_of_an_older_file_becomes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "_rank_and_world_size", lambda: (1, 2))
    optimizer = _adamw(64, 32)
    optimizer.load_state_dict(_with_state(optimizer, torch.arange(32 * 32.0)))
    (param,) = optimizer.param_groups[0]["params"]
    assert torch.equal(optimizer.state[param]["exp_avg"], torch.arange(32 * 32.0).view(32, 32))


@pytest.mark.parametrize("shape", [(8,), (50, 32)])
def test_a_chunk_of_an_older_file_that_would_have_to_be_cut_anew_is_refused(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "_rank_and_world_size", lambda: (0, 3))
    optimizer = _adamw(*shape)
    chunk = -(-torch.Size(shape).numel() // 3)
    old = _with_state(optimizer, torch.zeros(chunk))
    assert not optimizer.fits(old["state"])
    with pytest.raises(ValueError, match="not rank 0's of 3"):
        optimizer.load_state_dict(old)
