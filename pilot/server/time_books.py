"""Where each round's time went, for its line, its event `round_time` and the run's last table.

Numbers come from `IdleTime` (the federation's phases, by the server's clock) and from replies (each client's,
by its own); what they add up to is `rules/accounts.py`.
"""

from dataclasses import dataclass, field

from pilot.rules.accounts import (
    ClientAccount,
    OrderFacts,
    Spent,
    added,
    client_accounts,
    spent_on_order,
)
from pilot.server.idle import Cause, IdleTime
from pilot.server.open_round import OpenRound
from pilot.server.orders import Settled
from pilot.server.report import Report
from pilot.wire.messages import TrainReply


@dataclass
class TimeBooks:
    """Follows the rounds of one server; `idle` says what the federation does."""

    idle: IdleTime
    report: Report
    so_far: dict[str, ClientAccount] = field(default_factory=dict)  # client → of all rounds here
    _bytes_up: dict[str, int] = field(default_factory=dict)  # order → of its answer's tensors
    _spent: dict[str, Spent] = field(default_factory=dict)  # order → what its time went into
    _answered_at_s: float = float("-inf")  # the last one
    _last_end_s: float = float("-inf")  # of training in the last round
    _last_asked: set[str] = field(default_factory=set)  # clients of the last round

    def answered(self, settled: Settled, start_s: float | None, now_s: float) -> None:
        """An answer to an order of the open round came at `now_s`; `start_s` as in `spent_on_order`."""
        order, reply = settled.order, settled.reply
        self._answered_at_s = now_s
        self._bytes_up[order.message_id] = settled.bytes_up
        if reply is not None:
            self._spent[order.message_id] = _spent(reply, now_s - order.sent_at_s, start_s)

    def close(self, closed: OpenRound, *, merged: bool) -> None:
        """The round is over, with all that belongs to it; `merged`: its accepted replies are in the model."""
        fences = {one.order.fence for one in closed.accepted} if merged else set()
        orders = [
            OrderFacts(
                order.client.name,
                order.sent_at_s,
                order.bytes_down,
                self._bytes_up.get(order.message_id, 0),
                self._spent.get(order.message_id),
                order.fence in fences,
            )
            for order in closed.sent.values()
        ]
        trained = any(order.lease is not None for order in closed.sent.values())
        # an evaluation after the last round belongs to no period
        self.idle.because(Cause.DISPATCH, closed.number)  # what follows is the next round's
        end_s = self._end_of_training_s(closed) if trained else self._last_end_s
        accounts = client_accounts(
            orders, before=self._last_asked, last_end_s=self._last_end_s, end_s=end_s
        )
        self.report.round_time(closed.number, self.idle.take(), accounts, trained=trained)
        self.so_far |= {name: added(self.so_far.get(name), one) for name, one in accounts.items()}
        self._last_end_s, self._last_asked = end_s, set(accounts)
        self._bytes_up, self._spent = {}, {}

    def _end_of_training_s(self, closed: OpenRound) -> float:
        """If nobody was seen training, as in a round shorter than a tick: when the last answer came."""
        if self.idle.trained_until_s > closed.opened_at_s:
            return self.idle.trained_until_s
        return max(self._answered_at_s, closed.opened_at_s)


def _spent(reply: TrainReply, away_s: float, start_s: float | None) -> Spent:
    return spent_on_order(
        away_s,
        start_s,
        total_s=reply.total_s,
        ready_s=reply.ready_s,
        eval_s=reply.eval_s,
        train_s=reply.train_s,
        pack_s=reply.pack_s,
        encode_s=reply.encode_s,
    )
