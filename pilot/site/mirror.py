"""The mirror: the global model that this client holds, so that an order need only say what has changed.

A resident group has it in memory (rank 0 only: the others get parameters), and behind that it lies on the
site's disk, beside the inner state, written whole when the reply has gone. It is known by its digest alone. One
that is of another version, another run, or damaged fits no order, and the server is asked again for what is
needed: no client trains from other bits than the rest.
"""

import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.common import get_base_dir
from nanochat.files import atomic_path
from pilot.config import RunConfig
from pilot.errors import PilotError
from pilot.wire.codec import decode
from pilot.wire.digests import is_digest
from pilot.wire.messages import Part, TrainOrder
from pilot.wire.steps import FULL, apply_step, by_number, digest_of

log = logging.getLogger("pilot.site")


class MirrorError(PilotError):
    """What an order brought is not the model that it names."""


def mirror_path(run: str, client: str) -> Path:
    """Where this site keeps the mirror of `client` between the rounds of `run`."""
    return get_base_dir() / "runs" / run / "mirror" / f"client-{quote(client, safe='')}.safetensors"


def digest_on_disk(path: Path) -> str:
    """The digest of the mirror at `path`, as it was when it was written; "" if there is none to be read."""
    try:
        with safe_open(path, framework="pt") as file:
            digest = str((file.metadata() or {}).get("digest", ""))
            return digest if is_digest(digest) else ""
    except FileNotFoundError:
        return ""
    except (OSError, SafetensorError) as error:
        log.warning("The mirror %s is damaged: %s", path, error)
        return ""


class Mirror:
    """The global model in the memory of rank 0 of a group, of whichever client and run came last."""

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}
        self._digest = ""

    def take(self, order: TrainOrder, parts: Sequence[Part]) -> dict[str, Tensor] | None:
        """The model (fp32, CPU) that `order` names, from its `parts` and what is held; None if that does not
        fit.

        It must not be changed, unless the run's `wire-down` is full: then it is the caller's. Raises CodecError
        for parts that are no model or no steps, MirrorError for a whole model of another digest.
        """
        keeps = order.config.get("wire-down", FULL) != FULL
        if order.whole:
            self._drop()
            weights = decode(parts)
            if order.digest and digest_of(weights) != order.digest:
                raise MirrorError("the model of this order arrived damaged: its digest is another")
            if keeps:
                self._weights, self._digest = weights, order.digest
            return weights
        fitting = [*order.steps, order.digest]
        path = mirror_path(order.fence.run, order.client)
        if self._digest not in fitting and digest_on_disk(path) in fitting:
            self._load(path)
        if self._digest not in fitting:
            return None
        self._follow(order, parts, path)
        return self._weights if self._digest else None

    def held(self, order: TrainOrder) -> str:
        """The digest of what the client of `order` has, "" if it has nothing."""
        return self._digest or digest_on_disk(mirror_path(order.fence.run, order.client))

    def keep(self, order: TrainOrder) -> None:
        """Write what `order` was trained from, or remove it all if the run is over; a disk that refuses costs a
        warning, and the whole model the next time if this group ends before."""
        path = mirror_path(order.fence.run, order.client)
        for stray in path.parent.glob(f".{glob.escape(path.name)}.*"):  # of killed processes
            stray.unlink(missing_ok=True)
        if order.run_is_over:
            self._drop()
            path.unlink(missing_ok=True)
            return
        if not self._digest or self._digest == digest_on_disk(path):
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file(self._weights, temporary, metadata={"digest": self._digest})
        except (OSError, SafetensorError) as error:
            log.warning("Cannot save the mirror of the global model in %s: %s", path, error)

    def _follow(self, order: TrainOrder, parts: Sequence[Part], path: Path) -> None:
        """Take the steps from the model that is held to the one of `order`; nothing is held if that fails.

        Raises CodecError for parts that are none."""
        steps, before = by_number(parts, len(order.steps)), self._digest
        if before == order.digest:
            return
        self._digest = ""  # half a step is no model
        for step in steps[order.steps.index(before) :]:
            apply_step(self._weights, step)
        if digest_of(self._weights) == order.digest:
            self._digest = order.digest
            return
        log.warning("The mirror of the global model is not what it should be: asking for the whole")
        self._drop()
        if digest_on_disk(path) == before:
            path.unlink(missing_ok=True)

    def _load(self, path: Path) -> None:
        """Hold what lies on disk, if it is what it says."""
        self._drop()
        try:
            digest = digest_on_disk(path)
            weights = load_file(path)
            if digest_of(weights) == digest:
                self._weights, self._digest = weights, digest
                return
            log.warning("The mirror %s is damaged: asking for the whole model", path)
            path.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            log.warning("The mirror %s cannot be read: %s", path, error)

    def _drop(self) -> None:
        self._weights, self._digest = {}, ""


def keeps_mirror(config: RunConfig) -> bool:
    """Whether clients of a run hold the model between rounds."""
    return config.wire_down != FULL


def held_after(order: TrainOrder, config: RunConfig) -> str | None:
    """The digest of what this client holds after `order`; None: it holds nothing between rounds."""
    if not keeps_mirror(config):
        return None
    return "" if order.run_is_over else order.digest
