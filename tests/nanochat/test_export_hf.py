"""An exported model is, to the real transformers, the same model with the same tokenizer."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import model_export
from nanochat.checkpoint_manager import load_any, save_checkpoint
from nanochat.common import run_command_line
from nanochat.gpt import GPT, GPTConfig, build_gpt
from nanochat.tokenizer import get_tokenizer
from scripts import export_hf

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
TEXTS = [
    "Ein Satz, naïve – mit 12345 Zahlen\n\n  und   Leerzeichen.",
    "def f(x):\n\treturn x ** 2  # \u4f60\u597d \U0001f600",
    "",
    " leading and trailing ",
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _checkpoint(
    base_dir: Path, tokenizer_dir: Path, tag: str, *, table: torch.dtype, **changes: Any
) -> GPT:
    """A random model, saved under a tag with all that a run's meta data says."""
    tokenizer = get_tokenizer(tokenizer_dir)
    values: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    values |= {"sequence_len": 160, "vocab_size": tokenizer.get_vocab_size()}
    config = GPTConfig(**{**values, **changes})
    model = build_gpt(config, device=CPU, seed=0, compute_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    state = model.state_dict()
    state["transformer.wte.weight"] = state["transformer.wte.weight"].to(table)
    meta = {
        "model_config": config.to_meta(),
        "step": 7,
        "val_bpb": 1.2345678,
        "total_batch_size": 1000,
        "user_config": {"lr": 0.02, "depth": 3},
        "data": {
            "source": "fineweb-edu",
            "tokenizer": str(tokenizer_dir),
            "tokenizer_sha256": tokenizer.fingerprint(),
            "sequence_len": 160,
            "packing": "bestfit",
            "eval_rows": 99,
            "val_shard": 1822,
        },
    }
    save_checkpoint(base_dir / "base_checkpoints" / tag, 7, state, None, meta)
    return model


def _call(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["export_hf", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command_line(export_hf.main)
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("no_network")
def test_transformers_computes_the_same_logits_from_the_same_ids(
    table: torch.dtype,
    base_dir: Path,
    prepared_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _checkpoint(base_dir, prepared_base / "tokenizer_512", "mine", table=table)
    out = tmp_path / "exported"
    assert _call("--checkpoint", "mine", "--out", str(out), monkeypatch=monkeypatch) == 0
    ours, _ = load_any("mine", CPU, compute_dtype=torch.float32)
    tokenizer = get_tokenizer(prepared_base / "tokenizer_512")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(theirs).__module__ == "transformers.models.nanochat.modeling_nanochat"
    assert theirs.dtype == torch.float32
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(512, (3, 160), generator=generator)
    with torch.inference_mode():
        difference = (theirs.eval()(ids).logits - ours(ids)).abs().max()
    assert float(difference) < 1e-4

    # beyond the rows that it was trained on, too
    long = torch.randint(512, (1, 400), generator=generator)
    with torch.inference_mode():
        difference = (theirs(long).logits - ours(long)).abs().max()
    assert float(difference) < 1e-4

    auto = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        expected = tokenizer.encode(text, prepend="<|bos|>")
        assert auto(text)["input_ids"] == expected
        assert auto.decode(expected, skip_special_tokens=True) == text
    assert auto.model_max_length == 160
    # both continue a prompt alike
    prompt = torch.tensor([tokenizer.encode("The ", prepend="<|bos|>")])
    said = theirs.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.size(1) :].tolist()
    expected = list(ours.generate(prompt[0].tolist(), 12, temperature=0.0))
    assert said == expected[: len(said)] and (len(said) == 12 or said[-1] == auto.bos_token_id)


@pytest.mark.usefixtures("no_network")
def test_texts_of_unequal_length_are_continued_in_one_batch_as_one_by_one(
    base_dir: Path, prepared_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _checkpoint(base_dir, prepared_base / "tokenizer_512", "mine", table=torch.float32)
    out = tmp_path / "exported"
    assert _call("--checkpoint", "mine", "--out", str(out), monkeypatch=monkeypatch) == 0
    auto = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert auto.padding_side == "left" and auto.pad_token == "<|bos|>"
    assert model.generation_config.pad_token_id == auto.bos_token_id
    texts = ["The ", "A much longer text than the first one, of many tokens"]
    batch = auto(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    together = model.generate(**batch, **options)[:, -6:]
    for text, expected in zip(texts, together, strict=True):
        alone = model.generate(**auto(text, return_tensors="pt"), **options)[0, -6:]
        assert alone.tolist() == expected.tolist()


def test_the_folder_holds_a_card_of_the_run_and_nothing_to_execute(
    base_dir: Path, prepared_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _checkpoint(base_dir, prepared_base / "tokenizer_512", "mine", table=torch.float32)
    out = tmp_path / "a" / "d3"
    assert _call("--checkpoint", "mine", "--out", str(out), monkeypatch=monkeypatch) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    card = (out / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for said in ("# d3", "fineweb-edu", "7,000", "1.2346 bits per byte", "| `n_kv_head` | `2` |"):
        assert said in card
    assert "| Positions | trained on 160; further ones" in card and "padded on the left" in card
    assert f"{parameters:,}" in card and "| `lr` | `0.02` |" in card
    assert [path.name for path in out.parent.iterdir()] == ["d3"]
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}  # others may load it


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arch": "modern"}, "use the checkpoint with scripts.chat_cli"),
        ({"window_pattern": "SL"}, "--window-pattern L"),
    ],
)
def test_what_transformers_cannot_compute_is_refused_with_what_to_use_instead(
    changes: dict[str, Any],
    said: str,
    base_dir: Path,
    prepared_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = prepared_base / "tokenizer_512"
    _checkpoint(base_dir, tokenizer, "mine", table=torch.float32, **changes)
    out = tmp_path / "out"
    assert _call("--checkpoint", "mine", "--out", str(out), monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not out.exists()


def test_an_export_is_there_whole_or_not_at_all(
    base_dir: Path,
    prepared_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _checkpoint(base_dir, prepared_base / "tokenizer_512", "mine", table=torch.float32)
    out = tmp_path / "out"
    arguments = ["--checkpoint", "mine", "--out", str(out)]

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(model_export, "save_file", full_disk)
        assert _call(*arguments, monkeypatch=monkeypatch) == 2
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert _call(*arguments, monkeypatch=monkeypatch) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
