"""What several checks measure with: errors against a reference, milliseconds, peaks of a card."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of `exact`, in float64."""
    exact = exact.detach().double()
    return float((ours.detach().double() - exact).norm() / exact.norm().clamp_min(1e-300))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(function: Callable[[], Any], device: torch.device, *, repeat: int = 10) -> float:
    """The median of `repeat` calls, by events on a GPU; two calls before are not counted."""
    for _ in range(2):
        function()
    synchronize(device)
    times = []
    if device.type != "cuda":
        for _ in range(repeat):
            began = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)
    for _ in range(repeat):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        function()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


class Stages:
    """Milliseconds of parts of a step: by events on a GPU, which nothing waits for, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            before = self._mark()
            result = function(*args, **options)
            self._spans.append((name, before, self._mark()))
            return result

        return timed

    def take(self) -> dict[str, float]:
        """Milliseconds by name since the last call."""
        synchronize(self._device)
        spent: dict[str, float] = {}
        for name, before, after in self._spans:
            cuda = self._device.type == "cuda"
            ms = before.elapsed_time(after) if cuda else 1e3 * (after - before)
            spent[name] = spent.get(name, 0.0) + ms
        self._spans = []
        return spent

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def memory_gb(device: torch.device) -> dict[str, float]:
    """Peaks since the last reset, in 10^9 bytes."""
    if device.type != "cuda":
        return {"peak_gb": 0.0, "reserved_gb": 0.0}
    return {
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
    }
