"""The training and evaluation scripts, as they are called."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zygote import Zygote

import nanochat_train
from nanochat import gpus
from nanochat.checkpoint_manager import load_any, optimizer_ranks
from nanochat.common import run_command_line
from nanochat.gpt import GPTConfig, build_gpt
from nanochat.param_groups import make_optimizer
from nanochat.prompts import PROMPTS
from nanochat.resume import find_saved, restore_run
from nanochat.schedule import learning_rates
from nanochat.settings import Settings
from scripts import base_eval, base_train

from .bundle_kit import make_bundle
from .data_kit import assert_equal, byte_tokenizer, texts, write_shard

TINY = [
    *("--depth", "1", "--max-seq-len", "32", "--batch-size", "2", "--total-batch-size", "160"),
    *("--num-iterations", "3", "--eval-rows", "9", "--log-every", "2", "--device-type", "cpu"),
]


@pytest.fixture
def corpus(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small training shards, one for validation, and a tokenizer."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    directory = base_dir / "shards"
    for number in range(3):
        write_shard(directory, number, texts(30, seed=number))
    byte_tokenizer(base_dir / "tokenizer")
    return directory


def _call(main: Callable[[], None], *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command_line(main)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def _last_bpb(output: str) -> str:
    return [word for word in output.split() if word.startswith("val_bpb=")][-1]


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_bpb_of_base_eval_is_the_last_that_the_run_logged(
    arch: str,
    corpus: Path,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = ["--", *TINY, "--arch", arch, "--source", str(corpus), "--run=mine", "--eval_every=2"]
    train += ["--resume-from-step=-1", "--core-metric-every=-1", "--save-every=-1"]  # as upstream
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 0
    logged = capsys.readouterr().out
    assert "Scaling weight decay from 0.200000 to 28.800000 for depth 1" in logged
    assert logged.count("val_bpb=") == 2
    directory = base_dir / "base_checkpoints" / "mine"
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["meta_000003.json", "model_000003.pt", "optim_000003_rank0.pt"]
    _check_upstream_can_read(directory, arch)

    evaluate = ["--checkpoint", "mine", "--device-type", "cpu"]
    assert _call(base_eval.main, *evaluate, monkeypatch=monkeypatch) == 0
    assert _last_bpb(capsys.readouterr().out) == _last_bpb(logged)
    evaluate += ["--json", "--eval", "bpb,sample", "--eval-rows", "4"]
    # without --batch-size a device takes what its memory has room for
    at_once: list[int] = []
    sums = base_eval.bpb_sums

    def counted(model: object, batches: Iterable[np.ndarray], token_bytes: object) -> object:
        return sums(model, (at_once.append(len(b)) or b for b in batches), token_bytes)

    monkeypatch.setattr(base_eval, "bpb_sums", counted)
    monkeypatch.setattr(gpus, "DEFAULT_ROWS", 3)
    assert _call(base_eval.main, *evaluate, monkeypatch=monkeypatch) == 0
    result = json.loads(capsys.readouterr().out)
    assert at_once == [2, 2]
    assert result["eval_rows"] == 4 and len(result["samples"]) == len(PROMPTS)


def _check_upstream_can_read(directory: Path, arch: str) -> None:
    """Upstream's fields of the meta file, and optimizer state in its form; `data` alone is ours."""
    meta = json.loads((directory / "meta_000003.json").read_text())
    assert set(meta) - {"data"} == {
        *("step", "val_bpb", "model_config", "user_config", "device_batch_size"),
        *("max_seq_len", "total_batch_size", "dataloader_state_dict", "loop_state"),
    }
    assert set(meta["loop_state"]) == {
        *("min_val_bpb", "smooth_train_loss", "total_training_time"),
    }
    assert {"pq_idx", "rg_idx", "epoch"} <= set(meta["dataloader_state_dict"])
    own = {"arch"} if arch == "classic" else set()
    assert set(meta["model_config"]) - own == {
        *("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"),
        "window_pattern",
    }
    optimizer = torch.load(directory / "optim_000003_rank0.pt", weights_only=True)
    assert set(optimizer) == {"state", "param_groups"}
    kinds = [group["kind"] for group in optimizer["param_groups"]]
    assert kinds == ["adamw"] * (6 if arch == "modern" else 2) + ["muon"] * kinds.count("muon")
    for group in optimizer["param_groups"]:
        first = optimizer["state"][group["params"][0]]
        if group["kind"] == "adamw":
            assert set(first) == {"step", "exp_avg", "exp_avg_sq"}
        else:  # of the whole group, with its first parameter
            assert set(first) == {"momentum_buffer", "second_momentum_buffer"}
            assert len(first["momentum_buffer"]) == len(group["params"])


