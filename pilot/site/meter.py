"""Loss, speed and seconds of a client's round, for heartbeats, the progress bar and the reply."""

import contextlib
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from nanochat.gpus import mfu, peak_flops
from pilot.site.ranks import Ranks
from pilot.site.stop import Progress

_LOSS_EMA = 0.9
_READ_EVERY_S = 1.0  # reading the loss waits for the device: no more often than this


class Seconds:
    """What a round's seconds were spent on, by the field of the reply that says so."""

    def __init__(self) -> None:
        self.by_field: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, field: str) -> Iterator[None]:
        """Add what the block takes to `field`, however it ends."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.by_field[field] = self.by_field.get(field, 0.0) + time.monotonic() - began_s


@contextlib.contextmanager
def progress_bar(label: str, *, shown: bool) -> Iterator["tqdm[object]"]:
    """A client's own progress bar, if it is to be `shown` and standard error is a terminal."""
    hidden = not (shown and sys.stderr.isatty())
    with tqdm(desc=label, unit="tok", unit_scale=True, disable=hidden) as bar:
        yield bar


class Meter:
    """The sum of nats of a round, read from the device now and then, and shown where people look.

    `token_flops`: of training on one token.
    """

    def __init__(
        self, ranks: Ranks, progress: Progress, bar: "tqdm[object]", *, token_flops: float
    ) -> None:
        self.nats = torch.zeros((), dtype=torch.float64)  # read so far, of this rank
        self._pending = torch.zeros((), device=ranks.device)  # not read yet
        self._pending_tokens = 0
        self._ranks, self._progress, self._bar = ranks, progress, bar
        self._began_s = self._read_at_s = time.monotonic()
        self._token_flops, self._peak = token_flops, peak_flops(ranks.device, ranks.world_size)

    def add(
        self, nats: Tensor, tokens: int, position: tuple[int, int, int, int | None] | None
    ) -> None:
        """One step's nats of this rank and tokens of all; `position` as of `RowStream`."""
        self._pending += nats
        self._pending_tokens += tokens
        late = time.monotonic() - self._read_at_s >= _READ_EVERY_S
        if late or self._progress.heartbeat.step == 1:
            self._show(position)

    def read(self) -> Tensor:
        """Wait for the device, and return the nats that were pending."""
        read = self._pending.cpu().double()  # float64 does not exist on MPS
        self.nats += read
        self._pending.zero_()
        self._read_at_s = time.monotonic()
        return read

    def mfu(self, tokens_per_s: float) -> float | None:
        """Which share of the devices' arithmetic such a rate uses; None where nobody knows."""
        return mfu(tokens_per_s, token_flops=self._token_flops, peak=self._peak)

    def _show(self, position: tuple[int, int, int, int | None] | None) -> None:
        tokens, self._pending_tokens = self._pending_tokens, 0
        done = self._progress.heartbeat
        # rank 0 has about 1/n of the tokens; what the heartbeat shows need not be exact
        loss = float(self.read()) * self._ranks.world_size / tokens
        smoothed = _LOSS_EMA * (done.loss or loss) + (1 - _LOSS_EMA) * loss
        _, shard, row, rows = position or (0, -1, 0, None)
        rate = done.tokens / max(1e-9, time.monotonic() - self._began_s)
        used = self.mfu(rate)
        self._progress.update(
            loss=smoothed,
            tokens_per_s=rate,
            mfu=used or 0.0,
            shard=shard,
            shard_row=row,
            shard_rows=rows or 0,
        )
        share = row / rows if rows else 0.0
        text = f"loss={smoothed:.4f} shard={shard} shard_progress={share:.1%}"
        if used is not None:
            text += f" mfu={used:.1%}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done.tokens - self._bar.n)
