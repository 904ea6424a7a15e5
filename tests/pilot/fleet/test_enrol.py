"""A site joins over TLS, with a token, once; its Redis speaks TLS to it; strangers get one line."""

import contextlib
import io
import json
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pilot.coordination.link import CoordinatorError, ping
from pilot.errors import PilotError
from pilot.fleet import redis_users
from pilot.fleet.certificates import Authority, site_key
from pilot.fleet.door import Door, Doors, server_context
from pilot.fleet.enrol import Membership, ca_path, enrol, key_path
from pilot.fleet.head import Head, join_line, write_head
from pilot.fleet.journal import Journal
from pilot.fleet.members import Members
from pilot.fleet.secret_file import private_directory
from pilot.fleet.tokens import NO_CA, Token
from pilot.processes.scratch import free_port

from ...waiting import until
from .redis_kit import FleetRedis, fleet_redis

HEAD = "127.0.0.1"


@dataclass(frozen=True)
class Started:
    """A head without Flower."""

    directory: Path
    head: Head

    def said(self) -> str:
        return (self.directory / "logs" / "pilot.log").read_text()

    def token(self, client: str = "") -> Token:
        return Token.read(join_line(self.directory, client).rpartition(" ")[2])

    def join(self, directory: Path, name: str, token: Token) -> Membership:
        return enrol(directory, head=HEAD, port=self.head.join_port, name=name, token=token)

    def ask(self, line: bytes) -> bytes:
        """What a stranger that speaks TLS is answered."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        address = (HEAD, self.head.join_port)
        with contextlib.closing(context.wrap_socket(socket.create_connection(address))) as there:
            there.settimeout(60)
            with contextlib.suppress(ConnectionError, ssl.SSLEOFError):  # it was closed before
                there.sendall(line)
                return there.recv(1 << 16)
            return b""


@pytest.fixture(scope="module")
def redis_inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetRedis]:
    with fleet_redis(tmp_path_factory.mktemp("redis")) as started:
        yield started


@contextlib.contextmanager
def started_head(
    directory: Path, redis_inside: FleetRedis, *, secure: bool = True
) -> Iterator[Started]:
    private_directory(directory)
    authority = Authority(directory)
    logs = private_directory(directory / "logs")
    head = Head(HEAD, free_port(), 1, free_port(), secure)
    write_head(directory, head)
    with contextlib.closing(Journal(logs, io.StringIO())) as journal:
        members = Members(
            directory, redis_inside.admin, journal.say, env=None, answers=lambda: True
        )
        members.follow()
        tls = server_context(*authority.server([HEAD])) if secure else None
        doors = Doors(HEAD, head.redis_port, redis_inside.port, head.join_port)
        with Door(doors, tls, head.answers(directory, authority.pem, members, journal.say)):
            yield Started(directory, head)
        members.close()


@pytest.fixture
def head(tmp_path: Path, redis_inside: FleetRedis) -> Iterator[Started]:
    with started_head(tmp_path / "head", redis_inside) as started:
        yield started


def url_of(membership: Membership, directory: Path | None) -> str:
    ca = ca_path(directory) if directory else None
    return redis_users.url(
        HEAD, membership.redis_port, membership.redis_user, membership.redis_password, ca
    )


def test_a_site_joins_once_and_reaches_redis_over_tls(head: Started, tmp_path: Path) -> None:
    site, thief = tmp_path / "site", tmp_path / "thief"
    token = head.token()
    membership = head.join(site, "site-a", token)
    assert membership == Membership.read(site)
    ping(url_of(membership, site))
    sites = head.directory / "sites"
    assert (sites / "site-a" / "node.pub").read_text() == site_key(key_path(site))
    # the same token once more, by somebody who has stolen it
    with pytest.raises(PilotError, match=r"refused: the token was used before, by site-a$"):
        head.join(thief, "site-b", token)
    with pytest.raises(PilotError, match="used before"):
        head.join(thief, "site-a", token)
    assert not (sites / "site-b").exists() and Membership.read(thief) is None
    ping(url_of(membership, site))
    # another Redis user's name, another CA, no TLS
    with pytest.raises(CoordinatorError):
        ping(url_of(replace(membership, redis_user="server"), site))
    private_directory(thief)
    other = private_directory(thief / "other")
    Authority(other)
    with pytest.raises(CoordinatorError, match=r"certificate|CERTIFICATE"):
        ping(url_of(membership, other))
    with pytest.raises(CoordinatorError):
        ping(url_of(membership, None))


def test_what_a_site_keeps_and_what_a_head_says_holds_no_secret_for_others(
    head: Started, tmp_path: Path
) -> None:
    site, token = tmp_path / "site", head.token()
    membership = head.join(site, "site-a", token)
    files = [*site.rglob("*"), *head.directory.rglob("*")]
    assert files and all(path.stat().st_mode & 0o077 == 0 for path in files if path.is_file())
    assert site.stat().st_mode & 0o077 == 0
    # neither is there a site's secret on the head, nor in its log
    kept = "".join(path.read_text() for path in head.directory.rglob("*") if path.is_file())
    for secret in (str(token), token.secret.hex(), membership.redis_password):
        assert secret not in kept and secret not in head.said()
    assert "site site-a has joined" in head.said()
    # others may read it now: nothing is done with it
    (site / "head.json").chmod(0o644)
    with pytest.raises(PilotError, match=r"chmod 600 .*head\.json"):
        Membership.read(site)


def test_a_false_head_gets_no_secret(head: Started, tmp_path: Path) -> None:
    elsewhere = replace(head.token(), fingerprint=bytes(range(32)))
    with pytest.raises(PilotError, match="not the head that issued this token"):
        head.join(tmp_path / "site", "site-a", elsewhere)
    assert not (tmp_path / "site" / "node.key").exists()
    port = free_port()
    with pytest.raises(PilotError, match="is `pilot up --head` running there"):
        enrol(tmp_path / "site", head=HEAD, port=port, name="a", token=head.token())


@pytest.mark.parametrize(
    "values",
    [
        {"name": "../site"},
        {"name": "a\nuser evil on nopass ~* +@all"},
        {"name": ["a"]},
        {"key": "ssh-rsa AAAA"},
        {"key": ""},
        {"secret": "zz"},
        {"secret": "00" * 16},
        {"secret": None},
    ],
    ids=repr,
)
def test_a_request_that_cannot_be_is_refused_and_costs_no_token(
    head: Started, tmp_path: Path, values: dict[str, object]
) -> None:
    token = head.token()
    key = site_key(private_directory(tmp_path / "site") / "node.key")
    request = {"name": "a", "key": key, "secret": token.secret.hex()} | values
    answer = json.loads(head.ask(json.dumps(request).encode() + b"\n"))
    assert list(answer) == ["error"] and len(head.said().splitlines()) == 1
    assert list((head.directory / "sites").iterdir()) == []
    head.join(tmp_path / "site", "a", token)


def test_noise_ends_a_connection_and_nothing_else(head: Started, tmp_path: Path) -> None:
    assert json.loads(head.ask(b"GET / HTTP/1.1\r\n")) == {"error": "no request"}
    assert json.loads(head.ask(b"[" * 4000 + b"\n")) == {"error": "no request"}
    assert head.ask(b"x" * 100_000) == b"", "a line that is too long"
    with socket.create_connection((HEAD, head.head.join_port)) as plain:
        plain.sendall(b"no TLS\n")
    head.join(tmp_path / "site", "a", head.token())


def test_without_tls_only_where_both_ends_ask_for_it(
    tmp_path: Path, redis_inside: FleetRedis
) -> None:
    with started_head(tmp_path / "head", redis_inside, secure=False) as head:
        line = join_line(head.directory)
        assert " --insecure " in line
        token = Token.read(line.rpartition(" ")[2])
        assert token.fingerprint == NO_CA
        membership = head.join(tmp_path / "site", "site-a", token)
        assert not membership.secure
        ping(url_of(membership, None))


def test_a_site_whose_files_are_removed_is_shut_out(
    head: Started, tmp_path: Path, redis_inside: FleetRedis
) -> None:
    membership = head.join(tmp_path / "site", "site-a", head.token())
    url = url_of(membership, tmp_path / "site")
    ping(url)
    for path in (head.directory / "sites" / "site-a").iterdir():
        path.unlink()
    until(lambda: redis_users.user_of("site-a") not in redis_inside.admin.users())
    with pytest.raises(CoordinatorError, match="refuses the login"):
        ping(url)


def test_tokens_for_one_name_say_so_in_their_line(head: Started) -> None:
    line = join_line(head.directory, "site-a")
    assert re.fullmatch(
        rf"pilot join {HEAD}:{head.head.join_port} --name site-a --token \S{{64}}", line
    )
