"""Every test has a base directory of its own: nothing here touches a user's files."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.builtin import ensure_builtin_tokenizer
from nanochat.tokenizer import tokenizer_dir

TOKENIZER, VOCAB_SIZE = "tokenizer_512", 512

# Whoever runs the tests in the background may ignore these, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _signum in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, signal.SIG_DFL)

# Tests share two cores with the processes that they start: more threads would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def base_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(directory))
    # the same numbers on every machine; tests of bf16 say so
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path_factory.mktemp("flwr")))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.delenv("PILOT_REDIS_URL", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return directory


@pytest.fixture(scope="session")
def prepared_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with the built-in corpus and a small tokenizer, made once for all tests."""
    directory = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(directory))
        ensure_builtin_tokenizer(tokenizer_dir(TOKENIZER), VOCAB_SIZE)
    return directory


@pytest.fixture
def builtin(base_dir: Path, prepared_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """NANOCHAT_BASE_DIR with data; shared, so runs in it need names of their own."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(prepared_base))
    return prepared_base


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; skips where none may be mounted (most containers, and any user but root)."""
    directory = tmp_path / "disk"
    directory.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no file system can be mounted: {error}")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
