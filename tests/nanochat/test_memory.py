"""A training process keeps the memory that it frees."""

import subprocess
import sys
from pathlib import Path

import pytest

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
