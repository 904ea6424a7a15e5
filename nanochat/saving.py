"""When a run's steps go to disk, and what happens when the disk does not take one.

What was trained is never dropped for want of room: a step that --save-every asks for may fail (the
training continues), the last one is tried again until there is room, and its weights go first.
"""

import time
from collections.abc import Callable

from nanochat.agreement import Agreement, PeerFailed
from nanochat.checkpoint_manager import not_finite, save_checkpoint
from nanochat.files import atomic_write_json
from nanochat.progress import Diverged
from nanochat.resume import NotSaved, TrainingState, if_first, save_run, save_weights
from nanochat.run_directory import prune, remove_step, set_aside, steps_after
from nanochat.run_setup import Setup

ROOM_WAIT_S = 1800.0  # somebody may be called to make room
ROOM_POLL_S = 10.0


class Saver:
    """Puts the steps of one run on disk. All ranks call it together, but for `keep_alone`."""

    def __init__(self, setup: Setup, agreement: Agreement, say: Callable[[str], None]) -> None:
        self.saved = setup.state.step  # the last step whose weights are on disk; 0: none
        self.whole = True  # it has its optimizer, too: a run can continue from it
        self._model, self._optimizer = setup.model, setup.optimizer
        self._plan, self._rank = setup.plan, setup.plan.place.rank
        self._agreement, self._say = agreement, say
        self._begin = setup.state.step if setup.plan.saved else -1  # later ones are not of this run
        self._cleared = False  # of those

    def announce(self) -> None:
        """Say what the first save will do to steps that are no part of this run."""
        if others := steps_after(self._plan.directory, self._begin):
            self._say(
                f"{self._plan.directory} holds {self._others}, the last one {others[-1]}: the first "
                "checkpoint of this run moves them aside"
            )

    @property
    def _others(self) -> str:
        return "later steps" if self._plan.saved else "steps of another run"

    def save(self, state: TrainingState) -> None:
        """What --save-every asks for: a disk that does not take it costs a line.

        Raises Diverged, as the others do, for weights that are not finite.
        """
        try:
            self._save(state)
        except NotSaved as error:
            self._say(f"warning: {error}; training continues")
            self._tidy(state)

    def keep(self, state: TrainingState) -> None:
        """What must not be lost: it is tried until the disk takes it, for ROOM_WAIT_S.

        Meanwhile, and then, there are at least the weights, if these fit; NotSaved if they do not.
        """
        deadline_s = time.monotonic() + ROOM_WAIT_S
        weights = reported = False
        while True:
            try:
                self._save(state)
                return
            except NotSaved as error:
                weights = weights or self._save_weights(state)
                what = "its weights alone are there" if weights else "nothing of it is there"
                if self._agreement.any(time.monotonic() >= deadline_s):
                    if not weights:
                        self._tidy(state)
                        raise
                    self._say(f"warning: {error} ({what}: no run can continue from them)")
                    return
                if not reported:
                    minutes = ROOM_WAIT_S / 60
                    self._say(f"{error}; it is tried again for {minutes:.0f} minutes ({what})")
                    reported = True
            time.sleep(ROOM_POLL_S)

    def amend(self, state: TrainingState) -> None:
        """Write the meta data of the saved step again, with what was measured since."""
        path = self._plan.directory / f"meta_{state.step:06d}.json"
        meta = self._meta(state, whole=self.whole)
        try:
            if_first(self._rank, lambda: atomic_write_json(path, meta), self._agreement)
        except (OSError, PeerFailed) as error:
            self._say(f"warning: the evaluation is not in {path} ({error})")

    def keep_alone(self, state: TrainingState) -> bool:
        """Write the weights, which each rank has: the others may be stuck. Whether it was possible.

        Raises OSError, and Diverged.
        """
        self._check_finite(state)
        if not self._cleared:
            if self._rank and steps_after(self._plan.directory, self._begin):
                return False
            self._clear()
        meta = self._meta(state, whole=False)
        save_checkpoint(self._plan.directory, state.step, self._model.state_dict(), None, meta)
        self.saved, self.whole = state.step, False
        return True

    def _save(self, state: TrainingState) -> None:
        self._check_finite(state)
        try:
            if_first(self._rank, self._clear, self._agreement)
        except (OSError, PeerFailed) as error:
            raise NotSaved(f"cannot write to {self._plan.directory} ({error})") from error
        self._cleared = True
        save_run(
            self._plan.directory,
            self._model,
            self._optimizer,
            self._meta(state, whole=True),
            rank=self._rank,
            agreement=self._agreement,
        )
        self.saved, self.whole = state.step, True
        self._say(f"wrote {self._plan.directory / f'model_{state.step:06d}.pt'}")
        if self._rank == 0:
            self._prune()

    def _save_weights(self, state: TrainingState) -> bool:
        meta = self._meta(state, whole=False)

        def write() -> None:
            self._clear()
            save_weights(self._plan.directory, self._model, meta)

        try:
            if_first(self._rank, write, self._agreement)
        except (OSError, PeerFailed):
            return False
        self.saved, self.whole = state.step, False
        return True

    def _clear(self) -> None:
        """Make the directory this run's: what others left there is moved aside."""
        if self._cleared:
            return
        directory = self._plan.directory
        directory.mkdir(parents=True, exist_ok=True)
        if target := set_aside(directory, after=self._begin):
            self._say(f"moved {self._others} to {target}")
        self._cleared = True

    def _prune(self) -> None:
        try:
            prune(self._plan.directory, keep=self._plan.settings.save_keep)
        except OSError as error:  # it costs space and nothing else
            self._say(f"warning: cannot remove old checkpoints: {error}")

    def _tidy(self, state: TrainingState) -> None:
        """Remove what was written of a step that is not whole."""
        if self._rank == 0:
            try:
                remove_step(self._plan.directory, state.step)
            except OSError as error:
                self._say(f"warning: cannot remove what was written of step {state.step}: {error}")

    def _check_finite(self, state: TrainingState) -> None:
        if name := not_finite(self._model.state_dict()):
            raise Diverged(f"{name} is not finite after step {state.step}")

    def _meta(self, state: TrainingState, *, whole: bool) -> dict[str, object]:
        return self._plan.meta(state, ranks=self._plan.place.world_size if whole else 0)
