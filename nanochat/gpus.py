"""What NVIDIA GPUs need from a process, and what is known of them: drivers, memory, peak rates.

Importing this module does not import torch: `common.py`, which does not either, asks here.
"""

import gc
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DEVICES = Path("/dev")
_DRIVER = Path("/proc/driver/nvidia/version")
_NO_GPUS = ("", "-1", "none", "void")  # values of CUDA_VISIBLE_DEVICES that hide all of them
# CUDA's major version → the oldest driver that runs it (CUDA's release notes, table 3)
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}

# Dense bf16 FLOP/s by a part of the name that torch gives (NVIDIA's data sheets, without sparsity).
# The first that fits counts, so the narrower name comes first.
_PEAK_FLOPS = (
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("H800", 989e12),
    ("B200", 2250e12),
    ("B100", 1750e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 6000 Ada", 364e12),
    ("4090", 165.2e12),
    ("3090", 71e12),
)

# Rows of 2,048 tokens that depth 20 has room for, by GiB of the card: measured 24.3 GB at 8 rows and 70.3
# at 32 (docs/performance.md), so 9 GB and 1.9 per row. `Trainer` halves what does not fit.
_ROWS_BY_GIB = ((70, 32), (38, 16), (24, 8), (0, 4))
_ROW_TOKENS = 2048
DEFAULT_ROWS = 8  # where no GPU's memory says more

_COMPILE_THREADS = 8  # of Triton's kernels: a block has about 20, and ranks share the cores


class _Known:
    """Compute capability of this process's GPU. No lru_cache: torch.compile breaks its graph there."""

    capability: tuple[int, int] | None = None


def unusable_gpus(*, devices: Path | None = None, driver: Path | None = None) -> str:
    """Why torch can use none of the GPUs that this machine shows, and the cure; "" if there is no such.

    torch itself only warns, and a run would go on on the CPUs, a thousand times slower. GPUs that
    CUDA_VISIBLE_DEVICES hides are none.
    """
    import torch

    devices, driver = devices or _DEVICES, driver or _DRIVER
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip().lower() in _NO_GPUS
    if hidden or torch.cuda.is_available() or not any(devices.glob("nvidia[0-9]*")):
        return ""
    cure = 'or choose the device "cpu" to train on the processors'
    cuda = torch.version.cuda
    if cuda is None:
        return (
            f"this machine has NVIDIA GPUs, but torch {torch.__version__} is built without CUDA: "
            f"install a build for CUDA, {cure}"
        )
    found = driver_version(driver)
    oldest = _OLDEST_DRIVER.get(cuda.split(".")[0])
    needs = f" (it needs driver {oldest} or newer)" if oldest else ""
    return (
        f"this machine has NVIDIA GPUs that torch cannot use: the driver is {found}, and torch "
        f"{torch.__version__} is built for CUDA {cuda}{needs}. Update the driver, or install a torch "
        f"for an older CUDA and set UV_NO_SYNC=1 so that uv keeps it, {cure}"
    )


def driver_version(path: Path | None = None) -> str:
    """The NVIDIA driver's version as its kernel module tells it, or "unknown"."""
    try:
        text = (path or _DRIVER).read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group() if found else "unknown"


def prepare_device(device: "torch.device", *, cache: Path) -> None:
    """What every process that computes on `device` sets first: TF32, an allocator that grows, compilers.

    TF32 is for fp32 matmuls only, which a run has with NANOCHAT_DTYPE=float32: eight times as fast on
    an A100. Segments that can grow leave no holes where batches and evaluations take turns; the
    variable must be there before the process first takes memory, and a user's own wins. `cache` keeps
    what was compiled for later processes.
    """
    if device.type != "cuda":
        return
    import torch

    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for name, kind in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str(cache / kind))
    threads = min(_COMPILE_THREADS, os.cpu_count() or 1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    torch.set_float32_matmul_precision("high")
    capability_of(device)


def capability_of(device: "torch.device") -> tuple[int, int]:
    """(major, minor) of this process's GPU, (0, 0) elsewhere; kept, as compiled code asks, too."""
    if device.type != "cuda":
        return 0, 0
    if _Known.capability is None:
        import torch

        _Known.capability = torch.cuda.get_device_capability(device)
    return _Known.capability


def peak_flops(device: "torch.device", world_size: int = 1) -> float | None:
    """Dense bf16 FLOP/s of `world_size` such cards, by the data sheet; None for a CPU or a card that is
    not known."""
    if device.type != "cuda":
        return None
    import torch

    of_one = peak_flops_of(torch.cuda.get_device_name(device))
    return None if of_one is None else world_size * of_one


def peak_flops_of(name: str) -> float | None:
    """The same by the name that torch gives a card."""
    return next((flops for part, flops in _PEAK_FLOPS if part in name), None)


def mfu(tokens_per_s: float, *, token_flops: float, peak: float | None) -> float | None:
    """Model FLOP utilisation, 0..1: which share of the devices' arithmetic a training rate uses.

    token_flops: FLOP of training on one token (`GPT.estimate_flops`); peak: dense bf16 FLOP/s of all
    devices together, None where no data sheet says it, as for CPUs: then there is no such figure.
    As defined in PaLM (arXiv 2204.02311, appendix B).
    """
    return tokens_per_s * token_flops / peak if peak else None


def rows_by_memory(total_bytes: int, sequence_len: int) -> int:
    """Rows of `sequence_len` tokens for a card of that size, as `device-batch-size` 0 takes them."""
    gib = total_bytes / 2**30
    rows = next(rows for least, rows in _ROWS_BY_GIB if gib >= least)
    return max(1, rows * _ROW_TOKENS // sequence_len)


def device_rows(given: int, *, device: "torch.device", sequence_len: int, rank_rows: int) -> int:
    """Rows that a device takes at once: `given`, or for 0 what its memory has room for.

    rank_rows: rows of an optimizer step that fall to a device. Chosen rows divide them evenly, since a
    shorter last micro-batch runs uncompiled.
    """
    if given:
        return given
    most = DEFAULT_ROWS
    if device.type == "cuda":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        most = rows_by_memory(total, sequence_len)
    rank_rows = max(1, rank_rows)
    pieces = -(-rank_rows // most)
    return -(-rank_rows // pieces)


def settle_garbage() -> None:
    """After the first step: what lives now lives to the end, so no collection looks at it again.

    Full collections of a process with torch's modules pause it for up to half a second. What an
    earlier call has set aside is looked at once more: a process may train one model after another.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
