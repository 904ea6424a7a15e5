"""Other ways than the chosen ones, to see what a choice is worth: `--variants head=… sdpa=…`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from nanochat import attention, head
from nanochat.choices import HeadPasses, Kernel

HEAD = {"eager": HeadPasses.EAGER, "fused": HeadPasses.FUSED}
SDPA = {"flash": Kernel.CAUSAL, "cudnn": Kernel.CUDNN}


def head_variants(device_type: str) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """By name, each form of the head's passes that this device has."""
    names = ("eager", "fused") if device_type == "cuda" else ("eager",)
    return {name: lambda name=name: using({"head": name}) for name in names}  # type: ignore[misc]  # a default argument binds the name


@contextlib.contextmanager
def using(options: Mapping[str, str]) -> Iterator[None]:
    """What `options` say, in place of what choices.py would; keys that are no variants are left alone."""
    modules: Any = (head, attention)
    before = head.choose_head_passes, attention.choose_kernel
    if name := options.get("head"):
        modules[0].choose_head_passes = lambda **_: HEAD[name]
    if name := options.get("sdpa"):
        wanted, choose = SDPA[name], attention.choose_kernel

        def chosen(**facts: Any) -> Kernel:
            kernel = choose(**facts)
            return wanted if kernel in SDPA.values() else kernel

        modules[1].choose_kernel = chosen
    try:
        yield
    finally:
        modules[0].choose_head_passes, modules[1].choose_kernel = before
