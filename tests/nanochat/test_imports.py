"""What an eager training step leaves unimported: torch's compiler is 1.5 s and 150 MB of a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_STEP = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from nanochat.gpt import build_gpt, config_for_depth
from nanochat.param_groups import make_optimizer
from nanochat.schedule import Hyper, learning_rates
from nanochat.trainer import Trainer
import {module}

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
device = torch.device("cpu")
for arch in ("classic", "modern"):
    config = config_for_depth(2, vocab_size=64, sequence_len=256, arch=arch, window_pattern="SL")
    model = build_gpt(config, device=device, seed=0)
    optimizer = make_optimizer(model, learning_rates(arch), weight_decay=0.1)
    trainer = Trainer(model, optimizer, device=device, device_batch_rows=1)
    rows = np.ones((2, 257), dtype=np.uint16)
    hyper = Hyper(lr_multiplier=1.0, momentum=0.9, weight_decay=0.1)
    assert trainer.step(rows, hyper=hyper) is not None
    optimizer.load_state_dict(optimizer.state_dict())
    with torch.inference_mode():
        model(torch.zeros((1, 8), dtype=torch.long))
dist.destroy_process_group()
heavy = ["torch._dynamo", "torch._inductor", "sympy", "triton", "pandas", "wandb", "transformers"]
print(*[name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize("module", ["pilot.site.serve", "nanochat.pretrain"])
def test_an_eager_step_imports_no_compiler(module: str) -> None:
    root = Path(__file__).parents[2]
    step = _STEP.format(module=module)
    environ = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", step], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
