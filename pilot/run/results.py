"""What a run leaves: `final_model.pt` and a nanochat checkpoint that upstream reads."""

from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import (
    FINAL_MODEL_NAME,
    load_meta,
    save_checkpoint,
    save_final_model,
)
from nanochat.common import get_base_dir
from nanochat.data_spec import DataSpec
from nanochat.errors import UserError
from nanochat.run_directory import own, set_aside
from pilot import plan
from pilot.errors import PilotError
from pilot.faults import fault_point
from pilot.run.state import RunState


class ResultsError(PilotError):
    """What the run leaves can't be written; the run itself is whole, in its last snapshot."""


def write_checkpoint(state: RunState) -> Path:
    """The directory of the checkpoint, which has the run's last step only.

    Another run's steps that are there are moved aside first. Raises ResultsError if the disk does not
    take it, UserError while another process trains into it.
    """
    directory = get_base_dir() / "base_checkpoints" / state.config.run_name
    try:
        with own(directory):
            if not _is_ours(directory, state):
                set_aside(directory, after=-1)
            fault_point("results.checkpoint")
            save_checkpoint(directory, state.steps, state.weights, None, _meta(state))
    except OSError as error:
        raise _not_written(directory, error) from error
    return directory


def write_results(state: RunState, run_dir: Path) -> tuple[Path, Path]:
    """(final_model.pt, directory of the checkpoint). The former last: it marks the run as finished.

    Raises ResultsError if the disk does not take them; a resumed run writes them again.
    """
    checkpoint, final = write_checkpoint(state), run_dir / FINAL_MODEL_NAME
    try:
        fault_point("results.final-model")
        save_final_model(final, state.weights, _meta(state))
        fault_point("results.written")
    except OSError as error:
        raise _not_written(checkpoint, error) from error
    return final, checkpoint


def _not_written(checkpoint: Path, error: OSError) -> ResultsError:
    return ResultsError(
        f"cannot write the final model or {checkpoint}: {error}; fix this and rerun the "
        "same command to write them"
    )


def _is_ours(directory: Path, state: RunState) -> bool:
    """Whether an earlier call for this run, in this process or before, has written what is there."""
    try:
        return load_meta(directory, state.steps).get("run_id") == state.wandb_id
    except UserError:
        return False


def _meta(state: RunState) -> dict[str, Any]:
    config = state.config
    last = state.record(state.round_number)
    return {
        "step": state.steps,
        "val_bpb": last.val_bpb if last and last.eval_rows == config.eval_rows else None,
        "model_config": plan.model_config(config).to_meta(),
        "user_config": config.to_mapping(),
        "device_batch_size": config.device_batch_size,
        "max_seq_len": config.sequence_len,
        "run": config.run_name,
        "run_id": state.wandb_id,
        "rounds": state.round_number,
        "tokens": state.tokens,
        "data": DataSpec(
            source=config.source,
            tokenizer=config.tokenizer,
            tokenizer_sha256=state.fingerprints["tokenizer"],
            sequence_len=config.sequence_len,
            packing=config.packing,
            eval_rows=config.eval_rows,
            val_shard=int(state.fingerprints["validation shard"]),
        ).to_meta(),
    }
