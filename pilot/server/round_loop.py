"""The round loop: `RoundLoop.run` reads as the numbered list of docs/protocol.md.

It never waits on Flower alone: every wait has a limit of its own, and whatever a site does, a round
ends, its rows are accounted for, and the next one opens.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from pilot import plan
from pilot.config import RunConfig
from pilot.coordination.coordinator import ServerCoordinator
from pilot.errors import PilotError
from pilot.redis_url import without_credentials
from pilot.rules.admission import Cooling
from pilot.rules.outer import outer_step
from pilot.rules.rounds import (
    Clock,
    EndReason,
    RoundRules,
    RoundView,
    end_reason,
    grace_s,
    join_min_remaining_s,
    remaining_s,
)
from pilot.run.snapshot import write_snapshot
from pilot.run.state import RoundRecord, RunState
from pilot.server import report
from pilot.server.dispatch import Dispatcher
from pilot.server.mailbox import Answer, Mailbox
from pilot.server.monitor import RoundMonitor, uploads_s
from pilot.server.open_round import OpenRound
from pilot.server.roster import Roster, Site
from pilot.server.telemetry import Telemetry

_TICK_S = 0.25
_REDIS_EVERY_S = 1.0
_TELL_EVERY_S = 2.0
_IDLE_TICK_S = 1.0  # where nobody works yet
# Clients that answer or are back within this time are waited for, once each time that some are missing.
RETURN_S = 15.0
# Rounds in a row in which workers gave nothing but errors, before the run gives up.
MAX_FAILED_ROUNDS = 3
_EVALUATION_ATTEMPTS = 3

log = logging.getLogger("pilot")


class RunFailed(PilotError):
    """The run can't go on; what it has is on disk, and the same command resumes it."""


class RunInterrupted(PilotError):
    """Somebody stopped the run; the same command resumes it."""


