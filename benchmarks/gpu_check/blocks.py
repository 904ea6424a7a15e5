"""Compiled blocks compute what plain ones do, in one graph per kind, also for a second model."""

import time

import torch

from benchmarks.gpu_check.kit import relative_error
from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.acceleration import compiled_block
from nanochat.gpt import GPT, build_gpt, config_for_depth
from nanochat.layers import RunBlock, run_block

# bf16: both round, at other places (measured 0.021 and 0.024)
_BOUNDS = {torch.bfloat16: 4e-2, torch.float32: 1e-4}
_GRAPHS = {"classic": 1, "modern": 4}  # kinds of block: window short or not, value embedding or not


def check(setup: Setup, verdict: Verdict) -> None:
    from torch._dynamo.utils import counters

    device = torch.device(setup.device)
    torch.set_float32_matmul_precision("highest")
    dtypes = (torch.bfloat16, torch.float32) if not setup.tiny else (torch.float32,)
    for arch in ("classic", "modern"):
        for dtype in dtypes:
            name = f"{arch}_{str(dtype).removeprefix('torch.')}"
            torch._dynamo.reset()
            fast = compiled_block(device, backend="inductor" if setup.cuda else "aot_eager")
            if fast is None:
                verdict.that(False, "the compiler that is here does not work")
                return
            counters.clear()  # of the line that was compiled to see whether it works
            began = time.monotonic()
            worst = _worst_error(_model(setup, arch, dtype, seed=0), fast, setup)
            verdict.note(f"{name}_first_s", time.monotonic() - began)
            verdict.at_most(f"{name}_gradients", worst, _BOUNDS[dtype])
            graphs = counters["stats"]["unique_graphs"]
            verdict.at_most(f"{name}_graphs", graphs, _GRAPHS[arch])
            verdict.that(not counters["graph_break"], f"{name}: {dict(counters['graph_break'])}")
            _worst_error(_model(setup, arch, dtype, seed=1), fast, setup)
            verdict.that(
                fast.is_compiled, f"{name}: the compiler failed, and the blocks ran eagerly"
            )
            grown = counters["stats"]["unique_graphs"] - graphs
            verdict.that(grown == 0, f"{name}: a second model compiles {grown} graphs again")


def _model(setup: Setup, arch: str, dtype: torch.dtype, *, seed: int) -> GPT:
    """Four layers, so that modern has every kind of block; no matrix of it is zero."""
    length = setup.size(1024, 256)
    config = config_for_depth(
        4, vocab_size=300, sequence_len=length, arch=arch, head_dim=setup.size(128, 64)
    )
    device = torch.device(setup.device)
    model = build_gpt(config, device=device, seed=seed, compute_dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.transformer.h.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def _worst_error(model: GPT, fast: RunBlock, setup: Setup) -> float:
    """The largest relative error of a matrix's gradient, compiled against plain."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(300, (2, model.config.sequence_len + 1), generator=generator)
    ids = ids.to(model.get_device())
    gradients = []
    for run in (run_block, fast):
        model.zero_grad(set_to_none=True)
        model(ids[:, :-1], ids[:, 1:], run_block=run).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.dim() == 2})
    plain, compiled = gradients
    errors = []
    for name, exact in plain.items():
        ours = compiled[name]
        assert exact is not None and ours is not None
        errors.append(relative_error(ours, exact))
    return max(errors)
