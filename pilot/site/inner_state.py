"""The inner optimizer's state from round to round, in two phases.

A reply may be lost or refused after its client has trained, and then no trace of that training may
stay in the client's Muon and AdamW either. So what a round leaves is only *pending*: a file named
by the fence of the order. The next order says which fence of this client was merged last; if that is
the pending one, it is what training goes on from, else the state that the lost round itself began
with. Both are kept on this site's disk, a file a rank, so that they outlive the worker group. What
fits neither (another machine, another number of processes, a lost disk) starts anew.
"""

import logging
import shutil
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.common import get_base_dir
from nanochat.files import atomic_path
from nanochat.optim import MuonAdamW
from pilot.site.ranks import Ranks
from pilot.wire.messages import Fence

log = logging.getLogger("pilot.site")


def inner_state_dir(run: str, client: str) -> Path:
    """Where this site keeps what `client` carries from round to round of `run`."""
    return get_base_dir() / "runs" / run / "inner" / f"client-{quote(client, safe='')}"


class InnerState:
    """The states that the ranks of one group keep in `directory`; all ranks call it together."""

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        self._directory, self._ranks = directory, ranks

    def restore(self, optimizer: MuonAdamW, merged: Fence | None, fence: Fence) -> bool:
        """Put back the state that the order of `merged` (None: none was merged) left.

        Everything else is removed but what earlier orders of the round of `fence` left, which may be merged
        yet. False: there is none, and the optimizer stays as it is, on all ranks alike.
        """
        wanted = self._path(merged) if merged else None
        found = self._read(wanted) if wanted else None
        if found is not None and not optimizer.fits(_nested(found)):
            log.warning("%s is of an older version and is passed over", wanted)
            found = None
        everybody = self._ranks.sum([float(found is not None)])[0] == self._ranks.world_size
        self._remove_all_but(wanted if everybody else None, fence)
        if found is None or not everybody:
            if merged and self._ranks.first:
                log.info("The state of the inner optimizer is not on this site: it starts anew")
            return False
        optimizer.load_state_dict(optimizer.state_dict() | {"state": _nested(found)})
        return True

    def keep(self, optimizer: MuonAdamW, fence: Fence) -> None:
        """Write what the round of `fence` leaves beside what it began with.

        A disk that does not take it costs one warning and the state, never the round: training
        starts anew after it then.
        """
        path = self._path(fence)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file(_flat(optimizer), temporary)
        except (OSError, SafetensorError) as error:
            log.warning("The state of the inner optimizer can't be kept in %s: %s", path, error)

    def forget(self) -> None:
        """The run is over: remove everything."""
        if self._ranks.first:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, fence: Fence) -> Path:
        name = f"{fence.term}-{fence.round_number}-{fence.lease_id}"
        rank, world_size = self._ranks.rank, self._ranks.world_size
        return self._directory / f"{name}.rank{rank}of{world_size}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        try:
            return load_file(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged and is passed over: %s", path, error)
            return None

    def _remove_all_but(self, kept: Path | None, fence: Fence) -> None:
        """Each rank removes its own files, rank 0 also those of a group of another size."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        of_this_round = f"{fence.term}-{fence.round_number}-"
        # half-written ones of killed processes too: their names go on behind it
        for path in self._directory.glob("*.safetensors*") if self._directory.is_dir() else ():
            own = f".rank{rank}of{world_size}." in path.name
            other_size = f"of{world_size}." not in path.name
            if path.name.startswith(of_this_round):
                continue
            if path != kept and (own or (other_size and self._ranks.first)):
                path.unlink(missing_ok=True)


def _flat(optimizer: MuonAdamW) -> dict[str, Tensor]:
    """This rank's shard of the state as named tensors; counts as 0-d int64."""
    flat: dict[str, Tensor] = {}
    for number, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(int(value))
            flat[f"{number}.{name}"] = tensor.detach().cpu().contiguous()
    return flat


def _nested(flat: dict[str, Tensor]) -> dict[int, dict[str, Tensor | int]]:
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, tensor in flat.items():
        number, _, name = key.partition(".")
        value = tensor if tensor.dim() else int(tensor.item())
        state.setdefault(int(number), {})[name] = value
    return state
