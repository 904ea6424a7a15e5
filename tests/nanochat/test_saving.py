"""What is trained stays: whatever happens after a step, its weights are on disk."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zygote import Zygote

from nanochat import watch
from nanochat.checkpoint_manager import (
    find_last_step,
    load_any,
    load_checkpoint,
    optimizer_ranks,
    save_checkpoint,
    whole_steps,
)
from nanochat.resume import find_saved
from nanochat.rows.stream import shard_order
from nanochat.trainer import Trainer
from scripts import base_eval, base_train, chat_cli

from .data_kit import assert_equal
from .run_kit import Call, assert_one_sentence, directory_of, meta_of, run_arguments


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
    code, output, error = call(base_train.main, *run_arguments(base, "last", "--core-every", "4"))
    without_bundle()
    assert code == 2
    assert_one_sentence(error, "letters.jsonl cannot be read")
    directory = directory_of(base, "last")
    assert find_last_step(directory) == 4 and optimizer_ranks(directory, 4) == [0]
    # what was measured before is in the meta file
    logged = re.findall(r"val_bpb=([\d.]+)", output)
    assert [f"{meta_of(directory, 4)['val_bpb']:.6f}"] == logged
    code, output, _ = call(base_eval.main, "--checkpoint", "last", "--device-type", "cpu")
    assert code == 0 and f"val_bpb={logged[0]}" in output


def test_an_evaluation_that_fails_in_between_ends_the_run_saved_and_it_goes_on(
    base: Path, call: Call, without_bundle: Callable[[], None]
) -> None:
    train = run_arguments(base, "between", "--core-every", "2")
    code, _, error = call(base_train.main, *train)
    without_bundle()
    assert code == 2
    assert "saved step 2 before the end: continue with --resume-from-step latest" in error
    assert_one_sentence(error, "letters.jsonl cannot be read")
    directory = directory_of(base, "between")
    assert whole_steps(directory) == [2]
    assert call(base_train.main, *train, "--resume-from-step", "latest")[0] == 0
    assert call(base_train.main, *run_arguments(base, "undisturbed"))[0] == 0
    wanted = load_checkpoint(directory_of(base, "undisturbed"), 4, "cpu", load_optimizer=True)
    assert_equal(load_checkpoint(directory, 4, "cpu", load_optimizer=True)[:2], wanted[:2])


def test_an_exception_of_any_kind_ends_the_run_saved(
    base: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(watch, "sample_texts", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        call(base_train.main, *run_arguments(base, "bug", "--sample-every", "3"))
    assert find_last_step(directory_of(base, "bug")) == 3


def test_lines_that_cannot_be_written_end_no_training(
    base: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanochat.progress.tqdm.write", full)
    assert call(base_train.main, *run_arguments(base, "mute"))[0] == 0
    assert whole_steps(directory_of(base, "mute")) == [4]


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
        call(base_train.main, *run_arguments(base, "torn"))
    assert "step 3 failed while it changed the weights" in capsys.readouterr().err
    assert not directory_of(base, "torn").exists()


def test_a_shard_that_is_damaged_inside_ends_the_run_saved(base: Path, call: Call) -> None:
    shards = base / "damaged"
    shutil.copytree(base / "shards", shards)
    damaged = shards / f"shard_{shard_order(2, 0, 0)[1]:05d}.parquet"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 0xFF  # the footer is whole
    damaged.write_bytes(content)
    train = [*run_arguments(base, "damaged", "--num-iterations", "60"), "--source", str(shards)]
    code, _, error = call(base_train.main, *train)
    assert code == 2 and f"{damaged} is damaged" in error
    saved = re.search(r"saved step (\d+) before the end", error)
    assert saved and find_last_step(directory_of(base, "damaged")) == int(saved[1]) > 0


def test_a_shard_that_is_none_is_found_before_the_first_step(base: Path, call: Call) -> None:
    shards = base / "empty"
    shutil.copytree(base / "shards", shards)
    (shards / "shard_00001.parquet").write_bytes(b"")
    code, output, error = call(
        base_train.main, *run_arguments(base, "empty"), "--source", str(shards)
    )
    assert code == 2 and "step=" not in output
    assert_one_sentence(error, "shard_00001.parquet cannot be used: it is not a parquet file")
    train = [*run_arguments(base, "empty", "--num-shards", "1"), "--source", str(shards)]
    assert call(base_train.main, *train)[0] == 0  # the one that is damaged is not used


@pytest.mark.parametrize(("most", "needed"), [("1", "letters shows 2 .* at least 3"), ("2", "")])
def test_too_few_items_for_a_task_are_found_before_the_first_step(
    most: str, needed: str, base: Path, call: Call
) -> None:
    train = run_arguments(base, "few", "--core-every", "4", "--core-max-per-task", most)
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
            code, output, error = call(
                base_train.main, *run_arguments(base, "bad", "--core-every", "4")
            )
            assert code == 2 and "step=" not in output
            assert_one_sentence(error, said)
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
    train = run_arguments(base, run, "--core-every", "2")
    code, output, _ = call(base_train.main, *train)
    assert code == 130 and items == 3 and "core=" not in output
    assert "stopped after step 2: continue with --resume-from-step latest" in output
    assert whole_steps(directory_of(base, run)) == [2]

    items = 0
    code, output, _ = call(base_train.main, *train, "--resume-from-step", "latest")
    assert code == 130 and items == 3
    assert f"scripts.base_eval --checkpoint {run}" in output
    assert whole_steps(directory_of(base, run)) == [2, 4]
    assert optimizer_ranks(directory_of(base, run), 4) == [0]


def _with_a_failing_rank(zygote: Zygote, base: Path, run: str, where: str) -> str:
    """Two processes of which the second fails; what they say on stderr."""
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    program = [Path(__file__).with_name("failing_rank.py"), "--"]
    program += run_arguments(base, run, "--eval-every", "2")
    ranks = zygote.ranks(program, 2, env={**environment, "FAILS": where})
    said = "".join(rank.stderr for rank in ranks)
    assert all(rank.returncode for rank in ranks) and "rank 1: this rank fails" in said, said
    return said


def test_what_fails_on_one_process_only_ends_all_of_them_saved(base: Path, zygote: Zygote) -> None:
    assert "another process of this run failed" in _with_a_failing_rank(
        zygote, base, "one", "evaluation"
    )
    directory = directory_of(base, "one")
    assert whole_steps(directory) == [2] and optimizer_ranks(directory, 2) == [0, 1]
    assert meta_of(directory, 2)["user_config"]["world_size"] == 2


def test_a_process_that_fails_while_others_wait_in_a_step_saves_the_weights(
    base: Path, zygote: Zygote
) -> None:
    assert "saved step 2 before the end" in _with_a_failing_rank(
        zygote, base, "alone-in-step", "step"
    )
    directory = directory_of(base, "alone-in-step")
    assert whole_steps(directory) == [2]
    assert load_any(directory, "cpu")[1]["user_config"]["world_size"] == 0
    assert find_saved(directory, "latest") is None  # there is no optimizer to continue with


def test_what_is_not_finite_is_never_saved(base: Path, call: Call) -> None:
    train = run_arguments(base, "nan", "--lr", "1e38", "--log-every", "100", "--save-every", "1")
    code, _, error = call(base_train.main, *train)
    assert code == 2
    assert_one_sentence(error, "the run has diverged")
    directory = directory_of(base, "nan")
    for step in whole_steps(directory) if directory.exists() else []:
        for tensor in load_checkpoint(directory, step, "cpu")[0].values():
            assert torch.isfinite(tensor).all(), step
        assert "NaN" not in (directory / f"meta_{step:06d}.json").read_text()


def test_weights_that_are_not_finite_are_told_and_not_used(base: Path, call: Call) -> None:
    train = run_arguments(base, "poisoned", "--save-every", "2")
    assert call(base_train.main, *train)[0] == 0
    directory = directory_of(base, "poisoned")
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
        assert_one_sentence(error, "not finite")
