"""MuonAdamW on this device against the CPU, and how long a step of depth 20 takes."""

import torch

from benchmarks.gpu_check.kit import memory_gb, milliseconds, relative_error
from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.gpt import build_gpt, config_for_depth
from nanochat.param_groups import make_optimizer
from nanochat.schedule import learning_rates
from nanochat.update_rules import AdamWRule, MuonRule, adamw_update, muon_update, polar_express

_ADAMW = AdamWRule(lr=1e-2, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
_RANKS = 8  # of the machine whose rank's share is measured


def _muon(polar_dtype: torch.dtype) -> MuonRule:
    return MuonRule(lr=0.02, momentum=0.9, beta2=0.9, weight_decay=0.1, polar_dtype=polar_dtype)


def check(setup: Setup, verdict: Verdict) -> None:
    torch.set_float32_matmul_precision("highest")
    device = torch.device(setup.device)
    verdict.at_most("adamw_error", _adamw_error(device), 1e-6)
    verdict.at_most("muon_error", _muon_error(device), 1e-4)
    shape = (4, setup.size(1280, 64), setup.size(5120, 128))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(device)
    ours, exact = polar_express(x, dtype=torch.bfloat16), polar_express(x.cpu().double().float())
    cosine = torch.nn.functional.cosine_similarity(
        ours.cpu().double().flatten(), exact.double().flatten(), dim=0
    )
    verdict.at_least("polar_bf16_cosine", float(cosine), 0.99)
    values = torch.linalg.svdvals(ours.float())
    verdict.at_least("polar_least_singular_value", float(values.min()), 0.7)
    verdict.at_most("polar_greatest_singular_value", float(values.max()), 1.2)


def _adamw_error(device: torch.device) -> float:
    """Of the update after three steps, fp32 against the CPU's kernel."""
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(1 << 16, generator=generator)
    gradients = [torch.randn(1 << 16, generator=generator) for _ in range(3)]
    results = []
    for where in (device, torch.device("cpu")):
        weight = start.clone().to(where)
        moments = [torch.zeros_like(weight), torch.zeros_like(weight)]
        for step, gradient in enumerate(gradients, start=1):
            adamw_update(
                weight,
                gradient.to(where),
                *moments,
                rule=_ADAMW,
                step=step,
            )
        results.append(weight.cpu())
    return relative_error(*results)


def _muon_error(device: torch.device) -> float:
    """Of a stack of matrices after one step, in fp32, against the CPU."""
    generator = torch.Generator().manual_seed(6)
    start, gradient = (torch.randn((3, 96, 64), generator=generator) for _ in range(2))
    results = []
    for where in (device, torch.device("cpu")):
        weights = start.clone().to(where)
        muon_update(
            weights,
            gradient.to(where),
            torch.zeros_like(weights),
            weights.new_zeros((3, 96, 1)),
            rule=_muon(torch.float32),
        )
        results.append(weights.cpu())
    return relative_error(*results)


def speed(setup: Setup, verdict: Verdict) -> None:
    """A whole step of depth 20, and one rank's share of its matrices on a machine of eight."""
    device = torch.device(setup.device)
    torch.set_float32_matmul_precision("high")
    config = config_for_depth(
        setup.size(20, 1),
        vocab_size=setup.size(65536, 300),
        sequence_len=setup.size(2048, 64),
        head_dim=setup.size(128, 64),
    )
    model = build_gpt(config, device=device, seed=0)
    optimizer = make_optimizer(model, learning_rates("classic"), weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    ms = milliseconds(optimizer.step, device, repeat=5)
    verdict.h100_at_most("step_ms", ms, 110.0)
    verdict.note("peak_gb", memory_gb(device)["peak_gb"])
    parts = {}
    for group in optimizer.param_groups:
        if group["kind"] != "muon":
            continue
        shape = tuple(group["params"][0].shape)
        share = -(-len(group["params"]) // _RANKS)
        weights = torch.randn((share, *shape), device=device)
        gradient, momentum = torch.randn_like(weights), torch.zeros_like(weights)
        factored = (share, shape[0], 1) if shape[0] >= shape[1] else (share, 1, shape[1])
        second = weights.new_zeros(factored)

        def update(w=weights, g=gradient, m=momentum, s=second) -> None:  # type: ignore[no-untyped-def]
            muon_update(
                w,
                g,
                m,
                s,
                rule=_muon(torch.bfloat16),
            )

        parts["x".join(map(str, shape))] = milliseconds(update, device, repeat=5)
    verdict.note("muon_ms_per_rank_of_8", parts)
    verdict.h100_at_most("muon_sum_ms_per_rank_of_8", sum(parts.values()), 20.0)
