"""A head and a site that joins it, as people start them: who is let in, who is not, and nothing is left."""

import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from benchmarks.chaos.processes import BIN, environment
from pilot.fleet.environment import read_environment
from pilot.fleet.places import Places
from pilot.processes.scratch import free_port

from ...waiting import gone, until

START_S = 600.0
NOBODY = 65534


class Machine:
    """A directory of its own for all that a machine keeps, and what runs there."""

    def __init__(self, directory: Path) -> None:
        self.base = directory
        self.env = environment(directory, directory)
        self.places = Places(directory / "fleet", directory / "keys")
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: str, stdin: str = "") -> "subprocess.Popen[str]":
        with (self.base / f"{words[0]}.out").open("w") as output:
            process = subprocess.Popen(
                [BIN / "pilot", *words],
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
            )
        assert process.stdin is not None
        process.stdin.write(stdin)
        process.stdin.close()
        self.started.append(process)
        return process

    def run(self, *words: str, **env: str) -> str:
        command = [BIN / words[0], *words[1:]]
        done = subprocess.run(command, env=self.env | env, capture_output=True, text=True)
        return done.stdout + done.stderr

    def said(self) -> str:
        return "".join(path.read_text() for path in self.base.glob("*.out"))

    def logged(self) -> str:
        return self.said() + "".join(path.read_text() for path in self.places.logs.iterdir())


@contextlib.contextmanager
def machine(directory: Path) -> Any:
    directory.mkdir(mode=0o700)
    there = Machine(directory)
    try:
        yield there
    finally:
        for process in there.started:
            process.kill()
            process.wait()


def activates(port: int, ca: bytes, private: Any, *, registers: bool = False) -> str:
    """What a SuperNode with this key is answered; with `registers` it asks to be registered first."""
    public = private.public_key()
    key = public_key_to_bytes(public)
    interceptors = [
        RuntimeVersionHttpInterceptor("SuperNode"),
        NodeAuthHttpInterceptor(private, public),
    ]
    address = f"127.0.0.1:{port}"
    with FleetHttpClient.from_server_address(address, False, ca, interceptors=interceptors) as node:
        try:
            if registers:
                node.RegisterNode(RegisterNodeFleetRequest(public_key=key))
            node.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=30.0))
        except Exception as error:  # noqa: BLE001 - what Flower raises is Flower's
            return f"refused: {error}"
    return "let in"


def unsigned(port: int, path: str) -> int:
    """The HTTP status of a request without any key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context)
    with contextlib.closing(connection):
        connection.request("POST", path, b"", {"Content-Type": PROTOBUF_MEDIA_TYPE})
        return connection.getresponse().status


STRANGER = """
import http.client, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
connection = http.client.HTTPSConnection("127.0.0.1", int(sys.argv[1]), context=context)
connection.request("POST", "/v1/control/list-nodes", b"", {"Content-Type": "application/x-protobuf"})
print(connection.getresponse().status)
"""


@pytest.mark.timeout(1800)
def test_a_head_lets_in_who_has_joined_and_nobody_else_and_leaves_nothing(tmp_path: Path) -> None:
    ports = [free_port() for _ in range(3)]
    options = ["--port", "--redis-port", "--join-port"]
    words = [word for pair in zip(options, map(str, ports), strict=True) for word in pair]
    with machine(tmp_path / "server") as server, machine(tmp_path / "site") as site:
        up = server.start("up", "--head", "--host", "127.0.0.1", "--address", "127.0.0.1", *words)
        until(
            lambda: "in another terminal" in server.said() or up.poll() is not None,
            START_S,
            "the head",
        )
        assert up.poll() is None, server.said()
        token = json.loads(server.run("pilot", "token", "--json"))["token"]
        join = site.start(
            *("join", f"127.0.0.1:{ports[2]}", "--name", "site-a", "--token", "-"),
            stdin=f"{token}\n",
        )
        until(lambda: "SuperNode ID" in site.said() or join.poll() is not None, START_S, "the site")
        assert join.poll() is None, site.said()

        # the operator's own command line sees it; another user's is refused
        variables = read_environment(server.places.environment)
        listed = server.run(
            "flwr", "supernode", "list", "local-deployment", "--format", "json", **variables
        )
        nodes = json.loads(listed[listed.index("{") :])["nodes"]
        assert [node["status"] for node in nodes] == ["online"]
        if os.getuid() == 0:
            stranger = subprocess.run(
                ["/usr/bin/env", "python3", "-c", STRANGER, str(ports[0])],
                capture_output=True,
                text=True,
                user=NOBODY,
                cwd="/",
            )
            assert stranger.stdout.strip() == "403", stranger.stderr

        # nodes without a key, or with one that nobody registered
        ca = (server.places.head / "ca.pem").read_bytes()
        assert unsigned(ports[0], "/v1/fleet/pull-messages") == 401
        strangers, _ = generate_key_pairs()
        for registers in (False, True):
            assert activates(ports[0], ca, strangers, registers=registers).startswith("refused")
        # a token that was used
        again = site.run(
            "pilot", "join", f"127.0.0.1:{ports[2]}", "--name", "b", PILOT_JOIN_TOKEN=token
        )
        assert again == "error: the head refused: the token was used before, by site-a\n"

        processes = [*psutil.Process(up.pid).children(recursive=True)]
        processes += psutil.Process(join.pid).children(recursive=True)
        secrets = [token, *json.loads((server.places.keys / "redis.json").read_text()).values()]
        head = json.loads((site.places.joined("site-a") / "head.json").read_text())
        secrets += [head["redis_password"], variables["PILOT_REDIS_URL"]]
        shown = " ".join(" ".join(process.cmdline()) for process in processes)
        for secret in secrets:
            assert secret not in shown + server.logged() + site.logged()
        for path in [*server.places.keys.rglob("*"), *site.places.keys.rglob("*")]:
            assert path.stat().st_mode & 0o077 == 0, path

        join.send_signal(signal.SIGTERM)
        assert join.wait(START_S) == 0
        key = load_ssh_private_key((site.places.joined("site-a") / "node.key").read_bytes(), None)
        assert activates(ports[0], ca, key) == "let in", "so what refused strangers is their key"
        assert "ending `pilot up`" in server.run("pilot", "down")
        assert up.wait(START_S) == 0
        assert gone(processes)
        assert not list(server.places.running.glob("*.json"))
