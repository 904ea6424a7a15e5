"""Vanilla training on one device, with small defaults: the same code as `scripts.base_train`.

python nanochat_train.py --num-steps 50 --batch-size 2 --max-length 512

Without a dataset or a tokenizer it makes its own from the text that comes with Python.
"""

from nanochat.builtin import ensure_builtin_tokenizer
from nanochat.common import ArgumentParser, compute_init, get_dist_info, run_command_line
from nanochat.errors import UserError
from nanochat.gpt_config import ARCHITECTURES
from nanochat.pretrain import pretrain
from nanochat.settings import Settings
from nanochat.source import get_source
from nanochat.tokenizer import get_tokenizer

_BUILTIN_TOKENIZER, _BUILTIN_VOCAB_SIZE = "tokenizer_builtin_4096", 4096


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="nanochat_train", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--num-steps", type=int, default=50, help="optimizer steps")
    add("--batch-size", type=int, default=2, help="rows per step")
    add("--max-length", type=int, default=512, help="tokens per row")
    add("--depth", type=int, default=4, help="transformer layers; the width follows")
    add("--arch", default="classic", choices=ARCHITECTURES, help="architecture")
    add("--lr", type=float, help="Muon's learning rate; the others follow it")
    add(
        "--source",
        help="fineweb-edu, climbmix, builtin, hf:NAME, or a directory; none: what is on this disk",
    )
    add("--tokenizer", help="tokenizer's directory; none: what is on this disk")
    add("--eval-rows", type=int, default=32, help="validation rows")
    add("--device-type", default="", help="cuda, mps or cpu; empty: the best there is")
    add("--seed", type=int, default=0, help="seeds the weights and the order of shards")
    add("--run", default="vanilla", help="name of the checkpoint directory and W&B run")
    add("--resume-from-step", help="continue from this step: a number, or latest (if any)")
    add("--wandb-project", default="", help="W&B project; empty: no W&B")
    return parser


def main() -> None:
    args = _parser().parse_args()
    if get_dist_info()[3] > 1:
        raise UserError("this trains in one process only: for several, use scripts.base_train")
    settings = Settings(
        run=args.run,
        depth=args.depth,
        arch=args.arch,
        max_seq_len=args.max_length,
        batch_size=args.batch_size,
        total_batch_size=args.batch_size * args.max_length,
        num_iterations=args.num_steps,
        lr=args.lr,
        source=args.source or _source_here(),
        tokenizer=args.tokenizer or _tokenizer_here(),
        eval_rows=args.eval_rows,
        eval_every=0,
        seed=args.seed,
        resume_from_step=args.resume_from_step,
        wandb_project=args.wandb_project,
    )
    settings.check()
    *_, device = compute_init(args.device_type)
    pretrain(settings, device=device)


def _source_here() -> str:
    """The default source if it was downloaded, else the built-in one."""
    try:
        source = get_source()
        source.ensure_text()
    except UserError as error:
        print(
            f"no dataset on this disk ({error}): training on the built-in corpus instead",
            flush=True,
        )
        return "builtin"
    return source.name


def _tokenizer_here() -> str:
    """The default tokenizer if there is one, else one trained on the built-in corpus."""
    try:
        get_tokenizer()
    except UserError:
        print(
            f"no tokenizer on this disk: using {_BUILTIN_TOKENIZER}, trained on the built-in corpus",
            flush=True,
        )
        ensure_builtin_tokenizer(_BUILTIN_TOKENIZER, _BUILTIN_VOCAB_SIZE)
        return _BUILTIN_TOKENIZER
    return "tokenizer"


if __name__ == "__main__":
    run_command_line(main)
