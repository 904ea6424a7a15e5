"""Whose `total-batch-size` is: with `batch-of = "federation"`, the clients of a round share each step."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from benchmarks.chaos.micro import MICRO
from pilot import plan
from pilot.config import RunConfig
from pilot.run.events import read_events
from pilot.wire.messages import TrainOrder, from_header
from pilot.wire.records import from_records

from . import in_process
from .in_process import federate
from .scripted import ROW_TOKENS, ScriptedSite

BATCH, ROUNDS, STEPS = int(MICRO["total-batch-size"]), 2, 3


def test_two_clients_take_the_steps_of_plain_training_together(
    builtin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, rows, number of steps and schedule are those of one cluster; each step is shared."""
    orders: list[TrainOrder] = []
    answer = in_process.answer

    def noted(content: RecordDict, name: str) -> RecordDict:
        order = from_header(from_records(content)[0])
        if isinstance(order, TrainOrder) and order.segments:
            orders.append(order)
        return answer(content, name)

    monkeypatch.setattr(in_process, "answer", noted)
    length = {"round-steps": STEPS, "num-rounds": 9, "total-tokens": ROUNDS * STEPS * BATCH}
    values = MICRO | length | {"run-name": "shared", "batch-of": "federation", "min-clients": 2}
    config = RunConfig.from_mapping(values)
    state, _ = federate(config, "a", "b")

    assert state.tokens == state.total_tokens == ROUNDS * STEPS * BATCH
    assert (state.steps, state.round_number) == (ROUNDS * STEPS, ROUNDS)
    assert state.ledger.rows_committed == ROUNDS * STEPS * config.batch_rows
    assert {order.step_rows for order in orders} == {config.batch_rows // 2}
    replies = [
        event
        for event in read_events(builtin / "runs" / "shared" / "events.jsonl")
        if event["event"] == "reply" and event["tokens"]
    ]
    assert [(reply["steps"], reply["tokens"]) for reply in replies] == 4 * [
        (STEPS, STEPS * BATCH // 2)
    ]
    # every client's steps are at the places in the schedule at which plain training's are
    schedule = plan.schedule(config, total_tokens=state.total_tokens)
    assert schedule.total_steps == ROUNDS * STEPS
    places = [
        (order.committed_tokens + step * order.step_rows * config.sequence_len / order.share)
        / BATCH
        for order in sorted(orders, key=lambda order: (order.client, order.fence.round_number))
        for step in range(STEPS)
    ]
    assert places == 2 * [float(step) for step in range(ROUNDS * STEPS)]
    first, last = state.history[0], state.history[-1]
    assert first.val_bpb and last.val_bpb and last.val_bpb < first.val_bpb, "it learns"


def test_when_a_client_leaves_the_other_takes_the_whole_batch(server: Any) -> None:
    stays = ScriptedSite("stays")

    def leave(order: TrainOrder, *_: Any) -> None:
        if order.fence.round_number == 2:
            run.grid.online.discard(101)

    stays.react = leave
    run = server(
        [stays, ScriptedSite("leaves", rows=2)],
        num_rounds=3,
        batch_of="federation",
        total_batch_size=4 * ROW_TOKENS,
    )
    state = run.run()
    assert state.round_number == 3
    trained = [order for order in stays.orders if order.segments]
    assert [order.step_rows for order in trained] == [2, 2, 4]
    assert [order.share for order in trained] == [0.5, 0.5, 1.0]
