"""A worker of a chaos site sends a bad reply when the injector asks for one, once; no other process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos.topology import HOOKS

PROGRAM = """
import os
from pathlib import Path
import torch
from pilot.wire.codec import CodecError, decode, encode
from pilot.wire.messages import Fence, TrainReply, to_header
order = Path(os.environ["PILOT_CHAOS_REPLY"])
update = {"a": torch.ones(2), "b": torch.ones(4096)}
reply = TrainReply(fence=Fence("run", 1, 1, 1), client="c", tokens=64)
def result():
    try:
        tensors = decode(encode(update))
    except CodecError:
        return "refused"
    same = all(torch.equal(update[name], tensor) for name, tensor in tensors.items())
    return "same" if same else "nan" if tensors["b"].isnan().any() else "other"
for word in ("nan", "truncate", "corrupt", "misreport"):
    order.write_text(word)
    print(word, result(), to_header(reply)["tokens"], order.exists(), end="; ")
    order.unlink(missing_ok=True)
    print(result(), to_header(reply)["tokens"])
"""


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (
            "0",
            [
                "nan nan 64 False; same 64",
                "truncate refused 64 False; same 64",
                "corrupt nan 64 False; same 64",
                "misreport same 128 False; same 64",
            ],
        ),
        (
            "",
            [
                f"{word} same 64 True; same 64"
                for word in ("nan", "truncate", "corrupt", "misreport")
            ],
        ),
    ],
)
def test_one_reply_of_a_worker_is_spoilt(tmp_path: Path, rank: str, expected: list[str]) -> None:
    env = os.environ | {
        "PYTHONPATH": str(HOOKS),
        "PILOT_CHAOS_REPLY": str(tmp_path / "reply"),
    }
    env |= {"PILOT_RANK": rank} if rank else {}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == expected
