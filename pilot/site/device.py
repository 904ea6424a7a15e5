"""What all ranks of a group compute with: the dtype of matmuls, and the rows that a device takes at once."""

import torch

from nanochat.gpus import capability_of, device_rows
from nanochat.kernels import fp8
from nanochat.kernels.choices import default_compute_dtype, dtype_from_name
from pilot.config import RunConfig
from pilot.errors import PilotError
from pilot.site.ranks import Ranks
from pilot.site.rows import given_rows


def agree_on_device(config: RunConfig, ranks: Ranks, *, step_rows: int) -> tuple[torch.dtype, int]:
    """(dtype of matmuls, rows of a device): rank 0's, on all ranks; `step_rows` of all ranks.

    Raises PilotError on a rank whose GPU is of another kind than rank 0's: by itself it would choose
    other kernels, and perhaps tables of another dtype, which no collective can fill.
    """
    device = ranks.device
    check_fp8(config, device)
    capability = list(capability_of(device))
    own = {
        "dtype": str(default_compute_dtype(device.type)).removeprefix("torch."),
        "capability": capability,
        "rows": _rows(config, ranks, step_rows),
    }
    agreed = ranks.broadcast_json(own)
    if agreed["capability"] != capability:
        first, mine = (f"{major}.{minor}" for major, minor in (agreed["capability"], capability))
        raise PilotError(
            f"the GPUs of this site differ: rank 0 has compute capability {first}, rank {ranks.rank} "
            f"has {mine}. Set CUDA_VISIBLE_DEVICES to cards of one kind, and start a node for the others"
        )
    return dtype_from_name(agreed["dtype"]), int(agreed["rows"])


def check_fp8(config: RunConfig, device: torch.device) -> None:
    """Raise UserError if the run trains in fp8 and this machine's device cannot."""
    if not config.fp8:
        return
    fp8.check_fp8(
        device,
        default_compute_dtype(device.type),
        sequence_len=config.sequence_len,
        vocab_size=config.vocab_size,
    )


def _rows(config: RunConfig, ranks: Ranks, step_rows: int) -> int:
    return device_rows(
        given_rows(config.device_batch_size),
        device=ranks.device,
        sequence_len=config.sequence_len,
        rank_rows=-(-step_rows // ranks.world_size),
    )
