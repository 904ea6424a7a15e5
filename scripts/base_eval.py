"""Evaluate a base model: bits per byte on its validation rows, and samples of what it writes.

python scripts/base_eval.py --checkpoint final_model.pt
python scripts/base_eval.py --checkpoint RUN --eval bpb,sample --json
"""

import json
from typing import Any

import torch

from nanochat.checkpoint_manager import load_any
from nanochat.common import ArgumentParser, UserError, check_device_type, run_command_line
from nanochat.gpt import GPT
from nanochat.loss_eval import bits_per_byte, bpb_sums
from nanochat.tokenizer import RustBPETokenizer
from nanochat.training_data import DataSpec, validation_rows

EVALUATIONS = ("bpb", "sample")

_PROMPTS = ("The capital of France is", "If a function returns None, then", "Water boils at")
_SAMPLE_TOKENS = 24


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="base_eval", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="a path, the name of a run, or a tag")
    add("--eval", default="bpb", help=f"comma-separated: {', '.join(EVALUATIONS)}")
    add("--device-type", default="", help="cuda, mps or cpu; empty: the best there is")
    add("--batch-size", type=int, default=8, help="rows at once")
    add("--eval-rows", type=int, help="validation rows; none: as many as in training")
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
    for name in ("batch_size", "eval_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    device = torch.device(check_device_type(args.device_type))
    model, meta = load_any(args.checkpoint, device)
    cache, tokenizer = DataSpec.from_meta(meta).open()
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        raise UserError("the model's vocabulary is not its tokenizer's: the checkpoint is damaged")

    result: dict[str, Any] = {"checkpoint": args.checkpoint, "step": meta.get("step")}
    if "bpb" in wanted:
        rows = validation_rows(cache, args.eval_rows or meta["data"]["eval_rows"])
        batches = (rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size))
        token_bytes = torch.tensor(tokenizer.token_bytes(), device=device)
        result["val_bpb"] = bits_per_byte(*bpb_sums(model, batches, token_bytes))
        result["eval_rows"] = len(rows)
    if "sample" in wanted:
        result["samples"] = [_sample(model, tokenizer, prompt) for prompt in _PROMPTS]
    cache.close()

    if args.json:
        print(json.dumps(result))
        return
    if "bpb" in wanted:
        print(f"val_bpb={result['val_bpb']:.6f} eval_rows={result['eval_rows']}")
    for text in result.get("samples", []):
        print(f"sample: {text!r}")


def _sample(model: GPT, tokenizer: RustBPETokenizer, prompt: str) -> str:
    """`prompt` and the likeliest continuation, up to the next document."""
    tokens = [tokenizer.get_bos_token_id(), *tokenizer.encode(prompt)]
    length = len(tokens)
    for token in model.generate(tokens, _SAMPLE_TOKENS, temperature=0.0):
        if token == tokenizer.get_bos_token_id():
            break
        tokens.append(token)
    return prompt + tokenizer.decode(tokens[length:])


if __name__ == "__main__":
    run_command_line(main)
