"""Flower's transfers, with each message in memory once.

Flower 1.41 takes three times the size of a message to send it (the tensors, and copies of all of their chunks,
which wait for their turn), and as much to receive it (the chunks as they came, cut out of that, and joined).
`install` puts functions in the place of three of Flower's: chunks are copied when it is their turn, are gone
once they are joined, and are counted as they come. A test holds them against the pinned version. Of another
Flower nothing is changed.
"""

import contextlib
import functools
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flwr.app import Array

_UTILS = "flwr.supercore.inflatable.inflatable_utils"
_USERS = (_UTILS, "flwr.superlink.grid.http_grid")  # modules that have the names
_INFLATE, _PUSH = "inflate_object_from_contents", "push_object_contents_from_iterable"
_PULL = "pull_objects"
_ARRAY, _CHUNK = b"Array ", b"ArrayChunk "
_END_OF_HEAD = b"\0"
_noted = threading.local()
_QUEUED = 2  # chunks that are ready for each one that is being sent


def install() -> None:
    """Use them in this process from now on."""
    with contextlib.suppress(ImportError):
        from flwr.supercore.inflatable import inflatable_utils

        if not hasattr(inflatable_utils, _INFLATE) or not hasattr(inflatable_utils, _PUSH):
            return
        for module in (sys.modules[name] for name in _USERS if name in sys.modules):
            theirs = vars(module).get(_INFLATE)
            if theirs is not None and not hasattr(theirs, "_of_pilot"):
                vars(module)[_INFLATE] = inflating(theirs)
                vars(module)[_PULL] = telling(vars(module)[_PULL])
        vars(inflatable_utils)[_PUSH] = push


def inflating(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's `inflate_object_from_contents`, with arrays joined beforehand."""

    @functools.wraps(theirs)
    def inflate(
        object_id: str,
        object_contents: dict[str, bytes],
        *,
        keep_object_contents: bool = False,
        objects: dict[str, Any] | None = None,
    ) -> Any:
        if objects is None and not keep_object_contents:
            objects = joined(object_contents)
        return theirs(
            object_id, object_contents, keep_object_contents=keep_object_contents, objects=objects
        )

    vars(inflate)["_of_pilot"] = True
    return inflate


@contextlib.contextmanager
def noting(note: Callable[[], None]) -> Iterator[None]:
    """`note` is called for each object that this thread has Flower pull."""
    _noted.note = note
    try:
        yield
    finally:
        del _noted.note


def telling(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's `pull_objects`, which tells what comes to whom `noting` says."""

    @functools.wraps(theirs)
    def pull(
        object_ids: list[str], pull_object_fn: Callable[[str], bytes], **options: Any
    ) -> dict[str, bytes]:
        note = getattr(_noted, "note", lambda: None)

        def one(object_id: str) -> bytes:
            content = pull_object_fn(object_id)
            note()
            return content

        found: dict[str, bytes] = theirs(object_ids, one, **options)
        return found

    return pull


def joined(contents: dict[str, bytes]) -> dict[str, Any]:
    """The arrays in `contents` by object id; they and their chunks are no longer in `contents`.

    Raises what a client's bytes may cause, as Flower does: KeyError, ValueError, TypeError, IndexError.
    """
    listed = {i: _listed(content) for i, content in contents.items() if content.startswith(_ARRAY)}
    left = Counter(chunk for _, chunks in listed.values() for chunk in set(chunks))
    arrays = {}
    for object_id, (said, chunks) in listed.items():
        array = Array(said["dtype"], tuple(said["shape"]), said["stype"], b"")
        array.data = b"".join(_body(contents[chunk], _CHUNK) for chunk in chunks)
        arrays[object_id] = array
        del contents[object_id]
        for chunk in set(chunks):
            left[chunk] -= 1
            if not left[chunk]:
                del contents[chunk]
    return arrays


def _listed(content: bytes) -> tuple[dict[str, Any], list[str]]:
    """What an array says of itself, and the object ids of its chunks in order."""
    children = content[: content.index(_END_OF_HEAD)].decode().split(" ")[1].split(",")
    said = json.loads(bytes(_body(content, _ARRAY)))
    chunks = [children[i] for i in said["arraychunk_ids"]]
    if set(chunks) != set(children) - {""}:
        raise ValueError("an array does not consist of its chunks")
    return said, chunks


def _body(content: bytes, kind: bytes) -> memoryview:
    if not content.startswith(kind):
        raise ValueError(f"an object is no {kind.decode().strip()}")
    return memoryview(content)[content.index(_END_OF_HEAD) + 1 :]


def push(
    object_contents: Iterable[tuple[str, bytes]],
    push_object_fn: Callable[[str, bytes], None],
    *,
    max_concurrent_pushes: int = 2,
) -> None:
    """Flower's `push_object_contents_from_iterable`, which asks for contents only as fast as they leave.

    Raises what `push_object_fn` raises; nothing more is sent then.
    """
    workers = max(1, max_concurrent_pushes)
    room, failed = threading.Semaphore(workers * (1 + _QUEUED)), threading.Event()

    def send(object_id: str, content: bytes) -> None:
        try:
            if not failed.is_set():
                push_object_fn(object_id, content)
        except BaseException:
            failed.set()
            raise
        finally:
            room.release()

    sent: list[Future[None]] = []
    with ThreadPoolExecutor(workers) as pool:
        for object_id, content in object_contents:
            room.acquire()
            if failed.is_set():
                break
            sent.append(pool.submit(send, object_id, content))
            del content
    for one in sent:
        one.result()
