"""Bits per byte against a plain sum."""

import math

import numpy as np
import pytest
import torch

from nanochat.gpt import GPT, GPTConfig, build_gpt
from nanochat.loss_eval import bits_per_byte, bpb_sums, evaluate_bpb


@pytest.fixture(scope="module")
def model() -> GPT:
    config = GPTConfig(sequence_len=12, vocab_size=40, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)
    model = build_gpt(config, device=torch.device("cpu"), seed=0, compute_dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)  # losses that differ
    return model


TOKEN_BYTES = torch.tensor([0, 0] + [1 + i % 5 for i in range(38)], dtype=torch.int32)
ROWS = np.random.default_rng(0).integers(0, 40, (7, 13)).astype(np.uint16)


def _plain_sums(model: GPT) -> tuple[float, int]:
    nats, num_bytes = 0.0, 0
    for row in ROWS.astype(int).tolist():
        logits = model(torch.tensor([row[:-1]])).double()[0]
        for t, target in enumerate(row[1:]):
            if TOKEN_BYTES[target] > 0:
                nats -= logits[t].log_softmax(-1)[target].item()
                num_bytes += int(TOKEN_BYTES[target])
    return nats, num_bytes


@pytest.mark.parametrize("batch_rows", [1, 3, 7])
def test_sums_leave_out_special_tokens_for_any_batching(model: GPT, batch_rows: int) -> None:
    batches = [ROWS[i : i + batch_rows] for i in range(0, 7, batch_rows)]
    nats, num_bytes = bpb_sums(model, batches, TOKEN_BYTES)
    expected_nats, expected_bytes = _plain_sums(model)
    assert isinstance(nats, float) and isinstance(num_bytes, int)
    assert nats == pytest.approx(expected_nats, rel=1e-6)
    assert num_bytes == expected_bytes


def test_sums_over_nothing_are_zero_and_their_bpb_is_infinite(model: GPT) -> None:
    assert bpb_sums(model, [], TOKEN_BYTES) == (0.0, 0)
    assert bits_per_byte(0.0, 0) == math.inf


def test_bpb_is_nats_over_ln_2_times_bytes_of_the_first_steps(model: GPT) -> None:
    ids = torch.from_numpy(ROWS.astype(np.int64))
    batches = [(ids[i : i + 1, :-1], ids[i : i + 1, 1:]) for i in range(7)]
    nats, num_bytes = bpb_sums(model, [ROWS[:5]], TOKEN_BYTES)
    bpb = evaluate_bpb(model, iter(batches), 5, TOKEN_BYTES)
    assert bpb == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


def test_ignored_targets_are_left_out(model: GPT) -> None:
    ids = torch.from_numpy(ROWS.astype(np.int64))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[:, 4:] = -1
    ours = evaluate_bpb(model, [(inputs, targets)], 1, TOKEN_BYTES)
    nats, num_bytes = bpb_sums(model, [ROWS[:, :5]], TOKEN_BYTES)
    assert ours == pytest.approx(bits_per_byte(nats, num_bytes), rel=1e-6)
