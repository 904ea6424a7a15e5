"""Flower and Redis between the server and simulated clients, as far as the server could tell."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from pilot.config import RunConfig
from pilot.coordination.heartbeats import Heard
from pilot.coordination.stop_reasons import ANNOUNCED
from pilot.rehearse.client import SimulatedClient
from pilot.rehearse.clock import VirtualClock
from pilot.rehearse.machine import Machine, Physics
from pilot.rehearse.trace import REDIS, SERVER, Happening
from pilot.wire.messages import Fence, Part, TrainOrder, from_header, plain
from pilot.wire.records import from_records, to_records

# Measured of Flower (docs/flower.md), in seconds: until it misses a node that was killed, from a push to the
# ClientApp's start, from a reply's end to where the server can pull it.
MISSED_S, DELIVERED_S, RETURNED_S = 50.0, 0.5, 0.2
BEGAN = 1_700_000_000.0  # the wall clock of every rehearsal's begin, so that its events are the same bytes
_HELLO_S = 1.0
_AGAIN_S = 2.0  # between the two arrivals of an answer that comes twice
_CRASH_WITHIN = 60  # fault points and messages: two rounds or three


class ServerKilled(BaseException):
    """The server's process is gone, at whatever it was doing; it is back after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"killed, back after {seconds:.0f} s")
        self.seconds = seconds


class Horizon(BaseException):
    """The rehearsal ends here."""


@dataclass
class _Node:
    client: SimulatedClient
    info: NodeInfo
    online_s: float
    missed_s: float = math.inf  # when Flower knows that it is gone


