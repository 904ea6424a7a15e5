"""What Flower's processes are started with: the same in every way of starting them, and Flower reads it."""

import subprocess
import sys
from pathlib import Path

import pytest

from pilot.launch.connection import FLOWER_SETTINGS, flower_environment

ROOT = Path(__file__).resolve().parents[3]
READ = """
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as size
from flwr.supercore.constant import FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS as pulls
from flwr.supercore.constant import FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES as pushes
print(pushes, pulls, size)
"""


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FLOWER_SETTINGS:
        monkeypatch.delenv(name, raising=False)


def test_the_plain_recipe_has_the_settings_of_our_own_commands() -> None:
    lines = (ROOT / "flower.env").read_text(encoding="utf-8").split()
    by_hand = dict(line.split("=", 1) for line in lines)
    assert by_hand.pop("FLWR_HOME") == "${PWD}/.flwr"
    assert by_hand == FLOWER_SETTINGS


def test_an_operators_own_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES"
    assert flower_environment().items() >= FLOWER_SETTINGS.items()
    monkeypatch.setenv(name, "1")
    assert flower_environment()[name] == "1"


def test_flower_reads_them() -> None:
    """By these names, in the version that is installed."""
    asked = {**flower_environment(), "FLWR_TELEMETRY_ENABLED": "0"}
    found = subprocess.run(
        [sys.executable, "-c", READ], env=asked, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [FLOWER_SETTINGS[name] for name in list(FLOWER_SETTINGS)[1:]]
