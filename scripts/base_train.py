"""Pretrain a base model on one machine, on one device or, under torchrun, on many.

python -m scripts.base_train --depth 4 --source builtin …
torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth 20 --run baseline

Ctrl-C ends the step and saves it; the same command with `--resume-from-step latest` goes on.
torchrun kills 30 s after Ctrl-C: give it `--shutdown-timeout SECONDS` if a step and its save take longer.
"""

from argparse import SUPPRESS

from nanochat.common import ArgumentParser, compute_cleanup, compute_init, run_command_line
from nanochat.errors import UserError
from nanochat.gpt_config import ARCHITECTURES
from nanochat.kernels.choices import COMPILE_MODES
from nanochat.pretrain import pretrain
from nanochat.progress import WANDB_MODES
from nanochat.rows.packing import PACKINGS
from nanochat.schedule import SCHEDULE_KINDS
from nanochat.settings import Settings


def _parser() -> ArgumentParser:
    defaults = Settings()
    parser = ArgumentParser(prog="base_train", description=(__doc__ or "").splitlines()[0])

    def add(*names: str, type: type = int, help: str, **options: object) -> None:
        destination = names[0][2:].replace("-", "_")
        options.setdefault("default", getattr(defaults, destination, None))
        parser.add_argument(*names, type=type, dest=destination, help=help, **options)  # type: ignore[arg-type]  # a pass-through

    add(
        "--run",
        "--model-tag",
        type=str,
        help="name of the checkpoint directory and W&B run; empty: d<depth>",
    )
    add("--device-type", type=str, default="", help="cuda, mps or cpu; empty: the best there is")
    add("--compile", type=str, choices=COMPILE_MODES, help="compile the step; auto: if repaid")
    add("--seed", help="seeds the weights and the order of shards")
    # the model
    add("--depth", help="transformer layers; the width follows")
    add("--aspect-ratio", help="width a layer, rounded up to whole heads")
    add("--head-dim", help="channels of a head")
    add("--arch", type=str, choices=ARCHITECTURES, help="architecture")
    add("--window-pattern", type=str, help="attention windows, as SSSL; none: the architecture's")
    add("--max-seq-len", help="tokens a row")
    # the data
    add("--source", type=str, help="fineweb-edu, climbmix, builtin, or a directory of shards")
    add("--num-shards", help="training shards to use; none: those that are here")
    add("--tokenizer", type=str, help="tokenizer's directory under the base directory, or a path")
    add("--packing", type=str, choices=PACKINGS, help="how documents become rows")
    # how long
    add("--num-iterations", help="optimizer steps; none: --target-param-data-ratio decides")
    add("--target-param-data-ratio", type=float, help="training tokens a parameter")
    add("--target-flops", type=float, help="floating-point operations of the run, instead of that")
    # the optimizer
    add("--batch-size", "--device-batch-size", help="rows a device takes at once; 0: what fits")
    add("--total-batch-size", help="tokens of an optimizer step; -1: from the run's length")
    add("--lr", type=float, help="Muon's learning rate; the others follow it")
    add("--matrix-lr", type=float, help="Muon's learning rate alone, instead of that")
    add("--embedding-lr", type=float, help="learning rate of the embeddings")
    add("--unembedding-lr", type=float, help="learning rate of the head")
    add("--scalar-lr", type=float, help="learning rate of the modern scalars")
    add("--weight-decay", type=float, help="Muon's weight decay, before it is scaled")
    add("--schedule", type=str, choices=SCHEDULE_KINDS, help="whose schedule")
    add("--warmup-steps", type=float, help="steps in which the learning rate rises")
    add("--warmdown-ratio", type=float, help="last share of the run, in which it falls")
    add("--final-lr-fraction", "--final-lr-frac", type=float, help="what it falls to")
    # what is kept and told
    add("--eval-every", help="steps between validations; 0: only at the end")
    add("--eval-rows", help="validation rows")
    add("--eval-tokens", help="validation tokens, instead of that")
    add("--core-every", "--core-metric-every", help="steps between CORE evaluations; 0: none")
    add("--core-max-per-task", "--core-metric-max-per-task", help="items of a task, for that")
    add("--sample-every", help="steps between samples of what it writes; 0: none")
    add("--save-every", help="steps between checkpoints; 0: only at the end")
    add("--resume-from-step", type=str, help="a number, or latest (if there is one): goes on there")
    add("--log-every", help="steps between log lines")
    add("--wandb-project", type=str, help="W&B project; empty: no W&B")
    add("--wandb-mode", type=str, choices=WANDB_MODES, help="auto: online with a key, else offline")
    parser.add_argument("--fp8", action="store_true", help=SUPPRESS)
    return parser


def main() -> None:
    values = vars(_parser().parse_args())
    if values.pop("fp8"):
        raise UserError("there is no fp8 here, matmuls are in bf16 at the least: leave --fp8 out")
    if values["resume_from_step"] == "-1":  # upstream's way to say: from the beginning
        values["resume_from_step"] = None
    device_type = values.pop("device_type")
    settings = Settings(**values)
    settings.check()
    _, rank, _, world_size, device = compute_init(device_type)
    pretrain(settings, device=device, rank=rank, world_size=world_size)
    compute_cleanup()


if __name__ == "__main__":
    run_command_line(main)
