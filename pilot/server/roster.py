"""Which clients take part: each new node is asked once what it is, and a mismatch is refused with a sentence.

Clients must agree to the bit on tokenizer, packing, validation rows, corpus and the code that decides on
numbers, which must be the server's own. What they must agree on is what the snapshot says, or else the first
answer that `min_clients` clients share.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from pilot.rules.rounds import Clock
from pilot.run.state import versions
from pilot.server.mailbox import Answer, Mailbox
from pilot.server.report import Report
from pilot.wire.code_hashes import code_hashes
from pilot.wire.messages import HelloOrder, HelloReply, plain, to_header

ASK_AGAIN_S = 30.0
# A client without Redis, which may reach it by now: most lines that break are back in seconds.
BLIND_AGAIN_S, BLIND_AGAIN_MAX_S = 5.0, 60.0  # the first time; doubled each time up to the second
TAKEN_AGAIN_S = 10.0  # its name was another's, who may have died
LOST_AGAIN_S = 5.0  # where the question was lost, and nothing is wrong with the client
_MAX_REFUSALS, _MAX_REASON_CHARS = 100, 300  # that are remembered, and shown in one line


@dataclass
class Client:
    """A node that answered, and what its last round showed (None before there was one).

    `start_s` passed from sending an order to its first heartbeat, `begin_s` to its first step, `last_upload_s`
    from the end of the round to the arrival of the reply, and `upload_s` is what that usually takes;
    `fixed_cost_s` is all that a round cost besides training.
    `steady_tokens_per_s` is the rate by which a batch is shared: the measured one when it last changed much.
    `late_rounds`: the rounds in a row, up to the last, that had ended before it could take a step.
    """

    name: str
    node_id: int
    hello: HelloReply
    tokens_per_s: float | None = None
    steady_tokens_per_s: float | None = None
    start_s: float | None = None
    begin_s: float | None = None
    upload_s: float | None = None
    last_upload_s: float | None = None
    fixed_cost_s: float | None = None
    late_rounds: int = 0
    blind_answers: int = 0  # in a row, in which it could not use Redis
    note: str = ""  # what its next order tells the people of its site
    mirror: str = ""  # the digest of the global model that it holds, as it said last

    @property
    def blind(self) -> bool:
        """Whether it cannot use the run's Redis: it sends no heartbeats, and hears of no end of a round."""
        said = self.hello.redis  # None: of a client of before that question
        return bool(self.hello.warning) if said is None else not said

    def sent_within(self, upload_s: float) -> None:
        """A reply has come. What the client needs is the shorter of its last two uploads: one in which it was
        frozen or cut off for a moment says nothing of the next."""
        before_s, self.last_upload_s = self.last_upload_s, upload_s
        self.upload_s = upload_s if before_s is None else min(upload_s, before_s)

    def sends_no_faster_than(self, waited_s: float) -> None:
        """A reply had not come after `waited_s`."""
        self.upload_s = max(self.upload_s or 0.0, waited_s)
        self.last_upload_s = max(self.last_upload_s or 0.0, waited_s)

    def remember(self, before: "Client | None") -> None:
        """Take over what was measured of a node of the same name."""
        if before is not None:
            self.last_upload_s = before.last_upload_s
            self.tokens_per_s = before.tokens_per_s
            self.steady_tokens_per_s = before.steady_tokens_per_s
            self.start_s, self.upload_s = before.start_s, before.upload_s
            self.fixed_cost_s = before.fixed_cost_s
            self.begin_s, self.late_rounds = before.begin_s, before.late_rounds
            self.blind_answers = before.blind_answers


