"""What a round asks of each site: rows, validation rows, time, and no credentials."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from pilot.config import RunConfig
from pilot.rules.ledger import Ledger
from pilot.run.state import RunState
from pilot.server.blind import BlindClients
from pilot.server.dispatch import Dispatcher
from pilot.server.mailbox import Mailbox
from pilot.server.open_round import OpenRound
from pilot.server.report import Report
from pilot.server.roster import Client
from pilot.server.telemetry import Telemetry
from pilot.wire.codec import decode
from pilot.wire.messages import HelloOrder, HelloReply, TrainOrder, from_header
from pilot.wire.records import from_records

from ..grid_fixture import ManualClock, ManualGrid

T, BATCH_ROWS = 8, 4
WEIGHTS = {"w": torch.arange(3.0)}


class Server:
    def __init__(self, directory: Path, *nodes: int, known_rows: int = 0, **values: Any) -> None:
        defaults = {
            "run_name": "r",
            "sequence_len": T,
            "batch_of": "client",
            "total_batch_size": T * BATCH_ROWS,
            "num_shards": 8,
            "eval_rows": 10,
            "round_max_duration": 100.0,
            "round_min_duration": 1.0,
        }
        self.config = RunConfig(**(defaults | values))
        ledger = Ledger(num_shards=8, epochs=1, shard_order=lambda _: range(8))
        for shard in range(8) if known_rows else ():
            ledger.register("z", {shard})
            lease = ledger.lease("z", 1)
            assert lease is not None
            ledger.commit(lease.lease_id, [], {shard: known_rows})
        self.state = RunState(self.config, WEIGHTS, ledger, total_tokens=1_000_000)
        self.grid, self.clock = ManualGrid(*nodes), ManualClock()
        box = Mailbox(self.grid, self.clock)  # type: ignore[arg-type]  # what Grid is used for
        telemetry = Telemetry(
            directory, config_dict={}, wandb_mode="disabled", wandb_project="", run_name="r"
        )
        report = Report(telemetry)
        blind = BlindClients(self.config, self.state, report)
        self.dispatcher = Dispatcher(
            self.config, self.state, 5, box, self.clock, "unix:///r.sock", blind
        )
        self.open = OpenRound(
            2,
            self.state,
            report,
            spool=directory / "spool",
            opened_at_s=self.clock.at_s,
        )

    def order(self, node: int) -> TrainOrder:
        order = from_header(self.grid.header(self.grid.to(node)[-1]))
        assert isinstance(order, TrainOrder)
        return order

    def rows(self, node: int) -> int:
        return sum(segment.rows or 0 for segment in self.order(node).segments)


def client(
    number: int, *, speed: float | None = None, shards: range = range(8), **hello: Any
) -> Client:
    return Client(f"s{number}", number, HelloReply(shards=list(shards), **hello), speed)


def model(content: RecordDict) -> torch.Tensor:
    return decode(from_records(content)[1])["w"]


def test_order_says_all_that_a_worker_needs(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, round_steps=2)
    server.state.tokens = 96
    server.dispatcher.send_all(server.open, [client(1, devices=3)])
    order = server.order(1)
    (sent,) = server.open.pending
    assert order.fence == sent.fence and sent.lease is not None
    assert (order.fence.run, order.fence.term, order.fence.round_number) == ("r", 5, 2)
    assert order.fence.lease_id == sent.lease.lease_id
    assert order.segments == list(sent.lease.segments)
    assert (order.client, order.processes, order.redis_url) == ("s1", 3, "unix:///r.sock")
    assert (order.committed_tokens, order.total_tokens, order.share) == (96, 1_000_000, 1.0)
    assert (order.eval_first_row, order.eval_end_row, order.lease_is_tail) == (0, 10, False)
    assert RunConfig.from_mapping(order.config) == server.config
    assert torch.equal(model(server.grid.pushed[sent.message_id].content), WEIGHTS["w"])


def test_orders_of_a_round_share_one_copy_of_the_model(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, 3, round_steps=1)
    server.dispatcher.send_all(server.open, [client(n) for n in (1, 2, 3)])
    contents = [message.content for message in server.grid.pushed.values()]
    assert len(contents) == 3 and all(torch.equal(model(c), WEIGHTS["w"]) for c in contents)
    assert len({id(content["parts"]) for content in contents}) == 1
    assert len({from_records(content)[0]["client"] for content in contents}) == 3


def test_hello_asks_with_the_whole_configuration(tmp_path: Path) -> None:
    server = Server(tmp_path)
    order = server.dispatcher.hello_order()
    assert order == HelloOrder(
        run="r", config=server.config.to_mapping(), redis_url="unix:///r.sock"
    )


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 13])
def test_validation_rows_are_evaluated_once_each(tmp_path: Path, count: int) -> None:
    nodes = range(1, count + 1)
    server = Server(tmp_path, *nodes, round_steps=1)
    server.dispatcher.send_all(server.open, [client(n) for n in nodes], evaluate_only=True)
    slices = [(server.order(n).eval_first_row, server.order(n).eval_end_row) for n in nodes]
    assert [row for first, end in slices for row in range(first, end)] == list(range(10))
    assert all(server.order(n).segments == [] for n in nodes) and not server.state.ledger.open


def test_first_rows_of_each_slice_are_scored_by_two(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, round_steps=1)
    server.dispatcher.send_all(server.open, [client(n) for n in (1, 2)], evaluate_only=True)
    pieces = [server.order(n).eval_pieces for n in (1, 2)]
    scored = [[row for first, end in one for row in range(first, end)] for one in pieces]
    assert scored == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 0]]


def test_those_that_are_not_believed_are_told_of_the_end_and_score_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, 3, round_steps=1)
    clients = [client(n) for n in (1, 2, 3)]
    server.dispatcher.send_all(server.open, clients, evaluate_only=True, scorers=clients[::2])
    slices = [(server.order(n).eval_first_row, server.order(n).eval_end_row) for n in (1, 2, 3)]
    assert slices == [(0, 5), (0, 0), (5, 10)]
    assert all(server.order(n).run_is_over for n in (1, 2, 3))
    assert server.order(2).eval_pieces == []


def test_fixed_steps_lease_exactly_their_rows_whoever_is_fast(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, round_steps=3, known_rows=100)
    server.dispatcher.send_all(server.open, [client(1, speed=1.0), client(2, speed=1e9)])
    assert [server.rows(n) for n in (1, 2)] == [3 * BATCH_ROWS] * 2
    assert [server.order(n).share for n in (1, 2)] == [0.5, 0.5]


def test_lease_is_about_twice_what_a_sites_speed_will_use(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, known_rows=1000)
    server.dispatcher.send_all(server.open, [client(1, speed=6.0), client(2, speed=18.0)])
    assert [server.order(n).share for n in (1, 2)] == [0.25, 0.75]
    assert server.rows(1) == pytest.approx(2 * 6.0 * 100 / T, abs=BATCH_ROWS)
    assert server.rows(2) == pytest.approx(2 * 18.0 * 100 / T, abs=BATCH_ROWS)
    assert server.rows(1) % BATCH_ROWS == 0


def test_token_target_limits_a_lease(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, known_rows=1000, target_tokens=4800)
    server.dispatcher.send_all(server.open, [client(1), client(2)])
    assert [server.rows(n) for n in (1, 2)] == [2 * 4800 // 2 // T] * 2


def test_end_of_the_run_limits_a_lease(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, known_rows=1000, target_tokens=10**6)
    server.state.tokens = server.state.total_tokens - 64
    server.dispatcher.send_all(server.open, [client(1)])
    assert server.rows(1) == 2 * 64 // T


def test_site_of_unknown_speed_is_leased_at_least_one_step(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, known_rows=1000, target_tokens=1)
    server.dispatcher.send_all(server.open, [client(1)])
    assert server.rows(1) == BATCH_ROWS


def test_site_is_leased_shards_that_it_has_or_only_evaluates(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, 3, round_steps=1, known_rows=100)
    sites = [
        client(1, shards=range(2, 3)),
        client(2, shards=range(0)),
        client(3, shards=range(8, 2000)),
    ]
    for one in sites:
        server.state.ledger.register(one.name, one.hello.shards)
    server.dispatcher.send_all(server.open, sites)
    assert {segment.shard for segment in server.order(1).segments} == {2}
    for node in (2, 3):
        assert server.order(node).segments == [] and server.order(node).fence.lease_id == 0
        assert server.order(node).eval_end_row > server.order(node).eval_first_row
    assert len(server.open.pending) == 3


def test_rows_of_a_message_that_could_not_be_sent_go_back(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, round_steps=1, known_rows=100)
    server.dispatcher.send_all(server.open, [client(1), client(2)])
    assert len(server.state.ledger.open) == len(server.open.pending) == 1
    assert set(server.open.clients) == {"s1", "s2"}


def test_site_that_joins_has_the_time_that_is_left_and_no_part_in_the_evaluation(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path, 1, 2, round_steps=1, known_rows=100)
    server.dispatcher.send_all(server.open, [client(1)])
    assert server.order(1).seconds_left == 100.0
    server.clock.at_s += 60
    server.dispatcher.join(server.open, client(2))
    order = server.order(2)
    assert order.seconds_left == 40.0 and order.share == 0.5
    assert order.eval_first_row == order.eval_end_row
    assert not {*order.segments} & {*server.order(1).segments}


def test_last_lease_says_so(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, round_steps=4, known_rows=3)
    server.dispatcher.send_all(server.open, [client(1), client(2)])
    assert [server.order(n).lease_is_tail for n in (1, 2)] == [False, True]
    assert [server.rows(n) for n in (1, 2)] == [12, 12]


def test_sites_share_what_is_left_in_whole_steps(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, 3, round_steps=100, known_rows=4)
    server.dispatcher.send_all(server.open, [client(1), client(2), client(3)])
    assert [server.rows(n) for n in (1, 2, 3)] == [8, 12, 12]


def test_note_for_the_people_of_a_site_travels_once(tmp_path: Path) -> None:
    server, one = Server(tmp_path, 1, round_steps=1, known_rows=100), client(1)
    one.note = "another node has your name"
    for expected in ("another node has your name", ""):
        server.dispatcher.send_all(server.open, [one])
        assert server.order(1).note == expected


def test_order_says_what_the_clients_last_reply_took(tmp_path: Path) -> None:
    server, one = Server(tmp_path, 1, round_steps=1, known_rows=100), client(1)
    for measured, said in ((None, 0.0), (42.5, 42.5)):
        one.upload_s = measured
        server.dispatcher.send_all(server.open, [one])
        assert server.order(1).upload_s == said


# -- whose batch -------------------------------------------------------------------------------------


def step_rows(server: Server, *nodes: int) -> list[int]:
    return [server.order(node).step_rows for node in nodes]


def test_the_batch_of_each_client_is_that_of_the_configuration(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, round_steps=2)
    server.dispatcher.send_all(server.open, [client(1), client(2)])
    assert step_rows(server, 1, 2) == [BATCH_ROWS, BATCH_ROWS]


def test_clients_of_a_round_share_the_batch_of_the_federation(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"batch_of": "federation", "total_batch_size": 11 * T}
    server = Server(tmp_path, 1, 2, 3, round_steps=3, known_rows=100, **shared)
    three = [client(1), client(2, devices=2, speed=9.0), client(3)]
    server.dispatcher.send_all(server.open, three)
    assert step_rows(server, 1, 2, 3) == [4, 4, 3], "of fixed work speed decides nothing"
    assert [server.rows(node) for node in (1, 2, 3)] == [12, 12, 9], "three steps each"
    assert [server.order(node).share for node in (1, 2, 3)] == [4 / 11, 4 / 11, 3 / 11]
    sent = {order.client.name: order.step_tokens for order in server.open.pending}
    assert sent == {"s1": 4 * T, "s2": 4 * T, "s3": 3 * T}


def test_who_leaves_makes_the_others_shares_larger_in_the_next_round(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, round_steps=1, batch_of="federation")
    one, two = client(1), client(2)
    server.dispatcher.send_all(server.open, [one, two])
    assert step_rows(server, 1, 2) == [2, 2]
    server.dispatcher.send_all(server.open, [two])
    assert step_rows(server, 2) == [4] and server.order(2).share == 1.0


def test_shares_follow_measured_speeds_that_have_changed_much(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"batch_of": "federation", "total_batch_size": 30 * T}
    server = Server(tmp_path, 1, 2, target_tokens=4000, known_rows=500, **shared)
    one, two = client(1, speed=100.0), client(2)
    found = []
    for slow, fast in ((100, None), (100, 120), (100, 200), (110, 180), (110, 440)):
        one.tokens_per_s, two.tokens_per_s = slow, fast
        server.dispatcher.send_all(server.open, [one, two])
        found.append(step_rows(server, 1, 2))
    assert found == [[15, 15], [15, 15], [10, 20], [10, 20], [6, 24]]
    assert server.rows(1) % 6 == 0 and server.rows(2) % 24 == 0, "whole steps of its own"


def test_who_joins_a_round_takes_its_share_and_the_others_keep_theirs(tmp_path: Path) -> None:
    server = Server(tmp_path, 1, 2, batch_of="federation", known_rows=500)
    one, two = client(1), client(2)
    server.dispatcher.send_all(server.open, [one])
    server.dispatcher.join(server.open, two)
    assert step_rows(server, 1, 2) == [4, 2]
    server.dispatcher.join(server.open, one)  # another lease, in the same round
    assert step_rows(server, 1, 2) == [4, 2]
