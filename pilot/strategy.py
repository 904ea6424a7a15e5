"""The round loop: `PilotStrategy.run` reads as the numbered list of ARCHITECTURE.md.

It never waits on Flower alone: every wait has a limit of its own, and whatever a site does, a round
ends, its rows are accounted for, and the next one opens.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from pilot import plan, report
from pilot.config import PilotError, RunConfig, without_credentials
from pilot.coordinator import ServerCoordinator
from pilot.dispatch import Dispatcher
from pilot.mailbox import Mailbox
from pilot.open_round import OpenRound
from pilot.outer import outer_step
from pilot.rounds import Clock, EndReason, RoundRules, RoundView, end_reason
from pilot.run_state import RoundRecord, RunState
from pilot.sites import Roster, Site
from pilot.snapshot import write_snapshot
from pilot.telemetry import Telemetry

_TICK_S = 0.25
_REDIS_EVERY_S = 1.0
_TELL_EVERY_S = 2.0
# A site that joins a round is sent work only if it has this long to do it: starting costs seconds.
JOIN_MIN_REMAINING_S = 30.0
# After the first round, clients that are back within this time are waited for.
RETURN_S = 15.0
# Rounds in a row in which nothing but errors came back, before the run gives up.
MAX_FAILED_ROUNDS = 3
_EVALUATION_ATTEMPTS = 3

log = logging.getLogger("pilot")


class RunFailed(PilotError):
    """The run can't go on; what it has is on disk, and the same command resumes it."""


class RunInterrupted(PilotError):
    """Somebody stopped the run; the same command resumes it."""