@dataclass
class Roster:
    """All nodes of the federation, asked and not yet asked.

    `fingerprints` is what clients must agree on; empty until it is known.
    """

    mailbox: Mailbox
    order: HelloOrder
    report: Report
    clock: Clock
    min_clients: int
    fingerprints: dict[str, str]
    closed: bool = False  # no node will come that isn't there yet
    joined: Callable[[Client], None] = lambda client: None  # called for each client that may train
    silent: Callable[[str], bool] = lambda name: (
        False
    )  # whether a client owes a reply and is not heard
    refusals: dict[str, str] = field(default_factory=dict)  # client → sentence
    _asked: dict[str, int] = field(default_factory=dict)  # message id → node id
    _known: dict[int, float] = field(default_factory=dict)  # node → when to ask it (again)
    _why_refused: dict[int, str] = field(
        default_factory=dict
    )  # node → sentence, for its next hello
    _answered: dict[str, Client] = field(default_factory=dict)
    _accepted: dict[str, Client] = field(default_factory=dict)
    _measured: dict[str, Client] = field(
        default_factory=dict
    )  # the last client of each name, gone or not

    def __post_init__(self) -> None:
        if self.fingerprints:  # a run may be resumed with a newer pilot, on all clients alike
            self.fingerprints = self.fingerprints | code_hashes()

    def send_hellos(self) -> None:
        """Ask nodes that are new, and once in a while those that were refused; forget those that went."""
        online, now_s = self.mailbox.nodes(), self.clock.now_s()
        self._known = {node: ask_s for node, ask_s in self._known.items() if node in online}
        self._why_refused = {n: why for n, why in self._why_refused.items() if n in online}
        for node_id in sorted(online):
            if now_s >= self._known.get(node_id, now_s) and not self.mailbox.busy(node_id):
                order = replace(self.order, note=self._why_refused.get(node_id, ""))
                message_id = self.mailbox.send(node_id, "query", to_header(order))
                if message_id:
                    self._asked[message_id] = node_id
                    self._known[node_id] = float("inf")
        for clients in (self._accepted, self._answered):
            for name, client in list(clients.items()):
                if client.node_id not in online:
                    del clients[name]
                    self.report.client_left(name)

    def handle_answer(self, answer: Answer) -> bool:
        """Handle an answer if it is to a hello; False: it is not."""
        if answer.message_id not in self._asked:
            return False
        node_id = self._asked.pop(answer.message_id)
        hello, name = _hello(answer), answer.name or f"node {node_id}"
        known = self._accepted.get(name)
        again = known is not None and known.node_id == node_id
        if hello.error:
            if again and not answer.lost:
                del self._accepted[name]
            self._refuse(name, node_id, hello.error, LOST_AGAIN_S if answer.lost else ASK_AGAIN_S)
            return True
        if again and known is not None and known.hello == replace(hello, mirror=known.hello.mirror):
            known.mirror = hello.mirror  # nothing else has changed
            self._known[node_id] = self._ask_again_s(known)
            return True
        if hello.warning:
            self.report.client_warned(name, hello.warning)
        if holder := self._alive_elsewhere(name, node_id, hello):
            self._refuse_name(holder, node_id, hello)
            return True
        # a newer node of the same name supersedes the older
        self._answered[name] = Client(name, node_id, hello, mirror=hello.mirror)
        self._admit(hello)
        return True

    def _alive_elsewhere(self, name: str, node_id: int, hello: HelloReply) -> Client | None:
        """The client that has this name on another machine and lives, as far as Redis and Flower know.

        On the same machine it was restarted: Flower needs a minute to miss the node of before.
        """
        holder = self._accepted.get(name) or self._answered.get(name)
        if holder is None or holder.node_id == node_id or holder.hello.host == hello.host:
            return None
        lives = holder.node_id in self.mailbox.nodes() and not self.silent(name)
        return holder if lives else None

    def _refuse_name(self, holder: Client, node_id: int, hello: HelloReply) -> None:
        """Tell both that want the name `holder` has."""
        name = holder.name
        if node_id not in self._why_refused:
            self.report.name_contested(name, holder=holder.hello.host, other=hello.host)
        holder.note = (
            f"a node on {hello.host or 'another machine'} also says that it is {name}: if it isn't yours, "
            "let only nodes with a registered key in (docs/deployment.md)"
        )
        reason = (
            f"the name {name} is taken by a client on {holder.hello.host or 'another machine'} that is alive: "
            "stop that one, or choose another name (pilot node --name)"
        )
        self._refuse(f"node {node_id}", node_id, reason, TAKEN_AGAIN_S)

    def _admit(self, newest: HelloReply) -> None:
        if not self.fingerprints and not self._find_agreement(newest.fingerprints):
            return
        for name, client in list(self._answered.items()):
            del self._answered[name]
            if reason := self._mismatch(client.hello):
                self._refuse(name, client.node_id, reason, ASK_AGAIN_S)
                continue
            client.remember(self._measured.get(name))
            self._accepted[name] = self._measured[name] = client
            self._known[client.node_id] = self._ask_again_s(client)
            self.joined(client)
            self._why_refused.pop(client.node_id, None)
            self.refusals.pop(name, None)
            self.refusals.pop(f"node {client.node_id}", None)
            self.report.client_accepted(name, client.hello)
            if other := _other_versions(client.hello.versions):
                self.report.client_warned(name, other)

    def _ask_again_s(self, client: Client) -> float:
        if not client.blind:
            client.blind_answers = 0
            return float("inf")
        pause_s = min(BLIND_AGAIN_MAX_S, BLIND_AGAIN_S * 2.0 ** min(client.blind_answers, 10))
        client.blind_answers += 1
        return self.clock.now_s() + pause_s

    def _find_agreement(self, newest: Mapping[str, str]) -> bool:
        """Fix what to agree on, once enough clients do: those that agree with the newest, which was missing."""
        agreeing = sum(s.hello.fingerprints == newest for s in self._answered.values())
        if agreeing >= self.min_clients and code_hashes().items() <= newest.items():
            self.fingerprints = dict(newest)
            return True
        return False

    def _mismatch(self, hello: HelloReply) -> str:
        differing = [
            what for what, ours in self.fingerprints.items() if hello.fingerprints.get(what) != ours
        ]
        if not differing:
            return ""
        return (
            f"its {' and '.join(differing)} differ from those of the run: give all clients the same "
            "data, tokenizer and package versions"
        )

    def _refuse(self, name: str, node_id: int, reason: str, again_s: float) -> None:
        if self.refusals.get(name) != reason:
            self.report.client_refused(name, reason)
        self.refusals[name] = self._why_refused[node_id] = reason
        while len(self.refusals) > _MAX_REFUSALS:  # a node may say another name each time
            del self.refusals[next(iter(self.refusals))]
        self._known[node_id] = self.clock.now_s() + again_s  # somebody may repair it

    def accepted(self) -> list[Client]:
        """Clients that may train, busy or not, in the natural order of their names."""
        return sorted(self._accepted.values(), key=lambda client: natural(client.name))

    def ready(self) -> list[Client]:
        """Clients that may train and have no message unanswered."""
        return [client for client in self.accepted() if not self.mailbox.busy(client.node_id)]

    def hopeless(self, wanted: int) -> bool:
        """All nodes of a closed federation have answered, and fewer than `wanted` may train."""
        settled = bool(self._known) and not self._asked
        return self.closed and settled and len(self._accepted) < wanted

    def waiting_for(self, wanted: int) -> str:
        """Why there are not enough clients, as a clause for people."""
        reasons = [
            plain(f"{name}: {why}", _MAX_REASON_CHARS)
            for name, why in sorted(self.refusals.items())
        ]
        if self._answered and len(self._answered) >= self.min_clients:
            names = ", ".join(sorted(self._answered))
            reasons.append(f"{names} disagree about data, tokenizer or package versions")
        there = len(self._accepted) + len(self._answered)
        reasons.append(f"{there} of {wanted} clients can take part")
        return "; ".join(reasons)

    @property
    def questions_open(self) -> bool:
        """Whether a node that is no client yet was asked what it is and has not answered."""
        accepted = {client.node_id for client in self._accepted.values()}
        return not accepted.issuperset(self._asked.values())


@lru_cache(maxsize=10_000)  # asked for all clients at each tick
def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts client_2 before client_10."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


def _other_versions(theirs: Mapping[str, str]) -> str:
    """A sentence if a client has another version than the server of what its numbers come from; "" if not.

    Builds for other devices are the same version: 2.9.0+cpu and 2.9.0+cu130.
    """
    ours = versions()["torch"].partition("+")[0]
    other = theirs.get("torch", ours).partition("+")[0]
    if other == ours:
        return ""
    return (
        f"its torch is {other}, the server's {ours}: their numbers may differ more than by rounding"
    )


def _hello(answer: Answer) -> HelloReply:
    """The hello in an answer; one with an error if there is none."""
    if answer.error:
        return HelloReply(error=answer.error)
    if not isinstance(answer.message, HelloReply):
        return HelloReply(error=f"answered a hello with {type(answer.message).__name__}")
    return answer.message
