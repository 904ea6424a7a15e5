"""How large a run is: what it takes of GPUs, of memory and of disks, on its server and on a site.

Tensors are counted exactly. What the processes around them hold is a sum of copies, read from the code and from
Flower's (docs/flower.md), and `_PYTHON` or `_TORCH` for each process; files are without their headers.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nanochat.memory import DeviceBytes, device_bytes
from nanochat.rows.packing import row_dtype
from pilot import plan
from pilot.config import RunConfig
from pilot.wire.codec import DECAY, form_of, message_bytes
from pilot.wire.steps import FULL

_FP32 = 4
_OUTER_STATES = {"fedavg": 0, "nesterov": 1, "adam": 2}  # of the model's size, in fp32
_STUCK_AT_ONCE = 4  # replies beside the one that a server pulls (`server/puller.py`)
_PYTHON, _TORCH = 500 << 20, 3 << 30  # a process with Flower; a rank with torch and a CUDA context
# NCCL's guide for containers: `--shm-size=1g`. Docker's own default of 64 MB is too small for it.
_NCCL = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All in bytes, but for `parameters`; of a run with `clients` sites of `gpus` ranks each.

    Disks are without the system, the environment (7 GB) and the shards. `rows_disk`: the row cache of a
    site that trains on all tokens of the run. `shm`: shared memory of a site's container (`--shm-size`);
    `simulation_shm`: of one that simulates all clients on Ray.
    """

    parameters: int
    gpu: DeviceBytes
    order: int  # the model, as a site gets it that holds none
    step: int  # what it gets else
    reply: int  # a pseudo-gradient, as it travels
    spilled: int  # the same on the server's disk
    snapshot: int
    inner_state: int  # of all ranks of a site
    server_app_memory: int
    superlink_memory: int
    server_disk: int
    supernode_memory: int
    client_app_memory: int
    ranks_memory: int
    site_disk: int
    rows_disk: int
    shm: int
    simulation_shm: int

    @property
    def server_memory(self) -> int:
        return self.server_app_memory + self.superlink_memory

    @property
    def site_memory(self) -> int:
        return self.supernode_memory + self.client_app_memory + self.ranks_memory

    def to_json(self) -> dict[str, Any]:
        sums = {"server_memory": self.server_memory, "site_memory": self.site_memory}
        return asdict(self) | sums | {"gpu": asdict(self.gpu) | {"total": self.gpu.total}}


def sizes(
    config: RunConfig,
    *,
    rows: int,
    gpus: int = 1,
    clients: int = 2,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> Sizes:
    """Of a run of `config` with `clients` sites of `gpus` GPUs each, which take `rows` rows at once.

    Raises nanochat.errors.UserError for a shape that the architecture can't have.
    """
    model = plan.build_model(config, device=torch.device("meta"), compute_dtype=compute_dtype)
    optimizer = plan.make_optimizer(config, model)
    shapes = [tensor.shape for tensor in model.state_dict().values()]
    parameters = sum(map(math.prod, shapes))
    order = spilled = _FP32 * parameters
    reply = message_bytes(shapes, wire=config.wire_up)
    outer = _OUTER_STATES[config.outer_optimizer] * spilled
    step, mirror, residual = order, 0, 0
    if config.wire_down != FULL:
        step, mirror = message_bytes(shapes, wire=config.wire_down), order
        lossy = [shape for shape in shapes if form_of(config.wire_down, shape) in DECAY]
        residual = _FP32 * sum(map(math.prod, lossy))
    history = config.mirror_history * step if mirror else 0
    snapshot = spilled + outer + residual + history
    per_rank = optimizer.state_bytes(gpus)
    tokens = plan.total_tokens(config)
    row_bytes = (config.sequence_len + 1) * row_dtype(config.vocab_size).itemsize
    largest = _FP32 * max(map(math.prod, shapes))
    # the weights; a reply in Flower's chunks, its largest tensor joined and decoded, and what has come of those
    # that are stuck on their way; or the version before, when a merge is taken back
    pulled = min(clients, 1 + _STUCK_AT_ONCE) * reply + 2 * largest
    server_app = spilled + max(spilled, pulled)
    # the outer step before, in bf16, and the last step as clients get it
    server_app += spilled // 2 + (step if mirror else 0)
    # rank 0: model and update in fp32, the update as it is sent if that is another form, and the mirror
    rank_0 = order + spilled + (reply if reply != spilled else 0) + mirror
    return Sizes(
        parameters=parameters,
        gpu=device_bytes(model, optimizer, rows=rows, world_size=gpus),
        order=order,
        step=step,
        reply=reply,
        spilled=spilled,
        snapshot=snapshot,
        inner_state=gpus * per_rank,
        server_app_memory=server_app + _PYTHON,
        superlink_memory=order + clients * reply + _PYTHON,
        # the snapshots that are kept and the next one, replies (with `quarantine` those of the last merge,
        # too), and at the end model and checkpoint
        server_disk=(config.snapshot_keep + 1) * (snapshot - history)
        + history
        + (1 + config.quarantine) * clients * spilled
        + 2 * spilled,
        supernode_memory=2 * order + _PYTHON,
        # below a bare SuperNode, where Flower puts the order together
        client_app_memory=max(2 * order, reply) + largest + _PYTHON,
        ranks_memory=rank_0 + gpus * _TORCH,
        # the inner state of the round and the one that it began with; the mirror, and the next one
        site_disk=(2 * gpus * per_rank if config.inner_state == "keep" else 0) + 2 * mirror,
        rows_disk=-(-tokens // config.sequence_len) * row_bytes,
        shm=_NCCL if gpus > 1 else 0,
        simulation_shm=clients * (order + reply),
    )
