"""The inner optimizer's state between rounds, in two phases.

A reply may be lost or refused after its client has trained, and then no trace of that training may stay in
the client's Muon and AdamW either. So the state after a round is only *pending*: a file named by the fence of
the order. The next order names the fence of this client that was merged last. If that is the pending one,
training continues from the pending state, otherwise from the state with which the lost round itself began.
Both are kept on this site's disk, one file per rank, so that they outlive the worker group. Where neither can
be used (another machine, another number of processes, a lost disk), the state starts fresh.
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
    """Where this site keeps the inner state of `client` between the rounds of `run`."""
    return get_base_dir() / "runs" / run / "inner" / f"client-{quote(client, safe='')}"


class InnerState:
    """The states of one group's ranks in `directory`; all ranks call each method together."""

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        self._directory, self._ranks = directory, ranks

    def restore(
        self,
        optimizer: MuonAdamW,
        merged: Fence | None,
        fence: Fence,
        *,
        holds: Fence | None = None,
    ) -> bool:
        """Put back the state that the order of `merged` (None: none was merged) left.

        `holds`: the order whose state `optimizer` has already, on this rank; then nothing is read. All other
        files are removed, except those of earlier orders in the round of `fence`, which may still be merged.
        Returns False, on all ranks alike, if there is no such state: the optimizer is then unchanged.
        """
        wanted = self._path(merged) if merged else None
        has_it = merged is not None and holds == merged
        found = self._read(wanted) if wanted and not has_it else None
        if found is not None and not optimizer.fits(_nested(found)):
            log.warning("%s was written by another version; skipping it", wanted)
            found = None
        here = has_it or found is not None
        everybody = self._ranks.sum([float(here)])[0] == self._ranks.world_size
        self._remove_all_but(wanted if everybody else None, fence)
        if not everybody:
            if merged and self._ranks.first:
                log.info("No saved inner-optimizer state on this site; starting fresh")
            return False
        if found is not None:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": _nested(found)})
        return True

    def keep(self, optimizer: MuonAdamW, fence: Fence) -> None:
        """Write the state after the order with `fence`, beside the one that it began with.

        A disk that refuses costs one warning and the state, which starts fresh in the next round, but never
        this round's work.
        """
        path = self._path(fence)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file(_flat(optimizer), temporary)
        except (OSError, SafetensorError) as error:
            log.warning("Cannot save the inner-optimizer state in %s: %s", path, error)

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
            log.warning("%s is damaged; skipping it: %s", path, error)
            return None

    def _remove_all_but(self, kept: Path | None, fence: Fence) -> None:
        """Each rank removes its own files, and rank 0 those of a group of another size, too."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        of_this_round = f"{fence.term}-{fence.round_number}-"
        # and the temporary files of killed processes, whose names have a suffix behind that
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
