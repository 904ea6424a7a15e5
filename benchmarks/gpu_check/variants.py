"""Other ways than the chosen ones, to see what a choice is worth: `--variants head=… sdpa=…`."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nanochat.kernels import head
from nanochat.kernels.choices import HeadPasses

HEAD = {"eager": HeadPasses.EAGER, "fused": HeadPasses.FUSED}
SDPA = {
    "flash": False,
    "cudnn": True,
}  # whether torch may take cuDNN's kernel, which it then prefers


def head_variants(device_type: str) -> tuple[str, ...]:
    """Each form of the head's passes that this device has."""
    return ("eager", "fused") if device_type == "cuda" else ("eager",)


@contextlib.contextmanager
def using(options: Mapping[str, str]) -> Iterator[None]:
    """What `options` say, in place of what choices.py would; keys that are no variants are left alone."""
    module: Any = head
    before, cudnn = module.choose_head_passes, torch.backends.cuda.cudnn_sdp_enabled()
    if "head" in options:
        form = HEAD[options["head"]]
        module.choose_head_passes = lambda **_: form
    if "sdpa" in options:
        torch.backends.cuda.enable_cudnn_sdp(SDPA[options["sdpa"]])
    try:
        yield
    finally:
        module.choose_head_passes = before
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
