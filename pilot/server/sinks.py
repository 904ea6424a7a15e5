"""Where a run's numbers go besides `events.jsonl`: to W&B and TensorBoard, by a thread that delays no round."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pilot.errors import PilotError
from pilot.wire.jsonable import redact

logger = logging.getLogger("pilot")
T = TypeVar("T")

MOST_WAITING = 10_000  # rounds whose numbers nobody takes: beyond, the oldest are dropped


class Background(Generic[T]):
    """Does `work` for one item after the other, in a thread: `put` never waits.

    Of more than `most` items that wait, the oldest is dropped, which `dropped` counts.
    """

    def __init__(self, name: str, work: Callable[[T], None], *, most: int) -> None:
        self._name, self._work, self._most = name, work, most
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False
        self.dropped = 0

    def put(self, item: T) -> None:
        with self._changed:
            if self._ending:
                return
            if len(self._items) >= self._most:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout_s: float) -> bool:
        """Take nothing more, and wait at most `timeout_s` for what waits; False if that was too short."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._items and not self._ending:
                    self._changed.wait()
                if not self._items:
                    return
                item = self._items.popleft()
            self._work(item)


class Sink(Protocol):
    """Takes the numbers of a run. What it raises ends it, not the run."""

    def log(self, values: Mapping[str, Any], *, step: int) -> None: ...

    def finish(self, *, exit_code: int, timeout_s: float) -> None: ...


class Sinks:
    """Several sinks behind one queue. `opening`: how each begins, which may take long, also in the thread."""

    def __init__(self, opening: Sequence[Callable[[], Sink]]) -> None:
        self._opening, self._sinks = list(opening), list[Sink]()
        self._background = Background("metrics", self._do, most=MOST_WAITING)
        self._put: Callable[[Callable[[Sink], None]], None] = self._background.put

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        """Let every sink record `values` of round `step`, soon."""
        if self._opening or self._sinks:
            self._put(lambda sink: sink.log(values, step=step))

    def finish(self, *, exit_code: int, timeout_s: float) -> None:
        """End all sinks, waiting about `timeout_s`; harmless when repeated."""
        if not (self._opening or self._sinks):
            return
        self._put(lambda sink: sink.finish(exit_code=exit_code, timeout_s=timeout_s))
        if not self._background.close(timeout_s + _LAST_WORDS_S):
            logger.warning(
                "some metrics were not taken within %g s; events.jsonl has them", timeout_s
            )
        if self._background.dropped:
            logger.warning(
                "metrics of %d rounds were dropped, since nobody took them; events.jsonl has them",
                self._background.dropped,
            )

    def _do(self, what: Callable[[Sink], None]) -> None:
        for opening in self._opening:
            self._guarded(lambda opening=opening: self._sinks.append(opening()))  # type: ignore[misc]
        self._opening = []
        for sink in list(self._sinks):
            if not self._guarded(lambda sink=sink: what(sink)):  # type: ignore[misc]
                self._sinks.remove(sink)

    def _guarded(self, do: Callable[[], None]) -> bool:
        try:
            do()
        except Exception as error:  # noqa: BLE001 - whatever a sink raises, the run continues
            logger.warning("metrics: %s, continuing without it", redact(str(error)))
            return False
        return True


_LAST_WORDS_S = 5.0  # for a sink whose own time is over to say so


class TensorBoard:
    """Scalars for TensorBoard, in `directory`."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(directory))

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        for name, value in values.items():
            with contextlib.suppress(TypeError, ValueError):  # a text is no scalar
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def finish(self, *, exit_code: int, timeout_s: float) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raise PilotError unless TensorBoard's writer is installed."""
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        raise PilotError(
            "tensorboard = true needs TensorBoard, which is not installed here: "
            "uv sync --extra tensorboard, or pip install 'pilot[tensorboard]'"
        )
