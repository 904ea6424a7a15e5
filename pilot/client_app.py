"""The ClientApp: moves bytes between Flower and this client's worker group, and nothing else.

It imports neither torch nor nanochat: a message is a new process (docs/flower.md), and what fails in a
worker must become a reply with a reason, never an exception that Flower reports seconds later. A client
that is leaving takes no new work: it says so at once.
"""

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from pilot.config import RunConfig
from pilot.coordination.coordinator import ClientCoordinator, resolve_url
from pilot.errors import PilotError
from pilot.rules.rounds import stuck_s
from pilot.site import in_flight
from pilot.site.handle import SuperNodeGone, WorkerError, WorkerHandle
from pilot.site.notice import notice_files, noticed
from pilot.site.rows import ROWS_VARIABLE, rows_of_node
from pilot.wire import transfer
from pilot.wire.messages import (
    AnyMessage,
    Header,
    HelloOrder,
    HelloReply,
    Part,
    StopReason,
    TrainOrder,
    TrainReply,
    drained,
    from_header,
    to_header,
)
from pilot.wire.records import from_records, to_records

_LEAVE_EXPIRY_S = 60.0
_HELLO_S = 3600.0  # in which a worker says what it has: the first one packs the validation rows

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer the server's hello: what this client is called, has and can do."""
    return _answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    transfer.install()  # for the reply; in `pilot node` the order has come this way, too
    try:
        content = answer(message.content, node_name(context), context.node_config)
    except SuperNodeGone as error:
        # Flower would go on trying to deliver a reply for minutes, beside the next SuperNode of this site
        print(f"{error}: ending", file=sys.stderr, flush=True)
        os._exit(1)
    return Message(content, reply_to=message)


@dataclass(frozen=True)
class _Node:
    """What this client is called, and what its workers find in their environment besides ours."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)


def answer(
    content: RecordDict, name: str, node_config: Mapping[str, object] | None = None
) -> RecordDict:
    """What the client called `name` says to a message, whatever happens in its worker.

    The tensors in `content` are gone afterwards: in memory are those of the order until they are with the
    worker, then those of the reply. Raises SuperNodeGone if nobody is left to say it to.
    """
    header, parts = from_records(content)
    content.pop("parts")
    reply: Header
    update: list[Part]
    try:
        rows = rows_of_node(node_config or {})
    except PilotError as error:
        reply, update = _failure(header, str(error)), []
    else:
        node = _Node(name, {} if rows is None else {ROWS_VARIABLE: str(rows)})
        reply, update = _reply(header, parts, node)
    return to_records(reply | {"node_name": name}, drained(update))


def _reply(header: Header, parts: list[Part], node: _Node) -> tuple[Header, list[Part]]:
    try:
        order = from_header(header)
        config = RunConfig.from_mapping(getattr(order, "config", {}))
    except ValueError:  # the worker says what is wrong with it
        return _ask_worker(header, parts, RunConfig(worker_idle=0.0), node)
    return _obey(order, config, header, parts, node)


def _obey(
    order: AnyMessage, config: RunConfig, header: Header, parts: list[Part], node: _Node
) -> tuple[Header, list[Part]]:
    match order:
        case HelloOrder():
            if reason := _leaving(config, order.redis_url, node.name, order.run):
                return to_header(HelloReply(error=f"this client is leaving ({reason})")), []
            header = header | {"client": node.name}  # whose mirror is asked for
        case TrainOrder(fence=fence, client=client):
            if _leaving(config, order.redis_url, client, fence.run):
                reply = TrainReply(fence=fence, client=client, stopped_by=StopReason.LEAVING)
                return to_header(reply), []
            return _train(order, config, header, parts, node)
    return _ask_worker(header, parts, config, node, limit_s=_HELLO_S)


def _train(
    order: TrainOrder, config: RunConfig, header: Header, parts: list[Part], node: _Node
) -> tuple[Header, list[Part]]:
    """Let the worker train; this site's node and the server can see where the order is."""
    in_flight.write(in_flight.of_order(order, config, in_flight.WORKING))
    # the worker itself notices that it hangs, unless all its threads do
    limit_s = order.seconds_left + 2 * stuck_s(config.grace_max)
    reply, update = _ask_worker(header, parts, config, node, limit_s=limit_s)
    state = in_flight.SENDING if update else in_flight.DONE
    after = in_flight.of_order(order, config, state)
    in_flight.write(after)
    if update:
        in_flight.send_heartbeats_until_taken(after, heartbeat_s=config.heartbeat)
    return reply, update


def _leaving(config: RunConfig, redis_url: str, client: str, run: str) -> str:
    """Why this client takes no work now, by a notice on its disk or its stop key; "" if it does."""
    reason = noticed(notice_files(config.preempt_file))
    try:
        url = resolve_url(redis_url)
    except PilotError:
        return reason  # the worker's own hello says what is wrong with it
    if not url:
        return reason
    coordinator = ClientCoordinator(url, run, client=client, term=0, round_number=0)
    with contextlib.closing(coordinator):
        if reason:
            coordinator.announce_leave(reason, expiry_s=_LEAVE_EXPIRY_S)
        return reason or coordinator.told_to_leave() or ""


def _ask_worker(
    header: Header,
    parts: list[Part],
    config: RunConfig,
    node: _Node,
    *,
    limit_s: float = math.inf,
) -> tuple[Header, list[Part]]:
    processes = int(header.get("processes", 1))
    # a hello is asked of one process: with several, a resident group would be of no more use
    stays = header.get("kind") == "TrainOrder" or config.client_processes == processes
    try:
        with WorkerHandle(
            processes=processes,
            device=config.device,
            idle_s=config.worker_idle if stays else 0.0,
            name=node.name,
            limit_s=limit_s,
            environment=node.environment,
        ) as worker:
            with _sigterm_drains(worker):
                return worker.ask(header, parts)
    except SuperNodeGone:
        raise
    except (WorkerError, OSError) as error:
        return _failure(header, str(error)), []


@contextlib.contextmanager
def _sigterm_drains(worker: WorkerHandle) -> Iterator[None]:
    """SIGTERM makes the worker finish and reply; Flower's own handler would throw the reply away."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda *_: worker.drain())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failure(header: Header, sentence: str) -> Header:
    """The reply of a worker that could not give one."""
    if header.get("kind") == "HelloOrder":
        return {"kind": "HelloReply", "error": sentence}
    return {
        "kind": "TrainReply",
        "fence": header.get("fence"),
        "client": header.get("client", ""),
        "error": sentence,
    }


def node_name(context: Context) -> str:
    """What this client is called: `name` of its node config, else after its partition or node id."""
    node = context.node_config
    return str(node.get("name") or f"client_{node.get('partition-id', context.node_id)}")
