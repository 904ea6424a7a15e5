"""Evaluate a base model: bits per byte on its validation rows, CORE, and sample completions.

python scripts/base_eval.py --checkpoint final_model.pt
python scripts/base_eval.py --checkpoint RUN --eval core,bpb,sample --json
torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --checkpoint RUN --eval core
"""

import json
import math
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from nanochat.builtin import open_source
from nanochat.checkpoint_manager import checkpoint_tokenizer, load_any
from nanochat.common import (
    ArgumentParser,
    compute_cleanup,
    compute_init,
    get_base_dir,
    print0,
    run_command_line,
    user_path,
)
from nanochat.core_bundle import ensure_bundle, evaluate_core, load_tasks
from nanochat.data_spec import DataSpec, validation_rows
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.gpus import device_rows
from nanochat.loss_eval import bits_per_byte, bpb_sums, sum_over_ranks
from nanochat.prompts import sample_texts
from nanochat.source import default_packing
from nanochat.tokenizer import RustBPETokenizer
from nanochat.trainer import rank_slice

EVALUATIONS = ("core", "bpb", "sample")

_DEFAULT_EVAL_ROWS = 512  # for a checkpoint that does not say how many it was validated on


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="base_eval", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="a path, the name of a run, or a tag")
    add("--eval", default="bpb", help=f"comma-separated: {', '.join(EVALUATIONS)}")
    add("--device-type", default="", help="cuda, mps or cpu; empty: the best there is")
    add(
        "--batch-size",
        "--device-batch-size",
        type=int,
        default=0,
        help="rows at once; 0: what fits",
    )
    add("--eval-rows", type=int, help="validation rows; none: as many as in training")
    add("--source", help="data for bpb, if the checkpoint names none (another program's)")
    add("--max-per-task", type=int, default=-1, help="items of a CORE task; -1: all of them")
    add("--out", type=Path, help="directory for CORE's CSV and JSON; none: base_eval/ in the base")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    return parser


def _evaluations(names: str) -> list[str]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in EVALUATIONS]
    if unknown or not wanted:
        raise UserError(
            f"--eval is {names!r}: choose one or more of {', '.join(EVALUATIONS)}, "
            "separated by commas"
        )
    return wanted


def main() -> None:
    args = _parser().parse_args()
    wanted = _evaluations(args.eval)
    for name, least in (("batch_size", 0), ("eval_rows", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")
    if args.max_per_task < 1 and args.max_per_task != -1:
        raise UserError(f"--max-per-task is {args.max_per_task}: it must be at least 1, or -1")
    _, rank, _, world_size, device = compute_init(args.device_type)
    model, meta = load_any(args.checkpoint, device)
    tokenizer = checkpoint_tokenizer(meta, model.config)

    result: dict[str, Any] = {"checkpoint": args.checkpoint, "step": meta.get("step")}
    if "bpb" in wanted:
        result |= _bpb(model, meta, tokenizer, args, rank=rank, world_size=world_size)
        if not args.json:
            print0(f"val_bpb={result['val_bpb']:.6f} eval_rows={result['eval_rows']}")
    if "core" in wanted:
        result["core"] = _core(model, meta, tokenizer, args, rank=rank)
    if "sample" in wanted and rank == 0:
        result["samples"] = sample_texts(Engine(model, tokenizer))
        if not args.json:
            for text in result["samples"]:
                print(f"sample: {text!r}")
    if args.json:
        print0(json.dumps(result, allow_nan=False))
    compute_cleanup()


def _bpb(
    model: GPT,
    meta: dict[str, Any],
    tokenizer: RustBPETokenizer,
    args: Namespace,
    *,
    rank: int,
    world_size: int,
) -> dict[str, Any]:
    spec = _data_spec(model, meta, tokenizer, args.source)
    cache, _ = spec.open()
    rows = validation_rows(cache, args.eval_rows or spec.eval_rows)
    cache.close()
    mine = rows[rank_slice(len(rows), rank=rank, world_size=world_size)]
    device = model.get_device()
    size = device_rows(
        args.batch_size,
        device=device,
        sequence_len=rows.shape[1] - 1,
        rank_rows=len(mine),
    )
    batches = (mine[i : i + size] for i in range(0, len(mine), size))
    token_bytes = torch.tensor(tokenizer.token_bytes(), device=device)
    sums = bpb_sums(model, batches, token_bytes)
    bpb = bits_per_byte(*sum_over_ranks(*sums, device=model.get_device()))
    if not math.isfinite(bpb):
        raise UserError(
            f"the bits per byte of this model are {bpb}: its loss is not finite, or its validation rows "
            "stand for no text"
        )
    return {"val_bpb": bpb, "eval_rows": len(rows)}


def _data_spec(
    model: GPT, meta: dict[str, Any], tokenizer: RustBPETokenizer, source_name: str | None
) -> DataSpec:
    """The rows that the checkpoint was validated on, or those of `--source` if it names none."""
    if "data" in meta or source_name is None:
        return DataSpec.from_meta(meta)
    source = open_source(source_name)
    assert tokenizer.directory is not None
    return DataSpec(
        source=source.name,
        tokenizer=str(tokenizer.directory.resolve()),
        tokenizer_sha256=tokenizer.fingerprint(),
        sequence_len=model.config.sequence_len,
        packing=default_packing(source),
        eval_rows=_DEFAULT_EVAL_ROWS,
        val_shard=source.val_shard,
    )


def _core(
    model: GPT, meta: dict[str, Any], tokenizer: RustBPETokenizer, args: Namespace, *, rank: int
) -> dict[str, Any]:
    tasks = load_tasks(ensure_bundle())
    result = evaluate_core(
        model,
        tokenizer,
        model.get_device(),
        tasks,
        max_per_task=None if args.max_per_task == -1 else args.max_per_task,
        say=None if args.json else print0,
    )
    if rank == 0:
        path = user_path(args.checkpoint)  # final_model.pt here and there are two models
        checkpoint = path if path.exists() else Path(args.checkpoint)
        name = re.sub(r"[^\w.-]+", "_", checkpoint.as_posix()).strip("_")
        step = meta.get("step")
        name += "" if step is None else f"_{step:06d}"
        out = user_path(args.out) if args.out else get_base_dir() / "base_eval"
        path = result.save(out, name)
        if not args.json:
            print(f"{result.table()}\ncore={result.core:.6f}\nwrote {path} and {path.stem}.json")
    return result.to_json()


if __name__ == "__main__":
    run_command_line(main)
