"""The round loop: `RoundLoop.run` reads as the numbered list of docs/protocol.md.

It never waits on Flower alone: every wait has a limit of its own, and whatever a client does, a round
ends, its rows are accounted for, and the next one opens.
"""

import time
from collections.abc import Callable
from pathlib import Path

from pilot import plan
from pilot.config import RunConfig
from pilot.coordination.coordinator import ServerCoordinator
from pilot.redis_url import without_credentials
from pilot.rules.admission import Cooling
from pilot.rules.rounds import (
    Clock,
    EndReason,
    RoundRules,
    RoundView,
    end_reason,
    grace_s,
    join_min_remaining_s,
    remaining_s,
    return_s,
)
from pilot.run.state import RunState
from pilot.server.blind import BlindClients
from pilot.server.commit import Committer, Version
from pilot.server.dispatch import Dispatcher
from pilot.server.failures import Failures, RunFailed, RunInterrupted
from pilot.server.idle import Cause, IdleTime, gathering
from pilot.server.mailbox import Answer, Mailbox
from pilot.server.monitor import RoundMonitor, uploads_s
from pilot.server.open_round import OpenRound
from pilot.server.public import Public
from pilot.server.report import Report
from pilot.server.roster import Client, Roster
from pilot.server.time_books import TimeBooks
from pilot.server.wishes import Wishes
from pilot.wire.messages import TrainReply

_TICK_S = 0.25
_PROGRESS_EVERY_S = 2.0
_REPORT_WAITING_EVERY_S = 5.0
_IDLE_TICK_S = 1.0  # while no client works
_BRISK_S = 15.0  # for which clients are looked for at each tick
_EVALUATION_ATTEMPTS = 3


