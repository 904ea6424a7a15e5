"""The metadata services of three providers, as stand-ins with the documented paths, headers and answers."""

import http.client
import json
from datetime import timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from pilot.launch import metadata
from pilot.launch.metadata import Aws, Azure, Gcp, NoAnswer, Notice, Source

from .metadata_kit import ACTION, EVENTS, NAME, NOW, PREEMPTED, REBALANCE, Service

NOW_S = 1000.0


def clock() -> float:
    return NOW_S


# -- AWS ---------------------------------------------------------------------------------------------


def test_aws_is_asked_with_a_token_of_version_two(service: Service) -> None:
    aws = Aws(clock=clock)
    assert aws.look() is None and aws.look() is None
    assert service.paths() == [
        "PUT /latest/api/token",
        *[f"GET {ACTION}", f"GET {REBALANCE}"] * 2,
    ], "one token serves all questions"
    ttl = service.asked[0][2]["x-aws-ec2-metadata-token-ttl-seconds"]
    assert 1 <= int(ttl) <= 21600, "what AWS allows"
    assert {headers["x-aws-ec2-metadata-token"] for _, _, headers in service.asked[1:]} == {
        "token-1"
    }


def test_aws_interruption_says_how_long_by_the_services_own_clock(service: Service) -> None:
    service.interrupts(118, "stop")
    assert Aws(clock=clock).look() == Notice(reason="AWS spot stop", ends_at_s=NOW_S + 118)


@pytest.mark.parametrize("text", ["", "soon", "[1]", '{"action": "terminate"}', '{"time": 7}'])
def test_aws_interruption_that_says_no_time_is_two_minutes_ahead(
    service: Service, text: str
) -> None:
    service.items[ACTION] = text
    notice = Aws(clock=clock).look()
    assert notice is not None and notice.ends_at_s == NOW_S + 120


def test_aws_recommendation_is_no_notice_yet(service: Service) -> None:
    service.items[REBALANCE] = '{"noticeTime": "2026-05-01T12:00:00Z"}'
    notice = Aws(clock=clock).look()
    assert notice == Notice(reason="AWS recommends to rebalance", warning_s=120.0)
    service.interrupts(120)
    later = Aws(clock=clock).look()
    assert later is not None and later.ends_at_s == NOW_S + 120, "the notice is what counts"


def test_aws_token_is_renewed_when_it_is_refused_and_before_it_ends(service: Service) -> None:
    now = [NOW_S]
    aws = Aws(clock=lambda: now[0])
    assert aws.look() is None
    service.token = "token-2"
    assert aws.look() is None
    now[0] += 6 * 3600 / 2
    service.token = "token-3"
    assert aws.look() is None
    tokens = [path for path in service.paths() if path.startswith("PUT")]
    refused = [h for _, p, h in service.asked if h.get("x-aws-ec2-metadata-token") == "token-2"]
    assert len(tokens) == 3 and len(refused) == 2, "the third was fetched without a refusal"


# -- Google ------------------------------------------------------------------------------------------


def test_gcp_is_asked_once_and_then_waits_for_a_change(service: Service) -> None:
    service.items[PREEMPTED] = "FALSE"
    service.headers = {"Metadata-Flavor": "Google", "ETag": "0a1b2c"}
    gcp = Gcp(clock=clock, wait_s=7)
    assert gcp.look() is None
    service.items[PREEMPTED] = "TRUE"
    assert gcp.look() == Notice(reason="GCP preemption", ends_at_s=NOW_S + 30)
    assert service.paths() == [
        f"GET {PREEMPTED}",
        f"GET {PREEMPTED}?wait_for_change=true&timeout_sec=7&last_etag=0a1b2c",
    ]
    assert all(headers["metadata-flavor"] == "Google" for _, _, headers in service.asked)


@pytest.mark.parametrize("headers", [{}, {"Metadata-Flavor": "Mine"}])
def test_gcp_answer_of_another_service_is_none(service: Service, headers: dict[str, str]) -> None:
    service.items[PREEMPTED], service.headers = "TRUE", headers
    with pytest.raises(NoAnswer, match="Google"):
        Gcp(clock=clock).look()


