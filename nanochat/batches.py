"""From rows in the page cache to token ids on the device, through memory that is taken once."""

import numpy as np
import torch
from torch import Tensor

_HOST_BUFFERS = 2  # one is filled while the device copies from the other


class Batches:
    """Loads micro-batches of at most `max_rows` rows of `row_tokens` tokens to `device`.

    For CUDA they go through pinned memory in asynchronous copies, before the memory's next
    use but one; what `load` returns is then a tensor of its own. On the CPU it is the buffer itself,
    and valid until the next `load`.
    """

    def __init__(self, max_rows: int, row_tokens: int, *, device: torch.device) -> None:
        self._row_tokens, self._device = row_tokens, device
        self._cuda = device.type == "cuda"
        self._hosts: list[Tensor] = []
        self._copied: list[torch.cuda.Event] = []
        self._turn = 0
        self._make(max_rows)

    def load(self, rows: np.ndarray) -> Tensor:
        """rows: (n, row_tokens) of any integer type; returns (n, row_tokens) int64 on the device."""
        if len(rows) > len(self._hosts[0]):
            self._make(len(rows))
        turn = self._turn = (self._turn + 1) % len(self._hosts)
        if self._cuda:
            self._copied[turn].synchronize()
        host = self._hosts[turn][: len(rows)]
        np.copyto(host.numpy(), rows)
        if not self._cuda:
            return host if self._device.type == "cpu" else host.to(self._device)
        ids = host.to(self._device, non_blocking=True)
        self._copied[turn].record()
        return ids

    def _make(self, max_rows: int) -> None:
        """Buffers of `max_rows`; what is still being copied from the old ones is waited for."""
        for event in self._copied:
            event.synchronize()
        shape, count = (max_rows, self._row_tokens), _HOST_BUFFERS if self._cuda else 1
        self._hosts = [
            torch.empty(shape, dtype=torch.long, pin_memory=self._cuda) for _ in range(count)
        ]
        self._copied = [torch.cuda.Event() for _ in range(count)] if self._cuda else []
