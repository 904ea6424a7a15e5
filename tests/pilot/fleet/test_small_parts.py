"""Ports, devices, certificates, files, the journal: what a fleet is made of."""

import io
import json
import os
import shlex
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography import x509

from pilot.errors import PilotError
from pilot.fleet import devices, environment
from pilot.fleet.certificates import Authority, check_address, found_addresses
from pilot.fleet.environment import of_running_fleet, read_environment, write_connection
from pilot.fleet.journal import Journal
from pilot.fleet.places import Places
from pilot.fleet.ports import Ports, Wanted, is_free
from pilot.fleet.presence import UP, find, present
from pilot.fleet.secret_file import private_directory, read_secret, write_secret
from pilot.launch.connection import read_connection
from pilot.processes.scratch import free_port

from ...waiting import until

# -- files ---------------------------------------------------------------------------------------


def test_a_secret_file_is_its_owners_alone_or_not_used(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    before = os.umask(0)
    try:
        write_secret(path, "s3cret")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600 and read_secret(path) == b"s3cret"
    assert list(tmp_path.iterdir()) == [path]
    for mode in (0o640, 0o604):
        path.chmod(mode)
        with pytest.raises(PilotError, match=f"mode {mode:o}.*chmod 600 {path}"):
            read_secret(path)
    tmp_path.chmod(0o755)
    with pytest.raises(PilotError, match="chmod 700"):
        private_directory(tmp_path)


# -- ports ---------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_another_one_with_a_sentence(tmp_path: Path) -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        usual = taken.getsockname()[1]
        wanted = Wanted("Redis", "--redis-port", usual)
        first = Ports(tmp_path / "ports", said.append).choose(wanted)
        assert first != usual and is_free("127.0.0.1", first)
        assert said == [
            f"port {usual} is taken on this machine: Redis has {first} (--redis-port chooses)"
        ]
        # the next fleet of this directory has the same
        assert Ports(tmp_path / "ports", said.append).choose(wanted, keep=True) == first
        with pytest.raises(PilotError, match=rf"port {usual} for Redis is taken .*--redis-port"):
            Ports(tmp_path / "ports", said.append).choose(
                Wanted("Redis", "--redis-port", 1, asked=usual)
            )
    free = free_port()
    assert Ports(tmp_path / "others", said.append).choose(Wanted("x", "--x", free)) == free
    assert len(said) == 1


def test_a_port_that_sites_know_is_kept_or_refused(tmp_path: Path) -> None:
    wanted = Wanted("SuperLink", "--port", free_port())
    port = Ports(tmp_path / "ports", print).choose(wanted, keep=True)
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(PilotError, match="which the sites know"):
            Ports(tmp_path / "ports", print).choose(wanted, keep=True)
        assert Ports(tmp_path / "ports", lambda said: None).choose(wanted) != port
    with pytest.raises(PilotError, match=r"198\.51\.100\.7"):
        Ports(tmp_path / "ports", print).choose(Wanted("x", "--port", port, host="198.51.100.7"))


# -- devices -------------------------------------------------------------------------------------


def test_no_two_clients_have_the_same_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def visible(*arguments: int | None, cpu: bool = False) -> list[str]:
        return [own["CUDA_VISIBLE_DEVICES"] for own in devices.shares(*arguments, cpu=cpu)]

    assert visible(None, None) == ["0", "1", "2", "3"]
    assert visible(2, None) == ["0,1", "2,3"] == visible(None, 2)
    assert visible(1, 2) == ["0,1"]
    assert visible(3, None, cpu=True) == ["", "", ""]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, 5,3,1")
    assert visible(2, 2) == ["7,5", "3,1"]
    for clients, each in ((5, None), (2, 3)):
        with pytest.raises(PilotError, match="this machine has 4"):
            devices.shares(clients, each, cpu=False)
    for clients, each, cpu in ((-1, None, False), (1, 0, False), (1, 1, True)):
        with pytest.raises(PilotError, match=r"must be 0 or more|takes 1 or more"):
            devices.shares(clients, each, cpu=cpu)


def test_clients_on_cpus_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert devices.shares(None, None, cpu=False) == 2 * [
        {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
    ]
    with pytest.raises(PilotError, match="this machine has 0"):
        devices.shares(1, 1, cpu=False)


# -- certificates --------------------------------------------------------------------------------


def names(path: Path) -> set[str]:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in found}


def test_a_heads_certificate_is_for_its_addresses_and_stays_while_they_do(tmp_path: Path) -> None:
    first = Authority(tmp_path)
    certificate, _ = first.server(["head.example.org", "192.0.2.9"])
    assert names(certificate) >= {"head.example.org", "192.0.2.9", "127.0.0.1", "localhost"}
    before = certificate.read_bytes()
    again = Authority(tmp_path)
    assert again.fingerprint == first.fingerprint
    again.server(["192.0.2.9", "head.example.org"])
    assert certificate.read_bytes() == before
    again.server(["192.0.2.10"])
    assert "192.0.2.10" in names(certificate) and "192.0.2.9" not in names(certificate)
    (tmp_path / "ca.key").chmod(0o644)
    with pytest.raises(PilotError, match=r"chmod 600 .*ca\.key"):
        Authority(tmp_path)


def test_addresses_are_names_or_numbers() -> None:
    for address in ("head", "head-1.example.org", "192.0.2.1", "2001:db8::1"):
        check_address(address)
    for address in ("", "head:8001", "a b", "https://head", "*.example.org", "x" * 64):
        with pytest.raises(PilotError, match="neither an IP address nor"):
            check_address(address)
    for address in found_addresses():
        check_address(address)
    assert not {"127.0.0.1", "::1", "localhost"} & set(found_addresses())


# -- what other commands are given ---------------------------------------------------------------


def test_the_environment_is_there_while_the_fleet_is(
    tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLWR_HOME")
    places = Places.of(None).make()
    values = {"FLWR_HOME": "/some where/x", "PILOT_REDIS_URL": "redis://u:p@h:1/0?a=b"}
    environment.write_environment(places.environment, values)
    assert read_environment(places.environment) == values
    shown = subprocess.run(
        ["sh", "-c", f". {shlex.quote(str(places.environment))}; echo $PILOT_REDIS_URL"],
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == values["PILOT_REDIS_URL"]
    assert of_running_fleet() == {}, "nothing runs"
    with present(places.running, UP):
        assert of_running_fleet() == values
        monkeypatch.setenv("PILOT_REDIS_URL", "redis://mine/0")
        assert of_running_fleet() == {"FLWR_HOME": "/some where/x"}
    assert of_running_fleet() == {}


def test_the_connection_is_beside_those_that_were_known(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    known = '[superlink]\ndefault = "sim"\n[superlink.sim]\naddress = ":local:"\n'
    (tmp_path / "config.toml").write_text(known)
    places = Places.of(tmp_path / "fleet").make()
    write_connection(places, "127.0.0.1", 8123, None)
    found = read_connection(None, places.flower_home)
    assert found.name == "local-deployment" and found.address == "127.0.0.1:8123"
    assert found.table["insecure"] is True
    assert read_connection("sim", places.flower_home).is_local
    assert (tmp_path / "config.toml").read_text() == known
    write_connection(places, "::1", 8123, tmp_path / "ca.pem")
    secure = read_connection("local-deployment", places.flower_home)
    assert secure.address == "[::1]:8123" and "insecure" not in secure.table


def test_only_a_living_process_of_ours_is_found(tmp_path: Path) -> None:
    with present(tmp_path, "join-a"), present(tmp_path, UP):
        assert [found.what for found in find(tmp_path)] == ["join-a", UP]
        assert {found.process.pid for found in find(tmp_path)} == {os.getpid()}
        with pytest.raises(PilotError, match="`pilot up` runs here already"):
            with present(tmp_path, UP):
                pass
        said = json.loads((tmp_path / "up.json").read_text())
        (tmp_path / "up.json").write_text(json.dumps(said | {"created": said["created"] - 60}))
        (tmp_path / "other.json").write_text(json.dumps({"pid": 1, "created": 0}))
        (tmp_path / "broken.json").write_text("{")
        assert [found.what for found in find(tmp_path)] == ["join-a"], "the pid is another's now"
    assert [found.what for found in find(tmp_path)] == []


# -- the journal ---------------------------------------------------------------------------------


def test_lines_are_on_the_console_and_in_a_file_each_without_secrets(tmp_path: Path) -> None:
    console = io.StringIO()
    journal = Journal(tmp_path, console, secrets=["s3cret"])
    journal.line("redis", "\x1b[32mready\x1b[0m, 100% s3cret\n")
    journal.hide("t0ken")
    journal.say("join with t0ken")
    journal.line("superlink", '127.0.0.1 - "POST /v1/fleet/pull-messages HTTP/1.1" 200\n')
    journal.line("superlink", '127.0.0.1 - "POST /v1/fleet/pull-messages HTTP/1.1" 401\n')
    assert journal.last("redis") == "ready, 100% ***"
    journal.close()
    assert console.getvalue().splitlines() == [
        "redis        | ready, 100% ***",
        "pilot        | join with ***",
        'superlink    | 127.0.0.1 - "POST /v1/fleet/pull-messages HTTP/1.1" 401',
    ]
    assert len((tmp_path / "superlink.log").read_text().splitlines()) == 2
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    as_json = io.StringIO()
    journal = Journal(tmp_path, as_json, as_json=True)
    journal.line("redis", 'a "b"')
    journal.close()
    assert json.loads(as_json.getvalue()) == {"from": "redis", "line": 'a "b"'}


class Stopped(io.StringIO):
    """A terminal that takes nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def write(self, text: str) -> int:
        self.go.wait()
        return super().write(text)


def test_a_console_that_takes_nothing_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilot.fleet.journal._WAITING_LINES", 3)
    console = Stopped()
    journal = Journal(tmp_path, console)
    for i in range(10):
        journal.line("redis", f"line {i}")
    console.go.set()
    until(lambda: "line 2" in console.getvalue())
    journal.line("redis", "the last")
    journal.close()
    shown = console.getvalue()
    assert "line 0" in shown and "line 9" not in shown and "the last" in shown
    assert f"lines are in {tmp_path} only" in shown
    assert len((tmp_path / "redis.log").read_text().splitlines()) == 11
