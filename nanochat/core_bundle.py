"""CORE's tasks as upstream bundles them, and the figure over all of them.

The bundle is a directory: `core.yaml` lists the tasks, `eval_meta_data.csv` what guessing gets in
each (in percent), `eval_data/` holds their items as JSON lines.
"""

import csv
import io
import json
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from nanochat.common import get_base_dir
from nanochat.core_eval import TASK_TYPES, Item, centred, check_item, evaluate_task
from nanochat.download import Downloader, DownloadError
from nanochat.errors import UserError
from nanochat.files import atomic_write_json, atomic_write_text, file_lock
from nanochat.gpt import GPT
from nanochat.tokenizer import RustBPETokenizer

BUNDLE_NAME = "eval_bundle"
BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"

_SHUFFLE_SEED = 1337  # of the items, before the first max_per_task are taken
_DEFAULT_DELIMITER = " "


@dataclass(frozen=True, kw_only=True)
class Task:
    """One entry of `core.yaml`, with what guessing gets in it (a share)."""

    label: str
    task_type: str
    num_fewshot: int
    continuation_delimiter: str
    data_path: Path
    random_baseline: float

    @property
    def meta(self) -> dict[str, Any]:
        """What `evaluate_task` needs to know of it."""
        return {
            "task_type": self.task_type,
            "num_fewshot": self.num_fewshot,
            "continuation_delimiter": self.continuation_delimiter,
        }

    def items(self, max_items: int | None = None) -> list[Item]:
        """Its items in the order in which they are evaluated; UserError if they cannot be read."""
        try:
            with open(self.data_path, encoding="utf-8") as file:
                items = [json.loads(line) for line in file if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.data_path} cannot be read ({error}): delete {BUNDLE_NAME} and get it again"
            ) from error
        random.Random(_SHUFFLE_SEED).shuffle(items)
        return items[:max_items]


