"""What a round asks of each client: rows to train on, rows to be judged by, and how long it may take."""

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord

from pilot.config import RunConfig
from pilot.rules.ledger import Lease
from pilot.rules.rounds import Clock
from pilot.rules.validation import NOTHING, Asked, slices
from pilot.run.state import RunState
from pilot.server.blind import BlindClients
from pilot.server.mailbox import Mailbox
from pilot.server.open_round import OpenRound
from pilot.server.orders import SentOrder
from pilot.server.roster import Client
from pilot.wire.codec import encode
from pilot.wire.messages import Fence, HelloOrder, TrainOrder, to_header
from pilot.wire.records import num_bytes, to_arrays


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
        """An order to each of `clients`; together they, or the `scorers` of them, evaluate all validation rows.

        They share one copy of the model: a simulation keeps every order until its reply is there.
        """
        model = to_arrays(encode(self.state.weights))
        limited = not evaluate_only and not all(client.blind for client in clients)
        shares, leases = self._shares(clients), {}
        if not evaluate_only:
            wanted = {s.name: self._rows_wanted(s, shares[s.name]) for s in clients}
            leases = self.state.ledger.lease_all(wanted, step_rows=self.config.batch_rows)
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
                lease,
                asked,
                model,
                seconds_left,
                run_is_over=evaluate_only,
            )

    def join(self, open_round: OpenRound, client: Client) -> None:
        """An order to a client that came while the round runs.

        Of the evaluation it does what another one was asked for and will not do, if anything.
        """
        clients = [*(order.client for order in open_round.pending), client]
        share = self._shares(clients)[client.name]
        model = to_arrays(encode(self.state.weights))
        lease = self.state.ledger.lease(client.name, self._rows_wanted(client, share))
        limited = not all(one.blind for one in clients)
        seconds_left = self._seconds_left(open_round, client, limited=limited)
        asked = open_round.unscored(client.name)
        self._send(open_round, client, share, lease, asked, model, seconds_left)

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
        lease: Lease | None,
        asked: Asked,
        model: ArrayRecord,
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
            processes=self.config.client_processes or client.hello.devices,
            segments=list(lease.segments) if lease else [],
            lease_is_tail=lease.last if lease else False,
            seconds_left=seconds_left,
            committed_tokens=self.state.tokens,
            total_tokens=self.state.total_tokens,
            share=share,
            eval_first_row=asked.own[0],
            eval_end_row=asked.own[1],
            eval_pieces=[list(piece) for piece in asked.pieces],
            last_merged_fence=self.state.last_merged.get(client.name),
            upload_s=client.upload_s or 0.0,
            run_is_over=run_is_over,
            note=client.note,
        )
        client.note = ""
        message_id = self.mailbox.send(client.node_id, "train", to_header(order), model)
        open_round.asked(client.name)
        if message_id:
            now_s = self.clock.now_s()
            due_s = now_s + seconds_left
            down = num_bytes(model)
            open_round.add(SentOrder(message_id, client, fence, lease, now_s, due_s, asked, down))
        elif lease:
            self.state.ledger.give_back(lease.lease_id)

    def _shares(self, clients: Sequence[Client]) -> dict[str, float]:
        """Each client's share of the federation's token rate; equal shares where work is fixed."""
        rates = {client.name: client.tokens_per_s for client in clients}
        if self.config.round_steps or not all(rates.values()):
            return dict.fromkeys(rates, 1 / len(rates))
        total = sum(rate for rate in rates.values() if rate)
        return {name: (rate or 0.0) / total for name, rate in rates.items()}

    def _rows_wanted(self, client: Client, share: float) -> int:
        """About twice the rows that the client will use in a round, whole optimizer steps."""
        config = self.config
        if config.round_steps:
            return config.round_steps * config.batch_rows
        wanted = self.state.total_tokens - self.state.tokens
        if config.target_tokens:
            wanted = min(wanted, config.target_tokens)
        tokens = 2.0 * wanted * share
        if client.tokens_per_s:
            tokens = min(tokens, 2.0 * client.tokens_per_s * config.round_max_duration)
        elif not config.target_tokens:
            tokens = min(tokens, 2.0 * client.hello.devices * self._shard_tokens())
        steps = max(1, -int(-tokens // config.total_batch_size))
        return steps * config.batch_rows

    def _shard_tokens(self) -> float:
        """Tokens of an average shard; as long as none is known, no limit (a lease then counts shards)."""
        rows = self.state.ledger.mean_shard_rows
        return float(rows * self.config.sequence_len) if rows else float("inf")
