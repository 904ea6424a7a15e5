"""`flower-supernode` that looks for its next order at once, gives up one whose ClientApp is gone, and stays.

A SuperNode asks the SuperLink for a message, and if there is none it sleeps 3 s (hard-coded; docs/flower.md).
The next round's order comes about a second after the last reply, so nearly every round waits for that sleep.
Here the sleeps are short for a while after each message, and Flower's own while nothing happens.

It waits for a reply without a look at the ClientApp, whose death it takes a minute to notice. Here it looks: at
the file in which a ClientApp says what it works on (`site/in_flight.py`).

It ends when the SuperLink was started again. Here it does not (`rejoin.py`).
"""

import contextlib
import functools
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pilot.launch import warm
from pilot.processes.ancestry import alive
from pilot.site import in_flight
from pilot.site.notice import NODE_VARIABLE

PROGRAM = "flower-supernode"
_LOOP, _CONNECTION = "flwr.supernode.start_client_internal", "flwr.supernode.fleet_http_connection"
_STATE, _FINISHED = "flwr.supernode.nodestate.in_memory_nodestate", "finished"
_IDLE_S, _REPLY_S = 3.0, 0.5  # Flower's sleeps: while there is no message, and no reply to one
_EAGER_S, _EAGER_FOR_S = 0.5, 20.0
_REPLY_EAGER_S = 0.2


class Pace:
    """Stands in for `time.sleep` in Flower's loop; `lost` is called while that waits for a reply."""

    def __init__(self, lost: Callable[[], None] = lambda: None) -> None:
        self._eager_until_s = time.monotonic() + _EAGER_FOR_S
        self._lost = lost

    def sleep(self, seconds: float) -> None:
        now_s = time.monotonic()
        if seconds == _REPLY_S:  # there is a message
            seconds, self._eager_until_s = _REPLY_EAGER_S, now_s + _EAGER_FOR_S
            self._lost()
        elif seconds == _IDLE_S and now_s < self._eager_until_s:
            seconds = _EAGER_S
        time.sleep(seconds)


class LostClientApp:
    """Ends the wait for a reply that will not come; `directory` is the node's."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._state: Any = None  # Flower's, of this node
        self._since = 0.0  # wall clock, as the times of files are

    def noted(self, pull: Callable[..., Any]) -> Callable[..., Any]:
        """Flower's function that takes a message: what files said before is of earlier ones."""

        @functools.wraps(pull)
        def pulling(**others: Any) -> Any:
            self._since = time.time()
            return pull(**others)

        return pulling

    def watched(self, push: Callable[..., None]) -> Callable[..., None]:
        """Flower's function that waits for a reply and sends it, with its `state` known here."""

        @functools.wraps(push)
        def pushing(*, state: Any, **others: Any) -> None:
            self._state = state
            try:
                push(state=state, **others)
            finally:
                self._state = None

        return pushing

    def look(self) -> None:
        """Let Flower see at once what it would see in a minute, if the ClientApp at work is gone.

        And what it would never see: where a ClientApp is gone before it took its message, Flower finishes the
        task and leaves the message without a reply.
        """
        if self._state is None:
            return
        with contextlib.suppress(OSError, AttributeError):  # of another Flower: `pilot node` helps
            if self._gone():
                with self._state.lock_task_store:
                    for record in self._state.task_token_store.values():
                        record.active_until -= timedelta(days=1)
                for name in (in_flight.FILE_NAME, warm.LAST_CLIENTAPP):
                    (self._directory / name).unlink(missing_ok=True)
            if self._without_a_task():
                with self._state.lock_msg_store:
                    messages = list(self._state.msg_store.values())
                for entry in messages:  # only what was taken is answered
                    if not entry.is_retrieved:
                        entry.is_retrieved = True
                        self._state.record_message_processing_start(
                            entry.message.metadata.message_id
                        )
                nodestate = importlib.import_module(_STATE)
                runs = {entry.message.metadata.run_id for entry in messages}
                self._state._store_error_replies(runs, nodestate.CLIENT_APP_CRASHED_ERROR)

    def _without_a_task(self) -> bool:
        """Whether nobody is to answer the message that is waited for."""
        with self._state.lock_task_store:
            self._state._cleanup_expired_task_tokens_locked()
            tasks = [task.status.status for task in self._state.task_store.values()]
        with self._state.lock_msg_store:
            messages = [entry.message for entry in self._state.msg_store.values()]
        replied = any(message.metadata.reply_to_message_id for message in messages)
        return bool(messages and not replied and all(status == _FINISHED for status in tasks))

    def _gone(self) -> bool:
        """Whether the ClientApp of the message at work is gone.

        That is the one that was started last. The one that says what it works on counts where nothing is known
        of the start: it may be of an earlier message, and write late.
        """
        order = in_flight.read(self._directory)
        for name, pid in (
            (warm.LAST_CLIENTAPP, self._started()),
            (in_flight.FILE_NAME, order and order.pid),
        ):
            if pid and self._is_new(name):
                return not alive(pid)
        return False

    def _started(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self._directory / warm.LAST_CLIENTAPP).read_text(encoding="utf-8"))
        return None

    def _is_new(self, name: str) -> bool:
        """Whether a file is of the message at work."""
        with contextlib.suppress(OSError):
            return (self._directory / name).stat().st_mtime >= self._since
        return False


def install(directory: Path) -> Path:
    """Write the program into `directory`: a file of Flower's name, which `ps` shows."""
    return warm.write_program(directory / PROGRAM, f"from {__name__} import main\n\nmain()\n")


def main() -> None:
    """Be `flower-supernode`, with its own command line."""
    sys.argv[0] = PROGRAM
    with contextlib.suppress(ImportError):  # another Flower
        loop = importlib.import_module(_LOOP)
        warm.preload()
        if sys.platform.startswith("linux"):
            template = warm.Template.fork()
            if isinstance(template, list):
                warm.be_superexec(template)
                return
            template.starts(warm.PROGRAM, of=loop)
        lost = LostClientApp(Path(os.environ.get(NODE_VARIABLE, "")))
        pace = Pace(lost.look)
        vars(loop)["time"] = SimpleNamespace(**{**vars(time), "sleep": pace.sleep})
        vars(loop)["_pull_and_store_message"] = lost.noted(loop._pull_and_store_message)
        vars(loop)["_push_messages"] = lost.watched(loop._push_messages)
        rejoin = importlib.import_module("pilot.launch.rejoin")  # which needs all of Flower, too
        rejoin.install(
            importlib.import_module(_CONNECTION), say=functools.partial(loop.log, logging.INFO)
        )
    from flwr.supernode.cli import flower_supernode

    flower_supernode()
