"""Learning curves of tiny federations of one and of two clients, in fp32 on one thread.

`python -m tests.golden.federation_curves` writes them to federation_curves.json. Do that only after a change
that is meant to change what a federation learns, and say in the commit why it does.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.case import Case, Scale
from benchmarks.quality.laboratory import Laboratory
from benchmarks.quality.text import Corpus

GOLDEN = Path(__file__).with_suffix(".json")
CASES = {
    "one client": Case(name="one", clients=1, steps=4),
    "two clients": Case(name="two", clients=2, steps=4, batch="federation"),
    "two clients of speeds 1 and 3, numbers for the outer step": Case(
        name="numbers",
        clients=2,
        steps=4,
        batch="federation",
        speeds=(1.0, 3.0),
        config=(("outer-lr", 0.9), ("outer-momentum", 0.8)),
    ),
    "three clients who share a batch that they do not divide, one at a time away": Case(
        name="away",
        clients=3,
        steps=2,
        batch="federation",
        trace=((0, 1, 2), (0, 1), (1, 2)),
    ),
}
_SCALE = Scale(
    name="golden",
    depth=1,
    vocab_size=266,
    sequence_len=32,
    batch_tokens=256,
    total_tokens=6144,
    lr=0.2,
)


def curve(case: Case, *, seed: int = 0, **config: Any) -> list[float]:
    """Bits per byte as `Laboratory` notes them, the last of them after the last outer step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        changed = case.but(case.name, config=config)
        outcome = Laboratory(_SCALE, changed, seed, _corpus()).run()
    finally:
        torch.set_num_threads(threads)
    return [bpb for _, bpb in outcome.curve]


def _corpus() -> Corpus:
    """Rows in which a token mostly decides the next: there is something to learn."""
    rows = _rows(_SCALE.total_tokens // _SCALE.sequence_len, seed=1)
    return Corpus(rows, _rows(16, seed=2), torch.ones(_SCALE.vocab_size, dtype=torch.int64))


def _rows(count: int, *, seed: int) -> np.ndarray:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        row = [rng.randrange(64)]
        while len(row) <= _SCALE.sequence_len:
            known = rng.random() < 0.8
            row.append((5 * row[-1] + 3) % 64 if known else rng.randrange(64))
        rows.append(row)
    return np.array(rows, dtype=np.uint16)


def main() -> None:
    found = {name: curve(case) for name, case in CASES.items()}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {GOLDEN}")


if __name__ == "__main__":
    main()
