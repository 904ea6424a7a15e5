"""Other ways than the chosen ones, to see what a choice is worth: `--variants head=… sdpa=…`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from nanochat.kernels import attention, head
from nanochat.kernels.choices import HeadPasses, Kernel

HEAD = {"eager": HeadPasses.EAGER, "fused": HeadPasses.FUSED}
SDPA = {"flash": Kernel.CAUSAL, "cudnn": Kernel.CUDNN}


def head_variants(device_type: str) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """By name, each form of the head's passes that this device has."""
    names = ("eager", "fused") if device_type == "cuda" else ("eager",)
    return {name: lambda name=name: using({"head": name}) for name in names}  # type: ignore[misc]  # a default argument binds the name


@contextlib.contextmanager
def using(options: Mapping[str, str]) -> Iterator[None]:
    """What `options` say, in place of what choices.py would; keys that are no variants are left alone."""
    heads: Any = head
    kernels: Any = attention
    before = heads.choose_head_passes, kernels.choose_kernel
    if name := options.get("head"):
        heads.choose_head_passes = lambda **_: HEAD[name]
    if sdpa := options.get("sdpa"):
        choose = before[1]

        def chosen(**facts: Any) -> Kernel:
            kernel: Kernel = choose(**facts)
            return SDPA[sdpa] if kernel in SDPA.values() else kernel

        kernels.choose_kernel = chosen
    try:
        yield
    finally:
        heads.choose_head_passes, kernels.choose_kernel = before
