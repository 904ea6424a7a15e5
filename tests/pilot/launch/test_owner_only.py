"""A SuperLink takes commands from the sockets of its owner on this machine, and from nobody else."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest

from pilot.launch.owner_only import OwnerOnly, owner_of_connection

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the kernel's table of connections is Linux's"
)
NOBODY = 65534


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        yield server


def status(
    path: str,
    client: tuple[str, int],
    server: tuple[str, int],
    *,
    nodes: bool = False,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> int:
    """What a request gets: 200 where it comes to Flower."""
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("the body of a request is not asked for")

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    scope = {"type": "http", "path": path, "client": client, "server": server}
    asyncio.run(OwnerOnly(flower, nodes=nodes)(scope | {"headers": headers}, receive, send))
    return int(sent[0]["status"])


def test_commands_of_the_owner_pass_and_those_from_elsewhere_do_not(
    listener: socket.socket,
) -> None:
    here = listener.getsockname()
    with socket.create_connection(here) as ours:
        client = ours.getsockname()
        assert owner_of_connection(client, here) == os.getuid()
        assert status("/v1/control/start-run", client, here) == 200
        elsewhere = ("192.0.2.77", client[1])
        for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/v1/fleet"):
            assert status(path, elsewhere, here) == 403, path
        assert status("/v1/fleet/pull-messages", elsewhere, here) == 200, "nodes have keys"
        assert status("/v1/fleet/pull-messages", elsewhere, here, nodes=True) == 403
        assert status("/health", elsewhere, here, nodes=True) == 200
        forwarded = ((b"x-forwarded-for", b"127.0.0.1"),)
        assert status("/v1/control/start-run", client, here, headers=forwarded) == 403
    # its socket lives on without an owner, and the kernel then shows root's
    assert owner_of_connection(client, here) is None
    assert status("/v1/control/start-run", client, here) == 403


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_of_this_machine_is_a_stranger(listener: socket.socket) -> None:
    here = listener.getsockname()
    program = f"import socket, sys; s = socket.create_connection({here!r}); sys.stdin.read()"
    with subprocess.Popen(
        ["/usr/bin/env", "python3", "-c", program], stdin=subprocess.PIPE, user=NOBODY
    ) as stranger:
        accepted, client = listener.accept()
        with accepted:
            assert owner_of_connection(client, here) == NOBODY
            assert status("/v1/control/start-run", client, here) == 403
            assert status("/v1/fleet/pull-messages", client, here) == 200
        assert stranger.stdin is not None
        stranger.stdin.close()


def test_addresses_of_ipv6_are_found() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server, socket.create_connection(server.getsockname()[:2]) as ours:
        client, here = ours.getsockname()[:2], server.getsockname()[:2]
        assert owner_of_connection(client, here) == os.getuid()
