"""What the benchmarks of memory say: a server's does not grow with its clients, a ClientApp's is bounded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
_PROC = Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(not _PROC.exists(), reason="peaks are read from Linux's /proc")


def figures(name: str, *arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_server_of_six_clients_does_not_hold_four_replies_more_than_one_of_two() -> None:
    model = ("--depth", "3", "--vocab-size", "16384")  # 43 MB
    two, six = figures("server_memory", *model, "--clients", "2", "6")
    assert (two["clients"], six["clients"]) == (2, 6)
    model_bytes = 4 * two["parameters"]
    assert two["base_bytes"] + model_bytes < two["peak_bytes"]
    assert {"orders", "replies", "merge", "results"} <= two["phases"].keys()
    # four replies more would be four times the model; threads of a busy machine may hold some of one
    assert six["peak_bytes"] - two["peak_bytes"] < 2 * model_bytes


def test_a_clientapp_has_150_mb_and_two_messages_at_most() -> None:
    (found,) = figures("client_memory", "--depth", "3", "--vocab-size", "16384")
    assert found["order_bytes"] == found["reply_bytes"] == 4 * 10_747_904
    assert found["base_bytes"] < found["received_bytes"] <= found["peak_bytes"]
    assert found["peak_bytes"] <= found["goal_bytes"]
