"""A directory of checkpoints belongs to one run."""

import re
import shutil
from pathlib import Path

from nanochat.checkpoint_manager import (
    load_any,
    load_checkpoint,
    whole_steps,
)
from nanochat.run_directory import own
from scripts import base_eval, base_train

from .data_kit import assert_equal
from .run_kit import Call, assert_one_sentence, directory_of, meta_of, run_arguments


def test_a_new_run_in_an_old_directory_moves_the_old_one_aside(base: Path, call: Call) -> None:
    directory = directory_of(base, "twice")
    old = run_arguments(base, "twice", "--num-iterations", "12", "--save-every", "6")
    assert call(base_train.main, *old)[0] == 0
    before = load_checkpoint(directory, 12, "cpu")[0]
    new = run_arguments(base, "twice", "--num-iterations", "6", "--lr", "0.5")
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
    train = run_arguments(base, "again", "--save-every", "1")
    assert call(base_train.main, *train)[0] == 0
    directory = directory_of(base, "again")
    once = load_checkpoint(directory, 4, "cpu")[0]
    code, output, _ = call(base_train.main, *train, "--resume-from-step", "2", "--save-every", "0")
    assert code == 0 and "continuing" in output and "from step 2" in output
    assert f"moved later steps to {directory / 'replaced-1'}" in output
    assert whole_steps(directory) == [1, 2, 4]  # 3 would have been taken for a part of it
    assert whole_steps(directory / "replaced-1") == [3, 4]
    assert_equal(load_checkpoint(directory, 4, "cpu")[0], once)


def test_two_runs_at_once_in_one_directory_are_refused(base: Path, call: Call) -> None:
    with own(directory_of(base, "held")):
        code, output, error = call(base_train.main, *run_arguments(base, "held"))
    assert code == 2 and "step=" not in output
    assert_one_sentence(error, "another process trains into")
    assert not directory_of(base, "held").exists()


def test_a_beginning_is_called_one_and_removes_what_a_killed_save_left(
    base: Path, call: Call
) -> None:
    directory = directory_of(base, "killed")
    directory.mkdir(parents=True)
    left = (".model_000002.pt.x.tmp", "optim_000002_rank0.pt", "optim_000002_rank2.pt")
    for name in left:
        (directory / name).write_bytes(b"half")
    train = run_arguments(base, "killed", "--save-every", "1", "--save-keep", "2")
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
    train = [*run_arguments(base, "growing", "--save-every", "2"), "--source", str(shards)]
    assert call(base_train.main, *train)[0] == 0
    (shards / "shard_00002.parquet").write_bytes((shards / "shard_00000.parquet").read_bytes())
    code, _, error = call(base_train.main, *train, "--resume-from-step", "2")
    assert code == 0, error
    assert meta_of(directory_of(base, "growing"), 4)["user_config"]["num_shards"] == 2
    code, _, error = call(base_train.main, *train, "--resume-from-step", "2", "--num-shards", "3")
    assert code == 2 and "started with num_shards 2, not 3" in error
