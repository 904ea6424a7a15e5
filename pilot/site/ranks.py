"""The ranks of one worker group as torch sees them: rank, device, and the collectives between them.

CPU groups use gloo. CUDA groups use nccl, and a gloo group beside it for decisions: a one-integer collective
on the CPU costs microseconds and does not wait for the GPU's queue. The ranks meet through a file in the
group's private directory, so no port is opened for that.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import autodetect_device_type, compile_cache
from nanochat.gpus import prepare_device

# The other ranks wait while rank 0 packs rows, or for the next order. torch's default of 30 minutes may be too
# short for that, and is not needed: when a rank fails, the supervisor ends them all at once.
_CONTROL_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """One process's place in its group. Every method is a collective, which all ranks must call."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None
    threads: int = field(default_factory=torch.get_num_threads)  # a fair share of the cores

    @staticmethod
    def join(directory: Path, *, device_type: str) -> "Ranks":
        """Join the group that the supervisor describes in the environment; `device_type` may be "auto"."""
        rank, world_size = int(os.environ["PILOT_RANK"]), int(os.environ["PILOT_WORLD_SIZE"])
        kind = autodetect_device_type() if device_type == "auto" else device_type
        device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
        prepare_device(device, cache=compile_cache())
        if kind == "cuda":
            torch.cuda.set_device(device)
        control: dist.ProcessGroup | None = None
        if world_size > 1:
            # all ranks are on this machine: never resolve a host name, never leave the loopback
            loopback = "lo0" if sys.platform == "darwin" else "lo"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            dist.init_process_group(
                "nccl" if kind == "cuda" else "gloo",
                init_method=f"file://{directory}/rendezvous-{os.getppid()}",
                rank=rank,
                world_size=world_size,
            )
            control = dist.new_group(  # type: ignore[assignment]  # we are a member
                backend="gloo", timeout=_CONTROL_TIMEOUT
            )
        threads = max(1, torch.get_num_threads() // world_size)
        return Ranks(rank, world_size, device, control, threads)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, decision: bool) -> bool:
        """Rank 0's `decision`, on all ranks."""
        if self.world_size == 1:
            return decision
        flag = torch.tensor([int(decision)], dtype=torch.int32)
        dist.broadcast(flag, src=0, group=self.control)
        return bool(flag.item())

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's JSON value, on all ranks (as text: nothing is unpickled)."""
        if self.world_size == 1:
            return value
        text = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(text)])
        dist.broadcast(size, src=0, group=self.control)
        buffer = torch.empty(int(size.item()), dtype=torch.uint8)
        if self.first:
            buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(buffer, src=0, group=self.control)
        return json.loads(bytes(buffer.numpy()))

    def load_weights(
        self, parameters: Iterable[tuple[str, Tensor]], weights: Mapping[str, Tensor]
    ) -> None:
        """Copy rank 0's `weights` (fp32, CPU) into the parameters of all ranks, cast to theirs."""
        for name, parameter in parameters:
            if self.first:
                parameter.data.copy_(weights[name])
            if self.world_size > 1:
                dist.broadcast(parameter.data, src=0)

    def sum(self, values: list[float]) -> list[float]:
        """Sums over ranks, in float64."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def leave(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()