@dataclass(frozen=True, kw_only=True)
class CoreResult:
    """Accuracies by task, as shares, before and after centring; `core` is the mean of the latter."""

    accuracy: dict[str, float]
    centred: dict[str, float]

    @property
    def core(self) -> float:
        return sum(self.centred.values()) / len(self.centred)

    def to_json(self) -> dict[str, Any]:
        return {
            "core_metric": self.core,
            "results": self.accuracy,
            "centered_results": self.centred,
        }

    def table(self) -> str:
        """A table for people: one line per task, and the mean."""
        rows = [
            (label, f"{self.accuracy[label]:.6f}", self.centred[label]) for label in self.accuracy
        ]
        rows.append(("CORE", "", self.core))
        width = max(len(label) for label, *_ in rows)
        head = f"{'task':<{width}}  accuracy   centred"
        return "\n".join([head, *(f"{n:<{width}}  {a:>8}  {c:>8.6f}" for n, a, c in rows)])

    def to_csv(self) -> str:
        """Upstream's columns."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["Task", "Accuracy", "Centered"])
        for label, accuracy in self.accuracy.items():
            writer.writerow([label, f"{accuracy:.6f}", f"{self.centred[label]:.6f}"])
        writer.writerow(["CORE", "", f"{self.core:.6f}"])
        return out.getvalue()

    def save(self, directory: Path, name: str) -> Path:
        """Write `<name>.csv` and `<name>.json` to `directory`; returns the path of the first."""
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write_json(directory / f"{name}.json", self.to_json())
        atomic_write_text(directory / f"{name}.csv", self.to_csv())
        return directory / f"{name}.csv"


def evaluate_core(
    model: GPT,
    tokenizer: RustBPETokenizer,
    device: torch.device,
    tasks: list[Task],
    *,
    max_per_task: int | None = None,
    say: Callable[[str], None] | None = None,
    tick: Callable[[], None] | None = None,
) -> CoreResult:
    """CORE of `model`; all ranks of a process group call it together.

    max_per_task: a limit on each task's items, for an approximation; `say` gets one line per task;
    `tick` is called before each item.
    """
    accuracy: dict[str, float] = {}
    centred_by_task: dict[str, float] = {}
    for task in tasks:
        items = task.items(max_per_task)
        try:
            share = evaluate_task(model, tokenizer, items, device, task.meta, tick=tick)
        except (KeyError, IndexError) as error:
            raise UserError(
                f"an item of {task.data_path} is not a valid {task.task_type} item ({error!r}): "
                f"delete {BUNDLE_NAME} and get it again"
            ) from error
        accuracy[task.label] = share
        centred_by_task[task.label] = centred(share, task.random_baseline)
        if say is not None:
            say(
                f"{task.label}: accuracy={share:.4f} centred={centred_by_task[task.label]:.4f} "
                f"({task.num_fewshot}-shot, {len(items)} items)"
            )
    return CoreResult(accuracy=accuracy, centred=centred_by_task)


def check_items(tasks: list[Task], max_per_task: int | None) -> None:
    """Raise UserError if an item is not valid, or if a task would have too few for its examples.

    What `evaluate_core` would find after hours of training is found before.
    """
    for task in tasks:
        if task.task_type not in TASK_TYPES:
            known = ", ".join(TASK_TYPES)
            raise UserError(f"task {task.label} is of type {task.task_type!r}: known are {known}")
        items = task.items()
        if max_per_task is not None and len(items) > task.num_fewshot >= max_per_task:
            raise UserError(
                f"--core-max-per-task is {max_per_task}: task {task.label} shows {task.num_fewshot} "
                f"examples beside each item, so it needs at least {task.num_fewshot + 1}"
            )
        if len(items) <= task.num_fewshot:
            raise UserError(
                f"{task.data_path} has {len(items)} items, too few for {task.num_fewshot} examples "
                f"beside each: delete {BUNDLE_NAME} and get it again"
            )
        for number, item in enumerate(items):
            try:
                check_item(task.task_type, item)
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"item {number} of {task.data_path} is not a valid {task.task_type} item "
                    f"({error}): delete {BUNDLE_NAME} and get it again"
                ) from error


def load_tasks(directory: Path) -> list[Task]:
    """The tasks of a bundle; UserError, with the file's name, if it is not one."""
    try:
        text = (directory / "core.yaml").read_text(encoding="utf-8")
        entries = yaml.safe_load(text)["icl_tasks"]
        with open(directory / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            baselines = {
                row["Eval Task"]: float(row["Random baseline"]) / 100
                for row in csv.DictReader(file)
            }
        tasks = [
            Task(
                label=entry["label"],
                task_type=entry["icl_task_type"],
                num_fewshot=int(entry["num_fewshot"][0]),
                continuation_delimiter=entry.get("continuation_delimiter", _DEFAULT_DELIMITER),
                data_path=directory / "eval_data" / entry["dataset_uri"],
                random_baseline=baselines[entry["label"]],
            )
            for entry in entries
        ]
        for task in tasks:
            if not 0 <= task.random_baseline < 1 or task.num_fewshot < 0:
                raise ValueError(f"task {task.label} has figures out of range")
    except (OSError, ValueError, KeyError, TypeError, IndexError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{directory} is not CORE's bundle ({type(error).__name__}: {reason}): "
            "delete it and get it again"
        ) from error
    if not tasks:
        raise UserError(f"{directory / 'core.yaml'} names no task: delete {directory} and get it")
    return tasks


def ensure_bundle(*, downloader: Downloader | None = None) -> Path:
    """The bundle's directory, `$NANOCHAT_BASE_DIR/eval_bundle`; fetched if it is missing.

    Two processes at once: one fetches, the other waits. Raises UserError, with what to do by hand,
    when there is no network.
    """
    base = get_base_dir()
    directory = base / BUNDLE_NAME
    with file_lock(base / f".{BUNDLE_NAME}.lock"):
        if directory.exists():
            return directory
        archive = base / f"{BUNDLE_NAME}.zip"
        try:
            if not archive.exists():
                fetcher = downloader or Downloader(attempts=2, timeout_s=10.0)
                fetcher.fetch(BUNDLE_URL, archive, check=_check_archive)
            _unpack(archive, directory)
        except DownloadError as error:
            raise UserError(
                f"CORE's tasks are not in {directory} and cannot be fetched ({error}): on a machine "
                f"with a network get {BUNDLE_URL} and copy it to {archive}"
            ) from error
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{archive} cannot be unpacked ({error}): delete it and get {BUNDLE_URL} again"
            ) from error
        archive.unlink()
    return directory


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a zip file")


def _unpack(archive: Path, directory: Path) -> None:
    """Take the one directory in `archive` whole: unpacked beside, then renamed."""
    with tempfile.TemporaryDirectory(prefix=f".{BUNDLE_NAME}.", dir=directory.parent) as temporary:
        with zipfile.ZipFile(archive) as file:
            file.extractall(temporary)  # names that would leave the directory are cut by zipfile
        unpacked = Path(temporary) / BUNDLE_NAME
        if not (unpacked / "core.yaml").exists():
            raise ValueError(f"it holds no {BUNDLE_NAME}/core.yaml")
        shutil.move(unpacked, directory)
