"""What a run leaves: `final_model.pt` and a nanochat checkpoint that upstream reads."""

from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import FINAL_MODEL_NAME, save_checkpoint, save_final_model
from nanochat.common import get_base_dir
from nanochat.data_spec import DataSpec
from pilot import plan
from pilot.errors import PilotError
from pilot.faults import fault_point
from pilot.run.snapshot import remove_strays
from pilot.run.state import RunState


class ResultsError(PilotError):
    """What the run leaves can't be written; the run itself is whole, in its last snapshot."""


def write_results(state: RunState, run_dir: Path) -> tuple[Path, Path]:
    """(final_model.pt, directory of the checkpoint). The former last: it marks the run as finished.

    Raises ResultsError if the disk does not take them; a resumed run writes them again.
    """
    meta = _meta(state)
    checkpoint = get_base_dir() / "base_checkpoints" / state.config.run_name
    final = run_dir / FINAL_MODEL_NAME
    remove_strays(checkpoint)
    try:
        fault_point("results.checkpoint")
        save_checkpoint(checkpoint, state.steps, state.weights, None, meta)
        fault_point("results.final-model")
        save_final_model(final, state.weights, meta)
        fault_point("results.written")
    except OSError as error:
        raise ResultsError(
            f"cannot write the final model or {checkpoint}: {error}; fix this and rerun the "
            "same command to write them"
        ) from error
    return final, checkpoint


def _meta(state: RunState) -> dict[str, Any]:
    config = state.config
    last = state.record(state.round_number)
    return {
        "step": state.steps,
        "val_bpb": last.val_bpb if last else None,
        "model_config": plan.model_config(config).to_meta(),
        "user_config": config.to_mapping(),
        "device_batch_size": config.device_batch_size,
        "max_seq_len": config.sequence_len,
        "run": config.run_name,
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
