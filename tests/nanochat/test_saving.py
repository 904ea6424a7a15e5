"""What is trained stays: whatever happens after a step, its weights are on disk."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from zygote import Zygote

from nanochat import saving, watch
from nanochat.checkpoint_manager import (
    find_last_step,
    load_any,
    load_checkpoint,
    optimizer_ranks,
    save_checkpoint,
    whole_steps,
)
from nanochat.common import run_command_line
from nanochat.resume import find_saved
from nanochat.rows.stream import shard_order
from nanochat.run_directory import own, remove_step
from nanochat.trainer import Trainer
from scripts import base_eval, base_train, chat_cli

from .bundle_kit import make_bundle
from .data_kit import assert_equal, byte_tokenizer, texts, write_shard

# 32,768 parameters: a checkpoint is 131 kB of weights and 0.2 MB of optimizer
COMMON = [
    *("--depth", "1", "--head-dim", "32", "--aspect-ratio", "32", "--max-seq-len", "32"),
    *("--batch-size", "2", "--total-batch-size", "160", "--num-iterations", "4"),
    *("--eval-rows", "4", "--log-every", "1", "--device-type", "cpu", "--packing", "bestfit"),
]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with two training shards, whose rows are packed once for all tests."""
    directory = tmp_path_factory.mktemp("saving")
    for number in range(3):
        write_shard(directory / "shards", number, texts(24, seed=number, words=20))
    byte_tokenizer(directory / "tokenizer")
    make_bundle(directory / "eval_bundle")
    return directory


