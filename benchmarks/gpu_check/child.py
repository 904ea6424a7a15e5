"""One check in its own process: runs it and writes its verdict, also when it raises."""

import importlib
import json
import sys
import traceback
from pathlib import Path

from benchmarks.gpu_check.verdict import Setup, Verdict
from nanochat.files import atomic_path

_H100 = "H100"


def main() -> None:
    order = json.loads(sys.argv[1])
    setup = Setup(
        device=order["device"],
        tiny=order["tiny"],
        directory=Path(order["directory"]),
        options=order["options"],
    )
    path, raised = Path(order["verdict"]), False
    verdict = Verdict(on_h100=_on_h100(setup))
    verdict.save = lambda: _write(path, verdict, raised=False, over=False)
    module, _, function = order["function"].partition(":")
    try:
        if setup.tiny:  # a fork of a process that has torch did not look at OMP_NUM_THREADS
            importlib.import_module("torch").set_num_threads(1)
        check = getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), function)
        check(setup, verdict)
    except Exception as error:  # noqa: BLE001 - a check that raises has failed, and the others go on
        traceback.print_exc()
        raised = True
        first = str(error).splitlines()[0][:300] if str(error) else ""
        verdict.failures.append(f"{type(error).__name__}: {first}")
    _write(path, verdict, raised=raised, over=True)


def _write(path: Path, verdict: Verdict, *, raised: bool, over: bool) -> None:
    """Whole or not at all: this process may be ended at any time."""
    said = {
        "figures": verdict.figures,
        "failures": verdict.failures,
        "raised": raised,
        "over": over,
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(said), encoding="utf-8")


def _on_h100(setup: Setup) -> bool:
    if not setup.cuda or setup.tiny:
        return False
    import torch

    return torch.cuda.is_available() and _H100 in torch.cuda.get_device_name(0)


if __name__ == "__main__":
    main()
