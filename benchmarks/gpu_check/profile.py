"""One profiled step: which kernels take the time, and how long the GPU waits for the host."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType

from benchmarks.gpu_check.verdict import Verdict

_SHOWN = 15
_NAME = 90  # characters of a kernel's name


def profile_step(step: Callable[[], Any], verdict: Verdict, device: torch.device) -> None:
    if device.type != "cuda":
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    by_name: dict[str, float] = defaultdict(float)
    for start, end, name in spans:
        by_name[name] += end - start
    total = sum(by_name.values())
    if not total:
        verdict.note("profile", "the profiler saw no kernels")
        return
    whole = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    verdict.note("gpu_idle_percent", 100 * (1 - _covered(spans) / whole))
    top = sorted(by_name.items(), key=lambda item: -item[1])[:_SHOWN]
    verdict.note("kernels_percent", {name[:_NAME]: 100 * us / total for name, us in top})


def _covered(spans: list[tuple[float, float, str]]) -> float:
    """The length of the union: kernels on two streams may overlap."""
    covered, until = 0.0, float("-inf")
    for start, end, _ in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
