"""Clients that hold the model between rounds, and those that do not: all train from the same bits."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from safetensors.torch import save_file

from benchmarks.chaos.micro import MICRO
from pilot.run.state import RunState
from pilot.site.mirror import Mirror, mirror_path
from pilot.wire.codec import message_bytes
from pilot.wire.messages import TrainOrder, TrainReply, from_header
from pilot.wire.records import from_records
from pilot.wire.steps import digest_of

from .processes import Deployment, events, finished, killed_at_end, pilot_run, write_config
from .scripted import MirrorSite, Server
from .scripted import events as said

WHOLE = 4 * (64 * 80 + 5 + 6)
STEP = message_bytes([(64, 80), (5,), (2, 3)], wire="int4")
DOWN = {"wire_down": "int4", "num_rounds": 5, "epochs": 9}


@pytest.fixture(autouse=True)
def _base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))


def check(run: Server, state: RunState, *sites: MirrorSite) -> None:
    """All rounds trained from the same bits, and the last model is the one that the results hold."""
    by_round: dict[int, set[str]] = {}
    for site in sites:
        for order in site.orders:
            by_round.setdefault(order.fence.round_number, set()).add(order.digest)
    assert all(len(digests) == 1 for digests in by_round.values()), by_round
    assert {digest for site in sites for digest in site.trained_from} == {
        digest for digests in by_round.values() for digest in digests
    }
    assert by_round[max(by_round)] == {state.digest}
    assert not any(name.startswith("residual.") for name in state.outer)


def test_clients_are_sent_steps_and_train_from_the_same_bits(server: Any) -> None:
    sites = [MirrorSite("a"), MirrorSite("b", rows=3)]
    run = server(sites, **DOWN)
    state = run.run()
    for site in sites:
        assert site.received == [WHOLE, *[STEP] * 4, WHOLE], "the last merge is sent as it is"
        assert not mirror_path(run.config.run_name, site.name).exists()
    check(run, state, *sites)
    rounds = said(run, "round_time")
    assert [event["bytes_down"] for event in rounds] == [2 * WHOLE, *[2 * STEP] * 4, 2 * WHOLE]
    assert [event["bytes_up"] for event in rounds] == [2 * WHOLE] * 5 + [0]
    replies = [event for event in said(run, "reply") if event["round"] == 2]
    assert [(one["bytes_down"], one["bytes_up"]) for one in replies] == [(STEP, WHOLE)] * 2


@dataclass
class Spoilt(MirrorSite):
    """One whose mirror `spoil`s when the order of round 4 has come."""

    spoil: Callable[["Spoilt", str], None] = lambda site, run: None
    first: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, kind: str, content: RecordDict) -> RecordDict:
        order = from_header(from_records(content)[0])
        if isinstance(order, TrainOrder) and order.fence.round_number == 2 and not self.first:
            self.first = {n: t.clone() for n, t in self.mirror._weights.items()}
        if isinstance(order, TrainOrder) and order.fence.round_number == 4:
            spoil, self.spoil = self.spoil, lambda site, run: None
            spoil(self, order.fence.run)
        return super().__call__(kind, content)


def damage(site: Spoilt, run: str) -> None:
    site.mirror._weights["m"][7, 7] += 1


def lose_all(site: MirrorSite, run: str) -> None:
    site.mirror = Mirror()
    mirror_path(run, site.name).unlink(missing_ok=True)


def go_back(site: Spoilt, run: str) -> None:
    site.mirror = Mirror()
    digest = digest_of(site.first)
    save_file(site.first, mirror_path(run, site.name), metadata={"digest": digest})


def take_another_runs(site: Spoilt, run: str) -> None:
    site.first["v"] = torch.ones(3)
    go_back(site, run)


@pytest.mark.parametrize(
    ("spoil", "history", "again"),
    [
        (damage, 8, [WHOLE]),
        (lose_all, 8, [WHOLE]),
        (take_another_runs, 8, [WHOLE]),
        (go_back, 2, [WHOLE]),
        (go_back, 3, [3 * STEP]),
    ],
)
def test_client_whose_mirror_does_not_fit_is_sent_what_it_needs_in_the_same_round(
    server: Any, spoil: Any, history: int, again: list[int]
) -> None:
    sites = [MirrorSite("good"), Spoilt("bad", spoil=spoil)]
    run = server(sites, **DOWN, mirror_history=history)
    state = run.run()
    check(run, state, *sites)
    bad = sites[1]
    assert bad.received == [WHOLE, STEP, STEP, STEP, *again, STEP, WHOLE]
    asked = [order for order in bad.orders if order.fence.round_number == 4]
    assert len({order.fence for order in asked}) == 1 and len(asked) == 2
    assert asked[0].segments == asked[1].segments
    assert asked[1].seconds_left <= asked[0].seconds_left
    assert [record.clients for record in state.history] == [2] * 5
    (unfit,) = said(run, "mirror_unfit")
    assert (unfit["client"], unfit["round"]) == ("bad", 4)
    assert state.ledger.rows_leased == state.ledger.rows_committed + state.ledger.rows_returned


def test_client_that_never_takes_what_it_is_sent_is_refused_and_holds_nobody_up(
    server: Any,
) -> None:
    class Stubborn(MirrorSite):
        """Loses its mirror in round 2, and asks for the model although it has it."""

        def __call__(self, kind: str, content: RecordDict) -> RecordDict:
            order = from_header(from_records(content)[0])
            if isinstance(order, TrainOrder) and order.fence.round_number == 2:
                lose_all(self, order.fence.run)
                self.react = self._ask_again
            return super().__call__(kind, content)

        def _ask_again(self, order: TrainOrder, reply: TrainReply, _: Any) -> TrainReply | None:
            asks = order.fence.round_number == 2
            return replace(reply, needs_model=True, mirror="") if asks else None

    stubborn = Stubborn("stubborn")
    run = server([MirrorSite("good"), stubborn], **DOWN | {"num_rounds": 2})
    state = run.run()
    assert [record.clients for record in state.history] == [2, 1]
    reasons = [event["reason"] for event in said(run, "reply_refused")]
    assert reasons == ["it asks for the whole model, which it was sent"]


def test_joiner_in_mid_run_gets_the_model_and_then_steps(server: Any) -> None:
    late = MirrorSite("late")

    def let_in(order: TrainOrder, *_: Any) -> None:
        if order.fence.round_number == 2 and not late.orders:
            run.grid.add(200, late)
            deadline = time.monotonic() + 5
            while not late.orders and time.monotonic() < deadline:
                time.sleep(0.01)

    sites = [MirrorSite("a", react=let_in), MirrorSite("b")]
    run = server(sites, **DOWN)
    state = run.run()
    check(run, state, *sites, late)
    assert late.orders[0].fence.round_number == 2, "in the round that was running"
    assert late.received == [WHOLE, *[STEP] * 3, WHOLE]


def test_a_resumed_server_knows_mirrors_by_what_their_clients_say(server: Any) -> None:
    sites = [MirrorSite("a"), MirrorSite("b")]
    run = server(sites, **DOWN)

    def stop(order: TrainOrder, *_: Any) -> None:
        if order.fence.round_number == 3:
            run.stopped.set()

    sites[0].react = stop
    with pytest.raises(Exception, match="was stopped"):
        run.run()
    until_s = time.monotonic() + 60
    while any(site.kept < 3 for site in sites):  # one may still be at work
        assert time.monotonic() < until_s
        time.sleep(0.01)
    sites[0].react = lambda *_: None
    mirror_path(run.config.run_name, "b").unlink(missing_ok=True)
    sites[1].mirror = Mirror()
    for site in sites:
        site.received.clear()
    resumed = run.resume()
    state = resumed.run()
    check(resumed, state, *sites)
    assert sites[0].received[0] == 0, "it holds the model of the round that is done again"
    assert sites[1].received[0] == WHOLE
    assert sites[0].received[1:] == sites[1].received[1:] == [STEP, STEP, WHOLE]


@pytest.mark.timeout(1800)
def test_a_federation_over_flower_sends_few_bits_both_ways(builtin: Path, tmp_path: Path) -> None:
    """Real SuperLink, SuperNodes and workers, which hold a mirror each."""
    values = MICRO | {
        "run-name": "few-bits",
        "wire-up": "int4",
        "wire-down": "int4",
        "round-steps": 2,
        "num-rounds": 3,
        "total-tokens": 10**6,
    }
    config = write_config(tmp_path, values)
    with Deployment(tmp_path, builtin) as deployment:
        for name in ("site-a", "site-b"):
            deployment.start_node(name)
        with killed_at_end(pilot_run("local-deployment", config, env=deployment.env)) as process:
            output = finished(process)
    committed = events(builtin, "few-bits", "round_committed")
    assert [event["clients"] for event in committed] == [2, 2, 2], output[-3000:]
    rounds = events(builtin, "few-bits", "round_time")
    down = [event["bytes_down"] for event in rounds][: len(committed)]
    up = [event["bytes_up"] for event in rounds][: len(committed)]
    assert down[1] < down[0] / 6 and down[2] < down[0] / 6, down
    assert all(sent < down[0] / 6 for sent in up), up
    bpb = [event["val_bpb"] for event in events(builtin, "few-bits", "validation")]
    assert len(bpb) == 4 and bpb == sorted(bpb, reverse=True), bpb
    assert not events(builtin, "few-bits", "mirror_unfit")
