"""Who takes part: every node is asked once, and sites agree to the bit or hear why not."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.common.constant import ErrorCode

from pilot.server.mailbox import LOST_AFTER_S, Mailbox
from pilot.server.report import Report
from pilot.server.roster import (
    ASK_AGAIN_S,
    BLIND_AGAIN_MAX_S,
    BLIND_AGAIN_S,
    LOST_AGAIN_S,
    TAKEN_AGAIN_S,
    Roster,
    natural,
)
from pilot.server.telemetry import Telemetry
from pilot.wire.code_hashes import code_hashes
from pilot.wire.messages import HelloOrder, HelloReply, to_header

from ..grid_fixture import ManualClock, ManualGrid

ORDER = HelloOrder(run="r", config={}, redis_url="")
AGREED = {"tokenizer": "t", "validation rows": "v", **code_hashes()}


class Federation:
    def __init__(self, *nodes: int, **options: Any) -> None:
        self.grid, self.clock = ManualGrid(*nodes), ManualClock()
        self.box = Mailbox(self.grid, self.clock)  # type: ignore[arg-type]  # what Grid is used for
        values: dict[str, Any] = {"min_clients": 1, "fingerprints": {}} | options
        telemetry = Telemetry(
            Path(tempfile.mkdtemp()),
            config_dict={},
            wandb_mode="disabled",
            wandb_project="",
            run_name="r",
        )
        self.roster = Roster(self.box, ORDER, Report(telemetry), self.clock, **values)
        self.turn()

    def turn(self) -> None:
        for answer in self.box.poll():
            assert self.roster.handle_answer(answer)
        self.roster.send_hellos()

    def says(self, node: int, name: str | None, **values: Any) -> None:
        """The node answers its last hello."""
        hello = HelloReply(**{"fingerprints": AGREED, "shards": [0], **values})
        header = to_header(hello) | ({"node_name": name} if name else {})
        self.grid.answer(self.grid.to(node)[-1], header)
        self.turn()

    @property
    def names(self) -> list[str]:
        return [site.name for site in self.roster.accepted()]


def test_every_new_node_is_asked_once_who_it_is() -> None:
    them = Federation(1, 2)
    for _ in range(3):
        them.turn()
    assert len(them.grid.pushed) == 2 and them.roster.questions_open
    assert them.grid.header(them.grid.to(1)[0]) == to_header(ORDER)
    them.grid.online.add(3)
    them.turn()
    assert len(them.grid.to(3)) == 1


def test_sites_take_part_in_the_natural_order_of_their_names() -> None:
    them = Federation(1, 2, 3)
    for node, name in ((1, "client_10"), (2, "client_2"), (3, "alpha")):
        them.says(node, name)
    assert them.names == ["alpha", "client_2", "client_10"]
    assert sorted(["b", "a10", "a9", "9", ""], key=natural) == ["", "9", "a9", "a10", "b"]
    assert [site.node_id for site in them.roster.ready()] == [3, 2, 1]


def test_site_with_an_open_message_is_accepted_but_not_ready() -> None:
    them = Federation(1, 2)
    them.says(1, "a")
    them.says(2, "b")
    them.box.send(1, "train", {})
    assert them.names == ["a", "b"]
    assert [site.name for site in them.roster.ready()] == ["b"]


def test_site_that_cant_take_part_is_refused_with_its_sentence_and_asked_again_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    them = Federation(1)
    them.says(1, "a", error="run `python -m nanochat.dataset -n 240`")
    assert them.names == [] and "nanochat.dataset -n 240" in them.roster.waiting_for(1)
    them.clock.at_s += ASK_AGAIN_S - 0.1
    them.turn()
    assert len(them.grid.to(1)) == 1
    them.clock.at_s += 0.1
    them.turn()
    them.says(1, "a", error="run `python -m nanochat.dataset -n 240`")
    assert sum("is refused" in r.getMessage() for r in caplog.records) == 1, "told once"
    them.clock.at_s += ASK_AGAIN_S
    them.turn()
    them.says(1, "a")
    assert them.names == ["a"] and them.roster.refusals == {}


@pytest.mark.parametrize("what", list(AGREED))
def test_site_that_differs_from_the_run_is_told_in_what(what: str) -> None:
    them = Federation(1, 2, fingerprints=AGREED)
    them.says(1, "a")
    them.says(2, "b", fingerprints=AGREED | {what: "other"})
    assert them.names == ["a"]
    assert f"its {what} differ from those of the run" in them.roster.refusals["b"]


def test_without_agreement_nobody_starts_and_the_majority_decides() -> None:
    them = Federation(1, 2, 3, min_clients=2)
    them.says(1, "odd", fingerprints=AGREED | {"tokenizer": "other"})
    assert them.names == []
    them.says(2, "a")
    assert them.names == [] and "disagree" in them.roster.waiting_for(2)
    them.says(3, "b")
    assert them.names == ["a", "b"] and "odd" in them.roster.refusals
    assert them.roster.fingerprints == AGREED


@pytest.mark.parametrize("package", ["pilot package", "nanochat package"])
def test_sites_with_another_package_than_the_servers_dont_agree(package: str) -> None:
    them = Federation(1, 2)
    them.says(1, "a", fingerprints=AGREED | {package: "another version"})
    them.says(2, "b", fingerprints={k: v for k, v in AGREED.items() if k != package})
    assert them.names == []


@pytest.mark.parametrize("package", ["pilot package", "nanochat package"])
def test_run_may_be_resumed_with_a_newer_package_on_all_sites(package: str) -> None:
    them = Federation(1, 2, fingerprints=AGREED | {package: "of the first start"})
    them.says(1, "a")
    them.says(2, "b", fingerprints=AGREED | {package: "of the first start"})
    assert them.names == ["a"] and "b" in them.roster.refusals


def test_run_of_before_the_hash_of_nanochat_compares_it_from_now_on() -> None:
    before = {k: v for k, v in AGREED.items() if k != "nanochat package"}
    them = Federation(1, 2, fingerprints=before)
    them.says(1, "a")
    them.says(2, "b", fingerprints=AGREED | {"nanochat package": "another optimizer"})
    assert them.names == ["a"] and "its nanochat package differ" in them.roster.refusals["b"]


@pytest.mark.parametrize(
    ("version", "told"), [("1.0.0", True), (f"{torch.__version__.split('+')[0]}+cu999", False)]
)
def test_site_with_another_torch_takes_part_and_is_told(
    caplog: pytest.LogCaptureFixture, version: str, told: bool
) -> None:
    caplog.set_level(logging.INFO)
    them = Federation(1)
    them.says(1, "a", versions={"torch": version})
    assert them.names == ["a"] and ("its torch is 1.0.0, the server's" in caplog.text) == told


def test_newer_node_of_the_same_name_supersedes_the_older_and_keeps_its_speed() -> None:
    them = Federation(1)
    them.says(1, "a")
    them.roster.accepted()[0].tokens_per_s = 7.0
    them.grid.online.add(2)
    them.turn()
    them.says(2, "a", shards=[5])
    (site,) = them.roster.accepted()
    assert (site.node_id, site.tokens_per_s, site.hello.shards) == (2, 7.0, [5])
    them.grid.online.discard(1)
    them.turn()
    assert them.names == ["a"]


def test_living_name_is_not_taken_by_another_machine_and_both_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    silent: set[str] = set()
    them = Federation(1, silent=lambda name: name in silent)
    them.says(1, "a", host="ours")
    them.grid.online.add(2)
    them.turn()
    for _ in range(3):
        them.says(2, "a", host="theirs")
        (site,) = them.roster.accepted()
        assert site.node_id == 1
        them.clock.at_s += TAKEN_AGAIN_S
        them.turn()
    told = "A node on theirs says that it is a, and so does one on ours that is alive"
    assert caplog.text.count(told) == 1
    assert "the name a is taken by a client on ours" in them.roster.waiting_for(1)
    assert them.grid.header(them.grid.to(2)[0])["note"] == ""
    assert "choose another name" in them.grid.header(them.grid.to(2)[-1])["note"]
    assert "a node on theirs also says that it is a" in site.note
    silent.add("a")  # by its heartbeats
    them.says(2, "a", host="theirs")
    (site,) = them.roster.accepted()
    assert (site.node_id, them.roster.refusals) == (2, {})


def test_name_of_a_node_that_flower_misses_is_free_for_another_machine() -> None:
    them = Federation(1)
    them.says(1, "a", host="ours")
    them.grid.online = {2}
    them.turn()
    them.says(2, "a", host="theirs")
    assert [site.node_id for site in them.roster.accepted()] == [2]


def test_name_is_kept_by_who_said_it_first_before_anybody_is_agreed_on() -> None:
    them = Federation(1, 2, 3, min_clients=2)
    them.says(1, "a", host="ours")
    them.says(2, "a", host="theirs")
    them.says(3, "b", host="third")
    assert [site.node_id for site in them.roster.accepted()] == [1, 3]


def test_node_that_was_refused_hears_why_with_the_next_question() -> None:
    them = Federation(1)
    them.says(1, "a", fingerprints=AGREED)
    them.grid.online.add(2)
    them.turn()
    them.says(2, "b", fingerprints=AGREED | {"tokenizer": "other"})
    them.clock.at_s += ASK_AGAIN_S
    them.turn()
    assert "its tokenizer differ" in them.grid.header(them.grid.to(2)[-1])["note"]


def test_site_whose_hello_was_lost_is_asked_again_soon() -> None:
    them = Federation(1)
    them.grid.fail(them.grid.to(1)[-1], ErrorCode.CLIENT_APP_CRASHED)
    them.turn()
    them.clock.at_s += LOST_AGAIN_S
    them.turn()
    assert len(them.grid.to(1)) == 2


def test_node_that_leaves_is_forgotten_and_asked_again_when_it_comes_back() -> None:
    them = Federation(1)
    them.says(1, "a")
    them.grid.online.discard(1)
    them.turn()
    assert them.names == []
    them.grid.online.add(1)
    them.turn()
    assert len(them.grid.to(1)) == 2
    them.says(1, "a")
    assert them.names == ["a"]


def test_node_that_never_answered_leaves_no_reason_behind_once_it_does() -> None:
    them = Federation(1)
    them.grid.fail(them.grid.to(1)[0], 8, "killed")
    them.turn()
    assert them.roster.refusals == {"node 1": "Flower error 8: killed"}
    them.clock.at_s += ASK_AGAIN_S
    them.turn()
    them.says(1, "a")
    assert them.roster.refusals == {}


@pytest.mark.parametrize(
    "header", [{}, {"kind": "TrainReply"}, {"kind": "HelloReply", "shards": 1}]
)
def test_answer_that_is_no_hello_refuses_its_node(header: dict[str, Any]) -> None:
    them = Federation(1)
    them.grid.answer(them.grid.to(1)[0], header | {"node_name": "a"})
    them.turn()
    assert them.names == [] and list(them.roster.refusals) == ["a"]


def test_answer_to_another_message_is_not_taken() -> None:
    them = Federation(1)
    them.says(1, "a")
    message_id = them.box.send(1, "train", {})
    them.grid.answer(message_id, {})
    (answer,) = them.box.poll()
    assert not them.roster.handle_answer(answer)


def test_client_without_redis_is_asked_again_ever_more_rarely_and_nothing_is_said_twice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    them = Federation(1, 2)
    them.says(1, "a", redis=False)
    them.says(2, "b", redis=True)
    them.roster.accepted()[0].tokens_per_s = 7.0
    for factor in (1, 2):
        them.clock.at_s += factor * BLIND_AGAIN_S - 0.1
        them.turn()
        assert len(them.grid.to(1)) == factor, "not yet"
        them.clock.at_s += 0.1
        them.turn()
        assert not them.roster.questions_open, "no round waits for that"
        them.says(1, "a", redis=False)
    assert (len(them.grid.to(1)), len(them.grid.to(2))) == (3, 1)
    assert caplog.text.count("Client a joined") == 1
    assert them.roster.accepted()[0].blind
    them.clock.at_s += 4 * BLIND_AGAIN_S
    them.turn()
    them.says(1, "a", redis=True)
    site = them.roster.accepted()[0]
    assert not site.blind and site.tokens_per_s == 7.0
    them.clock.at_s += BLIND_AGAIN_MAX_S
    them.turn()
    assert len(them.grid.to(1)) == 4


def test_site_of_before_the_question_is_without_redis_if_it_warned() -> None:
    them = Federation(1, 2)
    them.says(1, "a", warning="cannot reach Redis")
    them.says(2, "b")
    assert [site.blind for site in them.roster.accepted()] == [True, False]


def test_warning_of_a_site_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    them = Federation(1)
    them.says(1, "a", warning="cannot reach Redis")
    assert them.names == ["a"] and "cannot reach Redis" in caplog.text


def test_closed_federation_is_hopeless_once_all_have_answered_and_too_few_may_train() -> None:
    them = Federation(1, 2, closed=True, min_clients=2)
    assert not them.roster.hopeless(2), "they have not answered"
    them.says(1, "a", error="no data")
    assert not them.roster.hopeless(2)
    them.says(2, "b")
    assert them.roster.hopeless(2)
    still_open = Federation(1, min_clients=1)
    still_open.says(1, "a", error="no data")
    assert not still_open.roster.hopeless(1)


def test_hello_that_was_lost_with_its_node_is_no_open_question() -> None:
    them = Federation(1, 2)
    them.says(2, "b")
    them.grid.online.discard(1)
    them.turn()
    them.clock.at_s += LOST_AFTER_S
    them.turn()
    assert not them.roster.questions_open


def test_names_of_any_characters_have_an_order() -> None:
    names = ["²", "a²", "٣", "b10", "b9", "", "-1"]
    assert sorted(names, key=natural) == ["", "٣", "-1", "a²", "b9", "b10", "²"]


def test_node_that_says_another_name_each_time_is_not_remembered_for_ever() -> None:
    them = Federation(1)
    for number in range(150):
        them.says(1, f"name-{number}", error="no" * 5000)
        them.clock.at_s += ASK_AGAIN_S
        them.turn()
    assert len(them.roster.refusals) == 100 and "name-149" in them.roster.refusals
    assert len(them.roster.waiting_for(1)) < 100 * 310