class World:
    """All that is not the server: clients, Flower's nodes and messages, Redis; and what a trace does to it."""

    def __init__(
        self,
        clock: VirtualClock,
        machines: Sequence[Machine],
        physics: Physics,
        trace: Iterable[Happening],
        *,
        seed: int,
        events: int = 0,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.clock = clock
        self.clients = {m.name: SimulatedClient(m, physics, self, seed) for m in machines}
        self.stops: dict[str, str] = {}  # client → why it is to leave
        self.redis_is_there = True
        self.wall_jump_s = 0.0  # of the server's wall clock
        self.acknowledged: dict[str, Fence] = {}
        self._round: tuple[int, int, str | None] = (0, 0, None)  # term, round, why it is over
        self._redis_back_s = 0.0
        self._nodes: dict[int, _Node] = {}  # that Flower does not miss yet
        self._last_node = 0
        self._messages: dict[str, tuple[Message, int]] = {}  # unanswered, by id
        self._ready: dict[str, Message] = {}
        self._sent, self._events_left = 0, events
        self._rng = random.Random(seed)
        self._crash: tuple[int, float] | None = None  # writes that are left, and for how long then
        for one in trace:
            clock.at(one.time_s, self._strike(one))

    def _strike(self, one: Happening) -> Callable[[], None]:
        def happens() -> None:
            if one.client == SERVER and one.event == "crash":
                self._crash = (self._rng.randint(1, _CRASH_WITHIN), one.seconds)
            elif one.client == SERVER and one.event == "freeze":
                self.clock.advance(self.clock.now_s() + one.seconds)
            elif one.client == SERVER and one.event == "jump":
                self.wall_jump_s += self._rng.choice((-1, 1)) * one.seconds
            elif one.client == SERVER:
                raise ServerKilled(one.seconds)
            elif one.client == REDIS:
                self._redis_goes(one.seconds)
            elif one.client in self.clients:
                self.clients[one.client].suffer(one.event, one.seconds)

        return happens

    def passes(self, point: str) -> None:
        """The server is at a fault point (pilot/faults.py) or a message: the place of a `crash`."""
        if self._crash is not None:
            left, seconds = self._crash
            self._crash = (left - 1, seconds) if left > 1 else None
            if left == 1:
                raise ServerKilled(seconds)

    def wall_clock(self) -> float:
        """The server's, in seconds."""
        return BEGAN + self.clock.now_s() + self.wall_jump_s

    def happened(self) -> None:
        """An event has been written. The last one that is wanted ends the rehearsal."""
        self._events_left -= 1
        if self._events_left == 0:
            raise Horizon

    # -- Flower ----------------------------------------------------------------------------------

    def new_node(self, client: SimulatedClient, boot_s: float) -> int:
        self._last_node += 1
        online_s = self.clock.now_s() + boot_s
        info = NodeInfo(node_id=self._last_node, last_activated_at=f"{online_s:.3f}")
        self._nodes[self._last_node] = _Node(client, info, online_s)
        return self._last_node

    def node_died(self, node_id: int) -> None:
        node = self._nodes[node_id]
        node.missed_s = self.clock.now_s() + MISSED_S
        self.clock.at(node.missed_s, lambda: self._miss(node_id))

    def _miss(self, node_id: int) -> None:
        del self._nodes[node_id]
        for message_id, (message, to) in list(self._messages.items()):
            if to == node_id:
                error = Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")
                self._ready[message_id] = Message(error, reply_to=message)
                del self._messages[message_id]

    def crashed(self, message_id: str) -> None:
        def arrive() -> None:
            if (found := self._messages.pop(message_id, None)) is not None:
                error = Error(ErrorCode.CLIENT_APP_CRASHED, "ClientApp stopped responding.")
                self._ready[message_id] = Message(error, reply_to=found[0])

        self.clock.after(RETURNED_S, arrive)

    def _online(self, node_id: int) -> bool:
        node, now_s = self._nodes.get(node_id), self.clock.now_s()
        return node is not None and node.online_s <= now_s < node.missed_s

    def get_nodes(self) -> list[NodeInfo]:
        now_s = self.clock.now_s()
        return [n.info for n in self._nodes.values() if n.online_s <= now_s < n.missed_s]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            to = message.metadata.dst_node_id
            if not self._online(to):
                yield ""
                continue
            self.passes("message.push")
            self._sent += 1
            message_id = f"m{self._sent}"
            self._messages[message_id] = (message, to)
            self.clock.after(DELIVERED_S, self._delivery(message_id))
            self.passes("message.pushed")
            yield message_id

    def _delivery(self, message_id: str) -> Callable[[], None]:
        def deliver() -> None:
            found = self._messages.get(message_id)
            node = self._nodes.get(found[1]) if found else None
            client = node.client if node else None
            if found is None or client is None or client.node_id != found[1]:
                return  # of a server that is gone, or to a machine that is: Flower will miss it
            if client.work is not None:  # a node takes one message at a time
                self.clock.after(1.0, deliver)
                return
            order = from_header(from_records(found[0].content)[0])
            if isinstance(order, TrainOrder):
                client.receive(message_id, order)
            else:
                self.clock.after(
                    _HELLO_S,
                    lambda: client.hello(lambda header: self.reply(message_id, header, [])),
                )

        return deliver

    def reply(
        self, message_id: str, header: dict[str, Any], parts: Iterable[Part], *, twice: bool = False
    ) -> None:
        """A client's answer leaves its node, perhaps twice; that to a server that is gone reaches nobody."""
        content = to_records(header, parts)

        def arrive() -> None:
            found = (
                self._messages.get(message_id) if twice else self._messages.pop(message_id, None)
            )
            if found is not None:
                self._ready[message_id] = Message(content, reply_to=found[0])

        self.clock.after(RETURNED_S, arrive)
        if twice:
            self.clock.after(RETURNED_S + _AGAIN_S, arrive)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [message for _, message in self.pull(message_ids) if isinstance(message, Message)]

    def pull(self, message_ids: Iterable[str]) -> Iterator[tuple[str, Message | Exception]]:
        """What `Puller.pull` gives, without its threads: in any order, each once."""
        found = [i for i in message_ids if i in self._ready]
        self._rng.shuffle(found)
        for message_id in found:
            self.passes("message.pull")
            yield message_id, self._ready.pop(message_id)
            self.passes("message.pulled")

    def forget_server(self) -> None:
        """A new server begins a new run of Flower's: what was sent to the one before is no longer there."""
        self._messages.clear()
        self._ready.clear()

    # -- Redis -----------------------------------------------------------------------------------

    def _redis_goes(self, seconds: float) -> None:
        self.redis_is_there = False
        self._redis_back_s = max(self._redis_back_s, self.clock.now_s() + seconds)
        self.clock.at(self._redis_back_s, self._redis_comes)

    def _redis_comes(self) -> None:
        if self.clock.now_s() >= self._redis_back_s:
            self.redis_is_there = True
            self.look()

    def look(self) -> None:
        """All clients see what Redis says now."""
        for client in self.clients.values():
            client.look()

    def set_round(self, term: int, number: int, over: str | None) -> None:
        self._round = (term, number, over)
        self.look()

    def over(self, fence: Fence) -> str:
        """Why the round of `fence` is over; "" while it is not."""
        term, number, reason = self._round
        if (term, number) > (fence.term, fence.round_number):
            return "a later round"
        return reason or "" if (term, number) == (fence.term, fence.round_number) else ""

    def announce_stop(self, name: str, why: str) -> None:
        self.stops[name] = ANNOUNCED + why

    def clear_stop(self, name: str) -> None:
        self.stops.pop(name, None)


class RehearsedCoordinator:
    """The server's half of Redis (`ServerCoordinator`), over a `World`."""

    url = "redis://rehearsed"

    def __init__(self, world: World, config: RunConfig, *, term: int) -> None:
        self._lengths_s = (config.round_min_duration, config.round_max_duration)
        self._world, self._term, self._number = world, term, 0
        self._over: str | None = "ended"
        self._heard: dict[str, tuple[Any, float]] = {}

    @property
    def failing(self) -> bool:
        return not self._world.redis_is_there

    def open_round(self, round_number: int) -> None:
        self._number, self._over = round_number, None
        self._heard.clear()
        for length_s in self._lengths_s:
            self._world.clock.notice(self._world.clock.now_s() + length_s)
        self.tick()

    def end_round(self, reason: str) -> None:
        self._over = str(reason)
        self.tick()

    def tick(self) -> None:
        if not self.failing and self._number:
            self._world.set_round(self._term, self._number, self._over)

    def heartbeats(self, clients: Iterable[str]) -> dict[str, Heard]:
        now_s = self._world.clock.now_s()
        if self.failing:
            self._heard.clear()
            return {}
        heard = {}
        for name in clients:
            client = self._world.clients[name]
            beat, work = client.heartbeat(), client.work
            fence = work.order.fence if work else None
            if beat and fence and (fence.term, fence.round_number) == (self._term, self._number):
                self._heard[name] = (beat, now_s)
            if name in self._heard:
                last, at_s = self._heard[name]
                heard[name] = Heard(last, now_s - at_s)
        return heard

    def acknowledge(self, client: str, fence: Fence) -> None:
        self._world.acknowledged[client] = fence

    def draining(self, clients: Iterable[str]) -> dict[str, str]:
        stops = self._world.stops if not self.failing else {}
        return {name: plain(stops[name]) for name in clients if name in stops}

    def stop_wish(self) -> str:
        return ""

    def publish(self, progress: Mapping[str, Any]) -> None:
        """Nobody looks."""
