"""What a round sends: its pseudo-gradient in the run's form, and the rest of that for the next one.

The rest (`wire/codec.py`) advances in two phases, as the inner optimizer's state does. A reply may be lost or
refused after it was encoded, and then its rest is that of an update which the model has never seen. So the rest
of a round is a file named by the fence of its order, and the next order names the fence that was merged last:
that one's rest is added, or none if it is not here. Where the disk fails, a rest is lost, never a round.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat.common import get_base_dir
from nanochat.files import atomic_path
from nanochat.gpt import GPT
from pilot.wire.codec import DECAY, Loss, encode, form_of
from pilot.wire.messages import Fence, Part, TrainOrder

log = logging.getLogger("pilot.site")

Rest = Callable[[str], Tensor | None]


def pseudo_gradient(
    model: GPT, weights: dict[str, Tensor], *, keep: bool = False
) -> dict[str, Tensor]:
    """Global minus local weights, fp32, in the memory of `weights` (fp32) where it can be; these are taken,
    unless they are to `keep` their values.

    The start is rounded as the model's own tensors are: a bf16 table that was not trained has a
    pseudo-gradient of exactly zero.
    """
    update = {}
    for name, local in model.state_dict().items():
        start = (weights[name] if keep else weights.pop(name)).to(local.dtype).float()
        change = torch.empty_like(start) if keep else start
        update[name] = torch.sub(start, local.detach().float().cpu(), out=change)
    return update


def rest_dir(run: str, client: str) -> Path:
    """Where this site keeps the rests of `client` between the rounds of `run`."""
    return get_base_dir() / "runs" / run / "rest" / f"client-{quote(client, safe='')}"


class Encoder:
    """Encodes the updates of one client as `wire` (a value of `wire-up`), on rank 0 of its group."""

    def __init__(self, directory: Path, wire: str) -> None:
        self._directory, self._wire = directory, wire
        self.lost: float | None = None  # of what `encode` had to say, as `Loss.share`
        self._new: tuple[dict[str, Tensor], Fence] | None = None  # a rest that is not written yet

    def encode(
        self, update: dict[str, Tensor], order: TrainOrder, device: torch.device
    ) -> list[Part]:
        """The parts of `update` (fp32, CPU), to which `order` led, and of the rest of the last merged one.

        `update` becomes the new rest, for `keep`. All other rests are removed, except that one and those of
        earlier orders in this round, which may still be merged. It works on `device` if that is a GPU.
        """
        merged, fence = order.last_merged_fence, order.fence
        where = device if device.type == "cuda" else torch.device("cpu")
        loss = Loss()
        if self._wire not in DECAY:
            parts = encode(update, wire=self._wire, device=where, loss=loss)
            self.lost = loss.share
            return parts
        before = self._path(merged) if merged else None
        with _opened(before) as rest:
            parts = encode(update, wire=self._wire, rest=rest, device=where, loss=loss)
        self.lost = loss.share
        self._remove_all_but(before, fence)
        lossy = {n: t for n, t in update.items() if form_of(self._wire, t.shape) in DECAY}
        self._new = lossy, fence
        return parts

    def keep(self) -> None:
        """Write the rest that `encode` left, if there is one; a disk that refuses costs a warning."""
        if self._new is None:
            return
        (rest, fence), self._new = self._new, None
        path = self._path(fence)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file(rest, temporary)
        except (OSError, SafetensorError) as error:
            log.warning("Cannot save the rest of an update in %s: %s", path, error)

    def forget(self) -> None:
        """The run is over: remove everything."""
        self._new = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, fence: Fence) -> Path:
        name = f"{fence.term}-{fence.round_number}-{fence.lease_id}"
        return self._directory / f"{name}.safetensors"

    def _remove_all_but(self, kept: Path | None, fence: Fence) -> None:
        of_this_round = f"{fence.term}-{fence.round_number}-"
        # and the temporary files of killed processes, whose names begin with a dot
        for path in self._directory.iterdir() if self._directory.is_dir() else ():
            if path != kept and not path.name.startswith(of_this_round):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[Rest]:
    """The tensors of a file by name, one at a time; no tensors if there is no such file, or it is damaged."""
    with contextlib.ExitStack() as stack:
        file = None
        try:
            file = stack.enter_context(safe_open(path, framework="pt")) if path else None
        except FileNotFoundError:
            log.info("The rest of the last update is not on this site; starting without")
        except (OSError, SafetensorError) as error:
            log.warning(
                "%s is damaged; starting without the rest of the last update: %s", path, error
            )
        names = frozenset(file.keys()) if file is not None else frozenset()
        yield lambda name: file.get_tensor(name) if file is not None and name in names else None
