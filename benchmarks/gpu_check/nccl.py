"""The collectives that a group uses, with one rank: NCCL with gloo beside it, by a rendezvous file."""

import os
import time

import torch
import torch.distributed as dist

from benchmarks.gpu_check.verdict import Setup, Verdict
from pilot.site.ranks import Ranks


def check(setup: Setup, verdict: Verdict) -> None:
    """All arguments are those of `Ranks.join`, with a world of one rank forced into a group."""
    device = torch.device(setup.device, 0) if setup.cuda else torch.device("cpu")
    began = time.monotonic()
    dist.init_process_group(
        "nccl" if setup.cuda else "gloo",
        init_method=f"file://{setup.directory}/rendezvous-{os.getpid()}",
        rank=0,
        world_size=1,
    )
    control = dist.new_group(backend="gloo")
    assert not isinstance(control, int) and control is not None
    rows = setup.size(65536, 64)
    for dtype in (torch.bfloat16, torch.float32):
        _collectives(rows, setup.size(1280, 32), dtype, device, verdict)
    ranks = Ranks(0, 1, device, control)
    verdict.that(ranks.agree(True), "rank 0's decision is lost")
    dist.barrier()
    dist.destroy_process_group()
    verdict.note("init_and_collectives_s", time.monotonic() - began)


def _collectives(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, verdict: Verdict
) -> None:
    start = torch.randn((rows, width), device=device).to(dtype)
    received = start.clone()
    dist.broadcast(received, src=0)
    reduced = start.clone()
    dist.all_reduce(reduced)
    scattered, gathered = torch.empty_like(start), torch.empty_like(start)
    first = dist.reduce_scatter_tensor(scattered, start, async_op=True)
    second = dist.all_gather_into_tensor(gathered, start, async_op=True)
    assert first is not None and second is not None
    first.wait()
    second.wait()
    for name, result in (
        ("broadcast", received),
        ("all_reduce", reduced),
        ("reduce_scatter", scattered),
        ("all_gather", gathered),
    ):
        verdict.that(bool(torch.equal(result, start)), f"{name} in {dtype} is not exact")
