"""The settings of a run on one machine, and which mistakes in them show without any file."""

import re
from dataclasses import dataclass

from nanochat.errors import UserError
from nanochat.kernels.choices import COMPILE_MODES
from nanochat.limits import check_number
from nanochat.schedule import SCHEDULE_KINDS
from nanochat.wandb_run import WANDB_MODES

# Least and greatest values; the greatest are far beyond what can be trained, and not beyond what torch
# and numpy can say no to. Every other number must be finite and fit into 64 bits.
_RANGES: dict[str, tuple[float | None, float | None]] = {
    "depth": (None, 10_000),  # the model says what is too little
    "aspect_ratio": (1, 1_000_000),
    "head_dim": (1, 1_000_000),
    "max_seq_len": (1, 2**30),
    "batch_size": (0, 2**30),
    "total_batch_size": (-1, 2**40),
    "eval_rows": (1, None),
    "core_max_per_task": (1, None),
    "log_every": (1, None),
    "save_keep": (0, None),
    "seed": (0, None),
    **dict.fromkeys(("lr", "matrix_lr", "embedding_lr", "unembedding_lr"), (0, None)),
    **dict.fromkeys(("scalar_lr", "weight_decay", "final_lr_fraction"), (0, None)),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run on one machine; None means: follows from the rest."""

    run: str = ""  # names the checkpoint directory; "": d<depth>
    depth: int = 20
    aspect_ratio: int = 64  # width per layer, rounded up to whole heads
    head_dim: int = 128
    arch: str = "classic"
    window_pattern: str | None = None
    source: str = "fineweb-edu"
    num_shards: int | None = None  # None: all that are here
    tokenizer: str = "tokenizer"
    packing: str | None = None
    max_seq_len: int = 2048
    batch_size: int = 0  # rows per device and micro-step; 0: what its memory has room for
    total_batch_size: int = 524288  # tokens of an optimizer step; -1: what fits the run's length
    num_iterations: int | None = None
    target_flops: float | None = None
    target_param_data_ratio: float = 20.0
    lr: float | None = None
    matrix_lr: float | None = None
    embedding_lr: float | None = None
    unembedding_lr: float | None = None
    scalar_lr: float | None = None
    weight_decay: float | None = None
    schedule: str = "pilot"
    warmup_steps: float | None = None
    warmdown_ratio: float | None = None
    final_lr_fraction: float | None = None
    eval_every: int = 250  # steps; 0 or less: only at the end
    eval_rows: int = 512
    eval_tokens: int | None = None  # upstream's way to say eval_rows
    core_every: int = 0  # steps; 0 or less: never
    core_max_per_task: int = 500  # items: the figure is an approximation
    sample_every: int = 0  # steps; 0 or less: never
    save_every: int = 0  # steps; 0 or less: only at the end
    save_keep: int = 0  # newest steps of this run to keep on disk; 0: all
    resume_from_step: str | None = None  # a number, or "latest"
    log_every: int = 10  # steps between readings of the loss; each waits for the device
    wandb_project: str = ""
    wandb_mode: str = "auto"
    compile: str = "auto"  # auto, on, off (acceleration.py)
    fp8: bool = False  # matmuls of training (kernels/fp8.py)
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for a value that is wrong whatever is on this machine."""
        if self.run and not re.fullmatch(r"[\w][\w.-]*", self.run):
            raise UserError(f"--run is {self.run!r}: use letters, digits, '.', '-' and '_' only")
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                low, high = _RANGES.get(name, (None, None))
                check_number(_flag(name), value, low=low, high=high)
        if self.total_batch_size == 0:
            raise UserError("--total-batch-size is 0: it must be at least 1, or -1")
        if self.eval_tokens is not None and self.eval_tokens < self.max_seq_len:
            raise UserError(
                f"--eval-tokens is {self.eval_tokens}: it must be at least a row, "
                f"--max-seq-len {self.max_seq_len}"
            )
        steps = self.given_iterations
        if steps is not None and steps < 1:
            raise UserError(f"--num-iterations is {steps}: it must be at least 1")
        if self.given_flops is not None and self.given_flops <= 0:
            raise UserError(f"--target-flops is {self.given_flops}: it must be above 0")
        if steps is None and self.given_flops is None and self.target_param_data_ratio <= 0:
            raise UserError(
                f"--target-param-data-ratio is {self.target_param_data_ratio}: it must be above 0"
            )
        if self.total_batch_size != -1 and self.total_batch_size % self.max_seq_len:
            raise UserError(
                f"--total-batch-size {self.total_batch_size} must be a multiple of "
                f"--max-seq-len {self.max_seq_len}"
            )
        for name, choices in (
            ("schedule", SCHEDULE_KINDS),
            ("wandb_mode", WANDB_MODES),
            ("compile", COMPILE_MODES),
        ):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{_flag(name)} is {getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )

    @property
    def given_iterations(self) -> int | None:
        """`num_iterations`, where upstream's -1 is None."""
        return None if self.num_iterations == -1 else self.num_iterations

    @property
    def given_flops(self) -> float | None:
        """`target_flops`, where upstream's -1 is None."""
        return None if self.target_flops == -1 else self.target_flops

    @property
    def validation_rows(self) -> int:
        """`eval_rows`, or the whole rows of `eval_tokens`."""
        return self.eval_rows if self.eval_tokens is None else self.eval_tokens // self.max_seq_len

    @property
    def tag(self) -> str:
        return self.run or f"d{self.depth}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
