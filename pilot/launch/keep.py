"""Keep a deployed run going: submit it again, with the same run-name, whenever its server is gone.

A run resumes from its last snapshot, so this is all that an operator would do. What fails before its first
round is a mistake of somebody's, and ends here; afterwards everything is worth another attempt: a killed
ServerApp, a SuperLink that was started again, a disk that was full for a while.
"""

import re
import threading
import time
from collections.abc import Callable

from pilot.errors import PilotError
from pilot.launch.flower_run import FlowerRun, Outcome

MAX_FAILURES = 12  # in a row, without a round between them
MAX_PAUSE_S = 60.0
_BEGUN = re.compile(r"\[ROUND \d+\]")
_PROGRESS = re.compile(r"\bround=\d+ val_bpb=")
_FINISHED = re.compile(r"run \S+ is finished")


def keep_running(
    submit: Callable[[], FlowerRun],
    follow: Callable[[FlowerRun, Callable[[str], None]], Outcome],
    show: Callable[[str], None],
    *,
    run_name: str,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Submit and follow a run until it has ended for good; how it ended.

    `submit` and `follow` raise PilotError for what Flower refuses, or while no SuperLink answers. Before the
    first round that is passed on; later it counts as a failure like any other.
    """
    begun, failures = False, 0
    stopping: list[threading.Thread] = []

    def watched(line: str) -> None:
        nonlocal begun, failures
        begun = begun or bool(_BEGUN.search(line))
        failures = 0 if _PROGRESS.search(line) else failures
        show(line)

    while True:
        run: FlowerRun | None = None
        try:
            run = submit()
            while stopping:
                stopping.pop().start()
            outcome = follow(run, watched)
        except PilotError as error:
            if not begun:
                raise
            outcome = Outcome("finished:failed", str(error))
        finally:
            if run is not None:
                run.close()
        if begun and _FINISHED.search(outcome.details):
            return Outcome("finished:completed")  # it died after it had written its results
        if outcome.succeeded or outcome.was_stopped or not begun:
            return outcome
        failures += 1
        if failures > MAX_FAILURES:
            return outcome
        if (
            run is not None
        ):  # Flower may think for another minute that it runs, which can't hold up the next
            stopping.append(threading.Thread(target=run.stop, daemon=True))
        pause_s = min(MAX_PAUSE_S, 2.0**failures - 2)  # none at first
        show(
            f"The run ended ({outcome.details or 'no reason is known'}): "
            f"resuming run {run_name} in {pause_s:.0f} s"
        )
        sleep(pause_s)
