"""What every file of the package shares: base directory, devices, ranks, dtypes, command lines.

Nothing is decided at import time and nothing is kept in globals: base directory, dtype and device
are looked up when asked for and travel as arguments from there, so that two clients with different
answers can live in one process. Importing this module does not import torch (a ClientApp that only
moves bytes imports it too).
"""

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nanochat.errors import UserError
from nanochat.gpus import prepare_device, unusable_gpus
from nanochat.limits import number_fault

if TYPE_CHECKING:
    import torch

DEVICE_TYPES = ("cuda", "mps", "cpu")

_SCRIPT_SEED = 42


def get_base_dir() -> Path:
    """`$NANOCHAT_BASE_DIR`, else `~/.cache/nanochat`, as an absolute path.

    Made if missing, looked up at each call.
    """
    try:
        base = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
        base = base.absolute()
    except RuntimeError as error:  # a user id without a name, as containers have
        raise UserError("this user has no home directory: set NANOCHAT_BASE_DIR") from error
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the base directory {base} ({error.strerror}): "
            "set NANOCHAT_BASE_DIR to a directory that you may write to"
        ) from error
    return base


def user_path(text: str | Path) -> Path:
    """The absolute path that a person means by `text`, seen from the working directory.

    Resolved once, where it comes in: later, elsewhere or in another process it would be another
    one. Raises UserError for `~name` where nobody has that name.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{text} is the home directory of nobody here: write the path out"
        ) from error
    return path if path.is_absolute() else path.resolve()


def compile_cache() -> Path:
    """Where what was compiled is kept for all later processes."""
    return get_base_dir() / "compile_cache"


def get_dist_info() -> tuple[bool, int, int, int]:
    """(under a launcher?, rank, local rank, world size).

    From the process group, if this process has joined one; else from torchrun's environment;
    without either this is the only process.
    """
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            rank = dist.get_rank()
            return (
                True,
                rank,
                int(os.environ.get("LOCAL_RANK", rank)),
                dist.get_world_size(),
            )
    if all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        environ = os.environ
        return (
            True,
            int(environ["RANK"]),
            int(environ["LOCAL_RANK"]),
            int(environ["WORLD_SIZE"]),
        )
    return False, 0, 0, 1


def print0(*values: object, **options: Any) -> None:
    """`print` on rank 0, silence on the others."""
    if get_dist_info()[1] == 0:
        print(*values, **options, flush=True)


def autodetect_device_type() -> str:
    """The best device there is: "cuda", else "mps", else "cpu".

    Raises UserError for GPUs that torch cannot use: nobody wants to train on the CPUs beside them
    without knowing.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if reason := unusable_gpus():
        raise UserError(reason)
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device_type(device_type: str) -> str:
    """`device_type`, or for "" the best one; raises UserError for a missing one."""
    import torch

    if not device_type:
        return autodetect_device_type()
    if device_type not in DEVICE_TYPES:
        raise UserError(
            f"unknown device type {device_type!r}: choose one of {', '.join(DEVICE_TYPES)}"
        )
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError(unusable_gpus() or "there is no GPU here: choose the device type cpu")
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise UserError("no MPS device is usable here: choose the device type cpu")
    return device_type


def compute_init(device_type: str = "") -> tuple[bool, int, int, int, "torch.device"]:
    """Join the process group, if a launcher started us.

    Returns (ddp, rank, local rank, world size, device). gloo on CPU, nccl on CUDA; `device_type` ""
    takes the best there is. Seeds torch's global generators alike on all ranks. Raises UserError
    when the device is missing.
    """
    import torch
    import torch.distributed as dist

    device_type = check_device_type(device_type)
    ddp, rank, local_rank, world_size = get_dist_info()
    torch.manual_seed(_SCRIPT_SEED)
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU ({torch.cuda.device_count()} are visible): "
                "start at most one process per GPU"
            )
        device = torch.device("cuda", local_rank)
        prepare_device(device, cache=compile_cache())
        torch.cuda.set_device(device)
    else:
        device = torch.device(device_type)
    if device_type == "mps" and world_size > 1:
        raise UserError("several processes cannot share the MPS device: start one, or use cpu")
    if ddp and device_type != "mps" and not dist.is_initialized():  # no backend knows MPS
        if device_type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return ddp, rank, local_rank, world_size, device


def compute_cleanup() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def __getattr__(name: str) -> Any:
    # Outside code imports `COMPUTE_DTYPE`; it is computed when asked for, so that importing this
    # module neither imports torch nor fixes the answer.
    if name == "COMPUTE_DTYPE":
        from nanochat.kernels.choices import default_compute_dtype

        return default_compute_dtype(autodetect_device_type())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the habits of this project's command lines.

    `--a-b` and `--a_b` are the same option; a leading `--`, which torchrun may pass on, is dropped;
    abbreviations are not guessed; an error is one line `error: …` and exit code 2. Numbers are finite
    and fit into 64 bits.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**options)

    def parse_known_args(  # type: ignore[override]  # argparse's overloads cannot be restated
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        arguments = list(sys.argv[1:] if args is None else args)
        if arguments[:1] == ["--"]:
            del arguments[0]
        known, unknown = super().parse_known_args([_dashed(a) for a in arguments], namespace)
        for action in self._actions:
            value = getattr(known, action.dest, None)
            if isinstance(value, int | float) and (fault := number_fault(value)):
                name = next((o for o in action.option_strings if o.startswith("--")), action.dest)
                self.error(f"{name} is {value}: {fault}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def run_command_line(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and exit: 0, 130 on Ctrl-C, 2 after a UserError (a line on stderr).

    Also 2, with a line, where the system refuses a file, and 141, with none, where nobody reads what
    is printed any more (as under `| head`).
    """
    code = 0
    try:
        main()
    except UserError as error:
        ddp, rank, _, _ = get_dist_info()
        where = f"rank {rank}: " if ddp and rank > 0 else ""
        print(f"error: {where}{error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        if not _discard_output():
            raise
        code = 141  # 128 + SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)


def _discard_output() -> bool:
    """Whether stdout is a pipe that nobody reads; then what is left in it goes nowhere, quietly."""
    try:
        output = sys.stdout.fileno()
        poll = select.poll()
        poll.register(output, 0)
        broken = any(event & select.POLLERR for _, event in poll.poll(0))
        if broken:
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    except (OSError, ValueError):  # not a file of the system
        return False
    return broken
