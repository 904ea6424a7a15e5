"""FlashAttention-3 through the `kernels` package, where it is installed and the chip is a Hopper.

`kernels` fetches compiled code from its hub at the first use, so nobody gets it who has not asked for it:
`uv pip install kernels`. Without it, or where it cannot be had, attention uses torch's own kernels.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_REPOSITORY, _VERSION = "kernels-community/flash-attn3", 1
_HOPPER = 9  # SM 90: the kernel uses instructions that chips before and after it lack
# what `kernels` raises without network, for an unknown torch, for another signature of its own
_FAILURES = (ImportError, OSError, ValueError, TypeError, RuntimeError, AttributeError)

Flash3 = Callable[..., Any]


class _Loaded:
    """What this process has found. No lru_cache: torch.compile traces into that, and breaks there."""

    asked = False
    function: Flash3 | None = None


def flash3_for(device: torch.device) -> Flash3 | None:
    """`flash_attn_func` of FlashAttention-3 where it can be had on `device`, else None."""
    if device.type != "cuda":
        return None
    if not _Loaded.asked:
        _Loaded.function = load_flash3(torch.cuda.get_device_capability(device))
        _Loaded.asked = True
    return _Loaded.function


def load_flash3(capability: tuple[int, int]) -> Flash3 | None:
    """The function for a chip of that compute capability; why there is none is logged."""
    if capability[0] != _HOPPER:
        return None
    if importlib.util.find_spec("kernels") is None:
        _LOG.info("attention uses torch's kernels: `uv pip install kernels` gets FlashAttention-3")
        return None
    try:
        kernels = importlib.import_module("kernels")
        function: Flash3 = kernels.get_kernel(_REPOSITORY, version=_VERSION).flash_attn_func
    except _FAILURES as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        _LOG.warning("no FlashAttention-3, attention uses torch's kernels (%s)", reason)
        return None
    _LOG.info("attention uses FlashAttention-3")
    return function


def flash3_attention(flash3: Flash3, q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """Causal attention to `window` positions before each; shapes as in `causal_attention`."""
    out = flash3(q, k, v, causal=True, window_size=(window, 0))
    result: Tensor = out[0] if isinstance(out, tuple) else out  # some builds add the log-sum-exp
    return result
