"""All that people see of a run: log lines, and the same facts as events and metrics.

The other rooms of the server say what happened by calling a method here; they print and record nothing
themselves. Arguments are plain values, so this module knows none of the rooms that use it.
"""

import contextlib
import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from nanochat.schedule import Schedule
from pilot.rules.accounts import ClientAccount, run_account, totals
from pilot.rules.rounds import EndReason
from pilot.run.events import EVENTS_VERSION, read_events
from pilot.run.state import RoundRecord, RunState
from pilot.server.bars import Speed, bar, bar_end
from pilot.server.report_wishes import WishReport
from pilot.server.tables import round_line, round_table, time_table
from pilot.server.telemetry import Telemetry
from pilot.wire.messages import Fence, Heartbeat, TrainReply, to_json

log = logging.getLogger("pilot")


class Report(WishReport):
    """The run's voice: one method per thing that can happen."""

    def __init__(self, telemetry: Telemetry) -> None:
        super().__init__(telemetry)
        self.refused = Counter[str]()  # client → its replies ("": nobody knows whose)
        self.refusals = deque[tuple[str, int | None, str]](maxlen=5)  # client, round, reason
        self._shown: dict[str, object] = {}  # client → what its last progress line said

    # -- the run ---------------------------------------------------------------------------------

    def run_started(self, state: RunState, term: int) -> None:
        """A server has begun, with a new run or where the last one stopped."""
        who: dict[str, Any] = {"run": state.config.run_name, "term": term, "tokens": state.tokens}
        self.telemetry.event(
            "run_started", **who, events_version=EVENTS_VERSION, round=state.round_number
        )
        for change in state.config_changes:
            if change.round_number == state.round_number:  # earlier ones were reported then
                self.telemetry.event(
                    "config_changed",
                    f"Resumed anyway: {change.key} was {change.was!r}, is {change.now!r} from round "
                    f"{change.round_number + 1} on",
                    **asdict(change),
                )

    def run_finished(self, state: RunState, *, final_model: str, checkpoint: str) -> None:
        log.info("")
        times = ""  # of a run whose events cannot be read
        with contextlib.suppress(OSError):
            times = time_table(run_account(read_events(self.telemetry.events_path)))
        for line in [*round_table(state).splitlines(), "", *times.splitlines(), ""]:
            log.info("%s", line)
        log.info("Final model: %s", final_model)
        log.info("Checkpoint:  %s", checkpoint)
        log.info("Events:      %s", self.telemetry.events_path)
        self.telemetry.event(
            "run_finished", tokens=state.tokens, rounds=state.round_number, final_model=final_model
        )

    # -- clients ---------------------------------------------------------------------------------

    def waiting_for_clients(self, why: str) -> None:
        log.info("Waiting for clients: %s", why)

    def client_warned(self, name: str, warning: str) -> None:
        log.warning("Client %s: %s", name, warning)

    def client_refused(self, name: str, reason: str) -> None:
        log.warning("Client %s is refused: %s", name, reason)

    def name_contested(self, name: str, *, holder: str, other: str) -> None:
        """A node on the host `other` wants the name that a living client on the host `holder` has."""
        self.telemetry.event(
            "name_contested",
            f"A node on {other or '?'} says that it is {name}, and so does one on {holder or '?'} that is "
            "alive: the newer one is refused. Give each client a name of its own, or stop one of them",
            client=name,
            holder=holder,
            other=other,
        )

    def client_left(self, name: str) -> None:
        log.info("Client %s left", name)

    def client_joined_round(self, number: int, name: str, *, again: bool) -> None:
        how = " with another lease" if again else ""
        self.telemetry.event(
            "client_joined", f"Client {name} joins ROUND {number}{how}", round=number, client=name
        )

    def client_silent(self, number: int, name: str) -> None:
        what = "is silent: the round continues without it"
        self._client_event("client_silent", number, name, what)

    def client_back(self, number: int, name: str) -> None:
        self._client_event("client_back", number, name, "is heard again")

    def mirror_unfit(self, number: int, name: str) -> None:
        what = "holds another model than it said, or a damaged one: it is sent what it needs"
        self._client_event("mirror_unfit", number, name, what)

    def client_cooling(self, number: int, name: str, *, refused: int, seconds: float) -> None:
        what = f"gets no work for {seconds:g} s: its last {refused} replies were refused"
        self._client_event("client_cooling", number, name, what, refused=refused)

    def client_too_late(
        self, number: int, name: str, *, rounds: int, begin_s: float, round_s: float
    ) -> None:
        """`begin_s`: what it was given to begin; `round_s`: how long the round was."""
        what = (
            f"could take no step in its last {rounds} rounds: it needs more than {begin_s:.0f} s to begin, and "
            f"ROUND {number} was over after {round_s:.0f} s. Rounds go on without waiting for it: raise "
            "target-tokens, round-min-duration or round-max-duration, or give the client a faster line"
        )
        self._client_event("client_too_late", number, name, what, rounds=rounds, begin_s=begin_s)

    def client_left_out(
        self, number: int, name: str, reason: str, *, seconds: float | None, needs_s: float
    ) -> None:
        """`seconds` that an order could give it (None: not known yet), `needs_s` what it needs to begin."""
        why = "how long rounds last is not known yet"
        if seconds is not None:
            why = f"it could train for {seconds:.0f} s and needs {needs_s:.0f} s to begin"
        what = (
            f"gets no order for ROUND {number}, since it would not hear its end ({reason}) and {why}: let it "
            "reach the run's Redis (PILOT_REDIS_URL), or make rounds longer"
        )
        self._client_event("client_left_out", number, name, what, reason=reason)

    def _client_event(self, kind: str, number: int, name: str, what: str, **fields: Any) -> None:
        self.telemetry.event(kind, f"Client {name} {what}", round=number, client=name, **fields)

    # -- a round ---------------------------------------------------------------------------------

    def round_opened(
        self, number: int, state: RunState, schedule: Schedule, nodes: Mapping[str, int]
    ) -> None:
        """`nodes`: client → the Flower node that speaks for it."""
        share, complete, shards = state.ledger.progress()
        step = state.tokens / state.config.total_batch_size
        hyper = schedule.at(step)
        log.info("")
        log.info("[ROUND %d]", number)
        log.info("Shard progress: %.1f%% (%d/%d complete)", 100 * share, complete, shards)
        log.info(
            "Round %d schedule: Step %.1f/%d, LRM %.3f, Momentum %.3f",
            number,
            step,
            round(schedule.total_steps),
            hyper.lr_multiplier,
            hyper.momentum,
        )
        log.info("Flower nodes: %s", ", ".join(f"{name} ({node})" for name, node in nodes.items()))
        log.info("configure_train: Training on all %d Flower nodes", len(nodes))
        self.telemetry.event("round_opened", round=number, clients=list(nodes))

    def monitoring(self, number: int) -> None:
        log.info("Round monitor started for ROUND %d", number)

    def progress(
        self, heartbeats: Mapping[str, Heartbeat], *, tokens: int, elapsed_s: float
    ) -> None:
        """One line per client, as its own progress bar would show it; `tokens` is what each may expect.

        A client that has not moved since its last line gets none.
        """
        for name, beat in heartbeats.items():
            now = (beat.state, beat.step, beat.tokens)
            if self._shown.get(name) == now:
                continue
            self._shown[name] = now
            postfix = beat.state
            if beat.step:
                postfix = bar_end(
                    beat.loss, beat.shard, beat.shard_row, beat.shard_rows, beat.mfu or None
                )
            rate = beat.tokens_per_s or None
            log.info("%s", bar(name, beat.tokens, postfix, tokens, elapsed_s, rate))

    def reply_accepted(
        self,
        name: str,
        reply: TrainReply,
        state: RunState,
        *,
        trained: bool,
        elapsed_s: float,
        traffic: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """A reply came and is not refused; `trained` is False where only an evaluation was asked for;
        `traffic`: bytes_down and bytes_up of its tensors."""
        values = to_json(reply) | {"round": reply.fence.round_number, "client": name}
        number = name.removeprefix("client_")
        known = reply.loss_nats is not None and reply.tokens > 0
        loss = (reply.loss_nats or 0.0) / reply.tokens if known else None
        rate = reply.tokens / reply.train_s if reply.tokens and reply.train_s else None
        self.telemetry.event(
            "reply",
            f"Client {number}: {reply.batches} batches" if trained else None,
            loss=loss,
            tokens_per_s=rate,
            **traffic,
            **values,
        )
        if reply.tokens and reply.consumed:
            # the line that a client's bar ends with: a round may be over before a heartbeat was due
            last = reply.consumed[-1]
            rows = state.ledger.row_counts.get(last.shard, 0)
            postfix = bar_end(loss, last.shard, last.end_row or 0, rows, reply.mfu)
            log.info("%s", bar(name, reply.tokens, postfix, reply.tokens, elapsed_s, rate))

    def reply_refused(self, name: str, fence: Fence, reason: str) -> None:
        number = fence.round_number
        self.refused[name] += 1
        self.refusals.append((name, number, reason))
        self.telemetry.event(
            "reply_refused",
            f"Reply of {name} in round {number} is refused: {reason}",
            round=number,
            client=name,
            fence=asdict(fence),
            reason=reason,
        )

    def reply_too_late(self, reply: TrainReply | None) -> None:
        """An answer to no order that is open: its rows have gone back long ago."""
        reason = "it answers a round that is over"
        client = reply.client if reply else ""
        self.refused[""] += 1
        self.refusals.append((client, reply.fence.round_number if reply else None, reason))
        self.telemetry.event(
            "reply_refused",
            f"A reply is refused: {reason}",
            reason=reason,
            client=client or None,
            fence=asdict(reply.fence) if reply else None,
        )

    def round_ended(self, number: int, reason: EndReason) -> None:
        self.telemetry.event(
            "round_ended", f"[ROUND {number}] ended: {reason}", round=number, reason=str(reason)
        )

    def idle(self, cause: str, seconds: float, number: int | None = None) -> None:
        """No client has trained for `seconds`, which ended in round `number`."""
        self.telemetry.event("idle", cause=str(cause), seconds=round(seconds, 3), round=number)

    def round_time(
        self,
        number: int,
        phases: Mapping[str, float],
        accounts: Mapping[str, ClientAccount],
        *,
        trained: bool,
    ) -> None:
        """What became of the time since the last round's; `trained` False: it only evaluated."""
        sums = totals(phases, accounts.values()) | ({} if trained else {"goodput": None})
        phases = {str(name): round(seconds, 3) for name, seconds in phases.items()}
        self.telemetry.event(
            "round_time",
            f"[ROUND {number}] {round_line(phases, accounts)}" if trained else None,
            round=number,
            phases=phases,
            clients={name: account.to_json() for name, account in accounts.items()},
            **sums,
        )
        if trained:
            self.telemetry.metrics(number, **sums, **{f"{p}_s": s for p, s in phases.items()})

    def nothing_to_merge(self, number: int) -> None:
        log.info("[ROUND %d] nothing to merge: the model stays as it was", number)

    def round_committed(
        self,
        record: RoundRecord,
        state: RunState,
        learning: Mapping[str, float | None] = MappingProxyType({}),
        speeds: Mapping[str, Speed] = MappingProxyType({}),
    ) -> None:
        """The round is on disk; `learning`: what its updates say of it (`Votes.figures`,
        `LastStep.figures`, what a code lost); `speeds`: client → how fast it trained."""
        loss = "-" if record.train_loss is None else f"{record.train_loss:.4f}"
        refused = f" refused={record.refused}" if record.refused else ""
        rate = sum(speed.tokens_per_s for speed in speeds.values()) or None
        fast = f" tokens_per_s={rate:,.0f}" if rate else ""
        self.telemetry.event(
            "round_committed",
            f"[ROUND {record.round_number}] committed: clients={record.clients} "
            f"tokens={record.tokens} train_loss={loss} total_tokens={state.tokens}{refused}{fast} "
            f"({record.duration_s:.1f} s)",
            total_tokens=state.tokens,
            merged=[reply.to_json() for reply in state.merged],
            speeds={name: asdict(speed) for name, speed in speeds.items()},
            **asdict(record),
        )
        self.telemetry.metrics(
            record.round_number,
            train_loss=record.train_loss,
            tokens=state.tokens,
            clients=record.clients,
            refused=record.refused,
            tokens_per_s=rate,
            **learning,
        )

    def updates_disagree(self, number: int, what: str) -> None:
        """Two clients of round `number` contradict each other, and nobody knows which one is right."""
        text = f"[ROUND {number}] {what}: with a third client it could be decided who is wrong"
        self.telemetry.event("updates_disagree", text, round=number, reason=what)

    def merge_taken_back(
        self,
        number: int,
        *,
        spoilt: int,
        to_round: int,
        clients: Sequence[str],
        bpb: float | None,
        before: float | None,
        aside: Sequence[str],
        culprit: str,
    ) -> None:
        """Round `number` has undone what was merged after round `to_round` up to round `spoilt`."""
        what = f"[ROUND {number}] the merge of round {spoilt} is taken back: val_bpb "
        what += f"{_bpb(before)} -> {_bpb(bpb)}"
        if culprit:
            what += f"; {culprit} took part in each such merge and gets no work for a while"
        elif aside:
            what += f"; until it is known who spoilt it, no work for {', '.join(aside)}"
        self.telemetry.event(
            "merge_taken_back",
            f"{what}; the run continues from the model of round {to_round}",
            round=number,
            taken_back=[to_round + 1, spoilt],
            clients=list(clients),
            val_bpb=bpb,
            val_bpb_before=before,
            aside=list(aside),
            culprit=culprit or None,
        )

    def cannot_take_back(self, number: int, why: str) -> None:
        self.telemetry.event(
            "merge_kept",
            f"The merge of round {number} made the model much worse and cannot be taken back: {why}",
            round=number,
            reason=why,
        )

    # -- evaluation ------------------------------------------------------------------------------

    def validation(self, number: int, *, val_bpb: float, eval_rows: int, wanted: int) -> None:
        """The replies of a round say how good the model is that round `number` merged.

        A figure of a part of the rows is marked as such wherever it appears, since it compares with no other.
        """
        complete = eval_rows == wanted
        rows = "" if complete else f" (partial: {eval_rows} of {wanted} rows)"
        self.telemetry.event(
            "validation",
            f"round={number} val_bpb={val_bpb:.4f}{rows}",
            round=number,
            val_bpb=val_bpb,
            eval_rows=eval_rows,
            complete=complete,
        )
        name = "val_bpb" if complete else "val_bpb_partial"
        self.telemetry.metrics(number, **{name: val_bpb, "val_rows": eval_rows})

    def validation_doubted(self, number: int, doubts: Sequence[str]) -> None:
        """Clients contradict one another, or the possible, about the model that round `number` merged."""
        for doubt in doubts:
            self.telemetry.event(
                "validation_doubted",
                f"Validation of the model of round {number}: {doubt}",
                round=number,
                reason=doubt,
            )

    def evaluation_incomplete(self, missing: Sequence[str]) -> None:
        log.warning(
            "The last model is not scored on all validation rows yet: %s", "; ".join(missing)
        )


def _bpb(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
