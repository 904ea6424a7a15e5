"""A run that was killed, interrupted or refused goes on as if nothing had been, or says why not."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zygote import Child, Zygote

from nanochat import checkpoint_manager, saving
from nanochat.checkpoint_manager import load_checkpoint
from nanochat.common import run_command_line
from nanochat.kernels.choices import what_compiling_lacks
from nanochat.resume import TrainingState
from scripts import base_train

from .bundle_kit import make_bundle
from .data_kit import assert_equal, byte_tokenizer, texts, write_shard

STEPS = 20
COMMON = [
    *("--depth", "1", "--max-seq-len", "32", "--batch-size", "2", "--total-batch-size", "160"),
    *("--num-iterations", str(STEPS), "--eval-rows", "9", "--log-every", "3"),
    *("--device-type", "cpu", "--save-every", "10", "--packing", "bestfit"),
]


@pytest.fixture
def corpus(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two training shards of which 20 steps need more than an epoch."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    directory = base_dir / "shards"
    for number in range(3):
        write_shard(directory, number, texts(24, seed=number, words=20))
    byte_tokenizer(base_dir / "tokenizer")
    return directory


def _call(main: Callable[[], None], *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command_line(main)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def _directory(base_dir: Path, run: str) -> Path:
    return base_dir / "base_checkpoints" / run


def _everything(directory: Path, step: int, ranks: int = 1) -> dict[str, Any]:
    """All that a step holds, besides times and the run's own name."""
    weights, _, meta = load_checkpoint(directory, step, "cpu")
    shards = [
        load_checkpoint(directory, step, "cpu", load_optimizer=True, rank=rank)[1]
        for rank in range(ranks)
    ]
    del meta["loop_state"]["total_training_time"]
    for name in ("run", "resume_from_step", "save_every"):
        del meta["user_config"][name]
    return {"weights": weights, "shards": shards, "meta": meta}


def _begin(zygote: Zygote, *arguments: str) -> Child:
    return zygote.start(arguments, stderr_to_stdout=True)


def _wait_for(path: Path, process: Child) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("arch", "dtype", "steps"), [("classic", "float32", STEPS), ("modern", "bfloat16", 4)]
)
def test_ten_steps_a_kill_and_ten_steps_are_twenty_steps(
    arch: str,
    dtype: str,
    steps: int,
    corpus: Path,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    zygote: Zygote,
) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
    half = steps // 2
    train = [*COMMON, "--source", str(corpus), "--arch", arch]
    train += ["--num-iterations", str(steps), "--save-every", str(half)]
    assert _call(base_train.main, *train, "--run", "whole", monkeypatch=monkeypatch) == 0

    broken = _begin(zygote, "-m", "scripts.base_train", *train, "--run", "broken")
    _wait_for(_directory(base_dir, "broken") / f"meta_{half:06d}.json", broken)
    broken.kill()
    broken.wait()
    for path in _directory(base_dir, "broken").glob(f"*_{steps:06d}*"):
        path.unlink()  # it was quicker than the kill
    resume = [*train, "--run", "broken", "--resume-from-step", "latest"]
    assert _call(base_train.main, *resume, monkeypatch=monkeypatch) == 0

    whole, broken_one = (_directory(base_dir, name) for name in ("whole", "broken"))
    for step in (half, steps):
        assert_equal(_everything(whole, step), _everything(broken_one, step))
    place = _everything(whole, steps)["meta"]["dataloader_state_dict"]
    assert place["row"] > 0 and (steps < STEPS or place["epoch"] > 0)  # no trivial place


