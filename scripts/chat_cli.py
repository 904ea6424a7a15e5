"""Let a base model complete text: typed in, or given with --prompt.

python -m scripts.chat_cli --checkpoint RUN
python -m scripts.chat_cli --checkpoint RUN --prompt "Once upon a time" --num-samples 4 --seed 1
"""

import io
import sys
from argparse import Namespace

import torch

from nanochat.checkpoint_manager import checkpoint_tokenizer, load_any
from nanochat.common import ArgumentParser, check_device_type, run_command_line
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.sampling import check_seed

_MOST = 2**31  # of any number here


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="chat_cli", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="a path, the name of a run, or a tag")
    add("-p", "--prompt", action="append", help="text to complete (may be repeated); none: ask")
    add("-n", "--num-samples", type=int, default=1, help="continuations of each text")
    add("--max-tokens", type=int, default=256, help="most tokens per continuation")
    add("-t", "--temperature", type=float, default=0.6, help="0: the likeliest token each time")
    add(
        "-k",
        "--top-k",
        type=int,
        default=50,
        help="sample from the k likeliest tokens only; 0: from all",
    )
    add("--seed", type=int, default=42, help="seeds the sampling")
    add("--device-type", default="", help="cuda, mps or cpu; empty: the best there is")
    return parser


def _check(args: Namespace) -> None:
    for name, least in (("num_samples", 1), ("max_tokens", 1), ("temperature", 0), ("top_k", 0)):
        value = getattr(args, name)
        option = f"--{name.replace('_', '-')}"
        if not value >= least:  # NaN too
            raise UserError(f"{option} is {value}: it must be at least {least}")
        if value > _MOST:
            raise UserError(f"{option} is {value}: it must be at most {_MOST}")
    check_seed(args.seed)


def main() -> None:
    args = _parser().parse_args()
    _check(args)
    for stream in (sys.stdin, sys.stdout):  # what a terminal sends or cannot show ends nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    device = torch.device(check_device_type(args.device_type))
    model, meta = load_any(args.checkpoint, device)
    engine = Engine(model, checkpoint_tokenizer(meta, model.config))
    if args.prompt is not None:
        for prompt in args.prompt:
            _continue(engine, prompt, args)
        return
    print(
        f"{model.config.arch} model of depth {model.config.n_layer}, step {meta.get('step')}: "
        "type text for it to complete; an empty line ends"
    )
    while prompt := _ask():
        try:
            _continue(engine, prompt, args)
        except UserError as error:  # of this line, such as its length: the next one may be shorter
            print(f"error: {error}", file=sys.stderr, flush=True)


def _ask() -> str:
    """A line that was typed; "" at the end of the input."""
    try:
        return input("> ")
    except EOFError:
        print()
        return ""


def _continue(engine: Engine, prompt: str, args: Namespace) -> None:
    """Print the prompt and what follows: one sample as it comes, several one below the other."""
    tokens = engine.tokenizer.encode(prompt, prepend=engine.bos)
    top_k = args.top_k or None
    if args.num_samples == 1:
        texts = engine.stream(tokens, args.max_tokens, args.temperature, top_k, args.seed)
        _write(prompt + next(texts, ""))  # a prompt that is refused is not repeated
        for text in texts:
            _write(text)
        _write("\n")
        return
    sequences, _ = engine.generate_batch(
        tokens, args.num_samples, args.max_tokens, args.temperature, top_k, args.seed
    )
    for number, sequence in enumerate(sequences, start=1):
        text = engine.tokenizer.decode(sequence[len(tokens) :])
        _write(f"--- {number}\n{prompt}{text}\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    run_command_line(main)
