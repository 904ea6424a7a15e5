"""A training process keeps the memory that it frees."""

import subprocess
import sys
from pathlib import Path

import pytest

_CODE = """
import resource, torch
from nanochat.memory import keep_freed_memory
if KEEPS and not keep_freed_memory():
    raise SystemExit(77)
def faults():
    for _ in range(4):
        blocks = [torch.ones(5 << 20) for _ in range(4)]  # 20 MB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
print(faults() - before)
"""


def test_blocks_that_were_freed_are_not_faulted_in_again() -> None:
    def faults(keeps: bool) -> int:
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

    kept = faults(True)
    assert kept < 1000 < faults(False)  # of 80,000 pages of 4 kB
