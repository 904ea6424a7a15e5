"""What a round asks of each client: rows to train on, rows to be judged by, and how long it may take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pilot.config import RunConfig
from pilot.rules.batch import alike, step_shares
from pilot.rules.ledger import Lease
from pilot.rules.rounds import Clock
from pilot.rules.validation import NOTHING, Asked, slices
from pilot.run.state import RunState
from pilot.server.blind import BlindClients
from pilot.server.cargo import Cargo
from pilot.server.mailbox import Mailbox
from pilot.server.open_round import OpenRound
from pilot.server.orders import SentOrder
from pilot.server.roster import Client
from pilot.wire.messages import Fence, HelloOrder, TrainOrder, to_header


@dataclass(frozen=True)
class Dispatcher:
    """Leases rows of `state`'s ledger and sends orders; `redis_url` travels, without credentials."""

    config: RunConfig
    state: RunState
    term: int
    mailbox: Mailbox
    clock: Clock
    redis_url: str
    blind: BlindClients
    cargo: Cargo = field(init=False)

    def __post_init__(self) -> None:
        borrow = self.mailbox.sends_at_once
        object.__setattr__(self, "cargo", Cargo(self.state, self.clock, borrow=borrow))

    def hello_order(self) -> HelloOrder:
        config = self.config
        return HelloOrder(run=config.run_name, config=config.to_mapping(), redis_url=self.redis_url)

    def send_all(
        self,
        open_round: OpenRound,
        clients: Sequence[Client],
        *,
        evaluate_only: bool = False,
        scorers: Sequence[Client] | None = None,
    ) -> None:
        """An order to each of `clients`; together they, or `scorers` of them, evaluate all validation rows."""
        limited = not evaluate_only and not all(client.blind for client in clients)
        step_rows, leases = self._step_rows(clients), {}
        shares = self._shares(clients, step_rows)
        if not evaluate_only:
            wanted = {
                s.name: self._rows_wanted(s, shares[s.name], step_rows[s.name]) for s in clients
            }
            leases = self.state.ledger.lease_all(wanted, step_rows=step_rows)
        names = [client.name for client in (clients if scorers is None else scorers)]
        asked_of = dict(zip(names, slices(self.config.eval_rows, len(names)), strict=True))
        for client in clients:
            asked = asked_of.get(client.name, NOTHING)
            lease, share = leases.get(client.name), shares[client.name]
            seconds_left = self._seconds_left(open_round, client, limited=limited)
            self._send(
                open_round,
                client,
                share,
                step_rows[client.name],
                lease,
                asked,
                seconds_left,
                run_is_over=evaluate_only,
            )

    def join(self, open_round: OpenRound, client: Client) -> None:
        """An order to a client that came while the round runs.

        Of the evaluation it does what another one was asked for and will not do, if anything.
        """
        clients = [*(order.client for order in open_round.pending), client]
        # the others keep their rows of a step until the round is over, as does a client that comes back
        known = {name: one.step_rows for name, one in open_round.clients.items() if one.step_rows}
        step_rows = self._step_rows(clients) | known
        share, rows = self._shares(clients, step_rows)[client.name], step_rows[client.name]
        lease = self.state.ledger.lease(client.name, self._rows_wanted(client, share, rows))
        limited = not all(one.blind for one in clients)
        seconds_left = self._seconds_left(open_round, client, limited=limited)
        asked = open_round.unscored(client.name)
        self._send(open_round, client, share, rows, lease, asked, seconds_left)

    def _seconds_left(self, open_round: OpenRound, client: Client, *, limited: bool) -> float:
        """How long the order may take; `limited`: less, for one that cannot hear when the round ends."""
        elapsed_s = self.clock.now_s() - open_round.opened_at_s
        whole_s = max(0.0, self.config.round_max_duration - elapsed_s)
        if not (limited and client.blind):
            return whole_s
        seconds = self.blind.seconds(elapsed_s)
        return whole_s if seconds is None else seconds

    def _send(
        self,
        open_round: OpenRound,
        client: Client,
        share: float,
        step_rows: int,
        lease: Lease | None,
        asked: Asked,
        seconds_left: float,
        *,
        run_is_over: bool = False,
    ) -> None:
        lease_id = lease.lease_id if lease else 0
        fence = Fence(self.config.run_name, self.term, open_round.number, lease_id)
        order = TrainOrder(
            fence=fence,
            client=client.name,
            config=self.config.to_mapping(),
            redis_url=self.redis_url,
            processes=self._processes(client),
            segments=list(lease.segments) if lease else [],
            lease_is_tail=lease.last if lease else False,
            seconds_left=seconds_left,
            committed_tokens=self.state.tokens,
            total_tokens=self.state.total_tokens,
            share=share,
            step_rows=step_rows,
            eval_first_row=asked.own[0],
            eval_end_row=asked.own[1],
            eval_pieces=[list(piece) for piece in asked.pieces],
            last_merged_fence=self.state.last_merged.get(client.name),
            upload_s=client.upload_s or 0.0,
            run_is_over=run_is_over,
            note=client.note,
        )
        client.note = ""
        open_round.asked(client.name)
        step_tokens = step_rows * self.config.sequence_len
        unsent = SentOrder(
            "", client, fence, lease, asked=asked, order=order, step_tokens=step_tokens
        )
        if (sent := self._load(unsent, client.mirror)).message_id:
            open_round.add(sent)
        elif lease:
            self.state.ledger.give_back(lease.lease_id)

    def send_again(self, open_round: OpenRound, sent: SentOrder, *, over: bool) -> None:
        """The same order, with what leads on from the mirror that its client says it has; the second time
        with the whole model. `over`: the round has ended, and there is no time for that."""
        if over:
            open_round.lose(sent, "its mirror did not fit its order, and the round is over")
            return
        assert sent.order is not None
        seconds_left = max(0.0, sent.due_s - self.clock.now_s())
        order = replace(sent.order, seconds_left=seconds_left)
        mirror = "" if sent.asked_again else sent.client.mirror
        again = self._load(replace(sent, order=order, asked_again=True), mirror)
        if again.message_id:
            open_round.add(again, instead_of=sent)
        else:
            open_round.lose(sent, "its node is gone")

    def _load(self, order: SentOrder, mirror: str) -> SentOrder:
        """Send `order` with what of the model leads on from `mirror`: the order as it was sent.

        Its message id is "" if the node is not there.
        """
        load = self.cargo.for_mirror(mirror)
        assert order.order is not None
        said = replace(order.order, digest=load.digest, whole=load.whole, steps=list(load.steps))
        message_id = self.mailbox.send(order.client.node_id, "train", to_header(said), load.parts)
        now_s = self.clock.now_s()
        down = load.num_bytes if message_id else 0
        return replace(
            order,
            message_id=message_id,
            sent_at_s=now_s,
            due_s=now_s + said.seconds_left,
            order=said,
            bytes_down=order.bytes_down + down,
        )

    def _processes(self, client: Client) -> int:
        return self.config.client_processes or client.hello.devices

    def _step_rows(self, clients: Sequence[Client]) -> dict[str, int]:
        """Rows of an optimizer step of each client: the batch, or its share of it, by `batch-of`.

        Shares are by measured speed, so that all take about as many steps; equal where work is fixed, where
        some speed is not known yet, and where all are alike.
        """
        config, names = self.config, [client.name for client in clients]
        if config.batch_of == "client":
            return dict.fromkeys(names, config.batch_rows)
        speeds = dict.fromkeys(names, 1.0)
        measured = {c.name: c.tokens_per_s for c in clients if c.tokens_per_s}
        if not config.round_steps and len(measured) == len(names):
            for client in clients:
                now, before = measured[client.name], client.steady_tokens_per_s
                client.steady_tokens_per_s = before if before and alike(before, now) else now
                speeds[client.name] = client.steady_tokens_per_s
            if alike(min(speeds.values()), max(speeds.values())):
                speeds = dict.fromkeys(names, 1.0)
        ranks = {client.name: self._processes(client) for client in clients}
        return step_shares(config.batch_rows, ranks, speeds)

    def _shares(self, clients: Sequence[Client], step_rows: Mapping[str, int]) -> dict[str, float]:
        """Each client's share of the federation's token rate; where work is fixed, by the rows of a step."""
        rates = {client.name: client.tokens_per_s for client in clients}
        if self.config.round_steps or not all(rates.values()):
            rows = sum(step_rows[name] for name in rates)
            return {name: step_rows[name] / rows for name in rates}
        total = sum(rate for rate in rates.values() if rate)
        return {name: (rate or 0.0) / total for name, rate in rates.items()}

    def _rows_wanted(self, client: Client, share: float, step_rows: int) -> int:
        """About twice the rows that the client will use in a round, whole optimizer steps."""
        config = self.config
        if config.round_steps:
            return config.round_steps * step_rows
        wanted = self.state.total_tokens - self.state.tokens
        if config.target_tokens:
            wanted = min(wanted, config.target_tokens)
        tokens = 2.0 * wanted * share
        if client.tokens_per_s:
            tokens = min(tokens, 2.0 * client.tokens_per_s * config.round_max_duration)
        elif not config.target_tokens:
            tokens = min(tokens, 2.0 * client.hello.devices * self._shard_tokens())
        steps = max(1, -int(-tokens // (step_rows * config.sequence_len)))
        return steps * step_rows

    def _shard_tokens(self) -> float:
        """Tokens of an average shard; as long as none is known, no limit (a lease then counts shards)."""
        rows = self.state.ledger.mean_shard_rows
        return float(rows * self.config.sequence_len) if rows else float("inf")
