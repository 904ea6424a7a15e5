"""Where a round's time went: tables of facts and events, and what they must add up to."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from pilot.rules.accounts import (
    OrderFacts,
    Spent,
    client_accounts,
    goodput,
    run_account,
    spent_on_order,
)

SAID = {
    "total_s": 20.0,
    "ready_s": 1.0,
    "eval_s": 3.0,
    "train_s": 12.0,
    "pack_s": 2.0,
    "encode_s": 0.5,
}


def test_the_parts_of_an_order_are_its_clients_and_the_rest_is_the_way_of_the_reply() -> None:
    found = spent_on_order(27.0, 4.0, **SAID)
    assert asdict(found) == {
        "start_s": 4.0,
        "load_s": 3.5,  # 20 - 1 (in start_s) - 3 - 12 - 0.5
        "evaluation_s": 3.0,
        "packing_s": 2.0,
        "training_s": 10.0,
        "encoding_s": 0.5,
        "sending_s": 4.0,
    }


def test_without_a_heartbeat_both_ways_count_as_the_replys() -> None:
    found = spent_on_order(27.0, None, **SAID)
    assert (found.start_s, found.load_s, found.sending_s) == (0.0, 4.5, 7.0)


@pytest.mark.parametrize(
    ("away_s", "start_s", "said"),
    [
        (27.0, 4.0, SAID),
        (27.0, None, SAID),
        (5.0, 4.0, SAID),  # clocks that differ, or a client that says anything
        (5.0, 9.0, SAID),
        (0.0, None, SAID),
        (30.0, 1.0, SAID | {"train_s": 1e9, "eval_s": 1e9, "pack_s": 2e9}),
        (30.0, 1.0, dict.fromkeys(SAID, 0.0)),  # a client that does not say
    ],
)
def test_the_parts_add_up_to_the_time_away_and_none_is_negative(
    away_s: float, start_s: float | None, said: dict[str, float]
) -> None:
    found = spent_on_order(away_s, start_s, **said)
    assert found.whole_s == pytest.approx(away_s)
    assert min(asdict(found).values()) >= 0.0


def _order(client: str, training_s: float | None, **facts: Any) -> OrderFacts:
    spent = None if training_s is None else Spent(training_s=training_s, sending_s=1.0)
    order = OrderFacts(client, sent_at_s=103.0, bytes_down=100, bytes_up=10, spent=spent)
    return replace(order, **{"merged": spent is not None, **facts})


def test_goodput_is_of_the_time_since_the_last_rounds_training_ended() -> None:
    orders = [
        _order("a", 6.0),
        _order("a", 2.0, sent_at_s=109.0),  # another lease
        _order("b", 9.0, merged=False),  # refused: its steps are of no use
        _order("late", 1.0, sent_at_s=108.0),
        _order("gone", None, bytes_up=0),
    ]
    found = client_accounts(orders, before=["a", "b", "gone"], last_end_s=100.0, end_s=112.0)
    assert {name: (one.period_s, one.goodput_s) for name, one in found.items()} == {
        "a": (12.0, 8.0),
        "b": (12.0, 0.0),
        "late": (4.0, 1.0),  # not in the last round: since its first order
        "gone": (12.0, 0.0),
    }
    assert found["a"].goodput == pytest.approx(8 / 12)
    assert found["a"].spent == Spent(training_s=8.0, sending_s=2.0)
    assert (found["a"].bytes_down, found["a"].bytes_up, found["gone"].bytes_up) == (200, 20, 0)
    assert goodput(found.values()) == pytest.approx(9 / 40)
    assert goodput([]) is None


def test_a_servers_first_round_counts_from_each_clients_first_order() -> None:
    found = client_accounts([_order("a", 6.0)], before=[], last_end_s=float("-inf"), end_s=111.0)
    assert found["a"].period_s == 8.0


def test_steps_that_took_longer_than_the_server_saw_are_no_goodput_above_one() -> None:
    found = client_accounts([_order("a", 6.0)], before=["a"], last_end_s=100.0, end_s=105.0)
    assert found["a"].goodput == 1.0


def test_a_runs_account_is_the_sum_of_its_rounds_whichever_server_led_them() -> None:
    def told(training_s: float, **phases: float) -> dict[str, Any]:
        accounts = client_accounts(
            [_order("a", training_s)], before=["a"], last_end_s=100.0, end_s=110.0
        )
        clients = {name: account.to_json() for name, account in accounts.items()}
        return {"event": "round_time", "phases": phases, "clients": clients}

    events = [
        {"event": "run_started"},
        told(5.0, training=5.0, start=1.0),
        {"event": "run_started"},
        told(7.0, training=7.0, merge=0.5),
        {"event": "round_time", "phases": {"evaluation": 2.0}, "clients": {}},
    ]
    found = run_account(events)
    assert found.phases == {"training": 12.0, "start": 1.0, "merge": 0.5, "evaluation": 2.0}
    assert found.clients["a"].goodput == found.goodput == pytest.approx(12 / 20)
    assert found.clients["a"].bytes_down == 200
    assert found.rounds == 2
    assert run_account([]).goodput is None