@pytest.mark.skipif(what_compiling_lacks("cpu") != "", reason=what_compiling_lacks("cpu"))
def test_compiled_steps_of_two_processes_are_those_of_one(corpus: Path, base_dir: Path) -> None:
    train = [*COMMON, "--source", str(corpus), "--compile", "on"]
    train += ["--num-iterations", "4", "--save-every", "2"]

    def run(
        *arguments: str,
    ) -> None:  # an interpreter of its own, as the compiler's workers want it
        command = [sys.executable, "-m", "scripts.base_train", *train, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "compile: on" in done.stdout, done.stdout + done.stderr

    run("--run", "whole")
    whole, broken = (_directory(base_dir, name) for name in ("whole", "broken"))
    broken.mkdir()
    for path in whole.glob("*_000002*"):
        shutil.copy(path, broken)
    run("--run", "broken", "--resume-from-step", "latest")
    assert_equal(_everything(whole, 4), _everything(broken, 4))


def test_ctrl_c_ends_the_step_saves_it_and_the_run_goes_on(
    corpus: Path, base_dir: Path, zygote: Zygote
) -> None:
    train = [*COMMON, "--source", str(corpus), "--num-iterations", "4000", "--save-every", "1"]
    run = _begin(zygote, "-m", "scripts.base_train", *train, "--run", "stopped")
    directory = _directory(base_dir, "stopped")
    _wait_for(directory / "meta_000002.json", run)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    assert "Traceback" not in output
    stopped = re.search(
        r"stopped after step (\d+): continue with --resume-from-step latest", output
    )
    assert stopped and checkpoint_manager.find_last_step(directory) == int(stopped[1])
    # the signal is only flagged: nothing but whole steps is there
    assert not list(directory.glob(".*.tmp"))


@pytest.fixture
def begun(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a run that has saved step 10 of 20, and not its end."""
    train = [*COMMON, "--source", str(corpus), "--run", "begun", "--save-every", "10"]
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 0
    return train


def test_latest_without_a_checkpoint_begins(
    corpus: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = [*COMMON, "--source", str(corpus), "--run", "new", "--num-iterations", "1"]
    train += ["--resume-from-step", "latest"]
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 0
    assert (_directory(base_dir, "new") / "model_000001.pt").exists()


def test_run_that_began_before_there_was_fp8_continues(
    begun: list[str], base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _directory(base_dir, "begun") / "meta_000010.json"
    meta = json.loads(path.read_text())
    assert meta["user_config"].pop("fp8") is False
    path.write_text(json.dumps(meta))
    resume = [*begun, "--resume-from-step", "10"]
    assert _call(base_train.main, *resume, monkeypatch=monkeypatch) == 0


def test_what_would_not_be_the_same_run_is_refused(
    begun: list[str],
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = _directory(base_dir, "begun")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def refused(said: str, *arguments: str) -> None:
        resume = [*begun, *arguments]
        if "--resume-from-step" not in arguments:
            resume += ["--resume-from-step", "10"]
        assert _call(base_train.main, *resume, monkeypatch=monkeypatch) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error

    refused("its 20 steps", "--resume-from-step", "latest")
    refused("give a number or latest", "--resume-from-step", "last")
    refused("model_000007.pt is missing", "--resume-from-step", "7")
    refused("started with seed 0, not 1", "--seed", "1")
    refused("started with n_layer 1, not 2", "--depth", "2")
    refused("started with packing 'bestfit', not 'stream'", "--packing", "stream")
    refused("started with num_shards 2, not 1", "--num-shards", "1")
    refused("started with lr None, not 0.5", "--lr", "0.5")
    byte_tokenizer(base_dir / "other", num_pairs=0)
    entry = (base_dir / "other" / "tokenizer.json").read_text()
    (base_dir / "other" / "tokenizer.json").write_text(entry.replace("{1,2}", "{1,3}"))
    refused("started with tokenizer_sha256", "--tokenizer", "other")
    (directory / "optim_000010_rank0.pt").write_bytes(
        before["optim_000010_rank0.pt"][:1000]  # as a full disk of another program leaves it
    )
    refused("optim_000010_rank0.pt cannot be read")
    (directory / "optim_000010_rank0.pt").unlink()
    refused("optim_000010_rank0.pt is missing")
    (directory / "model_000010.pt").write_bytes(before["model_000010.pt"][:-1000])
    refused("model_000010.pt cannot be read")


def test_a_full_disk_is_a_sentence_and_leaves_the_last_checkpoint(
    corpus: Path,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, written = torch.save, 0

    def disk_for_one_step(value: Any, file: Any) -> None:
        nonlocal written
        written += 1
        if written > 3:  # optimizer and model of the first step fit, and the second one's optimizer
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(value, file)

    monkeypatch.setattr(checkpoint_manager.torch, "save", disk_for_one_step)
    monkeypatch.setattr(saving, "ROOM_WAIT_S", 0.0)  # nobody will make room
    train = [*COMMON, "--source", str(corpus), "--run", "full", "--num-iterations", "4"]
    train += ["--save-every", "2"]
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert "step 4" in error and "No space left on device" in error and "make room" in error
    directory = _directory(base_dir, "full")
    assert checkpoint_manager.find_last_step(directory) == 2
    assert not list(directory.glob(".*")) and not (directory / "model_000004.pt").exists()

    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    train += ["--resume-from-step", "latest"]
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 0


def test_bpb_core_and_samples_are_told_when_they_are_due(
    corpus: Path,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_bundle(base_dir / "eval_bundle")
    train = [*COMMON, "--source", str(corpus), "--run", "told", "--num-iterations", "5"]
    train += ["--eval-every", "2", "--core-metric-every", "3", "--core-metric-max-per-task", "3"]
    train += ["--sample-every", "4", "--save-every", "-1"]
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 0
    output = capsys.readouterr().out
    for word, steps in (("val_bpb=", "2 4 5"), ("core=", "3 5"), ("sample: 'The cap", "4 5")):
        assert re.findall(rf"step=(\d) {word}", output) == steps.split(), word
    meta = json.loads((_directory(base_dir, "told") / "meta_000005.json").read_text())
    # upstream's fields, and the one that says on which rows the bpb was measured
    assert sorted(meta) == sorted(
        [
            *("step", "val_bpb", "model_config", "user_config", "device_batch_size"),
            *("max_seq_len", "total_batch_size", "dataloader_state_dict", "loop_state", "data"),
        ]
    )
    assert sorted(meta["loop_state"]) == [
        "min_val_bpb",
        "smooth_train_loss",
        "total_training_time",
    ]
    assert meta["loop_state"]["min_val_bpb"] <= meta["val_bpb"]
    assert meta["loop_state"]["smooth_train_loss"] > 0


def test_core_without_its_bundle_is_refused_before_any_training(
    corpus: Path,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (base_dir / "eval_bundle.zip").write_bytes(b"half")  # no network is asked
    train = [*COMMON, "--source", str(corpus), "--core-every", "2"]
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 2
    assert "eval_bundle.zip cannot be unpacked" in capsys.readouterr().err
    assert not (base_dir / "base_checkpoints").exists()


def test_figures_that_are_not_known_yet_are_numbers_for_upstream_and_unknown_for_us() -> None:
    meta = TrainingState(step=3, shard=0).to_meta()
    loop = json.loads(json.dumps(meta, allow_nan=False))["loop_state"]
    assert min(2.0, loop["min_val_bpb"]) == 2.0
    assert 0.9 * loop["smooth_train_loss"] == 0
    assert TrainingState.from_meta(meta) == TrainingState(step=3, shard=0)
    meta["loop_state"] |= {"min_val_bpb": None, "smooth_train_loss": None}  # as it was once
    assert TrainingState.from_meta(meta) == TrainingState(step=3, shard=0)
