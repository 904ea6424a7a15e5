"""A federation of one, with the default outer step, is plain training: the same rows, weights and bpb."""

from pathlib import Path

import pytest
import torch

from benchmarks.chaos.micro import MICRO
from nanochat.checkpoint_manager import load_any, load_checkpoint
from nanochat.pretrain import Settings, pretrain
from pilot import plan
from pilot.config import RunConfig
from pilot.wire.codec import form_of

from .in_process import federate

STEPS = 6


@pytest.mark.parametrize(
    ("arch", "dtype", "rounds", "batch_of"),
    [
        ("classic", "float32", 2, "client"),
        ("classic", "float32", 2, "federation"),
        ("modern", "float32", 1, "client"),
        ("classic", "bfloat16", 1, "client"),
    ],
)
def test_one_client_gives_the_weights_of_plain_training(
    builtin: Path,
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    dtype: str,
    rounds: int,
    batch_of: str,
) -> None:
    """Over several rounds too, since the inner optimizer's state stays with its client."""
    monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
    batch = int(MICRO["total-batch-size"])
    config = RunConfig.from_mapping(
        MICRO
        | {
            "run-name": f"one-{arch}-{dtype}-{batch_of}",
            "batch-of": batch_of,
            "arch": arch,
            "min-clients": 1,
            "round-steps": STEPS // rounds,
            "num-rounds": rounds,
            "total-tokens": STEPS * batch,
        }
    )
    state, final = federate(config, "only")
    settings = Settings(
        run=f"plain-{arch}-{dtype}-{batch_of}",
        depth=config.depth,
        arch=arch,
        source="builtin",
        num_shards=config.num_shards,
        tokenizer=config.tokenizer,
        packing=config.packing,
        max_seq_len=config.sequence_len,
        batch_size=config.device_batch_size,
        total_batch_size=batch,
        num_iterations=STEPS,
        lr=config.lr,
        weight_decay=config.weight_decay,
        eval_every=0,
        eval_rows=config.eval_rows,
        wandb_mode="disabled",
    )
    bpb = pretrain(settings, device=torch.device("cpu"))
    plain, _, _ = load_checkpoint(
        builtin / "base_checkpoints" / f"plain-{arch}-{dtype}-{batch_of}", STEPS, "cpu"
    )
    for name, weight in state.weights.items():
        # a table that is stored in bf16 keeps, in the fp32 global model, what its first rounding lost
        rounded = plain[name].dtype == torch.bfloat16
        rtol, atol = (2**-8, 2**-8) if rounded else (1e-5, 1e-6)
        torch.testing.assert_close(weight, plain[name].float(), rtol=rtol, atol=atol)
    assert state.history[-1].val_bpb == pytest.approx(bpb, rel=1e-6 if dtype == "float32" else 1e-3)
    _, meta = load_any(final, "cpu")
    assert meta["val_bpb"] == state.history[-1].val_bpb


def test_updates_in_few_bits_train_nearly_the_same_model_in_real_workers(builtin: Path) -> None:
    """What the worker encodes is what the server takes, round after round."""
    batch = int(MICRO["total-batch-size"])
    bpb, models = {}, {}
    for wire in ("float32", "int4", "sparse"):
        values = {"run-name": f"form-{wire}", "wire-up": wire, "min-clients": 1, "num-rounds": 2}
        outer = {"outer-optimizer": "fedavg", "outer-lr": 1.0, "round-steps": STEPS // 2}
        length = {"total-tokens": STEPS * batch}
        state, _ = federate(RunConfig.from_mapping(MICRO | values | outer | length), "only")
        assert [record.clients for record in state.history] == [1, 1]
        bpb[wire], models[wire] = state.history[-1].val_bpb or 0.0, state.weights
    assert bpb["int4"] == pytest.approx(bpb["float32"], rel=1e-2)
    first = plan.initial_weights(RunConfig.from_mapping(MICRO))
    for name, weight in models["sparse"].items():
        moved = weight != first[name]
        if form_of("sparse", weight.shape) == "sparse":
            assert 0 < float(moved.float().mean()) <= 2 * 64 / 4096 + 1e-3, name
        differs = not torch.equal(models["int4"][name], models["float32"][name])
        assert differs, name  # a vector, too, from the second round on
