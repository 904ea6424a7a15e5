"""Every test has a base directory of its own: nothing here touches a user's files."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadGroupScheduling
from zygote import Zygote

from benchmarks.chaos.micro import TOKENIZER, VOCAB_SIZE
from nanochat.builtin import ensure_builtin_tokenizer
from nanochat.tokenizer import tokenizer_dir

_TESTS = Path(__file__).parent
# What these files say of seconds would not hold if they ran at the same time: one group.
OF_SECONDS = (
    "federation/test_membership.py",
    "federation/test_round_loop.py",
    "federation/test_left_out.py",
    "pilot/coordination/test_redis_trouble.py",
)
# These begin first, in turn one that computes and one that mostly waits; the rest follows by name.
LONGEST_FIRST = (
    "chaos/test_tour.py",
    "federation/test_runs.py",
    "federation/test_deployments.py",
    "readme/test_readme.py",
    *OF_SECONDS,
    "test_gpu_check.py",
    "pilot/test_cli.py",
    "federation/test_crash.py",
    "pilot/site/test_resident_group.py",
    "nanochat/test_resume.py",
    "pilot/site/test_group.py",
    "nanochat/test_base_train.py",
    "federation/test_equivalence.py",
    "pilot/site/test_inner_state.py",
    "pilot/launch/test_node.py",
    "nanochat/rows/test_cache.py",
    "nanochat/test_trainer.py",
)

# Whoever runs the tests in the background may ignore these, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _signum in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, signal.SIG_DFL)

# Examples take as long as the machine is busy: no test says anything of time.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

# Tests share two cores with the processes that they start: more threads would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so; niced, it would hardly get any time


class _ByFile(LoadGroupScheduling):
    """The tests of a group go to one worker; those in no group go with their file, to share its fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        group = super()._split_scope(nodeid)
        return nodeid.split("::")[0] if group == nodeid else group


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadGroupScheduling:
    return _ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In an order that keeps both workers busy to the end."""
    places = {path: place for place, path in enumerate(LONGEST_FIRST)}
    files = [item.path.relative_to(_TESTS).as_posix() for item in items]
    for item, file in zip(items, files, strict=True):
        if file in OF_SECONDS:
            item.add_marker(pytest.mark.xdist_group("seconds"))
    order = sorted(range(len(items)), key=lambda i: places.get(files[i], len(places)))
    items[:] = [items[i] for i in order]


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
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


@pytest.fixture(scope="session")
def prepared_base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A base directory with the built-in corpus and a small tokenizer, made once for all workers."""
    of_this_worker = tmp_path_factory.getbasetemp()
    of_all = of_this_worker.parent if hasattr(request.config, "workerinput") else of_this_worker
    directory = of_all / "prepared"
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