def test_gcp_etag_that_would_change_the_question_is_left_out(service: Service) -> None:
    service.items[PREEMPTED] = "FALSE"
    service.headers = {"Metadata-Flavor": "Google", "ETag": "1&timeout_sec=9999"}
    gcp = Gcp(clock=clock)
    assert gcp.look() is None and gcp.look() is None
    assert service.paths() == [f"GET {PREEMPTED}"] * 2


# -- Azure -------------------------------------------------------------------------------------------


def event(left_s: float | None = None, **values: Any) -> dict[str, Any]:
    when = "" if left_s is None else format_datetime(NOW + timedelta(seconds=left_s), usegmt=True)
    fields = {"EventType": "Preempt", "EventStatus": "Scheduled", "Resources": ["other", "Site_0"]}
    return {"EventId": "e", "ResourceType": "VirtualMachine", "NotBefore": when, **fields, **values}


def azure(service: Service, *events: Any) -> Notice | None:
    service.items[NAME] = "site_0"
    service.items[EVENTS] = json.dumps({"DocumentIncarnation": 1, "Events": list(events)})
    return Azure(clock=clock).look()


@pytest.mark.parametrize(
    ("events", "reason", "left_s"),
    [
        ([event(45)], "Azure preempt", 45),
        ([event(None)], "Azure preempt", 30),
        ([event(-5, EventStatus="Started")], "Azure preempt", 0),
        (
            [event(900, EventType="Reboot"), event(300, EventType="Terminate")],
            "Azure terminate",
            300,
        ),
        ([event(600, EventType="Redeploy")], "Azure redeploy", 600),
    ],
)
def test_azure_event_that_ends_this_machine_is_a_notice(
    service: Service, events: list[Any], reason: str, left_s: float
) -> None:
    assert azure(service, *events) == Notice(reason=reason, ends_at_s=NOW_S + left_s)
    assert service.paths() == [
        f"GET {NAME}?api-version=2021-02-01&format=text",
        f"GET {EVENTS}?api-version=2020-07-01",
    ]
    assert all(headers["metadata"] == "true" for _, _, headers in service.asked)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [event(45, EventType="Freeze")],
        [event(45, Resources=["other"])],
        [event(45, Resources=None)],
        [event(45, EventType="Reboot", EventStatus="Started")],
        ["an event", None, 7, {}],
    ],
)
def test_azure_event_that_does_not_end_this_machine_is_none(
    service: Service, events: list[Any]
) -> None:
    assert azure(service, *events) is None


def test_azures_first_answer_may_take_two_minutes_and_its_name_is_asked_once(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience: list[float] = []
    real = metadata.ask

    def ask(*arguments: Any, timeout_s: float, **options: Any) -> Any:
        patience.append(timeout_s)
        return real(*arguments, timeout_s=timeout_s, **options)

    monkeypatch.setattr(metadata, "ask", ask)
    service.items[NAME], service.items[EVENTS] = "site_0", '{"Events": []}'
    source = Azure(clock=clock)
    assert source.look() is None and source.look() is None
    assert len(patience) == 3 and patience[0] == patience[2] < 10 and patience[1] >= 120


# -- all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Aws, Gcp, Azure])
@pytest.mark.parametrize("trouble", ["status", "redirect", "garbage"])
def test_what_is_no_answer_is_an_error_that_the_watcher_knows(
    service: Service, source: type[Aws | Gcp | Azure], trouble: str
) -> None:
    service.items = dict.fromkeys([ACTION, PREEMPTED, NAME, EVENTS], "\x00[[[" * 100_000)
    if trouble == "status":
        service.status = 503
    elif trouble == "redirect":
        service.status, service.headers = 302, {"Location": f"{service.url}/latest/elsewhere"}
    looking: Source = source(clock=clock)
    try:
        notice = looking.look()
    except (OSError, http.client.HTTPException, ValueError):
        notice = None
    if source is Aws and trouble == "garbage":  # an interruption of which nothing else is known
        assert notice is not None and notice.reason == "AWS spot interruption"
    else:
        assert notice is None
    assert not any("elsewhere" in path for path in service.paths())


def test_a_proxy_of_the_environment_never_sees_a_question(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Aws(clock=clock).look() is None and len(service.asked) == 3