class RoundLoop:
    """Trains `state` to its end over the sites that `mailbox` reaches. `run_dir` keeps the snapshots.

    `closed`: no site will come that isn't there yet (a simulation). `interrupted` is asked at every
    tick; once it says True the round is ended and RunInterrupted raised.
    """

    def __init__(
        self,
        config: RunConfig,
        state: RunState,
        *,
        term: int,
        mailbox: Mailbox,
        coordinator: ServerCoordinator,
        telemetry: Telemetry,
        clock: Clock,
        run_dir: Path,
        closed: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.state, self.term = config, state, term
        self.mailbox, self.coordinator, self.telemetry = mailbox, coordinator, telemetry
        self.clock, self.run_dir, self.interrupted = clock, run_dir, interrupted
        self.schedule = plan.schedule(config, total_tokens=state.total_tokens)
        redis_url = without_credentials(coordinator.url)
        self.dispatcher = Dispatcher(config, state, term, mailbox, clock, redis_url)
        hello = self.dispatcher.hello_order()
        self.roster = Roster(
            mailbox,
            hello,
            clock,
            config.min_clients,
            state.fingerprints,
            closed=closed,
            joined=self._welcome,
        )
        self.cooling = Cooling(state.admission, clock, config.cooling_time)
        self._failed_rounds = 0
        self._incomplete_since_s: float | None = None
        self._monitor: RoundMonitor | None = None
        self._leaving: dict[str, str] = {}  # clients that are to get no new work, and why
        self._told: dict[str, object] = {}
        self._redis_at_s = self._told_at_s = float("-inf")

    def run(self) -> None:
        """Rounds until the run is finished, then the last evaluation. Resumable at any moment."""
        wanted = self.config.min_clients
        while not self.state.finished:
            sites = self._gather(wanted, to_train=True)  # 0. hello
            open_round = self._open(sites)  # 1. open, 2. send
            reason = self._until_the_end(open_round)  # 3. train, 4. end
            self._collect(open_round)  # 5. reply
            self._commit(open_round, reason)  # 6. outer step, then commit
            self._check_failures(open_round)
            wanted = 1
        self._evaluate_last_merge()

    # -- 0. hello --------------------------------------------------------------------------------

    def _welcome(self, site: Site) -> None:
        """A node may take part from now on; one of the same name that was before it may not any more."""
        self.state.ledger.register(site.name, site.hello.shards)
        if self._monitor is not None:
            for message_id in self._monitor.open_round.supersede(site):
                self.mailbox.abandon(message_id)

    def _gather(self, wanted: int, *, to_train: bool) -> list[Site]:
        """Wait until `wanted` sites can take work, and a little for those that may come back.

        Raises RunFailed after `clients-timeout` seconds without them, or when they can't come; not as long as
        one is there that is only left out for a while.
        """
        began_s = told_s = self.clock.now_s()
        while True:
            waited_s = self.clock.now_s() - began_s
            self._tick(None, _TICK_S if waited_s < RETURN_S else _IDLE_TICK_S)
            self._raise_if_interrupted()
            sites = self._available(to_train=to_train)
            if self._all_there(len(sites), wanted):
                self.state.fingerprints = self.roster.fingerprints
                return sites
            why, cooling = self.roster.waiting_for(wanted), self._cooling_sites()
            if cooling:
                why += f"; left out for a while: {', '.join(site.name for site in cooling)}"
            timed_out = waited_s >= self.config.clients_timeout and not cooling
            if self.roster.hopeless(wanted) or timed_out:
                raise RunFailed(f"not enough clients to go on: {why}")
            if self.clock.now_s() - told_s >= 5.0:
                log.info("Waiting for clients: %s", why)
                told_s = self.clock.now_s()

    def _all_there(self, there: int, wanted: int) -> bool:
        """Whether a round may open with so many sites, or who is missing has been waited for.

        A site that was asked what it is and doesn't say is missing like one that left: its node may hang.
        """
        now_s = self.clock.now_s()
        if there >= max(wanted, self.config.min_clients) and not self.roster.questions_open:
            self._incomplete_since_s = None
            return True
        if self._incomplete_since_s is None:
            self._incomplete_since_s = now_s
        return there >= wanted and now_s - self._incomplete_since_s >= RETURN_S

    def _available(self, *, to_train: bool) -> list[Site]:
        """Sites that can take work now: idle, not leaving, not cooling, and with rows left to train on."""
        sites = [site for site in self.roster.ready() if site.name not in self._leaving]
        if to_train:
            sites = [site for site in sites if self.state.ledger.free_for(site.name)]
            sites = [site for site in sites if self.cooling.ready(site.name)]
        return sites

    def _cooling_sites(self) -> list[Site]:
        """Sites that are there and will get work again, but not before their cooling time is over."""
        sites = [site for site in self.roster.ready() if site.name not in self._leaving]
        return [site for site in sites if not self.cooling.ready(site.name)]

    # -- 1. open, 2. send ------------------------------------------------------------------------

    def _open(self, sites: list[Site]) -> OpenRound:
        open_round = self._new_round(self.state.round_number + 1)
        report.round_opened(open_round.number, self.state, self.schedule, sites, self.telemetry)
        self.dispatcher.send_all(open_round, sites)
        return open_round

    def _new_round(self, number: int) -> OpenRound:
        self.coordinator.open_round(number)
        spool = self.run_dir / "spool"
        now_s = self.clock.now_s()
        return OpenRound(number, self.state, self.telemetry, spool=spool, opened_at_s=now_s)

    # -- 3. train, 4. end ------------------------------------------------------------------------

    def _until_the_end(self, open_round: OpenRound) -> EndReason:
        """Watch the round until a rule ends it, and make the end known: durable key, then signal."""
        log.info("Round monitor started for ROUND %d", open_round.number)
        left = self.state.total_tokens - self.state.tokens
        rules = RoundRules.of(self.config, run_tokens_left=left)
        monitor = self._follow(open_round)
        reason = None
        while reason is None:
            self._tick(open_round, _TICK_S if monitor.awaited else _IDLE_TICK_S)
            self._join(open_round, monitor, rules)
            reason = end_reason(rules, self._view(open_round, monitor))
            if self.interrupted():
                reason = EndReason.INTERRUPTED
        monitor.ended_at_s = self.clock.now_s()
        self.coordinator.end_round(reason)
        report.round_ended(open_round.number, reason, self.telemetry)
        self._raise_if_interrupted()
        return reason

    def _follow(self, open_round: OpenRound) -> RoundMonitor:
        self._monitor = RoundMonitor(open_round, self.telemetry, self.config.heartbeat)
        return self._monitor

    def _newcomers(self, open_round: OpenRound) -> list[Site]:
        """Sites that could work in the open round and don't: they came late, used up their lease, or what
        they were to do came to nothing."""
        ready = self._available(to_train=True)
        return [site for site in ready if open_round.wants(site.name)]

    def _view(self, open_round: OpenRound, monitor: RoundMonitor) -> RoundView:
        new = [s for s in self._newcomers(open_round) if s.name not in open_round.used_up]
        rows_left = not self.state.ledger.exhausted
        return monitor.view(self.clock.now_s(), waiting=len(new), rows_left=rows_left)

    def _join(self, open_round: OpenRound, monitor: RoundMonitor, rules: RoundRules) -> None:
        """A site that came while the round runs trains at once, if enough of it is left."""
        newcomers = self._newcomers(open_round)
        view = self._view(open_round, monitor) if newcomers else None
        if view is None or (view.pending == view.silent and not view.replied):
            return  # a round of nobody is not joined: it ends, and the next one opens
        costs = [s.fixed_cost_s for s in self.roster.accepted() if s.fixed_cost_s is not None]
        if remaining_s(rules, view) < join_min_remaining_s(self.config.join_min_remaining, costs):
            return
        for site in newcomers:
            again = " with another lease" if site.name in open_round.asked else ""
            report.joined(open_round.number, site, again, self.telemetry)
            self.dispatcher.join(open_round, site)

    def _tick(self, open_round: OpenRound | None, pause_s: float = _TICK_S) -> None:
        """Everything that must go on while we wait: mail, newcomers, Redis, and what people see."""
        time.sleep(pause_s)
        for answer in self.mailbox.poll():
            self._take(answer, open_round)
        self.roster.greet()
        now_s = self.clock.now_s()
        if now_s - self._redis_at_s >= _REDIS_EVERY_S:
            self.coordinator.tick()
            names = [site.name for site in self.roster.accepted()]
            self._leaving = self.coordinator.draining(names)
            self._redis_at_s = now_s
        if open_round is None or self._monitor is None:
            return
        owing = [work.site.name for work in open_round.pending.values()]
        heartbeats = self.coordinator.heartbeats(owing)
        self._monitor.look(heartbeats, now_s, blind=self.coordinator.failing)
        if now_s - self._told_at_s >= _TELL_EVERY_S:
            self._told_at_s = now_s
            target = self.config.target_tokens or self.state.total_tokens - self.state.tokens
            report.progress(
                self._monitor.beats,
                self._told,
                tokens=max(1, target // len(open_round.asked)),
                elapsed_s=now_s - open_round.opened_at_s,
            )

    def _take(self, answer: Answer, open_round: OpenRound | None) -> None:
        """Hand an answer to whom it belongs; what is on disk is acknowledged to its client."""
        if self.roster.take(answer):
            return
        receipt = open_round.take(answer) if open_round else None
        if receipt is None:
            report.refused_late(answer, self.telemetry)
            return
        self.coordinator.acknowledge(receipt.work.site.name, receipt.work.fence)
        if self._monitor is not None and receipt.reply is not None:
            now_s = self.clock.now_s()
            self._monitor.measure(receipt.work, receipt.reply, now_s)
            elapsed_s = now_s - self._monitor.open_round.opened_at_s
            report.part_done(receipt.work, receipt.reply, self.state, elapsed_s=elapsed_s)

    def _raise_if_interrupted(self) -> None:
        if self.interrupted():
            raise RunInterrupted("the run was stopped; the same command resumes it")

    # -- 5. reply --------------------------------------------------------------------------------

    def _collect(self, open_round: OpenRound, patience_s: float | None = None) -> None:
        """Wait for the replies that are still to come: as long as they have ever taken, and more, or
        for `patience_s` seconds where they have more to do than to be sent."""
        monitor = self._monitor or self._follow(open_round)
        measured = patience_s is None
        if patience_s is None:
            patience_s = grace_s(uploads_s(monitor.awaited), self.config.grace_max)
        deadline_s = self.clock.now_s() + patience_s
        while open_round.pending:
            self._tick(open_round)  # once at least: who began in the last moment is heard then
            self._raise_if_interrupted()
            if not monitor.awaited or self.clock.now_s() >= deadline_s:
                break
        for work in monitor.awaited if measured else ():
            # it takes longer than it did: three times as long next time
            work.site.upload_s = max(work.site.upload_s or 0.0, patience_s)
        for message_id in open_round.pending:
            self.mailbox.abandon(message_id)
        reason = f"no reply within the {patience_s:.0f} s of grace"
        open_round.give_up(reason, silent=monitor.silent, unbegun=monitor.unbegun)
        self._monitor = None

    # -- 6. outer step, then commit --------------------------------------------------------------

    def _commit(self, open_round: OpenRound, reason: EndReason) -> None:
        """Merge what was taken and write it all in one snapshot: its rename is the commit."""
        report.validation(open_round, self.state, self.telemetry)
        state, mean = self.state, open_round.mean()
        if mean is None:
            state.empty_rounds += 1
            log.info("[ROUND %d] nothing to merge: the model stays as it was", open_round.number)
        else:
            state.weights, state.outer = outer_step(self.config, state.weights, mean, state.outer)
        taken = open_round.in_lease_order()
        for one in taken:
            state.ledger.commit(one.reply.fence.lease_id, one.consumed, one.row_counts)
        state.note_merged([one.merged() for one in taken])
        state.admission.merged(one.norm for one in taken)
        state.tokens += open_round.tokens
        state.round_number = open_round.number
        state.wandb_id = self.telemetry.wandb_id
        record = RoundRecord(
            round_number=open_round.number,
            reason=str(reason),
            clients=len({one.work.site.name for one in taken}),
            tokens=open_round.tokens,
            duration_s=round(self.clock.now_s() - open_round.opened_at_s, 3),
            train_loss=open_round.train_loss,
            refused=open_round.rejected,
        )
        state.history.append(record)
        snapshots = self.run_dir / "snapshots"
        snapshot = state.to_snapshot(term=self.term)
        keep, keep_every = self.config.snapshot_keep, self.config.snapshot_keep_every
        write_snapshot(snapshots, snapshot, keep=keep, keep_every=keep_every)
        open_round.close()
        report.round_committed(record, state, self.telemetry)

    def _check_failures(self, open_round: OpenRound) -> None:
        """Raise RunFailed when workers have given only errors for some rounds: nobody would see it.

        Sites that die are no such error, however many: others may come. Nor is content that may not be
        merged: who sends it is left out for a while.
        """
        failed = bool(open_round.failures) and not (open_round.taken or open_round.rejected)
        self._failed_rounds = self._failed_rounds + 1 if failed else 0
        if self._failed_rounds >= MAX_FAILED_ROUNDS:
            reasons = "; ".join(f"{site}: {why}" for site, why in open_round.failures.items())
            raise RunFailed(f"{self._failed_rounds} rounds in a row gave only errors: {reasons}")

    def _evaluate_last_merge(self) -> None:
        """The model of the last round has no next round to score it: one more order, without rows."""
        for _ in range(_EVALUATION_ATTEMPTS):
            sites = self._gather(1, to_train=False)
            open_round = self._new_round(self.state.round_number + 1)
            self.dispatcher.send_all(open_round, sites, evaluate_only=True)
            self._collect(open_round, self.config.round_max_duration)
            self.coordinator.end_round(EndReason.ALL_REPLIED)
            open_round.close()
            if open_round.eval_rows == self.config.eval_rows:
                break
            missing = open_round.failures | open_round.lost
            reasons = "; ".join(f"{site}: {why}" for site, why in missing.items())
            log.warning("The last model is not scored on all validation rows yet: %s", reasons)
        report.validation(open_round, self.state, self.telemetry)
