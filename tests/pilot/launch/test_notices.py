"""What `pilot node --watch` does with a notice: when it leaves, and what it still waits for."""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pilot.errors import PilotError
from pilot.launch import node, notices
from pilot.launch.metadata import Notice
from pilot.launch.node import NodeOptions
from pilot.launch.notices import AT_ONCE_S, File, Slurm, Watch, begins
from pilot.processes.scratch import free_port
from pilot.site import in_flight
from pilot.site.in_flight import InFlight
from pilot.wire.messages import Fence

from ...waiting import until
from .metadata_kit import REBALANCE, Service
from .node_kit import Site, end


@pytest.mark.parametrize(
    ("notice", "needed_s", "leaves"),
    [
        (Notice(reason="", ends_at_s=130.0), 0.0, True),  # AWS
        (Notice(reason="", ends_at_s=AT_ONCE_S + 10.1), 0.0, False),  # much later: use it
        (Notice(reason="", ends_at_s=500.0), 490.0, True),  # but leaving takes as long
        (Notice(reason="", ends_at_s=500.0), 489.0, False),
        (Notice(reason="", ends_at_s=500.0, at_once=True), 0.0, True),
        (Notice(reason=""), 0.0, True),  # a file that says no time
        (Notice(reason="", ends_at_s=5.0), 0.0, True),
        (Notice(reason="", warning_s=120.0), 120.0, False),  # a recommendation
        (Notice(reason="", warning_s=120.0), 121.0, True),
    ],
)
def test_node_leaves_when_leaving_takes_what_is_left(
    notice: Notice, needed_s: float, leaves: bool
) -> None:
    assert begins(notice, needed_s, now_s=10.0) is leaves


@pytest.mark.parametrize("word", ["asw", "AWS", "", "notice"])
def test_word_that_names_nothing_is_one_sentence(word: str) -> None:
    with pytest.raises(PilotError, match=r"aws, gcp, azure, slurm, and no path"):
        Watch([word])


def test_file_says_that_the_machine_ends_and_may_say_when(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    file = File(path)
    assert file.look() is None and File(path / "below").look() is None
    for text in ("", "soon", "\xff\xfe", "nan", "inf"):
        path.write_text(text, encoding="latin-1")
        assert file.look() == Notice(reason=f"notice {path}"), text
    real_s = time.time() + 77
    iso = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(real_s))
    for text in (f"{real_s}\n", iso):
        path.write_text(text)
        notice = file.look()
        assert notice is not None and notice.ends_at_s is not None
        assert notice.ends_at_s - time.monotonic() == pytest.approx(76.5, abs=1.5)
    path.unlink()
    path.mkdir()
    assert file.look() == Notice(reason=f"notice {path}"), "it is there"


def test_slurm_job_ends_by_its_walltime_and_its_signal_ends_it_at_once() -> None:
    said: list[str] = []
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 3600)}
    slurm = Slurm(job, said.append)
    notice = slurm.look()
    assert notice is not None and notice.ends_at_s is not None and not notice.at_once
    assert notice.ends_at_s - time.monotonic() == pytest.approx(3599.5, abs=1.5)
    slurm.signalled()
    asked = slurm.look()
    assert asked is not None and asked.at_once and asked.ends_at_s == notice.ends_at_s
    assert said == []
    without = Slurm({"SLURM_JOB_ID": "7"}, said.append)
    assert without.look() is None and "only SIGUSR1" in said[0]
    without.signalled()
    assert without.look() == Notice(reason="SIGUSR1 from Slurm", at_once=True)
    with pytest.raises(PilotError, match="no Slurm job"):
        Slurm({}, said.append)


