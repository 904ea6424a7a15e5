"""What a run of a depth takes of GPUs, of memory and of disks, before anything is rented.

python -m scripts.sizes --depth 20 [--gpus 8] [--rows 32] [--clients 4] [--run-config configs/d20.toml] [--json]

`--table` writes the table of docs/deployment.md.
"""

import json
from pathlib import Path

from nanochat.common import ArgumentParser, run_command_line
from nanochat.errors import UserError
from nanochat.files import atomic_write_text
from pilot.config import RunConfig
from pilot.errors import PilotError
from pilot.overrides import load_run_config
from pilot.run.sizes import Sizes, sizes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "deployment.md"
_BEGIN, _END = "<!-- sizes:", "<!-- /sizes -->"
_SHOWN = (("classic", 4), ("classic", 12), ("classic", 20), ("classic", 26), ("modern", 20))
_ROWS = (32, 16, 8, 4)  # as `device-batch-size` 0 takes them


def main() -> None:
    parser = ArgumentParser(prog="sizes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, help="layers (default: the run configuration's)")
    parser.add_argument("--arch", choices=("classic", "modern"), help="default: the same's")
    parser.add_argument(
        "--vocab-size", type=int, help="tokens of the vocabulary (default: the same's)"
    )
    parser.add_argument("--sequence-len", type=int, help="tokens per row (default: the same's)")
    parser.add_argument("--rows", type=int, default=8, help="rows per device and forward pass")
    parser.add_argument("--gpus", type=int, default=1, help="of each client")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument(
        "--run-config",
        action="append",
        default=[],
        metavar="FILE|KEY=VALUE",
        help="as of pilot run",
    )
    parser.add_argument("--json", action="store_true", help="all figures, in bytes")
    parser.add_argument(
        "--table", action="store_true", help="write the table in docs/deployment.md"
    )
    args = parser.parse_args()
    if args.table:
        atomic_write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8")))
        return
    for name in ("rows", "gpus", "clients"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: it must be at least 1")
    try:
        config = RunConfig.from_mapping(load_run_config(args.run_config) | _given(args))
    except PilotError as error:
        raise UserError(str(error)) from error
    found = sizes(config, rows=args.rows, gpus=args.gpus, clients=args.clients)
    print(json.dumps(found.to_json()) if args.json else text(found))


def _given(args: object) -> dict[str, object]:
    names = ("depth", "arch", "vocab_size", "sequence_len")
    values = {name.replace("_", "-"): getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def text(found: Sizes) -> str:
    """A line per figure, in GB of 10^9 bytes."""
    gpu = found.gpu
    lines = [
        ("parameters", f"{found.parameters:,}"),
        (
            "GPU, each",
            f"{_gb(gpu.total)} (weights {_gb(gpu.weights)}, gradients {_gb(gpu.gradients)}, optimizer "
            f"{_gb(gpu.optimizer)}, activations {_gb(gpu.activations)}, working {_gb(gpu.working)})",
        ),
        ("order and reply", f"{_gb(found.order)} and {_gb(found.reply)}"),
        (
            "server: memory",
            f"{_gb(found.server_memory)} (ServerApp {_gb(found.server_app_memory)}, SuperLink "
            f"{_gb(found.superlink_memory)})",
        ),
        ("server: disk", f"{_gb(found.server_disk)} (a snapshot is {_gb(found.snapshot)})"),
        (
            "site: memory",
            f"{_gb(found.site_memory)} (SuperNode {_gb(found.supernode_memory)}, ClientApp "
            f"{_gb(found.client_app_memory)}, ranks {_gb(found.ranks_memory)})",
        ),
        (
            "site: disk",
            f"{_gb(found.site_disk)}, and up to {_gb(found.rows_disk)} of packed rows, and its shards",
        ),
        (
            "shared memory",
            f"{_gb(found.shm)}, or {_gb(found.simulation_shm)} to simulate all clients on Ray",
        ),
    ]
    return "\n".join(f"{name:<16} {value}" for name, value in lines)


def table() -> str:
    """Markdown: a line per model, with default keys, two clients of one GPU each."""
    gpu = " | ".join(f"GPU, {rows} rows" for rows in _ROWS)
    lines = [
        f"| depth | parameters | {gpu} | message | server: memory | disk | site: memory | disk | rows |",
        "|" + "---|" * (8 + len(_ROWS)),
    ]
    for arch, depth in _SHOWN:
        config = RunConfig.from_mapping({"depth": depth, "arch": arch})
        by_rows = [sizes(config, rows=rows) for rows in _ROWS]
        one = by_rows[0]
        cells = [
            f"{depth}, modern" if arch == "modern" else str(depth),
            f"{one.parameters / 1e6:,.0f} M",
            *(_number(found.gpu.total) for found in by_rows),
            *map(_number, (one.order, one.server_memory, one.server_disk)),
            *map(_number, (one.site_memory, one.site_disk, one.rows_disk)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """`page` with the table between its two markers replaced."""
    begin = page.index("\n", page.index(_BEGIN)) + 1
    return f"{page[:begin]}{table()}\n{page[page.index(_END) :]}"


def _number(size: int) -> str:
    return f"{size / 1e9:.1f}"


def _gb(size: int) -> str:
    return f"{_number(size)} GB"


if __name__ == "__main__":
    run_command_line(main)
