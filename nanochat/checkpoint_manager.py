"""Checkpoints: written whole or not at all, read without unpickling code.

A training run leaves `<directory>/model_<step>.pt`, `meta_<step>.json` and one
`optim_<step>_rank<r>.pt` per rank, the layout that upstream reads and writes. The meta file is
written last: a step without one was interrupted and does not count. `final_model.pt` is the same in
one file, {"model", "meta"}.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.common import get_base_dir, user_path
from nanochat.errors import UserError
from nanochat.files import atomic_file, atomic_write_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.choices import default_compute_dtype
from nanochat.tokenizer import (
    DEFAULT_DIRECTORY,
    RustBPETokenizer,
    get_tokenizer,
)

State = dict[str, Tensor]
Meta = dict[str, Any]

FINAL_MODEL_NAME = "final_model.pt"

_SOURCES = {
    "base": "base_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
_MODEL_NAME = re.compile(r"model_(\d+)\.pt")


# -- writing -----------------------------------------------------------------------------------


def save_checkpoint(
    checkpoint_dir: Path | str,
    step: int,
    model_data: State,
    optimizer_data: dict[str, Any] | None,
    meta_data: Meta,
    rank: int = 0,
) -> None:
    """Write a step: rank 0 model and meta, every rank its shard of the optimizer (if not None).

    Raises OSError when the disk is full; what was there before is then untouched.
    """
    directory = Path(checkpoint_dir)
    directory.mkdir(parents=True, exist_ok=True)
    if optimizer_data is not None:
        save_optimizer(directory, step, optimizer_data, rank)
    if rank == 0:
        _save(_model_path(directory, step), model_data)
        atomic_write_json(_meta_path(directory, step), meta_data)


def save_optimizer(directory: Path, step: int, optimizer_data: dict[str, Any], rank: int) -> None:
    """Write a rank's shard of the optimizer; before the meta file, which makes a step whole."""
    directory.mkdir(parents=True, exist_ok=True)
    _save(_optimizer_path(directory, step, rank), optimizer_data)


