"""Every test has a base directory of its own: nothing here touches a user's files."""

import os
from pathlib import Path

import pytest

# Tests share two cores with the processes that they start: more threads would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def base_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(directory))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path_factory.mktemp("flwr")))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.delenv("PILOT_REDIS_URL", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return directory
