"""A run begun by an earlier version of this program goes on, to the same bits as that version's own."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from .scripted import ScriptedSite

# Written by commit c0d6a09 after round 2 of a scripted run of clients a (4 rows a round) and b (3 rows).
KEPT = Path(__file__).parents[1] / "golden" / "snapshot_round_000002"
# What that commit itself had after round 4: SHA-256 of weights and outer state, by name; tokens; the ledger.
MODEL_SHA256 = "b80e2926a6f7fc28ead66baa12b682154acf24f71ff2f92cccb2dc818e57577b"
TOKENS = 224
LEDGER = {
    "num_shards": 4,
    "epochs": 1,
    "next_lease_id": 9,
    "row_counts": [[0, 24], [1, 24]],
    "committed": [[0, 0, "a", [[0, 16]]], [0, 1, "b", [[0, 12]]]],
}


def test_snapshot_of_an_earlier_version_resumes_to_the_bits_that_version_would_have_had(
    server: Any, tmp_path: Path
) -> None:
    shutil.copytree(
        KEPT,
        tmp_path / "kept" / "snapshots" / KEPT.name.removeprefix("snapshot_").replace("_", "-"),
    )
    values = {"run_name": "kept", "num_rounds": 4, "quarantine": True, "resume_anyway": True}
    values["batch_of"] = (
        "client"  # as there was no other then; with resume-anyway, defaults of today hold
    )
    run = server([ScriptedSite("a"), ScriptedSite("b", rows=3)], **values)
    run.term = 2
    state = run.run()
    assert [(record.round_number, record.clients) for record in state.history] == [
        (1, 2),
        (2, 2),
        (3, 2),
        (4, 2),
    ]
    assert (state.tokens, state.ledger.to_state()) == (TOKENS, LEDGER)
    digest = hashlib.sha256()
    for tensors in (state.weights, state.outer):
        for name in sorted(tensors):
            digest.update(tensors[name].numpy().tobytes())
    assert digest.hexdigest() == MODEL_SHA256
