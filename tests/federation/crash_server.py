"""Servers that can be killed for real, quickly: `python crash_server.py` imports everything once, then forks
one server process for each job that it reads.

A job is a line of JSON: base (NANOCHAT_BASE_DIR), redis (URL), fault (for PILOT_FAULT, "": none), seed (of the
order in which replies arrive), spoilt (a round whose merge is to be taken back), config (run-config keys). The
answer is a line, too: status (exit code, minus the signal that ended it) and the last words of the log. The
process leads the run just as `server_app.main` does, over two scripted sites.
"""

import json
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, RecordDict

from pilot import server_app
from pilot.errors import PilotError
from pilot.faults import VARIABLE
from pilot.run.directory import open_run_dir
from pilot.segment import Score
from pilot.server.console import configure_logging
from pilot.site.mirror import Mirror, digest_on_disk, mirror_path
from pilot.site.update import Encoder, rest_dir
from pilot.wire.messages import TrainOrder, TrainReply, from_header, to_header
from pilot.wire.records import from_records, to_records

from .local_grid import LocalGrid
from .scripted import FINGERPRINTS, FastClock, ScriptedSite, needs_model, scripted_config

NAMES = ("a", "bb")
FAILED = 3  # exit code: a PilotError, told in a sentence
REFUSED_ROUND = 2  # in which the second site's update is not finite
_LIMIT_S = 60.0
_SPEED = 50.0  # of the clock: pauses of a quarter of a second are most of a run's time here


class _Grid(LocalGrid):
    """Knows how many replies of a round the server has taken: so either site can be the second."""

    first_round = 0
    trained = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.trained += sum(reply.metadata.message_type == "train" for reply in replies)
        return replies

    def wait_for_first(self, round_number: int) -> None:
        """Return once the server has a reply of that round, or soon if none comes."""
        deadline = time.monotonic() + 2.0
        before = len(NAMES) * (round_number - self.first_round)
        while self.trained <= before and time.monotonic() < deadline:
            time.sleep(0.002)


class _Site(ScriptedSite):
    """A scripted site for a real model: its update has the names and shapes of the weights it is sent."""

    seed = 0
    spoilt = (
        0  # the round whose merge makes the model much worse, as this site finds in the next one
    )
    grid: "_Grid"
    encoder: Encoder
    mirror: Mirror

    def held(self, run: str) -> str:
        return digest_on_disk(mirror_path(run, self.name))

    def __call__(self, kind: str, content: RecordDict) -> RecordDict:
        header, parts = from_records(content)
        order = from_header(header)
        if not isinstance(order, TrainOrder):
            return super().__call__(kind, content)
        number = order.fence.round_number
        self.grid.first_round = self.grid.first_round or number
        second = random.Random(f"{self.seed} {number}").choice(NAMES)
        if self.name == second and not self.spoilt:  # where one of them may be left out
            self.grid.wait_for_first(number)
        weights = self.mirror.take(order, parts)
        if weights is None:
            unfit = needs_model(order, self.mirror)
            return to_records(to_header(unfit) | {"node_name": self.name}, [])
        reply, rows = self._train(order)
        update: dict[str, torch.Tensor] = {}
        if rows:
            first = reply.consumed[0]
            generator = torch.Generator().manual_seed(1000 * first.shard + first.first_row)
            shapes = sorted((name, t.shape) for name, t in weights.items())
            update = {
                name: 1e-4 * torch.randn(shape, generator=generator) for name, shape in shapes
            }
            self._spoil(order, update)
        parts = self.encoder.encode(update, order, torch.device("cpu")) if rows else []
        self.encoder.keep()
        self.mirror.keep(order)
        reply = replace(reply, mirror="" if order.run_is_over else order.digest)
        return to_records(to_header(reply) | {"node_name": self.name}, parts)

    def _train(self, order: TrainOrder) -> tuple[TrainReply, dict[str, torch.Tensor]]:
        """Sums that depend on the order in which one adds them up, and never on when."""
        reply, rows = super()._train(order)
        values = vars(reply) | {"loss_nats": reply.tokens * (0.1 + order.fence.lease_id / 3)}
        worse = 2.0 if self.spoilt and order.fence.round_number == self.spoilt + 1 else 1.0
        nats = worse * (1.4 + len(self.name) / 70)
        values["scores"] = [Score(f, e, nats * (e - f), 2 * (e - f)) for f, e in order.eval_pieces]
        return TrainReply(**values), rows

    def _spoil(self, order: TrainOrder, update: dict[str, torch.Tensor]) -> None:
        if self.name == NAMES[1] and order.fence.round_number == REFUSED_ROUND:
            next(iter(update.values())).view(-1)[0] = float("nan")


def lead(job: dict[str, Any]) -> None:
    """Lead the run of `job` to its end, in this process."""
    os.environ["NANOCHAT_BASE_DIR"] = job["base"]
    if job["fault"]:
        os.environ[VARIABLE] = job["fault"]
    fingerprints = FINGERPRINTS | {"validation shard": "0"}
    config = scripted_config(**job["config"])
    sites = [_Site(name, fingerprints=fingerprints) for name in NAMES]
    grid: Any = _Grid({100 + i: site for i, site in enumerate(sites)})
    for site in sites:
        site.seed, site.grid, site.spoilt = job["seed"], grid, job.get("spoilt", 0)
        site.mirror = Mirror()
        site.encoder = Encoder(rest_dir(config.run_name, site.name), config.wire_up)
    with open_run_dir(config.run_name) as run_dir:
        stopped = threading.Event()
        clock = FastClock(speed=_SPEED)
        server_app._lead(
            config, grid, run_dir, job["redis"], simulation=True, stopped=stopped, clock=clock
        )


def fork(job: dict[str, Any]) -> tuple[int, str]:
    """(exit code, minus the signal that ended it; the log) of a process of its own that leads `job`."""
    log = Path(job["base"]) / "server.log"
    pid = os.fork()
    if pid == 0:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        _exit_after(job)
    deadline = time.monotonic() + _LIMIT_S
    while True:
        ended, raw = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(raw), log.read_text(encoding="utf-8")
        if time.monotonic() > deadline:
            os.kill(pid, 9)
        time.sleep(0.005)


def _exit_after(job: dict[str, Any]) -> None:
    """End this process with what became of `job`; nothing of the parent's is closed or flushed twice."""
    status = 1
    try:
        lead(job)
        status = 0
    except PilotError as error:
        print(f"{type(error).__name__}: {error}")
        status = FAILED
    except Exception:  # noqa: BLE001 - its traceback is what the failing test shows
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    configure_logging()
    print("ready", flush=True)
    for line in sys.stdin:
        status, log = fork(json.loads(line))
        print(json.dumps({"status": status, "log": log}), flush=True)


if __name__ == "__main__":
    main()