def test_signal_reaches_the_watch_of_a_slurm_job_only_while_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = signal.getsignal(signal.SIGUSR1)
    watch = Watch(["slurm"], lambda line: None)
    with watch.running():
        assert watch.reason(0.0) == "" and watch.ends_at_s() == math.inf
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watch.reason(0.0) == "SIGUSR1 from Slurm"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_service_that_is_not_there_is_one_sentence_before_anything_starts(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setenv("PILOT_METADATA_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(PilotError, match="--watch gcp: no metadata service answers here") as raised:
        node.run_node(NodeOptions(name="a", watch=["gcp"]), say=print)
    assert "\n" not in str(raised.value) and site.logged("argv") == []


def test_service_that_goes_away_is_said_once_and_asked_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_RETRY_S", 0.02)
    said: list[str] = []
    watch = Watch(["aws"], said.append)
    watch._polls[0]._source.pause_s = 0.02
    with watch.running():
        service.items[REBALANCE] = "{}"
        service.status = 503
        until(lambda: len(said) == 1)
        many = len(service.asked)
        until(lambda: len(service.asked) > many + 6)
        service.status = 200
        until(lambda: len(said) == 2)
        assert "does not answer" in said[0] and "answers again" in said[1]
        until(lambda: watch.reason(60.0) == "" and len(said) == 3)
        assert "staying" in said[2] and watch.reason(60.0) == "" and len(said) == 3
        assert watch.reason(121.0) == "AWS recommends to rebalance"
        service.interrupts(110)
        until(lambda: watch.reason(0.0) == "AWS spot terminate")
        assert 100 < watch.ends_at_s() - time.monotonic() <= 110


# -- the node ----------------------------------------------------------------------------------------


class Fixed(Watch):
    """A watch with one notice, which ends this machine in `left_s`."""

    def __init__(self, left_s: float) -> None:
        super().__init__()
        self.end_s = time.monotonic() + left_s

    def ends_at_s(self) -> float:
        return self.end_s


def leaves(
    directory: Path, monkeypatch: pytest.MonkeyPatch, left_s: float, **order: Any
) -> list[str]:
    """What a node says that leaves with `left_s`, while the ClientApp of `order` works."""
    monkeypatch.setenv("PILOT_NODE_DIR", str(directory))
    defaults: dict[str, Any] = {
        "run": "r",
        "redis_url": "",
        "client": "a",
        "fence": Fence("r", 1, 1, 1),
        "preempt_file": "",
        "drain_deadline_s": 20.0,
        "state": in_flight.WORKING,
        "pid": os.getpid(),
    }
    in_flight.write(InFlight(**(defaults | order)))
    said: list[str] = []
    leaving = node._Node(NodeOptions(name="a"), directory, [], said.append, Fixed(left_s))
    leaving._leave("a notice")
    return said


def test_reply_that_cannot_go_out_in_time_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = leaves(tmp_path, monkeypatch, 30.0, upload_s=45.0)
    assert len(said) == 1 and "our last reply took 45 s: leaving without this one" in said[0]
    assert (tmp_path / "leave").read_text() == "a notice", "its workers stop, too"


@pytest.mark.parametrize(
    ("state", "upload_s"), [(in_flight.WORKING, 0.0), (in_flight.SENDING, 9.0)]
)
def test_reply_of_unknown_length_or_on_its_way_is_waited_for_until_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, upload_s: float
) -> None:
    left_s = notices.GOODBYE_S + 0.4
    said = leaves(tmp_path, monkeypatch, left_s, state=state, upload_s=upload_s)
    assert said == [
        "a notice: waiting up to 0.4 s for the server to confirm our last reply",
        "leaving: no confirmation from the server",
    ]


def test_notice_that_comes_while_it_waits_shortens_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [math.inf, math.inf, math.inf, 0.0]
    monkeypatch.setattr(Fixed, "ends_at_s", lambda self: ends[0] if len(ends) == 1 else ends.pop(0))
    said = leaves(tmp_path, monkeypatch, math.inf)
    assert "waiting up to 80 s" in said[0] and said[1] == "leaving: no confirmation from the server"


def test_node_that_watches_aws_leaves_when_its_machine_is_interrupted(
    site: Site, service: Service
) -> None:
    with site.node("--watch", "aws", "--watch", str(site.directory / "other")) as process:
        site.has_order("working", upload_s=150.0)
        time.sleep(0.5)
        assert process.poll() is None and len(site.logged("argv")) == 1
        service.interrupts(119)
        code, said = end(process)
    assert code == 0 and site.logged("leave") == [True]
    assert "AWS spot terminate: 11" in said and "leaving without this one" in said
    assert json.dumps(service.token) not in said and service.token not in said