@pytest.fixture
def call(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call a script in that base directory: (exit code, stdout, stderr)."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))

    def called(main: Callable[[], None], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        with pytest.raises(SystemExit) as stop:
            run_command_line(main)
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capsys.readouterr()

    return called


def _train(base: Path, run: str, *more: str) -> list[str]:
    return [*COMMON, "--source", str(base / "shards"), "--run", run, *more]


def _directory(base: Path, run: str) -> Path:
    return base / "base_checkpoints" / run


def _meta(directory: Path, step: int) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((directory / f"meta_{step:06d}.json").read_text())
    return meta


def _assert_one_sentence(error: str, said: str) -> None:
    assert error.count("error: ") == 1 and said in error and "Traceback" not in error, error


@pytest.fixture
def without_bundle(base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The tasks' files go away when CORE is evaluated; the result brings them back."""
    evaluate, data = watch.evaluate_core, base / "eval_bundle" / "eval_data"

    def lost(*arguments: Any, **options: Any) -> Any:
        data.rename(data.with_name("away"))
        return evaluate(*arguments, **options)

    monkeypatch.setattr(watch, "evaluate_core", lost)

    def restored() -> None:
        monkeypatch.setattr(watch, "evaluate_core", evaluate)
        data.with_name("away").rename(data)

    return restored


def test_an_evaluation_that_fails_after_the_last_step_finds_it_saved(
    base: Path, call: Call, without_bundle: Callable[[], None]
) -> None:
    code, output, error = call(base_train.main, *_train(base, "last", "--core-every", "4"))
    without_bundle()
    assert code == 2
    _assert_one_sentence(error, "letters.jsonl cannot be read")
    directory = _directory(base, "last")
    assert find_last_step(directory) == 4 and optimizer_ranks(directory, 4) == [0]
    # what was measured before is in the meta file
    logged = re.findall(r"val_bpb=([\d.]+)", output)
    assert [f"{_meta(directory, 4)['val_bpb']:.6f}"] == logged
    code, output, _ = call(base_eval.main, "--checkpoint", "last", "--device-type", "cpu")
    assert code == 0 and f"val_bpb={logged[0]}" in output


def test_an_evaluation_that_fails_in_between_ends_the_run_saved_and_it_goes_on(
    base: Path, call: Call, without_bundle: Callable[[], None]
) -> None:
    train = _train(base, "between", "--core-every", "2")
    code, _, error = call(base_train.main, *train)
    without_bundle()
    assert code == 2
    assert "saved step 2 before the end: continue with --resume-from-step latest" in error
    _assert_one_sentence(error, "letters.jsonl cannot be read")
    directory = _directory(base, "between")
    assert whole_steps(directory) == [2]
    assert call(base_train.main, *train, "--resume-from-step", "latest")[0] == 0
    assert call(base_train.main, *_train(base, "undisturbed"))[0] == 0
    wanted = load_checkpoint(_directory(base, "undisturbed"), 4, "cpu", load_optimizer=True)
    assert_equal(load_checkpoint(directory, 4, "cpu", load_optimizer=True)[:2], wanted[:2])


def test_an_exception_of_any_kind_ends_the_run_saved(
    base: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(watch, "sample_texts", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        call(base_train.main, *_train(base, "bug", "--sample-every", "3"))
    assert find_last_step(_directory(base, "bug")) == 3


def test_lines_that_cannot_be_written_end_no_training(
    base: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanochat.progress.tqdm.write", full)
    assert call(base_train.main, *_train(base, "mute"))[0] == 0
    assert whole_steps(_directory(base, "mute")) == [4]


def test_a_step_that_failed_in_the_optimizer_is_not_passed_off_as_one(
    base: Path, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = Trainer.step, 0

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            self.optimizer.step = lambda: 1 / 0
        return real(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(ZeroDivisionError):
        call(base_train.main, *_train(base, "torn"))
    assert "step 3 failed while it changed the weights" in capsys.readouterr().err
    assert not _directory(base, "torn").exists()


def test_a_shard_that_is_damaged_inside_ends_the_run_saved(base: Path, call: Call) -> None:
    shards = base / "damaged"
    shutil.copytree(base / "shards", shards)
    damaged = shards / f"shard_{shard_order(2, 0, 0)[1]:05d}.parquet"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 0xFF  # the footer is whole
    damaged.write_bytes(content)
    train = [*_train(base, "damaged", "--num-iterations", "60"), "--source", str(shards)]
    code, _, error = call(base_train.main, *train)
    assert code == 2 and f"{damaged} is damaged" in error
    saved = re.search(r"saved step (\d+) before the end", error)
    assert saved and find_last_step(_directory(base, "damaged")) == int(saved[1]) > 0


def test_a_shard_that_is_none_is_found_before_the_first_step(base: Path, call: Call) -> None:
    shards = base / "empty"
    shutil.copytree(base / "shards", shards)
    (shards / "shard_00001.parquet").write_bytes(b"")
    code, output, error = call(base_train.main, *_train(base, "empty"), "--source", str(shards))
    assert code == 2 and "step=" not in output
    _assert_one_sentence(error, "shard_00001.parquet cannot be used: it is not a parquet file")
    train = [*_train(base, "empty", "--num-shards", "1"), "--source", str(shards)]
    assert call(base_train.main, *train)[0] == 0  # the one that is damaged is not used


@pytest.mark.parametrize(("most", "needed"), [("1", "letters shows 2 .* at least 3"), ("2", "")])
def test_too_few_items_for_a_task_are_found_before_the_first_step(
    most: str, needed: str, base: Path, call: Call
) -> None:
    train = _train(base, "few", "--core-every", "4", "--core-max-per-task", most)
    code, output, error = call(base_train.main, *train)
    assert code == 2 and "step=" not in output
    assert re.search(needed, error) and f"--core-max-per-task is {most}" in error


def test_an_item_that_cannot_be_scored_is_found_before_the_first_step(
    base: Path, call: Call
) -> None:
    path = base / "eval_bundle" / "eval_data" / "words.jsonl"
    good = path.read_text()
    try:
        for bad, said in (
            ('{"context": "a"}', "it has no 'continuation'"),
            ('{"context": 3, "continuation": "a"}', "something else than text"),
        ):
            path.write_text(good + bad + "\n")
            code, output, error = call(base_train.main, *_train(base, "bad", "--core-every", "4"))
            assert code == 2 and "step=" not in output
            _assert_one_sentence(error, said)
    finally:
        path.write_text(good)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_during_an_evaluation_gives_it_up_and_saves(
    name: str, base: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, items = watch.evaluate_core, 0

    def signalled(*arguments: Any, tick: Callable[[], None], **options: Any) -> Any:
        def counted() -> None:
            nonlocal items
            items += 1
            if items == 3:
                os.kill(os.getpid(), getattr(signal, name))
            tick()

        return evaluate(*arguments, tick=counted, **options)

    monkeypatch.setattr(watch, "evaluate_core", signalled)
    run = f"between-{name}"
    train = _train(base, run, "--core-every", "2")
    code, output, _ = call(base_train.main, *train)
    assert code == 130 and items == 3 and "core=" not in output
    assert "stopped after step 2: continue with --resume-from-step latest" in output
    assert whole_steps(_directory(base, run)) == [2]

    items = 0
    code, output, _ = call(base_train.main, *train, "--resume-from-step", "latest")
    assert code == 130 and items == 3
    assert f"scripts.base_eval --checkpoint {run}" in output
    assert whole_steps(_directory(base, run)) == [2, 4]
    assert optimizer_ranks(_directory(base, run), 4) == [0]


def _with_a_failing_rank(zygote: Zygote, base: Path, run: str, where: str) -> str:
    """Two processes of which the second fails; what they say on stderr."""
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    program = [Path(__file__).with_name("failing_rank.py"), "--"]
    program += _train(base, run, "--eval-every", "2")
    ranks = zygote.ranks(program, 2, env={**environment, "FAILS": where})
    said = "".join(rank.stderr for rank in ranks)
    assert all(rank.returncode for rank in ranks) and "rank 1: this rank fails" in said, said
    return said


def test_what_fails_on_one_process_only_ends_all_of_them_saved(base: Path, zygote: Zygote) -> None:
    assert "another process of this run failed" in _with_a_failing_rank(
        zygote, base, "one", "evaluation"
    )
    directory = _directory(base, "one")
    assert whole_steps(directory) == [2] and optimizer_ranks(directory, 2) == [0, 1]
    assert _meta(directory, 2)["user_config"]["world_size"] == 2


def test_a_process_that_fails_while_others_wait_in_a_step_saves_the_weights(
    base: Path, zygote: Zygote
) -> None:
    assert "saved step 2 before the end" in _with_a_failing_rank(
        zygote, base, "alone-in-step", "step"
    )
    directory = _directory(base, "alone-in-step")
    assert whole_steps(directory) == [2]
    assert load_any(directory, "cpu")[1]["user_config"]["world_size"] == 0
    assert find_saved(directory, "latest") is None  # there is no optimizer to continue with


# -- full disks ---------------------------------------------------------------------------------


def _fill(disk: Path, *, but_for: int) -> None:
    room = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * (room.f_bavail * room.f_bsize - but_for))


def test_a_disk_that_is_full_costs_no_step(
    base: Path, call: Call, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _directory(base, "full")
    directory.parent.mkdir(exist_ok=True)
    directory.symlink_to(small_disk)
    _fill(small_disk, but_for=900_000)  # room for two checkpoints and a model
    waited: list[list[int]] = []

    def make_room(_: float) -> None:
        waited.append([*whole_steps(directory), *optimizer_ranks(directory, 4)])
        remove_step(directory, 1)

    clock = SimpleNamespace(sleep=make_room, monotonic=time.monotonic)
    monkeypatch.setattr(saving, "time", clock)
    code, output, _ = call(base_train.main, *_train(base, "full", "--save-every", "1"))
    assert code == 0
    assert "cannot write the checkpoint of step 3" in output and "training goes on" in output
    assert "No space left on device" in output and "its weights alone are there" in output
    assert waited == [[1, 2, 4]]  # the weights of the last step were safe meanwhile
    assert whole_steps(directory) == [2, 4] and optimizer_ranks(directory, 4) == [0]
    assert not list(directory.glob(".*")) and not list(directory.glob("*_000003*"))
    assert _meta(directory, 4)["val_bpb"] > 0


def test_a_disk_that_stays_full_takes_the_weights_at_least(
    base: Path, call: Call, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _directory(base, "stays")
    directory.parent.mkdir(exist_ok=True)
    directory.symlink_to(small_disk)
    _fill(small_disk, but_for=900_000)
    monkeypatch.setattr(saving, "ROOM_WAIT_S", 0.0)
    code, output, _ = call(base_train.main, *_train(base, "stays", "--save-every", "1"))
    assert code == 0 and "no run can continue from them" in output
    assert find_last_step(directory) == 4 and optimizer_ranks(directory, 4) == []
    _, meta = load_any("stays", "cpu")
    assert meta["user_config"]["world_size"] == 0 and meta["val_bpb"] > 0
    saved = find_saved(directory, "latest")
    assert saved is not None and (saved.step, saved.ranks) == (2, 1)


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(
    base: Path, call: Call, small_disk: Path
) -> None:
    directory = _directory(base, "small")
    directory.parent.mkdir(exist_ok=True)
    directory.symlink_to(small_disk)
    _fill(small_disk, but_for=100_000)
    code, output, error = call(base_train.main, *_train(base, "small"))
    assert code == 2 and "step=" not in output
    _assert_one_sentence(error, "make room there")


# -- whose directory ----------------------------------------------------------------------------


def test_a_new_run_in_an_old_directory_moves_the_old_one_aside(base: Path, call: Call) -> None:
    directory = _directory(base, "twice")
    old = _train(base, "twice", "--num-iterations", "12", "--save-every", "6")
    assert call(base_train.main, *old)[0] == 0
    before = load_checkpoint(directory, 12, "cpu")[0]
    new = _train(base, "twice", "--num-iterations", "6", "--lr", "0.5")
    code, output, _ = call(base_train.main, *new)
    assert code == 0
    assert "twice holds steps of another run, the last one 12" in output
    assert f"moved steps of another run to {directory / 'replaced-1'}" in output
    assert whole_steps(directory) == [6]
    figure = re.findall(r"val_bpb=[\d.]+", output)[-1]
    code, output, _ = call(base_eval.main, "--checkpoint", "twice", "--device-type", "cpu")
    assert code == 0 and figure in output  # that of the run that ended last
    assert whole_steps(directory / "replaced-1") == [6, 12]
    model, meta = load_any("twice/replaced-1", "cpu")
    assert meta["step"] == 12
    assert_equal(dict(model.state_dict()), dict(before))


def test_steps_after_the_one_from_which_a_run_continues_are_of_a_past_that_is_done_anew(
    base: Path, call: Call
) -> None:
    train = _train(base, "again", "--save-every", "1")
    assert call(base_train.main, *train)[0] == 0
    directory = _directory(base, "again")
    once = load_checkpoint(directory, 4, "cpu")[0]
    code, output, _ = call(base_train.main, *train, "--resume-from-step", "2", "--save-every", "0")
    assert code == 0 and "continuing" in output and "from step 2" in output
    assert f"moved later steps to {directory / 'replaced-1'}" in output
    assert whole_steps(directory) == [1, 2, 4]  # 3 would have been taken for a part of it
    assert whole_steps(directory / "replaced-1") == [3, 4]
    assert_equal(load_checkpoint(directory, 4, "cpu")[0], once)


def test_two_runs_at_once_in_one_directory_are_refused(base: Path, call: Call) -> None:
    with own(_directory(base, "held")):
        code, output, error = call(base_train.main, *_train(base, "held"))
    assert code == 2 and "step=" not in output
    _assert_one_sentence(error, "another process trains into")
    assert not _directory(base, "held").exists()


def test_a_beginning_is_called_one_and_removes_what_a_killed_save_left(
    base: Path, call: Call
) -> None:
    directory = _directory(base, "killed")
    directory.mkdir(parents=True)
    left = (".model_000002.pt.x.tmp", "optim_000002_rank0.pt", "optim_000002_rank2.pt")
    for name in left:
        (directory / name).write_bytes(b"half")
    train = _train(base, "killed", "--save-every", "1", "--save-keep", "2")
    code, output, _ = call(base_train.main, *train, "--resume-from-step", "latest")
    assert code == 0 and "beginning" in output and "continuing" not in output
    assert all(f"removed {name}" in output for name in left)
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        name
        for step in (3, 4)
        for name in (f"meta_{step:06d}.json", f"model_{step:06d}.pt", f"optim_{step:06d}_rank0.pt")
    )


def test_a_run_goes_on_with_the_shards_that_it_began_with(base: Path, call: Call) -> None:
    shards = base / "growing"
    shutil.copytree(base / "shards", shards)
    (shards / "shard_00009.parquet").write_bytes((shards / "shard_00002.parquet").read_bytes())
    (shards / "shard_00002.parquet").unlink()  # 0 and 1, and 9 for validation
    train = [*_train(base, "growing", "--save-every", "2"), "--source", str(shards)]
    assert call(base_train.main, *train)[0] == 0
    (shards / "shard_00002.parquet").write_bytes((shards / "shard_00000.parquet").read_bytes())
    code, _, error = call(base_train.main, *train, "--resume-from-step", "2")
    assert code == 0, error
    assert _meta(_directory(base, "growing"), 4)["user_config"]["num_shards"] == 2
    code, _, error = call(base_train.main, *train, "--resume-from-step", "2", "--num-shards", "3")
    assert code == 2 and "started with num_shards 2, not 3" in error


# -- numbers ------------------------------------------------------------------------------------


def test_what_is_not_finite_is_never_saved(base: Path, call: Call) -> None:
    train = _train(base, "nan", "--lr", "1e38", "--log-every", "100", "--save-every", "1")
    code, _, error = call(base_train.main, *train)
    assert code == 2
    _assert_one_sentence(error, "the run has diverged")
    directory = _directory(base, "nan")
    for step in whole_steps(directory) if directory.exists() else []:
        for tensor in load_checkpoint(directory, step, "cpu")[0].values():
            assert torch.isfinite(tensor).all(), step
        assert "NaN" not in (directory / f"meta_{step:06d}.json").read_text()


def test_weights_that_are_not_finite_are_told_and_not_used(base: Path, call: Call) -> None:
    train = _train(base, "poisoned", "--save-every", "2")
    assert call(base_train.main, *train)[0] == 0
    directory = _directory(base, "poisoned")
    for step in (2, 4):
        weights, _, meta = load_checkpoint(directory, step, "cpu")
        weights["lm_head.weight"][3, 3] = float("nan")
        save_checkpoint(directory, step, weights, None, meta)
    for main, arguments in (
        (base_eval.main, ["--checkpoint", "poisoned", "--device-type", "cpu", "--json"]),
        (chat_cli.main, ["--checkpoint", "poisoned", "--device-type", "cpu", "-p", "a"]),
        (base_train.main, [*train, "--resume-from-step", "2"]),
    ):
        code, output, error = call(main, *arguments)
        assert code == 2 and "NaN" not in output
        _assert_one_sentence(error, "not finite")


# -- Weights & Biases ---------------------------------------------------------------------------


class _FakeWandb:
    """What `wandb.init` is told, and what is logged; out of reach on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.unreachable = False
        monkeypatch.setattr("wandb.init", self._init)

    def _init(self, **options: Any) -> "_FakeWandb":
        self.inits.append(options)
        if self.unreachable and options["mode"] == "online":
            raise RuntimeError("timed out")
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        assert exit_code == 0


def test_a_resumed_run_continues_its_wandb_run(
    base: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = _FakeWandb(monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    train = _train(base, "watched", "--wandb-project", "tests", "--save-every", "2")
    assert call(base_train.main, *train)[0] == 0
    assert call(base_train.main, *train, "--resume-from-step", "2")[0] == 0
    first, second = fake.inits
    assert first["id"] == second["id"] and (first["resume"], second["resume"]) == ("allow",) * 2
    meta = (_directory(base, "watched") / "meta_000002.json").read_text()
    assert json.loads(meta)["user_config"]["wandb_id"] == first["id"] and "secret" not in meta
    losses = [step for step, values in fake.logged if "train/loss" in values]
    assert losses == [1, 2, 3, 4, 3, 4]
    assert call(base_train.main, *_train(base, "other", "--wandb-project", "tests"))[0] == 0
    assert fake.inits[-1]["id"] != first["id"]


def test_wandb_out_of_reach_is_a_sentence_and_the_run_goes_on_offline(
    base: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = _FakeWandb(monkeypatch)
    fake.unreachable = True
    train = _train(base, "alone", "--wandb-project", "tests", "--wandb-mode", "online")
    code, _, error = call(base_train.main, *train)
    assert code == 0
    assert "warning: W&B cannot be reached, continuing offline: timed out" in error
    assert [init["mode"] for init in fake.inits] == ["online", "offline"]
    assert fake.inits[0]["id"] == fake.inits[1]["id"]
    assert [step for step, values in fake.logged if "train/loss" in values] == [1, 2, 3, 4]