def test_two_processes_under_torchrun_train_the_model_of_one_and_continue_it(
    corpus: Path,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    zygote: Zygote,
) -> None:
    arguments = ["--", *TINY, "--source", str(corpus), "--schedule", "upstream", "--seed", "3"]
    arguments += ["--save-every", "2", "--run"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    directory = base_dir / "base_checkpoints" / "two"
    ends: list[list[Any]] = []
    train = ["-m", "scripts.base_train", *arguments, "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for more in ([], ["--resume-from-step", "2"]):
        for path in directory.glob("*_000003*"):
            path.unlink()
        if more:
            ranks = zygote.ranks([*train, *more], 2, env=environment)
        else:
            run = [sys.executable, *command, *train]
            ranks = [subprocess.run(run, env=environment, capture_output=True, text=True)]
        assert not any(rank.returncode for rank in ranks), [rank.stderr for rank in ranks]
        output = "".join(rank.stdout for rank in ranks)
        assert output.count("step=3 val_bpb=") == 1  # rank 0 speaks for all
        assert optimizer_ranks(directory, 3) == [0, 1]
        names = ("model_000003.pt", "optim_000003_rank0.pt", "optim_000003_rank1.pt")
        ends.append([torch.load(directory / name, weights_only=True) for name in names])
    assert_equal(*ends)  # to the last bit

    assert _call(base_train.main, *arguments, "one", monkeypatch=monkeypatch) == 0
    (one, one_meta), (two, two_meta) = (
        load_any(name, torch.device("cpu")) for name in ("one", "two")
    )
    assert two_meta["val_bpb"] == pytest.approx(one_meta["val_bpb"], rel=1e-4)
    for name, weight in one.state_dict().items():
        difference = (weight - two.state_dict()[name]).abs().mean() / weight.abs().mean()
        assert difference < 1e-4, name

    make_bundle(base_dir / "eval_bundle")
    evaluate = ["--checkpoint", "two", "--eval", "core,bpb", "--device-type", "cpu", "--json"]
    pair = zygote.ranks(["-m", "scripts.base_eval", "--", *evaluate], 2, env=environment)
    assert not any(rank.returncode for rank in pair), [rank.stderr for rank in pair]
    told = json.loads("".join(rank.stdout for rank in pair))  # once
    capsys.readouterr()
    assert _call(base_eval.main, *evaluate, monkeypatch=monkeypatch) == 0
    told_alone = json.loads(capsys.readouterr().out)
    assert told["core"] == told_alone["core"]
    assert told["val_bpb"] == pytest.approx(told_alone["val_bpb"], rel=1e-6)
    assert (base_dir / "base_eval" / "two_000003.csv").exists()

    alone = [*arguments, "two", "--resume-from-step", "2"]
    before = [torch.load(directory / f"optim_000002_rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert _call(base_train.main, *alone, monkeypatch=monkeypatch) == 0
    assert optimizer_ranks(directory, 3) == [0]
    assert optimizer_ranks(directory / "replaced-1", 3) == [0, 1]  # those of the two are not lost
    joined = _state_on_one_process(directory)
    numbers = [group["params"][0] for group in joined["param_groups"]]
    assert len(numbers) == 5
    for number in numbers:
        for name, moments in joined["state"][number].items():
            if name != "step":
                halves = [
                    shard["state"][number][name] for shard in before if number in shard["state"]
                ]
                assert torch.equal(moments, torch.cat(halves)[: len(moments)]), (number, name)


def _state_on_one_process(directory: Path) -> dict[str, Any]:
    """The optimizer of step 2, as a process continues with it that is alone."""
    saved = find_saved(directory, "2")
    assert saved is not None and saved.ranks == 2
    config = GPTConfig(**saved.meta["model_config"])
    model = build_gpt(config, device=torch.device("cpu"), seed=0)
    optimizer = make_optimizer(model, learning_rates("classic"), weight_decay=0.0)
    restore_run(saved, model, optimizer, rank=0, world_size=1)
    return optimizer.state_dict()


def test_a_seed_decides_on_the_model(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train = [*TINY, "--source", str(corpus), "--seed", seed, "--run", run, "--num-shards", "1"]
        assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 0
    a, b, c = (load_any(run, torch.device("cpu"))[0].state_dict() for run in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_vanilla_training_needs_nothing_prepared(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--num-steps", "1", "--batch-size", "1", "--max-length", "16", "--depth", "1"]
    arguments += ["--eval-rows", "2", "--device-type", "cpu"]
    assert _call(nanochat_train.main, *arguments, monkeypatch=monkeypatch) == 0
    output = capsys.readouterr().out
    assert "training on the built-in corpus" in output and "val_bpb=" in output
    assert (base_dir / "base_checkpoints" / "vanilla" / "model_000001.pt").exists()
    resume = [*arguments, "--resume-from-step", "latest"]
    assert _call(nanochat_train.main, *resume, monkeypatch=monkeypatch) == 2
    assert "is over: it has done its 1 steps" in capsys.readouterr().err


def test_the_vanilla_command_refuses_several_processes(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert _call(nanochat_train.main, monkeypatch=monkeypatch) != 0
    assert "use scripts.base_train" in capsys.readouterr().err


def test_a_diverged_run_ends_in_one_sentence_and_keeps_its_checkpoints(
    corpus: Path,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*TINY, "--source", str(corpus), "--run", "diverged", "--lr", "1e38"]
    arguments += ["--log-every", "1", "--save-every", "1"]
    assert _call(base_train.main, *arguments, monkeypatch=monkeypatch) != 0
    assert "the run has diverged" in capsys.readouterr().err
    written = {path.name for path in (base_dir / "base_checkpoints" / "diverged").iterdir()}
    assert {"model_000001.pt", "meta_000001.json"} <= written
    assert "model_000003.pt" not in written


def test_matrix_lr_is_a_setting_of_its_own() -> None:
    args = base_train._parser().parse_args(["--matrix-lr", "0.1"])
    assert (args.lr, args.matrix_lr) == (None, 0.1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--total-batch-size", "100"], "multiple of --max-seq-len"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["--num-iterations", "0"], "--num-iterations is 0"),
        (["--total-batch-size", "0"], "--total-batch-size is 0"),
        (["--eval-tokens", "31"], "--eval-tokens is 31"),
        (["--num-iterations", "-1", "--target-flops", "0"], "--target-flops is 0"),
        (["--head-dim", "0"], "--head-dim is 0"),
        (["--core-every", "1", "--core-max-per-task", "0"], "--core-max-per-task is 0"),
        (["--run", "../elsewhere"], "letters, digits"),
        (["--device-type", "tpu"], "unknown device type"),
        (["--source", "wikipedia"], "no data source 'wikipedia'"),
        (["--source", "fineweb-edu"], "python -m nanochat.dataset -n 1"),
        (["--num-shards", "3"], "choose 1 to 2, not 3"),
        (["--num-shards", "0"], "choose 1 to 2, not 0"),
        (["--tokenizer", "other"], "other"),
        (["--depth", "0"], "depth is 0"),
        (["--arch", "gpt5"], "gpt5"),
        (["--window-pattern", "XL"], "letters S and L"),
        (["--warmdown-ratio", "2"], "warmdown_ratio is 2"),
        (["--wandb-mode", "maybe"], "maybe"),
        (["--fp8"], "fp8 needs an NVIDIA GPU"),
    ],
)
def test_every_input_error_is_one_sentence_before_any_work(
    arguments: list[str],
    said: str,
    corpus: Path,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = [*TINY, "--source", str(corpus), *arguments]
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not (base_dir / "rows").exists() and not (base_dir / "base_checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "nothing"], "no model called 'nothing'"),
        (["--checkpoint", "nothing", "--eval", "mmlu"], "choose one or more of core, bpb"),
        (["--checkpoint", "nothing", "--max-per-task", "0"], "--max-per-task is 0"),
        (["--checkpoint", "nothing", "--batch-size", "-1"], "--batch-size is -1"),
        ([], "--checkpoint"),
    ],
)
def test_base_eval_says_what_is_wrong(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _call(base_eval.main, *arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_ratio_counts_tokens_a_parameter(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # depth 1, 265 tokens padded to 320 rows: 12 * 128^2 + 2 * 320 * 128 = 278,528 parameters
    train = ["--depth", "1", "--max-seq-len", "32", "--batch-size", "4", "--eval-rows", "1"]
    train += ["--total-batch-size", "128", "--target-param-data-ratio", "0.001"]
    train += ["--source", str(corpus), "--device-type", "cpu", "--wandb-mode", "disabled"]
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 0
    assert "278,528 parameters, 2 steps of 128 tokens" in capsys.readouterr().out


def test_upstreams_ways_to_say_how_long_and_how_large(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        train = [*TINY, "--source", str(corpus), "--num-iterations=-1", *arguments]
        assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 0
        return capsys.readouterr().out

    # depth 1, width 128: 6 * (12 * 128^2 + 320 * 128) + 12 * 128 * 32 FLOPs a token
    flops = 6 * (12 * 128**2 + 320 * 128) + 12 * 128 * 32
    assert "2 steps of 160 tokens" in said("--target-flops", str(2 * 160 * flops))
    # 2^19 * (N / N at depth 12)^0.383, rounded to a power of two
    narrow = ["--head-dim", "32", "--aspect-ratio", "32", "--eval-tokens", "64"]
    ratio = (12 * 32**2 + 2 * 320 * 32) / (12 * 12 * 384**2 + 2 * 320 * 384)
    expected = 2 ** round(19 + 0.383 * math.log2(ratio))
    output = said("--total-batch-size=-1", "--target-flops", "1", "--batch-size", "512", *narrow)
    assert f"1 steps of {expected:,} tokens" in output and "32,768 parameters" in output


def test_wandb_is_offline_without_a_key_and_off_without_a_project(
    corpus: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, object]] = []

    class Run:
        def log(self, values: dict[str, object], step: int) -> None: ...

        def finish(self, exit_code: int) -> None: ...

    def init(**options: object) -> Run:
        calls.append(options)
        return Run()

    monkeypatch.setattr("wandb.init", init)
    train = [*TINY, "--num-iterations", "1", "--source", str(corpus)]
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 0
    assert calls == []
    train += ["--wandb-project", "pilot_flwr"]
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 0
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert _call(base_train.main, *train, monkeypatch=monkeypatch) == 0
    assert [(c["project"], c["mode"]) for c in calls] == [
        ("pilot_flwr", "offline"),
        ("pilot_flwr", "online"),
    ]
    assert "secret" not in repr(calls)


def test_settings_are_those_of_the_command_line() -> None:
    flags = {action.dest for action in base_train._parser()._actions} - {
        "help",
        "device_type",
    }
    assert flags == set(Settings.__dataclass_fields__)
