"""What a training step takes of memory, and what a process keeps of what it frees."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.gpt import GPT, build_gpt
from nanochat.gpt_config import config_for_depth
from nanochat.memory import DeviceBytes, device_bytes

# Peaks of one H100, in GB of 10^9 bytes (docs/performance.md): arch, depth, rows of 2,048 tokens
_MEASURED = (
    ("classic", 20, 32, 70.3),
    ("classic", 20, 8, 24.3),
    ("classic", 12, 32, 25.7),
    ("modern", 20, 8, 34.9),
)

# The size of the address space, not page faults: some kernels (gVisor) count no faults.
_CODE = """
import os, torch
from nanochat.memory import keep_freed_memory
if KEEPS and not keep_freed_memory():
    raise SystemExit(77)
def mapped_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
before = mapped_bytes()
blocks = [torch.empty(5 << 20) for _ in range(4)]  # 20 MB each
del blocks
print(mapped_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is changed")
def test_blocks_that_were_freed_stay_mapped() -> None:
    def left(keeps: bool) -> int:
        done = subprocess.run(
            [sys.executable, "-c", _CODE.replace("KEEPS", str(keeps))],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 77:
            pytest.skip("this C library has no mallopt")
        return int(done.stdout)

    assert left(True) > 60e6 > left(False)  # of 84 MB


# -- GPUs ----------------------------------------------------------------------------------------


def _described(model: GPT, *, rows: int, world_size: int = 1) -> DeviceBytes:
    return device_bytes(model, model.setup_optimizer(), rows=rows, world_size=world_size)


@pytest.mark.parametrize("arch", ["classic", "modern"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_weights_gradients_and_optimizer_are_those_of_the_tensors(
    arch: str, depth: int, dtype: torch.dtype
) -> None:
    config = config_for_depth(depth, vocab_size=300, sequence_len=16, arch=arch, head_dim=32)
    with torch.device("meta"):  # what is described has no data
        model = GPT(config, compute_dtype=dtype)
    described = {world: _described(model, rows=2, world_size=world) for world in (1, 2, 3)}
    real = build_gpt(config, device=torch.device("cpu"), seed=0, compute_dtype=dtype)
    optimizer = real.setup_optimizer()
    real(torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)).backward()
    parameters = list(real.parameters())
    for parameter in parameters:  # what the first rows do not reach
        parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    optimizer.step()
    state = optimizer.state_dict()
    for world, found in described.items():
        assert found.weights == sum(p.nbytes for p in parameters)
        assert found.gradients == gradients
        share = optimizer.recut([state], rank=0, world_size=world)["state"].values()
        tensors = [t for values in share for t in values.values() if isinstance(t, torch.Tensor)]
        assert found.optimizer == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(("arch", "depth", "rows", "peak_gb"), _MEASURED)
def test_peak_is_what_was_measured(arch: str, depth: int, rows: int, peak_gb: float) -> None:
    config = config_for_depth(depth, vocab_size=65536, sequence_len=2048, arch=arch)
    with torch.device("meta"):
        model = GPT(config, compute_dtype=torch.bfloat16)
    found = _described(model, rows=rows)
    assert found.total / 1e9 == pytest.approx(peak_gb, rel=0.03)
