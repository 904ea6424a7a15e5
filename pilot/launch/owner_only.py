"""A SuperLink that takes commands from its owner only: the user who runs it, on its own machine.

Flower 1.41 authenticates SuperNodes, and nobody else: all who reach the SuperLink's port may submit a run,
which is code that the server and every site execute, register a node of their own, or take a task that is
meant for its SuperExec. TLS changes nothing about that, since clients need no certificate.

Here a request is looked at before Flower sees it. The kernel's table of connections says whether its other
end is a socket of this machine, and whose: it needs to be the same user's, or root's. So `flwr` and `pilot
run` work on that machine without a password, also through `ssh -L`, whose end is a process of the user that
logged in.
"""

import ipaddress
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

COMMANDS, ALL = "commands", "all"  # what is kept to the owner
_FLEET, _HEALTH = "/v1/fleet/", "/health"
_FORWARDED = b"x-forwarded-for"  # uvicorn believes it of loopback, and shows another address then
_ESTABLISHED = "01"  # net/tcp_states.h; sockets in most others have lost their owner and show root
_REFUSED = b"only the user who runs this SuperLink may do that, on its machine (docs/deployment.md)"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def install(what: str) -> None:
    """Keep `what` of the SuperLink that this process will be to its owner: COMMANDS, or ALL, nodes as well.

    Raises ImportError or AttributeError with a Flower that has no place for it: such a SuperLink would be open.
    """
    from flwr.common import constant
    from flwr.superlink import extensions
    from starlette.middleware import Middleware

    for switch in (constant.FLWR_INTERNAL_GRPC_CONTROL_API, constant.FLWR_INTERNAL_GRPC_FLEET_API):
        os.environ.pop(switch, None)  # they open ports that nothing of this guards
    before = extensions.get_middleware

    def middleware() -> tuple[Middleware, ...]:
        return (Middleware(OwnerOnly, nodes=what == ALL), *before())

    vars(extensions)["get_middleware"] = middleware


class OwnerOnly:
    """ASGI middleware that answers others with 403; `nodes`: also where nodes ask, which have keys."""

    def __init__(self, app: App, *, nodes: bool) -> None:
        self._app, self._nodes = app, nodes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._open(scope) or _from_owner(scope):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(_REFUSED))]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": _REFUSED})

    def _open(self, scope: Scope) -> bool:
        """Whether everybody may ask this: Flower routes by the same path, and changes nothing about it."""
        path = str(scope.get("path", ""))
        return path == _HEALTH or (path.startswith(_FLEET) and not self._nodes)


def _from_owner(scope: Scope) -> bool:
    client, server = scope.get("client"), scope.get("server")
    if not client or not server or any(name == _FORWARDED for name, _ in scope["headers"]):
        return False
    try:
        if not sys.platform.startswith("linux"):
            return _plain(client[0]).is_loopback  # that has to do
        return owner_of_connection(client, server) in (0, os.getuid())
    except ValueError:
        return False


def owner_of_connection(local: tuple[str, int], remote: tuple[str, int]) -> int | None:
    """The user id behind a connection of this machine, whose own end is `local`; None if there is none."""
    ends = ((_plain(local[0]), local[1]), (_plain(remote[0]), remote[1]))
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/self/net/{table}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue  # no IPv6
        for line in lines:
            fields = line.split()
            if fields[3] == _ESTABLISHED and (_end(fields[1]), _end(fields[2])) == ends:
                return int(fields[7])
    return None


def _end(field: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """An address and a port as proc(5) has them: words of 32 bits in the machine's byte order, in hex."""
    words, _, port = field.partition(":")
    raw = b"".join(
        int(words[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(words), 8)
    )
    return _plain(str(ipaddress.ip_address(raw))), int(port, 16)


def _plain(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address, of IPv4 even where it is written as IPv6. Raises ValueError."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
