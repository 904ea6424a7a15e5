"""benchmarks.rows on a small shard: what it compares is the same, and its last line has the figures."""

import json
from pathlib import Path

from zygote import Zygote

from .data_kit import texts, write_shard


def test_both_loaders_take_all_documents_and_the_last_line_has_the_figures(
    tmp_path: Path, zygote: Zygote
) -> None:
    for shard in (0, 1):
        write_shard(tmp_path / "text", shard, texts(1500, seed=shard))
    options = ["--text", str(tmp_path / "text"), "--vocab", "400", "--seq-len", "100"]
    done = zygote.run(["-m", "benchmarks.rows", *options, "--rounds", "1", "--no-step"])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    packing = report["packing"]
    assert packing["documents"] == 1500 and packing["ratio"] > 0
    assert set(packing["stages_s"]) == {"read", "tokenize", "pack", "write", "tiktoken"}
    # the same rule over the same documents; the reference drops its last, incomplete batch of 8
    assert packing["rows"] - 8 <= packing["reference_rows"] <= packing["rows"] + 1
    assert report["reading"]["rows_a_step"] == 8
    assert report["resume"]["row"] == 10_000_000
