"""Loaded by every Python process of a chaos site (PYTHONPATH): makes a worker send a bad reply.

The injector writes a word into the file `$PILOT_CHAOS_REPLY`. The next update that a worker of the site
encodes is spoilt in that way, and the file is removed. The product does not know of it: `pilot.wire.codec`
and `pilot.wire.messages` are wrapped as they are imported, in worker processes only.
"""

import contextlib
import importlib.abc
import importlib.machinery
import os
import random
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_FILE = os.environ.get("PILOT_CHAOS_REPLY")


def _ordered(words: Sequence[str]) -> str | None:
    """The word that the injector wrote, if it is one of `words`; the file is then removed."""
    with contextlib.suppress(OSError):
        path = Path(_FILE or "")
        word = path.read_text(encoding="utf-8")
        if word in words:
            path.unlink()
            return word
    return None


def _spoil_parts(encode: Callable[..., Any]) -> Callable[..., Any]:
    def spoilt(tensors: Any, *arguments: Any, **options: Any) -> Any:
        parts = encode(tensors, *arguments, **options)
        word = _ordered(("nan", "corrupt", "truncate")) if parts else None
        if word:
            first = max(parts, key=lambda part: len(part.data))
            data = bytes(first.data)
            if word == "nan":  # all bits set is a NaN in every float format
                data = b"\xff" * 4 + data[4:]
            elif word == "truncate":
                data = data[: len(data) // 2]
            else:
                data = random.Random(len(data)).randbytes(len(data))
            parts[parts.index(first)] = type(first)(first.name, first.dtype, first.shape, data)
        return parts

    return spoilt


def _spoil_header(to_header: Callable[..., Any]) -> Callable[..., Any]:
    def spoilt(message: Any) -> Any:
        header = to_header(message)
        if header.get("kind") == "TrainReply" and header.get("tokens") and _ordered(("misreport",)):
            header["tokens"] = 2 * header["tokens"]
        return header

    return spoilt


_WRAPPED = {
    "pilot.wire.codec": ("encode", _spoil_parts),
    "pilot.wire.messages": ("to_header", _spoil_header),
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _WRAPPED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            attribute, wrap = _WRAPPED[name]
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                setattr(module, attribute, wrap(getattr(module, attribute)))

            spec.loader.exec_module = exec_module  # type: ignore[method-assign] # of this spec only
        return spec


if _FILE and "PILOT_RANK" in os.environ:
    sys.meta_path.insert(0, _Finder())
