"""Pretrain a base model on one machine, on one device or, under torchrun, on many.

python -m scripts.base_train --depth 4 --source builtin …
torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth 20 --run baseline

Ctrl-C or SIGTERM finishes the step and saves it; so does whatever fails. The same command with
`--resume-from-step latest` continues, on any number of processes.
torchrun kills 30 s after Ctrl-C: give it `--shutdown-timeout SECONDS` if a step and its save take longer.
"""

from collections.abc import Callable

from nanochat.common import ArgumentParser, compute_cleanup, compute_init, run_command_line
from nanochat.gpt_config import ARCHITECTURES
from nanochat.kernels.choices import COMPILE_MODES
from nanochat.pretrain import pretrain
from nanochat.rows.packing import PACKINGS
from nanochat.schedule import SCHEDULE_KINDS
from nanochat.settings import Settings
from nanochat.wandb_run import WANDB_MODES

Add = Callable[..., None]


def _parser() -> ArgumentParser:
    defaults = Settings()
    parser = ArgumentParser(prog="base_train", description=(__doc__ or "").splitlines()[0])

    def add(*names: str, type: type = int, help: str, **options: object) -> None:
        destination = names[0][2:].replace("-", "_")
        options.setdefault("default", getattr(defaults, destination, None))
        parser.add_argument(*names, type=type, dest=destination, help=help, **options)  # type: ignore[arg-type]  # a pass-through

    _add_run_options(add)
    _add_model_options(add)
    _add_data_options(add)
    _add_length_options(add)
    _add_optimizer_options(add)
    _add_report_options(add)
    text = "matmuls of training in fp8, on GPUs that have it (Ada, Hopper or newer)"
    parser.add_argument("--fp8", action="store_true", help=text)
    return parser


def _add_run_options(add: Add) -> None:
    add(
        "--run",
        "--model-tag",
        type=str,
        help="name of the checkpoint directory and W&B run; empty: d<depth>",
    )
    add("--device-type", type=str, default="", help="cuda, mps or cpu; empty: the best there is")
    add(
        "--compile",
        type=str,
        choices=COMPILE_MODES,
        help="compile the step; auto: if the run is long enough",
    )
    add("--seed", help="seeds the weights and the order of shards")


def _add_model_options(add: Add) -> None:
    add("--depth", help="transformer layers; the width follows")
    add("--aspect-ratio", help="width per layer, rounded up to whole heads")
    add("--head-dim", help="channels of a head")
    add("--arch", type=str, choices=ARCHITECTURES, help="architecture")
    add("--window-pattern", type=str, help="attention windows, as SSSL; none: the architecture's")
    add("--max-seq-len", help="tokens per row")


def _add_data_options(add: Add) -> None:
    add(
        "--source",
        type=str,
        help="fineweb-edu, climbmix, builtin, hf:NAME, or a directory of shards",
    )
    add("--num-shards", help="training shards to use; none: all on this disk")
    add("--tokenizer", type=str, help="tokenizer's directory under the base directory, or a path")
    add("--packing", type=str, choices=PACKINGS, help="how documents become rows")


def _add_length_options(add: Add) -> None:
    add("--num-iterations", help="optimizer steps; none: --target-param-data-ratio decides")
    add("--target-param-data-ratio", type=float, help="training tokens per parameter")
    add(
        "--target-flops",
        type=float,
        help="floating-point operations of the run, instead of a ratio",
    )


def _add_optimizer_options(add: Add) -> None:
    add("--batch-size", "--device-batch-size", help="rows per device and micro-step; 0: what fits")
    add("--total-batch-size", help="tokens of an optimizer step; -1: from the run's length")
    add("--lr", type=float, help="Muon's learning rate; the others follow it")
    add("--matrix-lr", type=float, help="Muon's learning rate alone, instead of --lr")
    add("--embedding-lr", type=float, help="learning rate of the embeddings")
    add("--unembedding-lr", type=float, help="learning rate of the head")
    add("--scalar-lr", type=float, help="learning rate of the modern scalars")
    add("--weight-decay", type=float, help="Muon's weight decay, before it is scaled")
    add("--schedule", type=str, choices=SCHEDULE_KINDS, help="pilot's or upstream's schedule")
    add("--warmup-steps", type=float, help="steps over which the learning rate rises")
    add("--warmdown-ratio", type=float, help="last part of the run, in which it falls (a share)")
    add(
        "--final-lr-fraction",
        "--final-lr-frac",
        type=float,
        help="share of the rate that it falls to",
    )


def _add_report_options(add: Add) -> None:
    add("--eval-every", help="steps between validations; 0: only at the end")
    add("--eval-rows", help="validation rows")
    add("--eval-tokens", help="validation tokens, instead of --eval-rows")
    add("--core-every", "--core-metric-every", help="steps between CORE evaluations; 0: none")
    add("--core-max-per-task", "--core-metric-max-per-task", help="items per task in those")
    add("--sample-every", help="steps between printed samples; 0: none")
    add("--save-every", help="steps between checkpoints; 0: only at the end")
    add("--save-keep", help="newest checkpoints to keep; 0: all of them")
    add(
        "--resume-from-step", type=str, help="continue from this step: a number, or latest (if any)"
    )
    add("--log-every", help="steps between log lines")
    add("--wandb-project", type=str, help="W&B project; empty: no W&B")
    add("--wandb-mode", type=str, choices=WANDB_MODES, help="auto: online with a key, else offline")


def main() -> None:
    values = vars(_parser().parse_args())
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
