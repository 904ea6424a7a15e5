"""The GPU check on a machine without one: its code runs, and no check's failure hides another's."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # the checks below are loaded by other processes, too
    from zygote import Child, Zygote

from benchmarks.gpu_check import data, federation, runner
from benchmarks.gpu_check.__main__ import main
from benchmarks.gpu_check.plan import Check, checks, parse_variants
from benchmarks.gpu_check.runner import Outcome, environment, run_all
from benchmarks.gpu_check.table import table
from benchmarks.gpu_check.verdict import Setup, Verdict


def good(setup: Setup, verdict: Verdict) -> None:
    verdict.at_most("error", 0.5, 1.0)


def bad(setup: Setup, verdict: Verdict) -> None:
    verdict.at_most("error", 2.0, 1.0)
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def dead(setup: Setup, verdict: Verdict) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def stuck(setup: Setup, verdict: Verdict) -> None:
    time.sleep(600)


@pytest.fixture
def outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Outcome]:
    """Of this file's four checks, found as if they were the package's own."""
    package = tmp_path / "package"
    package.mkdir()
    starter = package / "starter.py"
    starter.write_text(
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('own', {str(__file__)!r})\n"
        "own = importlib.util.module_from_spec(spec); spec.loader.exec_module(own)\n"
        "sys.modules['benchmarks.gpu_check.own'] = own\n"
        "from benchmarks.gpu_check.child import main; main()\n"
    )
    monkeypatch.setattr(runner, "CHILD", [str(starter)])
    monkeypatch.setattr(runner, "_SLOW_CPU", 1.0)
    names = ("dead", "stuck", "bad", "good")
    some = [
        Check(
            name=name,
            function=f"own:{name}",
            limit_s=5 if name == "stuck" else 200,
            cost_s=1,
            group="" if name == "good" else "beside",
        )
        for name in names
    ]
    setup = Setup(device="cpu", tiny=True, directory=tmp_path)
    told: list[Outcome] = []
    found = run_all(some, setup, seconds=600, tell=told.append)
    assert told == found
    return {outcome.check: outcome for outcome in found}


def test_no_failure_hides_another_check(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["good"].passed
    assert outcomes["good"].figures == {"error": 0.5}
    failed = {name: outcomes[name].failures for name in ("bad", "dead", "stuck")}
    assert failed["bad"][:2] == [
        "error is 2, at most 1",
        "RuntimeError: no kernel image is available",
    ]
    assert "no verdict" in failed["dead"][0]
    assert "ended after 5 s" in failed["stuck"][0]
    for outcome in outcomes.values():
        assert json.loads(outcome.line())["check"] == outcome.check
    assert table(list(outcomes.values())).endswith("1 of 4 passed")


def test_what_no_time_is_left_for_is_skipped(tmp_path: Path) -> None:
    late = Check(name="late", function="own:good", limit_s=60, cost_s=50)
    setup = Setup(device="cpu", tiny=False, directory=tmp_path)
    (outcome,) = run_all([late], setup, seconds=10, tell=lambda _: None)
    assert outcome.skipped
    assert not outcome.passed


def test_bounds_of_one_card_are_judged_on_that_card_only() -> None:
    for on_h100, failures in ((False, 0), (True, 2)):
        verdict = Verdict(on_h100=on_h100)
        verdict.h100_at_least("tokens_per_s", 10.0, 100.0)
        verdict.h100_at_most("peak_gb", 90.0, 80.0)
        assert len(verdict.failures) == failures
    verdict = Verdict()
    verdict.at_most("error", float("nan"), 1.0)
    assert verdict.failures, "NaN is within no bound"


def test_variants_are_before_and_after() -> None:
    variants = parse_variants(["head=eager,fused", "sdpa=flash,cudnn"])
    assert variants == [{"head": "eager", "sdpa": "flash"}, {"head": "fused", "sdpa": "cudnn"}]
    assert parse_variants(["head=eager,fused", "sdpa=cudnn"])[1] == {
        "head": "fused",
        "sdpa": "cudnn",
    }
    named = [check.name for check in checks(["d20-b32", "facts"], variants)]
    assert named == ["facts", "d20-b32 head=eager,sdpa=flash", "d20-b32 head=fused,sdpa=cudnn"]
    for wrong in (lambda: checks(["d21"], []), lambda: parse_variants(["eager"])):
        with pytest.raises(ValueError):
            wrong()


def test_checks_that_run_at_once_make_the_data_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(device="cpu", tiny=True, directory=tmp_path)
    written: list[int] = []
    both = threading.Barrier(2)

    def write(path: Path, number: int, characters: int) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # without a lock the other one is here, too
        written.append(number)
        path.touch()

    monkeypatch.setattr(data, "write_shard", write)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(data.make, [setup, setup]))
    assert written == list(range(data.TRAIN_SHARDS + 1))


def test_only_the_server_of_its_own_federation_is_killed(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)", "flwr-serverapp"]
    homes = [tmp_path / "own", tmp_path / "other"]
    servers = [
        subprocess.Popen(sleeper, env=os.environ | {"HOME": str(home)}, start_new_session=True)
        for home in homes
    ]
    try:
        federation._kill_server(homes[0])
        assert servers[0].wait(60) == -signal.SIGKILL
        assert servers[1].poll() is None
    finally:
        for server in servers:
            server.kill()
            server.wait()


@pytest.mark.timeout(1700)
def test_the_checks_run_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zygote: "Zygote"
) -> None:
    """All but `federation`, which takes as much as the others together and which tests/federation does, too."""
    left_out = ["federation"]
    command = ["gpu_check", "--device", "cpu", "--tiny", "--seconds", "1500"]
    command += ["--skip", ",".join(left_out), "--out", str(tmp_path)]

    def start_child(arguments: list[str], log: IO[bytes], directory: Path) -> "Child":
        env = environment(directory)
        return zygote.start(arguments, env=env, output=log, new_session=True)

    monkeypatch.setattr(runner, "start_child", start_child)
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main() == 0, (tmp_path / "logs.txt").read_text(encoding="utf-8")[-5000:]
    finally:
        signal.signal(signal.SIGTERM, before)
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["pass"] for line in lines)
    assert len(lines) == len(checks([], [])) - len(left_out)