class PilotStrategy:
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
            mailbox, hello, clock, config.min_clients, state.fingerprints, closed=closed
        )
        self._failed_rounds = 0
        self._told: dict[str, object] = {}
        self._redis_at_s = self._told_at_s = float("-inf")

    def run(self) -> None:
        """Rounds until the run is finished, then the last evaluation. Resumable at any moment."""
        wanted = self.config.min_clients
        while not self.state.finished:
            sites = self._gather(wanted, to_train=True)  # 0. hello
            open_round = self._open(sites)  # 1. open, 2. send
            reason = self._monitor(open_round)  # 3. train, 4. end
            self._collect(open_round)  # 5. reply
            self._commit(open_round, reason)  # 6. outer step, then commit
            self._check_failures(open_round)
            wanted = 1
        self._evaluate_last_merge()

    # -- 0. hello --------------------------------------------------------------------------------

    def _gather(self, wanted: int, *, to_train: bool) -> list[Site]:
        """Wait until `wanted` sites can take work, and a little for those that may come back.

        Raises RunFailed after `clients-timeout` seconds without them, or when they can't come.
        """
        began_s = told_s = self.clock.now_s()
        while True:
            self._tick(None)
            self._raise_if_interrupted()
            sites = self.roster.ready()
            if to_train:
                ledger = self.state.ledger
                sites = [site for site in sites if ledger.free_for(set(site.hello.shards))]
            waited_s = self.clock.now_s() - began_s
            complete = len(sites) >= max(wanted, self.config.min_clients)
            complete = complete and not self.roster.questions_open
            if complete or (len(sites) >= wanted and waited_s >= RETURN_S):
                self.state.fingerprints = self.roster.fingerprints
                return sites
            why = self.roster.waiting_for(wanted)
            if self.roster.hopeless(wanted) or waited_s >= self.config.clients_timeout:
                raise RunFailed(f"not enough clients to go on: {why}")
            if self.clock.now_s() - told_s >= 5.0:
                log.info("Waiting for clients: %s", why)
                told_s = self.clock.now_s()

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

    def _monitor(self, open_round: OpenRound) -> EndReason:
        """Watch the round until a rule ends it, and make the end known: durable key, then signal."""
        log.info("Round monitor started for ROUND %d", open_round.number)
        left = self.state.total_tokens - self.state.tokens
        rules = RoundRules.of(self.config, run_tokens_left=left)
        reason = None
        while reason is None:
            self._tick(open_round)
            self._join(open_round)
            reason = end_reason(rules, self._view(open_round))
            if self.interrupted():
                reason = EndReason.INTERRUPTED
        self.coordinator.end_round(reason)
        report.round_ended(open_round.number, reason, self.telemetry)
        self._raise_if_interrupted()
        return reason

    def _view(self, open_round: OpenRound) -> RoundView:
        beats = self._beats(open_round)
        training = [beat for beat in beats.values() if beat.get("state") == "training"]
        return RoundView(
            elapsed_s=self.clock.now_s() - open_round.opened_at_s,
            tokens=open_round.tokens + sum(int(beat.get("tokens", 0)) for beat in beats.values()),
            training=len(training) + len(open_round.taken),
            pending=len(open_round.pending),
        )

    def _beats(self, open_round: OpenRound) -> dict[str, dict[str, str]]:
        """Signs of life of the sites whose replies are still to come."""
        return self.coordinator.heartbeats([w.site.name for w in open_round.pending.values()])

    def _join(self, open_round: OpenRound) -> None:
        """A site that came while the round runs trains at once, if enough of it is left."""
        elapsed_s = self.clock.now_s() - open_round.opened_at_s
        if self.config.round_max_duration - elapsed_s < JOIN_MIN_REMAINING_S:
            return
        for site in self.roster.ready():
            if site.name not in open_round.asked:
                log.info("Node %s joins ROUND %d", site.name, open_round.number)
                self.dispatcher.join(open_round, site)

    def _tick(self, open_round: OpenRound | None) -> None:
        """Everything that must go on while we wait: mail, newcomers, Redis, and what people see."""
        time.sleep(_TICK_S)
        for answer in self.mailbox.poll():
            if not self.roster.take(answer) and not (open_round and open_round.take(answer)):
                self.telemetry.event(
                    "reply_refused",
                    "A reply is refused: it answers a round that is over",
                    reason="it answers a round that is over",
                    client=answer.header.get("client"),
                    fence=answer.header.get("fence"),
                )
        self.roster.greet()
        now_s = self.clock.now_s()
        if now_s - self._redis_at_s >= _REDIS_EVERY_S:
            self.coordinator.tick()
            self._redis_at_s = now_s
        if open_round is not None and now_s - self._told_at_s >= _TELL_EVERY_S:
            self._told_at_s = now_s
            target = self.config.target_tokens or self.state.total_tokens - self.state.tokens
            report.progress(
                self._beats(open_round),
                self._told,
                tokens=max(1, target // len(open_round.asked)),
                elapsed_s=now_s - open_round.opened_at_s,
            )

    def _raise_if_interrupted(self) -> None:
        if self.interrupted():
            raise RunInterrupted("the run was stopped; the same command resumes it")

    # -- 5. reply --------------------------------------------------------------------------------

    def _collect(self, open_round: OpenRound) -> None:
        """Wait for the replies that are still out, at most `grace-max` seconds."""
        deadline_s = self.clock.now_s() + self.config.grace_max
        while open_round.pending and self.clock.now_s() < deadline_s:
            self._tick(open_round)
            self._raise_if_interrupted()
        for message_id in open_round.pending:
            self.mailbox.abandon(message_id)
        open_round.give_up()

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
            fence = one.reply.fence
            state.last_merged[one.work.site.name] = [
                fence.term,
                fence.round_number,
                fence.lease_id,
            ]
        state.merged = [one.reply.fence for one in taken]
        state.tokens += open_round.tokens
        state.round_number = open_round.number
        state.wandb_id = self.telemetry.wandb_id
        record = RoundRecord(
            round_number=open_round.number,
            reason=str(reason),
            clients=len(taken),
            tokens=open_round.tokens,
            duration_s=round(self.clock.now_s() - open_round.opened_at_s, 3),
            train_loss=open_round.train_loss,
        )
        state.history.append(record)
        snapshots = self.run_dir / "snapshots"
        snapshot = state.to_snapshot(term=self.term)
        write_snapshot(snapshots, snapshot, keep=self.config.snapshot_keep)
        open_round.close()
        report.round_committed(record, state, self.telemetry)

    def _check_failures(self, open_round: OpenRound) -> None:
        """Raise RunFailed when only errors have come back for some rounds: nobody would see it."""
        failed = bool(open_round.failures) and not open_round.taken
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
            self._collect(open_round)
            self.coordinator.end_round(EndReason.ALL_REPLIED)
            open_round.close()
            if open_round.eval_rows == self.config.eval_rows:
                break
            reasons = "; ".join(f"{site}: {why}" for site, why in open_round.failures.items())
            log.warning("The last model is not scored on all validation rows yet: %s", reasons)
        report.validation(open_round, self.state, self.telemetry)
