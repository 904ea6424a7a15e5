"""Packing shards into rows before a run needs them: `python -m nanochat.dataset --prepare`."""

import os
import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

from nanochat.errors import UserError
from nanochat.rows.cache import RowCache, ShardRows

_POLL_S = 0.1


def prepare_rows(cache: RowCache, shards: Iterable[int]) -> list[str]:
    """Pack `shards`, several at once; returns a line for each that failed.

    Keeps what is packed already and continues what was begun, also after a kill.
    """
    waiting = list(dict.fromkeys(shards))
    failures: list[str] = []
    active: dict[int, ShardRows] = {}
    rows = tokens = discarded = 0
    with tqdm(total=len(waiting), desc=f"packing {cache.source.name}", unit="shard") as bar:
        while waiting or active:
            while waiting and len(active) < packers_at_once():
                shard = waiting.pop(0)
                active[shard] = cache.rows(shard)
            for shard, shard_rows in list(active.items()):
                try:
                    done = shard_rows.keep_packing()
                except UserError as error:
                    failures.append(f"shard {shard}: {error}")
                    tqdm.write(f"error: {failures[-1]}", file=sys.stderr)
                    del active[shard]
                    continue
                stats = shard_rows.stats
                if done and stats is not None:
                    rows += stats.rows
                    tokens += stats.tokens
                    discarded += stats.discarded_tokens
                    shard_rows.close()
                    del active[shard]
                    bar.update()
            so_far = rows + sum(shard_rows.rows_so_far for shard_rows in active.values())
            share = 100 * discarded / tokens if tokens else 0.0
            bar.set_postfix_str(f"rows={so_far:,} discarded={share:.1f}%")
            if active:
                time.sleep(_POLL_S)
    return failures


def packers_at_once() -> int:
    """As many as keep the cores busy: each packer takes half of them, at most eight."""
    cores = os.cpu_count() or 1
    return max(1, cores // max(1, min(8, cores // 2)))
