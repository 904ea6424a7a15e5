"""A SuperNode that outlives its SuperLink: it registers again where it is not known any more.

A SuperLink keeps its nodes in memory. One that was started again answers a SuperNode of before with "not
authorized", at which Flower's SuperNode ends, and with it the site's workers: seconds of imports on every site
at once, just when the server starts, too. Here the node registers again, with the same key and under another
id, which is all that the next SuperNode would do. A node whose key the operator has to register
(docs/deployment-by-hand.md) is left to end: it may not register itself.

While the SuperLink is away Flower asks for it after pauses that double up to 20 s. Here they end at 3 s, which
is how often it asks for messages anyway.
"""

import contextlib
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import httpx
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    RegisterNodeFleetRequest,
    RegisterNodeFleetResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.retry import http_retry
from flwr.supernode.fleet_http_client import FleetHttpClient

_MAX_PAUSE_S = 3


def install(connection: ModuleType, *, say: Callable[[str], None] = lambda line: None) -> None:
    """Let the connections that Flower's module `connection` makes last; `say` is given a line for people."""

    def client_of(*arguments: Any, **options: Any) -> _Client:
        client: _Client = _Client.from_server_address(*arguments, **options)
        client.say, vars(connection)["Node"] = say, client.made
        return client

    class Factory:
        from_server_address = staticmethod(client_of)

    vars(connection)["FleetHttpClient"] = Factory
    vars(http_retry)["MAX_RETRY_DELAY"] = _MAX_PAUSE_S


class _Client(FleetHttpClient):
    """Flower's client of one connection, which knows how that began."""

    say: Callable[[str], None]
    _registration: RegisterNodeFleetRequest | None = None
    _activation: ActivateNodeRequest | None = None
    _node: Node | None = None  # the connection's own, which all of its requests name

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._joining = threading.Lock()  # heartbeats have a thread of their own

    def made(self, **values: Any) -> Node:
        """Stands in for `Node(…)`, which the connection calls once."""
        self._node = Node(**values)
        return self._node

    def RegisterNode(self, request: RegisterNodeFleetRequest) -> RegisterNodeFleetResponse:
        self._registration = request
        return super().RegisterNode(request)

    def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:
        self._activation = request
        return super().ActivateNode(request)

    def PullMessages(self, request: PullMessagesRequest) -> PullMessagesResponse:
        return self._as_known(super().PullMessages, request)

    def PushMessages(self, request: PushMessagesRequest) -> PushMessagesResponse:
        return self._as_known(super().PushMessages, request)

    def SendNodeHeartbeat(self, request: SendNodeHeartbeatRequest) -> SendNodeHeartbeatResponse:
        return self._as_known(super().SendNodeHeartbeat, request)

    def _as_known(self, call: Callable[[Any], Any], request: Any) -> Any:
        """Call; if this node is not known, once more after it has registered again."""
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.UNAUTHORIZED or self._node is None:
                raise
            if not self._rejoin(request.node.node_id):
                raise
        request.node.CopyFrom(self._node)
        return call(request)

    def _rejoin(self, before: int) -> bool:
        """Register again, unless another thread has since the request of node `before` was made."""
        registration, activation, node = self._registration, self._activation, self._node
        if registration is None or activation is None or node is None:
            return False
        with self._joining:
            if node.node_id == before:
                with contextlib.suppress(httpx.HTTPStatusError):  # it may be registered by now
                    super().RegisterNode(registration)
                node.node_id = super().ActivateNode(activation).node_id
                self.say(f"The SuperLink was started again: this node is now {node.node_id}")
        return True
