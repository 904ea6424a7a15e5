"""outer-lr and outer-momentum "auto", as a server merges with them."""

import shutil
from typing import Any

import torch
from torch import Tensor

from pilot.rules.aggregation import weighted_mean
from pilot.wire.messages import TrainOrder, TrainReply

from .scripted import ScriptedSite, fresh_state, scripted_config

AUTO = {"outer_lr": "auto", "outer_momentum": "auto"}
OF_BEFORE = {"outer_lr": 0.7, "outer_momentum": 0.9}  # the defaults when there was no "auto"


def _lease(one: tuple[int, float, dict[str, Tensor]]) -> int:
    return one[0]


def test_a_merge_is_the_mean_of_the_updates_with_their_own_length(server: Any) -> None:
    sent: list[tuple[int, float, dict[str, Tensor]]] = []

    def keep(order: TrainOrder, reply: TrainReply, update: dict[str, Tensor]) -> None:
        sent.append((order.fence.lease_id, float(reply.tokens), dict(update)))

    sites = [ScriptedSite("a", react=keep), ScriptedSite("b", rows=3, react=keep)]
    state = server(sites, num_rounds=1, **AUTO).run()
    updates = [(tokens, update) for _, tokens, update in sorted(sent, key=_lease) if tokens]
    assert [tokens for tokens, _ in updates] == [32.0, 24.0]
    mean = weighted_mean(updates, restore_lengths=True)
    assert mean is not None
    for name, start in fresh_state(scripted_config()).weights.items():
        assert torch.equal(state.weights[name], start - mean[name])


def test_a_run_begun_with_the_defaults_of_before_resumes_with_them(server: Any) -> None:
    sites = [ScriptedSite("a"), ScriptedSite("b", rows=3)]
    whole = server(sites, num_rounds=4, snapshot_keep=9, **OF_BEFORE)
    weights = whole.run().weights
    for number in (3, 4):
        shutil.rmtree(whole.run_dir / "snapshots" / f"round-{number:06d}")
    later = server(sites, num_rounds=4, snapshot_keep=9, **AUTO)
    assert later.state.round_number == 2
    later.term = 2
    state = later.run()
    assert (state.config.outer_lr, state.config.outer_momentum) == (0.7, 0.9)
    for name, tensor in weights.items():
        assert torch.equal(state.weights[name], tensor)