class RoundLoop:
    """Trains `state` to its end over the clients that `mailbox` reaches.

    Args:
        config: the run's configuration.
        state: what the run is before its next round; updated in place, round by round.
        term: the number of this start of the server.
        mailbox: messages to and from Flower's nodes.
        coordinator, report: the server's half of Redis; all that people see.
        clock, run_dir: the only source of time; where snapshots and the open round's spool are kept.
        closed: no node will come that isn't there yet (a simulation).
        interrupted: asked at every tick; once it says True the round ends and RunInterrupted is raised.
        trained: called when the last round is committed, before it is evaluated.
        version: the run's state after an earlier round, so that a merge can be taken back.
        wall_clock: of the time in which no server ran, which outlives a process.
    """

    def __init__(
        self,
        config: RunConfig,
        state: RunState,
        *,
        term: int,
        mailbox: Mailbox,
        coordinator: ServerCoordinator,
        report: Report,
        clock: Clock,
        run_dir: Path,
        closed: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
        trained: Callable[[], None] = lambda: None,
        version: Version | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.config, self.state, self.term = config, state, term
        self.mailbox, self.coordinator, self.report = mailbox, coordinator, report
        self.clock, self.run_dir = clock, run_dir
        self.interrupted, self._trained = interrupted, trained
        self.schedule = plan.schedule(config, total_tokens=state.total_tokens)
        state.wandb_id = report.telemetry.wandb_id
        url, self.blind = without_credentials(coordinator.url), BlindClients(config, state, report)
        self.dispatcher = Dispatcher(config, state, term, mailbox, clock, url, self.blind)
        self.roster = Roster(
            mailbox,
            self.dispatcher.hello_order(),
            report,
            clock,
            config.min_clients,
            state.fingerprints,
            closed=closed,
            joined=self._welcome,
            silent=lambda name: self._current is not None and name in self._monitor.silent,
        )
        self.failures = Failures(clock, config.clients_timeout)
        self.cooling = Cooling(state.admission, clock, config.cooling_time)
        self.idle = IdleTime(report, clock, run_dir, wall_clock=wall_clock)
        self.times = TimeBooks(self.idle, report)
        self.committer = Committer(config, state, term, run_dir, report, clock, version)
        self.committer.writing = lambda: self.idle.because(Cause.SNAPSHOT, state.round_number)
        self._current: RoundMonitor | None = None  # the open round, and what is known of it
        self.wishes = Wishes(coordinator, report)
        self.public = Public(config, state, self.roster, self.cooling, self.wishes, self.times)
        self._incomplete_since_s: float | None = None
        self._progress_at_s = float("-inf")

    def run(self) -> None:
        """Rounds until the run is finished, then the last evaluation. Resumable at any moment."""
        try:
            self._rounds()
        finally:
            self.idle.stop(on_purpose=self.state.finished or self.interrupted() or self.wishes.end)

    def _rounds(self) -> None:
        wanted = self.config.min_clients
        while not (self.state.finished and self._last_merge_is_good()):
            clients = self._gather(wanted, to_train=True)  # 0. hello
            self._open(clients)  # 1. open, 2. send
            reason = self._until_the_end()  # 3. train, 4. end
            closed = self._collect()  # 5. reply
            self._commit(closed, reason)  # 6. outer step, then commit
            self.failures.note(closed)
            wanted = 1
        self.committer.forget()

    # -- 0. hello --------------------------------------------------------------------------------

    def _welcome(self, client: Client) -> None:
        """A node may take part from now on; an older one of the same name may not any more."""
        self.state.ledger.register(client.name, client.hello.shards)
        if self._current is not None and (lost := self._round.supersede(client)):
            self.mailbox.abandon(lost)

    def _gather(self, wanted: int, *, to_train: bool) -> list[Client]:
        """Wait until `wanted` clients are there, one of them for work, and a little for those that may return.

        Raises RunFailed after `clients-timeout` seconds without them, or when they can't come; not while
        a client is there that is only left out for a while.
        """
        began_s = reported_s = self.clock.now_s()
        while True:
            waited_s = self.clock.now_s() - began_s
            self._tick(_TICK_S if waited_s < _BRISK_S else _IDLE_TICK_S)
            self._raise_if_interrupted(self.wishes.stop)
            clients = self._available(to_train=to_train)
            left_out = [c.name for c in self._present() if not self.cooling.ready(c.name)]
            left_out += self.wishes.drained
            there = len({c.name for c in clients}.union(left_out)) if clients else 0
            if self._all_there(there, wanted):
                self.state.fingerprints = self.roster.fingerprints
                return self._at_work(clients) if to_train else clients
            cause = gathering(len(clients), wanted, asked=self.roster.questions_open)
            self.idle.because(cause, self.state.round_number)
            why = self.roster.waiting_for(wanted)
            if left_out:
                why += f"; left out for a while: {', '.join(left_out)}"
            timed_out = waited_s >= self.config.clients_timeout and not left_out
            if self.roster.hopeless(wanted) or timed_out:
                raise RunFailed(f"not enough clients to continue: {why}")
            if self.clock.now_s() - reported_s >= _REPORT_WAITING_EVERY_S:
                self.report.waiting_for_clients(why)
                reported_s = self.clock.now_s()

    def _all_there(self, there: int, wanted: int) -> bool:
        """Whether a round may open with `there` clients, or those that are missing have been waited for, once.

        One that does not answer what it is counts as missing: it may hang. One left out for a while does not.
        """
        now_s = self.clock.now_s()
        if there >= max(wanted, self.config.min_clients) and not self.roster.questions_open:
            self._incomplete_since_s = None
            return True
        if self._incomplete_since_s is None:
            self._incomplete_since_s = now_s
        patience_s = return_s(self.state.last_lengths_s)
        return there >= wanted and now_s - self._incomplete_since_s >= patience_s

    def _present(self) -> list[Client]:
        """Clients that owe no answer and are not leaving."""
        return [client for client in self.roster.ready() if client.name not in self.wishes.leaving]

    def _available(self, *, to_train: bool) -> list[Client]:
        """Clients that can take work now; to train, they need free rows and must not be cooling."""
        free, cooled = self.state.ledger.free_for, self.cooling.ready
        return [c for c in self._present() if not to_train or (free(c.name) and cooled(c.name))]

    def _at_work(self, clients: list[Client]) -> list[Client]:
        """Those of `clients` that are not aside until it is known who spoilt a merge; all, if they all are."""
        return [c for c in clients if c.name not in self.state.guard.aside] or clients

    # -- 1. open, 2. send ------------------------------------------------------------------------

    @property
    def _monitor(self) -> RoundMonitor:
        assert self._current is not None  # between `_begin` and `_collect` there is one
        return self._current

    @property
    def _round(self) -> OpenRound:
        return self._monitor.open_round

    def _open(self, there: list[Client]) -> None:
        clients = self.blind.askable(there)
        self.idle.because(Cause.DISPATCH, self.state.round_number + 1)
        self._begin(self.state.round_number + 1)
        nodes = {client.name: client.node_id for client in clients}
        self.report.round_opened(self._round.number, self.state, self.schedule, nodes)
        self.dispatcher.send_all(self._round, clients)
        self.report.monitoring(self._round.number)

    def _begin(self, number: int) -> None:
        self.coordinator.open_round(number)
        spool, now_s = self.run_dir / "spool", self.clock.now_s()
        open_round = OpenRound(number, self.state, self.report, spool=spool, opened_at_s=now_s)
        self._current = RoundMonitor(open_round, self.report, self.config.heartbeat)

    # -- 3. train, 4. end ------------------------------------------------------------------------

    def _until_the_end(self) -> EndReason:
        """Watch the round until a rule ends it, and make the end known: durable key, then signal."""
        left, reason = self.state.total_tokens - self.state.tokens, None
        rules = RoundRules.of(self.config, run_tokens_left=left)
        while reason is None:
            self._tick(_TICK_S if self._monitor.awaited else _IDLE_TICK_S)
            self._join(rules)
            reason = self.wishes.end_reason(self.interrupted()) or end_reason(rules, self._view())
        self._monitor.ended_at_s = self.clock.now_s()
        self.coordinator.end_round(reason)
        self.report.round_ended(self._round.number, reason)
        self._raise_if_interrupted()
        return reason

    def _newcomers(self) -> list[Client]:
        """Clients that could work in the open round and don't: they came late, used up their lease, or
        their last order came to nothing."""
        aside = self.state.guard.aside
        ready = [c for c in self._available(to_train=True) if c.name not in aside]
        new = [c for c in ready if self._round.may_have_order(c.name)]
        return self.blind.askable(new, self._round, self.clock.now_s())

    def _view(self) -> RoundView:
        new = [c for c in self._newcomers() if not self._round.used_up_lease(c.name)]
        rows_left = not self.state.ledger.exhausted
        return self._monitor.view(self.clock.now_s(), waiting=len(new), rows_left=rows_left)

    def _join(self, rules: RoundRules) -> None:
        """A client that came while the round runs trains at once, if enough of it is left."""
        newcomers = self._newcomers()
        view = self._view() if newcomers else None
        if view is None or (view.pending == view.silent and not view.replied):
            return  # a round in which no client works is not joined: it ends, and the next one opens
        costs = [c.fixed_cost_s for c in self.roster.accepted() if c.fixed_cost_s is not None]
        if remaining_s(rules, view) < join_min_remaining_s(self.config.join_min_remaining, costs):
            return
        for client in newcomers:
            again = client.name in self._round.clients
            self.report.client_joined_round(self._round.number, client.name, again=again)
            self.dispatcher.join(self._round, client)

    def _tick(self, pause_s: float = _TICK_S) -> None:
        """Pause, then everything that must continue while we wait: mail, hellos, Redis, the open round."""
        self.clock.sleep(pause_s)
        for answer in self.mailbox.poll():
            self._handle_answer(answer)
            answer.parts.clear()
        self.roster.send_hellos()
        self.dispatcher.cargo.forget()
        now_s = self.clock.now_s()
        self.public.exchange(self._current, now_s)
        if self._current is not None:
            self._follow(now_s)

    def _follow(self, now_s: float) -> None:
        """See how far the clients of the open round are, and show it now and then."""
        owing = [order.client.name for order in self._round.pending]
        heard = self.coordinator.heartbeats(owing)
        self._monitor.update(heard, now_s, blind=self.coordinator.failing)
        self.idle.because(self._monitor.idle_cause, self._round.number)
        if now_s - self._progress_at_s >= _PROGRESS_EVERY_S:
            self._progress_at_s = now_s
            target = self.config.target_tokens or self.state.total_tokens - self.state.tokens
            self.report.progress(
                {name: last.heartbeat for name, last in self._monitor.heard.items()},
                tokens=max(1, target // len(self._round.clients)),
                elapsed_s=now_s - self._round.opened_at_s,
            )

    def _handle_answer(self, answer: Answer) -> None:
        """Pass an answer to the roster or the open round; what is on disk is acknowledged to its client."""
        if self.roster.handle_answer(answer):
            return
        if self._current is not None and (unfit := self._round.needs_model(answer)) is not None:
            over = self._monitor.ended_at_s is not None
            self.dispatcher.send_again(self._round, unfit, over=over)
            return
        settled = self._round.handle_answer(answer) if self._current is not None else None
        if settled is None:
            if not answer.error:
                late = answer.message
                self.report.reply_too_late(late if isinstance(late, TrainReply) else None)
            return
        order, reply, now_s = settled.order, settled.reply, self.clock.now_s()
        self.times.answered(settled, self._monitor.started_s.get(order.message_id), now_s)
        if reply is not None:
            self._monitor.measure(order, reply, now_s)
            self.report.reply_accepted(
                order.client.name,
                reply,
                self.state,
                trained=order.lease is not None,
                traffic=settled.traffic,
                elapsed_s=now_s - self._round.opened_at_s,
            )
        self.coordinator.acknowledge(order.client.name, order.fence)

    def _raise_if_interrupted(self, wish: str = "") -> None:
        """`wish`: of an operator, between two rounds, where ending costs nothing."""
        if self.interrupted() or wish:
            raise RunInterrupted(wish)

    # -- 5. reply --------------------------------------------------------------------------------

    def _collect(self, patience_s: float | None = None) -> OpenRound:
        """Wait for the replies that are still to come, and return the round, to which no more can come.

        The wait is a multiple of what uploads have ever taken, or longer where that is worth it, or
        `patience_s` seconds where clients have more to do than to send.
        """
        monitor, open_round = self._monitor, self._round
        uploads, began_s = uploads_s(monitor.awaited), self.clock.now_s()

        def limit_s() -> float:
            if patience_s is not None:
                return patience_s
            return grace_s(uploads, self.config.grace_max, worth_s=monitor.worth_waiting_s)

        while open_round.pending:
            self._tick()  # at least once: a client that began in the last moment is heard then
            self._raise_if_interrupted()
            if not monitor.awaited or self.clock.now_s() - began_s >= limit_s():
                break
        waited_s = limit_s()
        if patience_s is None:
            monitor.note_slow_uploads(waited_s)
            monitor.note_late_beginners()
        for order in open_round.pending:
            self.mailbox.abandon(order.message_id)
        reason = f"no reply within the {waited_s:.0f} s of grace"
        open_round.give_up(reason, monitor.why_not_awaited)
        self._current = None
        self.dispatcher.cargo.drop()
        return open_round

    # -- 6. outer step, then commit --------------------------------------------------------------

    def _commit(self, closed: OpenRound, reason: EndReason) -> None:
        self.idle.because(Cause.MERGE, closed.number)
        if taken_back := self.committer.close(closed, str(reason)):
            self._went_back()
        self.times.close(closed, merged=not taken_back)

    def _went_back(self) -> None:
        """The books are those of an earlier round, which do not know which client has which shards."""
        for client in self.roster.accepted():
            self.state.ledger.register(client.name, client.hello.shards)

    def _last_merge_is_good(self) -> bool:
        """Have the model of the last round scored, which has no next round: one more order, without rows.

        False: it was much worse than the one before, which takes its place, and the run may not be finished.
        """
        self._trained()
        for _ in range(_EVALUATION_ATTEMPTS):
            clients = self._gather(1, to_train=False)
            self._begin(self.state.round_number + 1)
            # of two, one could take any merge back: only those score that would be given work
            scorers = [c for c in self._at_work(clients) if self.cooling.ready(c.name)] or clients
            self.dispatcher.send_all(self._round, clients, evaluate_only=True, scorers=scorers)
            closed = self._collect(self.config.round_max_duration)
            self.coordinator.end_round(EndReason.ALL_REPLIED)
            closed.close()
            self.times.close(closed, merged=False)
            if closed.figure().rows == self.config.eval_rows:
                break
            missing = closed.failures | closed.lost
            self.report.evaluation_incomplete([f"{name}: {why}" for name, why in missing.items()])
        if not self.committer.score(closed):
            return True
        self._went_back()
        return self.state.finished
