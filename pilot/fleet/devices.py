"""Which GPUs and cores each client of a machine has."""

import os
from collections.abc import Mapping

from pilot.errors import PilotError
from pilot.launch.connection import count_gpus

_VISIBLE, _THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
CPU_CLIENTS = 2  # without GPUs and without a word: as many as a run waits for by default


def shares(clients: int | None, gpus_per_client: int | None, *, cpu: bool) -> list[dict[str, str]]:
    """Variables for each client of this machine, so that no two have the same GPU.

    Without a word there is a client for each GPU, or CPU_CLIENTS where there is none. Raises PilotError if
    there are not enough GPUs, or if the options contradict each other.
    """
    if clients is not None and clients < 0:
        raise PilotError(f"--clients is {clients}: it must be 0 or more")
    if gpus_per_client is not None and (cpu or gpus_per_client < 1):
        raise PilotError("--gpus-per-client takes 1 or more, and not together with --cpu")
    here = 0 if cpu else count_gpus()
    if not here and gpus_per_client is None:
        clients = CPU_CLIENTS if clients is None else clients
        return [_of_cpus(clients, os.environ) for _ in range(clients)]
    each = gpus_per_client or (max(1, here // clients) if clients else 1)
    clients = max(1, here // each) if clients is None else clients
    if clients * each > here:
        raise PilotError(
            f"{clients} clients with {each} GPUs each need {clients * each}, and this machine has {here}: "
            "ask for fewer, or for --cpu"
        )
    devices = _devices(here)
    return [{_VISIBLE: ",".join(devices[i * each : (i + 1) * each])} for i in range(clients)]


def _of_cpus(clients: int, env: Mapping[str, str]) -> dict[str, str]:
    """No GPU, and as many threads as cores are there for each."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return {_VISIBLE: "", _THREADS: env.get(_THREADS) or str(max(1, cores // clients))}


def _devices(here: int) -> list[str]:
    visible = os.environ.get(_VISIBLE)
    if visible is None:
        return [str(i) for i in range(here)]
    return [device.strip() for device in visible.split(",")]
