"""How fast each code of the wire encodes and decodes, and what it costs and loses.

python -m benchmarks.codes
python -m benchmarks.codes --values 50000000 --repeats 9

One thread, one tensor of normally distributed noise. Figures are fp32 bytes per second of the thread's own
time, so that other processes on the machine count only where they share its caches; medians. The codes and
`memcpy` (into a tensor that exists) take turns; `of_memcpy` is the slower of encoding and decoding beside it.

Lines are JSON, one per code: GB/s, bytes per value, and the L2 norm of the error over that of the tensor.
Encoding leaves the rest in place, as error feedback needs it; decoding fills a new tensor. `rows_sent`: the
share of rows that are not zero; an embedding sends few.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat.common import ArgumentParser, run_command_line
from pilot.wire.codes import CODES, Code, decode, encode

_COLUMNS = 1024
_ROWS_SENT = (1.0, 0.1)


def _seconds(work: Callable[[], Any]) -> float:
    began_s = time.thread_time()
    work()
    return time.thread_time() - began_s


def measure(code: Code, table: Tensor, repeats: int) -> dict[str, Any]:
    """Figures of one code on `table`, which is left as it is."""
    copy, gb = table.clone(), 4 * table.numel() / 1e9
    said = encode(copy, code)
    lost = float(torch.linalg.vector_norm(copy) / torch.linalg.vector_norm(table))
    times: dict[str, list[float]] = {"memcpy": [], "encode": [], "decode": []}
    for _ in range(repeats):
        times["memcpy"].append(_seconds(lambda: copy.copy_(table)))
        times["encode"].append(_seconds(lambda: encode(copy, code)))
        times["decode"].append(_seconds(lambda: decode(said, code, table.shape)))
    rates = {what: gb / statistics.median(found) for what, found in times.items()}
    return {
        **{f"{what}_gb_s": round(rate, 3) for what, rate in rates.items()},
        "of_memcpy": round(min(rates["encode"], rates["decode"]) / rates["memcpy"], 3),
        "bytes_per_value": round(len(said) / table.numel(), 4),
        "lost": round(lost, 4),
    }


def main() -> None:
    parser = ArgumentParser(prog="benchmarks.codes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--values", type=int, default=1 << 24)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for share in _ROWS_SENT:
        table = torch.randn(max(1, args.values // _COLUMNS), _COLUMNS, generator=generator)
        table[torch.rand(len(table), generator=generator) > share] = 0
        for name, code in CODES.items():
            figures = measure(code, table, args.repeats)
            print(json.dumps({"code": name, "rows_sent": share, **figures}), flush=True)


if __name__ == "__main__":
    run_command_line(main)
