"""Refused updates, kept for people to look at: one pair of files per update, never read by the program."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nanochat.files import atomic_path, atomic_write_json
from pilot.faults import fault_point
from pilot.run.state import MergedReply
from pilot.tensor_file import write_tensors
from pilot.wire.jsonable import jsonable
from pilot.wire.messages import TrainReply, to_json

Answered = TrainReply | MergedReply
MAX_KEPT = 100  # updates; a client that sends junk for weeks must not fill the disk

log = logging.getLogger("pilot")


def keep_refused(
    directory: Path, reply: Answered, client: str, update: Mapping[str, Tensor], reason: str
) -> None:
    """Write `directory`/round-000003-<client>-lease-00000017.json and .safetensors (if there are tensors).

    A disk that does not take them costs one warning: the run continues, and the update is refused all the same.
    So does a directory that holds MAX_KEPT of them.
    """
    fence = reply.fence
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", client)[:80]
    name = f"round-{fence.round_number:06d}-{safe}-lease-{fence.lease_id:08d}"
    said = to_json(reply) if isinstance(reply, TrainReply) else reply.to_json()
    facts = {"client": client, "reason": reason, "reply": said, "tensors": len(update)}
    try:
        fault_point("quarantine.write")
        directory.mkdir(exist_ok=True)
        if sum(1 for _ in directory.glob("*.json")) >= MAX_KEPT:
            raise OSError(f"{directory} holds {MAX_KEPT} already: move them away to keep more")
        if update:
            with atomic_path(directory / f"{name}.safetensors") as path:
                write_tensors(path, update)
        fault_point("quarantine.tensors-written")
        atomic_write_json(directory / f"{name}.json", jsonable(facts))
        fault_point("quarantine.written")
    except (OSError, ValueError, TypeError) as error:
        log.warning("cannot keep the refused update of %s: %s", client, error)
