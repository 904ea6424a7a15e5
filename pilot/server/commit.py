"""What becomes of a round that has ended: its replies are merged, or the merge before is taken back.

Step 6 of docs/protocol.md. The replies of a round also say how good the model is that the round before merged.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from pilot.config import RunConfig
from pilot.errors import PilotError
from pilot.faults import fault_point
from pilot.rules.admission import REFUSALS_IN_A_ROW
from pilot.rules.aggregation import Merged
from pilot.rules.merge_guard import Verdict
from pilot.rules.outer import Coded, LastStep, outer_step_in_place
from pilot.rules.rounds import Clock
from pilot.rules.validation import Figure, bpb
from pilot.run.quarantine import keep_refused
from pilot.run.snapshot import SnapshotError, write_snapshot
from pilot.run.state import MergedReply, OuterStep, RoundRecord, RunState
from pilot.server.admit import compare, disagreeing
from pilot.server.bars import speeds
from pilot.server.open_round import OpenRound
from pilot.server.report import Report
from pilot.tensor_file import TensorFile

# Merges taken back one after another, each by all that is known the fault of another client: then it is none's.
MAX_TAKEN_BACK = 12
TAKEN_BACK = "taken-back"  # why the round ended, for its record

Version = Callable[[int], RunState]


class NoProgress(PilotError):
    """The run cannot get better than it is; what it has is on disk."""


@dataclass
class Committer:
    """Closes the rounds of `state` into snapshots in `run_dir`.

    `version` gives the run's state after an earlier round, 0 included; None: nothing can be taken back.
    """

    config: RunConfig
    state: RunState
    term: int
    run_dir: Path
    report: Report
    clock: Clock
    version: Version | None = None
    writing: Callable[[], None] = lambda: None  # called before a snapshot is written
    last_step: LastStep = field(default_factory=LastStep)

    def close(self, closed: OpenRound, reason: str) -> bool:
        """Merge what was accepted and write it all in one snapshot: its rename is the commit.

        Returns whether the merge before was taken back instead.
        """
        if self.score(closed):
            return True
        state = self.state
        votes = compare(state, closed.spilled)
        outliers, undecided = disagreeing(state, votes)
        for client, why in outliers.items():
            closed.turn_away(client, why)
        if undecided:
            self.report.updates_disagree(closed.number, undecided)
        step: OuterStep | None = None
        if (update := closed.merged()) is None:
            self.report.nothing_to_merge(closed.number)
        else:
            step = functools.partial(self._step, update, closed.outer_path)
        accepted = closed.in_lease_order()
        record = self._record(closed, reason)
        merged = {one.order.client.name for one in accepted}
        record.clients = len(merged)
        record.tokens, record.train_loss = closed.tokens, closed.train_loss
        state.absorb(record, [one.contribution for one in accepted], step)
        outer = self.last_step.figures() if step else {}
        self._write()
        self._keep_spool(closed)
        fast = speeds((one.order.client.name, one.reply) for one in accepted)
        learning = votes.figures(merged) | outer | {"code_lost": closed.code_lost}
        self.report.round_committed(record, state, learning, fast)
        return False

    def _step(self, update: Merged, path: Path, coded: Coded | None) -> TensorFile:
        """The outer step: the weights move in place, and their new outer state is a file at `path`.

        Whatever ends the server from here to the commit costs this round: what is resumed is on disk.
        """
        state = self.state
        try:
            fault_point("outer.write")
            self.last_step.begin()
            outer = outer_step_in_place(
                self.config,
                state.weights,
                update,
                state.outer,
                path,
                coded=coded,
                moved=self.last_step.add,
            )
            fault_point("outer.written")
        except OSError as error:
            raise SnapshotError(
                f"cannot write {path}: {error}; fix this and rerun the same command to resume"
            ) from error
        return outer

    def score(self, closed: OpenRound) -> bool:
        """Record how good the last merge is, and take it back if it made the model much worse: whether it
        did."""
        state, guard = self.state, self.state.guard
        last = bpb(guard.versions[-1]) if guard.versions else None
        figure = closed.figure(last)
        self._record_validation(figure)
        ratio = self.config.take_back_ratio
        verdict = guard.judge(figure, wanted_rows=self.config.eval_rows, max_ratio=ratio)
        if verdict is Verdict.BAD:
            if (before := self._before()) is not None:
                self._take_back(closed, before, figure)
                return True
            guard.versions = []  # with which later ones are no longer to be compared
        if verdict is not Verdict.UNKNOWN:
            guard.was_good(state.round_number, figure)
        return False

    def _record_validation(self, figure: Figure) -> None:
        number = self.state.round_number
        if figure.doubts:
            self.report.validation_doubted(number, figure.doubts)
        if (value := figure.bpb) is None:
            return
        if record := self.state.record(number):
            record.val_bpb, record.eval_rows = value, figure.rows
        wanted = self.config.eval_rows
        self.report.validation(number, val_bpb=value, eval_rows=figure.rows, wanted=wanted)

    # -- taking back -----------------------------------------------------------------------------

    def _before(self) -> RunState | None:
        """The run as it was before the merges since the last good version; None, with a word, if it is lost."""
        number = self.state.guard.trusted_round
        try:
            if self.version is None:
                raise PilotError("earlier versions are not kept here")
            return self.version(number)
        except PilotError as error:
            self.report.cannot_take_back(self.state.round_number, str(error))
            return None

    def _take_back(self, closed: OpenRound, before: RunState, figure: Figure) -> None:
        """Go on from the version before, in a round of its own that merges nothing: one snapshot, one
        rename."""
        state, guard = self.state, self.state.guard
        spoilt, clients = state.round_number, list(guard.since)
        was = min((v for one in guard.versions if (v := bpb(one)) is not None), default=None)
        for reply in state.merged:
            self._quarantine(
                reply, f"the model was much worse with it: round {closed.number} took it back"
            )
        closed.drop("it was trained from a model that is taken back")
        self.last_step.forget()
        culprit = guard.was_bad(closed.number)
        if culprit:
            state.admission.in_a_row[culprit] = REFUSALS_IN_A_ROW
        state.take_back(before, self._record(closed, TAKEN_BACK), term=self.term)
        self._write()
        closed.close()
        self.report.merge_taken_back(
            closed.number,
            spoilt=spoilt,
            to_round=before.round_number,
            clients=clients,
            bpb=figure.bpb,
            before=was,
            aside=guard.aside,
            culprit=culprit,
        )
        if guard.taken_back >= MAX_TAKEN_BACK:
            raise NoProgress(
                f"{guard.taken_back} merges in a row made the model much worse and were taken back, with any "
                "clients: lower lr or outer-lr, or set take-back-ratio=0 to keep such merges"
            )

    def _quarantine(self, reply: MergedReply, reason: str) -> None:
        if not self.config.quarantine:
            return
        path = self._merged_spool / f"lease-{reply.fence.lease_id:08d}.safetensors"
        update: Mapping[str, Tensor] = {}
        with contextlib.suppress(OSError, ValueError):  # a crash before it was kept
            update = TensorFile(path)
        keep_refused(self.run_dir / "quarantine", reply, reply.client, update, reason)

    # -- disk ------------------------------------------------------------------------------------

    @property
    def _merged_spool(self) -> Path:
        """The replies of the last merge, until it has been scored; kept with `quarantine` only."""
        return self.run_dir / "spool-merged"

    def _keep_spool(self, closed: OpenRound) -> None:
        self.forget()
        closed.close(keep_as=self._merged_spool if self.config.quarantine else None)

    def forget(self) -> None:
        """The last merge is as good as it should be: its replies are of no more use."""
        shutil.rmtree(self._merged_spool, ignore_errors=True)

    def _record(self, closed: OpenRound, reason: str) -> RoundRecord:
        return RoundRecord(
            round_number=closed.number,
            reason=reason,
            clients=0,
            tokens=0,
            duration_s=round(self.clock.now_s() - closed.opened_at_s, 3),
            train_loss=None,
            refused=closed.rejected,
        )

    def _write(self) -> None:
        config, steps = self.config, self.state.last_steps
        self.writing()
        written = write_snapshot(
            self.run_dir / "snapshots",
            self.state.to_snapshot(term=self.term),
            keep=config.snapshot_keep,
            keep_every=config.snapshot_keep_every,
            also=self.state.guard.trusted_round if config.take_back_ratio else -1,
        )
        for step in steps:  # the last one is what the next orders carry
            step.moved(written, keep_parts=step is steps[-1])