def optimizer_ranks(directory: Path, step: int) -> list[int]:
    """The ranks whose optimizer shards of a step are there, ascending."""
    names = [path.name for path in directory.glob(f"optim_{step:06d}_rank*.pt")]
    matches = (re.fullmatch(r"optim_\d+_rank(\d+)\.pt", name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def save_final_model(path: Path | str, model_state: State, meta: Meta) -> None:
    """Write a model and its meta data, which must be JSON-able, as one file."""
    json.dumps(meta, allow_nan=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(path, {"model": model_state, "meta": meta})


def _save(path: Path, value: Any) -> None:
    with atomic_file(path, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's writer hides what the disk said behind its own
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise cause from None


# -- reading -----------------------------------------------------------------------------------


def load_meta(checkpoint_dir: Path | str, step: int) -> Meta:
    """The meta data of a step whose weights are there; UserError where a file is missing."""
    directory = Path(checkpoint_dir)
    if not _model_path(directory, step).exists():
        raise UserError(f"{_model_path(directory, step)} is missing")
    return _load_meta(_meta_path(directory, step))


def load_optimizer_shards(directory: Path, step: int, ranks: int) -> list[dict[str, Any]]:
    """The optimizer shards of all ranks of a step, mapped: only what is used of them is read."""
    paths = [_optimizer_path(directory, step, rank) for rank in range(ranks)]
    return [_load(path, "cpu", mmap=True) for path in paths]


def load_checkpoint(
    checkpoint_dir: Path | str,
    step: int,
    device: torch.device | str,
    load_optimizer: bool = False,
    rank: int = 0,
) -> tuple[State, dict[str, Any] | None, Meta]:
    """(model state, optimizer state or None, meta) of a step; UserError where a file is missing."""
    directory = Path(checkpoint_dir)
    model_data = _load(_model_path(directory, step), device)
    optimizer_data = None
    if load_optimizer:
        optimizer_data = _load(_optimizer_path(directory, step, rank), device)
    return model_data, optimizer_data, _load_meta(_meta_path(directory, step))


def build_model(
    checkpoint_dir: Path | str, step: int, device: torch.device | str, phase: str
) -> tuple[GPT, RustBPETokenizer, Meta]:
    """(model, tokenizer, meta) of a step; `phase` is "train" or "eval"."""
    if phase not in ("train", "eval"):
        raise ValueError(f"phase must be train or eval, not {phase!r}")
    state, _, meta = load_checkpoint(checkpoint_dir, step, device)
    model = model_from_state(state, meta, device=device).train(phase == "train")
    return model, checkpoint_tokenizer(meta, model.config), meta


def checkpoint_tokenizer(meta: Meta, config: GPTConfig) -> RustBPETokenizer:
    """The tokenizer that a checkpoint names, else the default one; UserError if it is another one.

    With a wrong tokenizer every figure and every word would be wrong without an error.
    """
    data = meta.get("data", {})
    tokenizer = get_tokenizer(data.get("tokenizer") or DEFAULT_DIRECTORY)
    trained_with = data.get("tokenizer_sha256")
    if trained_with and tokenizer.fingerprint() != trained_with:
        raise UserError(
            f"the tokenizer in {tokenizer.directory} is not the one that the model was trained "
            "with: put that one there"
        )
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"the model has {config.vocab_size} tokens and the tokenizer in {tokenizer.directory} "
            f"{tokenizer.get_vocab_size()}: put the tokenizer that it was trained with in its place"
        )
    return tokenizer


def load_model(
    source: str,
    device: torch.device | str,
    phase: str = "eval",
    model_tag: str | None = None,
    step: int | None = None,
) -> tuple[GPT, RustBPETokenizer, Meta]:
    """`build_model` of a source ("base", "sft" or "rl"): the largest model, its last step."""
    if source not in _SOURCES:
        raise UserError(f"unknown kind of model {source!r}: choose one of {', '.join(_SOURCES)}")
    checkpoints_dir = get_base_dir() / _SOURCES[source]
    directory = checkpoints_dir / (model_tag or find_largest_model(checkpoints_dir))
    last = find_last_step(directory) if step is None else step
    return build_model(directory, last, device, phase)


def find_largest_model(checkpoints_dir: Path | str) -> str:
    """The tag d<depth> of the greatest depth, else the tag that was written to last."""
    directory = Path(checkpoints_dir)
    tags = [p for p in directory.iterdir() if p.is_dir()] if directory.is_dir() else []
    if not tags:
        raise UserError(f"there is no model in {directory}: train one with scripts.base_train")
    depths = [(int(p.name[1:]), p.name) for p in tags if re.fullmatch(r"d\d+", p.name)]
    return max(depths)[1] if depths else max(tags, key=lambda p: p.stat().st_mtime).name


def whole_steps(directory: Path) -> list[int]:
    """The steps that were written whole, weights and meta data, ascending."""
    names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    steps = [int(match[1]) for name in names if (match := _MODEL_NAME.fullmatch(name))]
    return sorted(step for step in steps if _meta_path(directory, step).exists())


def find_last_step(checkpoint_dir: Path | str) -> int:
    """The last step that was written whole."""
    directory = Path(checkpoint_dir)
    whole = whole_steps(directory)
    if not whole:
        raise UserError(f"there is no complete checkpoint in {directory}")
    return whole[-1]


def load_any(
    path_or_name: Path | str,
    device: torch.device | str,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[GPT, Meta]:
    """(model, meta) of whatever names a model; in evaluation mode, on `device`.

    In this order: a path (of a `final_model.pt`, a `model_<step>.pt` beside its meta file, or a
    directory of checkpoints), the name of a run, a tag under `base_checkpoints`.
    """
    state, meta = _load_path(_resolve(path_or_name), device)
    model = model_from_state(state, meta, device=device, compute_dtype=compute_dtype)
    return model.eval(), meta


def model_from_state(
    state: State,
    meta: Meta,
    *,
    device: torch.device | str,
    compute_dtype: torch.dtype | None = None,
) -> GPT:
    """A model on `device` with these weights, which may be of an older or another program.

    Raises UserError for weights that do not fit, and for a model that diverged: it can say nothing.
    """
    device = torch.device(device)
    state = {key.removeprefix("_orig_mod."): tensor for key, tensor in state.items()}
    if name := not_finite(state):
        raise UserError(
            f"the weights are not finite ({name} holds NaN or infinity): the training has diverged, "
            "take an earlier checkpoint"
        )
    config = config_from_meta(meta, state)
    with device:
        model = GPT(config, compute_dtype=compute_dtype or default_compute_dtype(device.type))
    model.init_rotary()
    try:
        model.load_state_dict(_with_newer_keys(state, model))
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(
            f"these weights do not fit their configuration ({first[0].strip()})"
        ) from error
    return model


def not_finite(state: Mapping[str, Tensor]) -> str:
    """The name of the first tensor with a NaN or an infinity; "" if there is none."""
    return next((name for name, one in state.items() if not torch.isfinite(one).all()), "")


def config_from_meta(meta: Meta, state: State) -> GPTConfig:
    """The configuration of a checkpoint.

    No `arch` means modern, unless the weights have no `resid_lambdas`; before windows there was no
    `window_pattern`, and all layers saw everything.
    """
    if not isinstance(meta.get("model_config"), dict):
        raise UserError("the checkpoint does not say which model it holds: it has no model_config")
    values = dict(meta["model_config"])
    values.setdefault("arch", "modern" if "resid_lambdas" in state else "classic")
    values.setdefault("window_pattern", "L")
    try:
        return GPTConfig(**values)
    except TypeError as error:
        raise UserError(f"no model that we know has this model_config: {error}") from error


def _with_newer_keys(state: State, model: GPT) -> State:
    """Add what an older modern checkpoint lacks, at values that leave its function as it was."""
    if not model.config.is_modern:
        return state
    state = dict(state)
    for name, parameter in model.named_parameters():
        if name in state:
            continue
        if name.startswith(("smear_", "backout_", "x0_", "value_embeds.")) or "ve_gate" in name:
            state[name] = torch.zeros_like(parameter)
        elif name == "resid_lambdas":
            state[name] = torch.ones_like(parameter)
    return state


def _resolve(path_or_name: Path | str) -> Path:
    base = get_base_dir()
    name = str(path_or_name)
    candidates = [
        user_path(path_or_name),
        base / "runs" / name / FINAL_MODEL_NAME,
        base / "base_checkpoints" / name,
    ]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    places = ", ".join(str(c) for c in candidates)
    raise UserError(f"there is no model called {name!r} (looked at {places})")


def _load_path(path: Path, device: torch.device | str) -> tuple[State, Meta]:
    if path.is_dir():
        if (path / FINAL_MODEL_NAME).exists():
            return _load_path(path / FINAL_MODEL_NAME, device)
        state, _, meta = load_checkpoint(path, find_last_step(path), device)
        return state, meta
    match = _MODEL_NAME.fullmatch(path.name)
    if match:
        state, _, meta = load_checkpoint(path.parent, int(match[1]), device)
        return state, meta
    content = _load(path, device)
    if not isinstance(content, dict) or not {"model", "meta"} <= content.keys():
        raise UserError(f"{path} is not a model that we wrote: it lacks the keys model and meta")
    return content["model"], content["meta"]


def _load(path: Path, device: torch.device | str, *, mmap: bool = False) -> Any:
    if not path.exists():
        raise UserError(f"{path} is missing")
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # on a damaged file torch's reader raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint ({reason})") from error


def _load_meta(path: Path) -> Meta:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: that checkpoint was not written whole") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path} is not the description of a checkpoint: it holds no JSON object")
    return meta


def _model_path(directory: Path, step: int) -> Path:
    return directory / f"model_{step:06d}.pt"


def _meta_path(directory: Path, step: int) -> Path:
    return directory / f"meta_{step:06d}.json"


def _optimizer_path(directory: Path, step: int, rank: int) -> Path:
    return directory / f"optim_{step:06d}_rank{rank:d}.pt"
