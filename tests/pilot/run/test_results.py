"""What a run leaves is beside nobody else's steps, and there again after each call."""

import json
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint, whole_steps
from nanochat.errors import UserError
from nanochat.run_directory import own
from pilot.config import RunConfig
from pilot.rules.ledger import Ledger
from pilot.run.results import ResultsError, write_checkpoint, write_results
from pilot.run.state import RoundRecord, RunState

from ...nanochat.data_kit import full_disk


def _state(
    *, run_id: str = "w1", val_bpb: float | None = None, eval_rows: int = RunConfig().eval_rows
) -> RunState:
    config = RunConfig(run_name="mine", num_shards=3, depth=1, total_batch_size=4096)
    ledger = Ledger(num_shards=3, epochs=1, shard_order=lambda _: [0, 1, 2])
    return RunState(
        config=config,
        weights={"w": torch.arange(3.0)},
        ledger=ledger,
        total_tokens=100_000,
        round_number=4,
        tokens=40_960,
        history=[RoundRecord(4, "min-duration", 2, 40_960, 1.5, 3.25, val_bpb, eval_rows)],
        fingerprints={"tokenizer": "ab", "validation shard": "2"},
        wandb_id=run_id,
    )


def test_the_checkpoint_is_whole_before_it_is_scored_and_gets_its_figure(
    base_dir: Path, tmp_path: Path
) -> None:
    directory = write_checkpoint(_state())
    assert directory == base_dir / "base_checkpoints" / "mine" and whole_steps(directory) == [10]
    weights, _, meta = load_checkpoint(directory, 10, "cpu")
    assert torch.equal(weights["w"], torch.arange(3.0)) and meta["val_bpb"] is None
    final, again = write_results(_state(val_bpb=1.25), tmp_path)
    assert again == directory and json.loads((directory / "meta_000010.json").read_text()) == {
        **meta,
        "val_bpb": 1.25,
    }
    assert torch.load(final, weights_only=True)["meta"]["val_bpb"] == 1.25
    assert sorted(path.name for path in directory.iterdir()) == [
        "meta_000010.json",
        "model_000010.pt",
    ]


def test_a_figure_of_a_part_of_the_rows_is_not_the_models(base_dir: Path) -> None:
    directory = write_checkpoint(_state(val_bpb=1.25, eval_rows=9))
    assert load_checkpoint(directory, 10, "cpu")[2]["val_bpb"] is None


def test_another_runs_steps_are_moved_aside_even_of_the_same_number(base_dir: Path) -> None:
    directory = base_dir / "base_checkpoints" / "mine"
    save_checkpoint(directory, 900, {"w": torch.zeros(1)}, None, {"step": 900})
    (directory / ".model_000901.pt.x.tmp").write_bytes(b"half")
    write_checkpoint(_state())
    assert whole_steps(directory) == [10] and whole_steps(directory / "replaced-1") == [900]
    assert not list(directory.glob(".*"))
    write_checkpoint(_state(run_id="w2"))
    assert whole_steps(directory) == [10] and whole_steps(directory / "replaced-2") == [10]


def test_a_full_disk_and_an_owner_are_a_sentence(base_dir: Path) -> None:
    with full_disk(100), pytest.raises(ResultsError, match="rerun the same command to write them"):
        write_checkpoint(_state())
    directory = base_dir / "base_checkpoints" / "mine"
    with own(directory), pytest.raises(UserError, match="another process trains into"):
        write_checkpoint(_state())
    assert whole_steps(write_checkpoint(_state())) == [10]
