"""Checkpoints: round trips, other programs' and older ones, and no half-written file ever."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import (
    build_model,
    find_largest_model,
    find_last_step,
    load_any,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_final_model,
)
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, build_gpt

from .data_kit import byte_tokenizer

CPU = torch.device("cpu")
IDS = torch.arange(24)[None] % 7


def _model(arch: str = "classic", vocab_size: int = 40) -> GPT:
    config = GPTConfig(
        sequence_len=24,
        vocab_size=vocab_size,
        n_layer=2,
        n_head=2,
        n_kv_head=2,
        n_embd=32,
        arch=arch,
    )
    model = build_gpt(config, device=CPU, seed=0, compute_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _meta(model: GPT, **more: Any) -> dict[str, Any]:
    return {"model_config": model.config.to_meta(), **more}


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_a_saved_step_comes_back_as_it_was(arch: str, tmp_path: Path) -> None:
    model = _model(arch)
    optimizer = model.setup_optimizer()
    model(IDS, IDS).backward()
    optimizer.step()
    save_checkpoint(tmp_path, 7, model.state_dict(), optimizer.state_dict(), _meta(model, step=7))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["meta_000007.json", "model_000007.pt", "optim_000007_rank0.pt"]

    state, optimizer_state, meta = load_checkpoint(tmp_path, 7, CPU, load_optimizer=True)
    assert meta["step"] == 7 and optimizer_state is not None
    assert list(state) == list(model.state_dict())
    loaded, _ = load_any(tmp_path, CPU)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(IDS), model(IDS))


def test_other_ranks_write_their_optimizer_only(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, {}, {"state": {}}, {"step": 3}, rank=2)
    assert [path.name for path in tmp_path.iterdir()] == ["optim_000003_rank2.pt"]


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_final_model_is_found_by_path_run_and_tag(
    arch: str, tmp_path: Path, base_dir: Path
) -> None:
    model = _model(arch)
    meta = _meta(model, step=5, val_bpb=1.25)
    save_final_model(tmp_path / "out" / "final_model.pt", model.state_dict(), meta)
    save_final_model(base_dir / "runs" / "mine" / "final_model.pt", model.state_dict(), meta)
    save_checkpoint(base_dir / "base_checkpoints" / "d2", 5, model.state_dict(), None, meta)
    model_file = base_dir / "base_checkpoints" / "d2" / "model_000005.pt"
    for name in (tmp_path / "out" / "final_model.pt", tmp_path / "out", "mine", "d2", model_file):
        loaded, loaded_meta = load_any(name, CPU)
        assert loaded_meta == meta
        assert torch.equal(loaded(IDS), model(IDS))


def test_meta_data_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = _model()
    for value in (float("nan"), torch.zeros(1)):
        with pytest.raises((TypeError, ValueError)):
            save_final_model(tmp_path / "x.pt", model.state_dict(), _meta(model, bad=value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written_before", [False, True])
def test_a_failed_write_leaves_no_half_written_file(
    written_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model()
    path = tmp_path / "final_model.pt"
    if written_before:
        save_final_model(path, model.state_dict(), _meta(model, step=1))

    def full_disk(value: Any, file: Any) -> None:
        file.write(b"half a model")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_manager.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_final_model(path, model.state_dict(), _meta(model, step=2))
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 1, model.state_dict(), None, _meta(model))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["final_model.pt"] if written_before else [])
    if written_before:
        assert load_any(path, CPU)[1]["step"] == 1


def test_a_step_without_its_meta_file_is_not_there(tmp_path: Path) -> None:
    model = _model()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, model.state_dict(), None, _meta(model, step=step))
    (tmp_path / "meta_000002.json").unlink()
    assert find_last_step(tmp_path) == 1
    with pytest.raises(UserError, match="not written whole"):
        load_any(tmp_path / "model_000002.pt", CPU)
    (tmp_path / "meta_000001.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_last_step(tmp_path)


def test_the_largest_model_is_the_deepest(tmp_path: Path) -> None:
    for tag in ("d4", "d12", "d9", "other"):
        (tmp_path / tag).mkdir()
    assert find_largest_model(tmp_path) == "d12"
    with pytest.raises(UserError, match=r"scripts\.base_train"):
        find_largest_model(tmp_path / "nothing")


def test_no_arch_means_modern_unless_the_weights_have_no_residual_scalars(tmp_path: Path) -> None:
    for arch in ("classic", "modern"):
        model = _model(arch)
        config = model.config.to_meta()
        config.pop("arch", None)
        save_final_model(tmp_path / arch, model.state_dict(), {"model_config": config})
        loaded, _ = load_any(tmp_path / arch, CPU)
        assert loaded.config.arch == arch
        assert torch.equal(loaded(IDS), model(IDS))


def test_a_checkpoint_from_before_windows_sees_everything(tmp_path: Path) -> None:
    model = _model()
    config = model.config.to_meta()
    del config["window_pattern"], config["arch"]
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path, 1, state, None, {"model_config": config})
    loaded, _ = load_any(tmp_path, CPU)
    assert loaded.config.window_pattern == "L"
    assert torch.equal(loaded(IDS), model(IDS))


def test_a_modern_checkpoint_without_the_newer_keys_computes_without_them(tmp_path: Path) -> None:
    model = _model("modern")
    lacking = ("smear_", "backout_", "x0_", "value_embeds")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(lacking)}
    state = {k: v for k, v in state.items() if "ve_gate" not in k}
    save_final_model(tmp_path / "old.pt", state, _meta(model))
    loaded, _ = load_any(tmp_path / "old.pt", CPU)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(lacking):
                parameter.zero_()
    assert torch.equal(loaded(IDS), model(IDS))


def test_bf16_tables_load_into_an_fp32_model(tmp_path: Path) -> None:
    model = _model("modern")
    state = model.state_dict()
    tables = [name for name in state if "wte" in name or "value_embeds" in name]
    for name in tables:
        state[name] = state[name].bfloat16()
    save_final_model(tmp_path / "m.pt", state, _meta(model))
    loaded, _ = load_any(tmp_path / "m.pt", CPU, compute_dtype=torch.float32)
    for name in tables:
        assert torch.equal(loaded.state_dict()[name], state[name].float())


@pytest.mark.parametrize("phase", ["train", "eval"])
def test_load_model_brings_the_tokenizer(phase: str, base_dir: Path) -> None:
    tokenizer = byte_tokenizer(base_dir / "tokenizer")
    model = _model(vocab_size=tokenizer.get_vocab_size())
    directory = base_dir / "base_checkpoints" / "d2"
    save_checkpoint(directory, 4, model.state_dict(), None, _meta(model, step=4))
    loaded, loaded_tokenizer, meta = load_model("base", CPU, phase)
    assert loaded.training == (phase == "train")
    assert loaded_tokenizer.get_vocab_size() == loaded.config.vocab_size
    assert meta["step"] == 4

    wrong = _model(vocab_size=40)
    save_checkpoint(directory, 5, wrong.state_dict(), None, _meta(wrong))
    with pytest.raises(UserError, match="tokenizer"):
        build_model(directory, 5, CPU, phase)


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    model = _model()
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    bad_config = {**_meta(model)["model_config"], "n_experts": 8}
    save_final_model(tmp_path / "moe.pt", model.state_dict(), {"model_config": bad_config})
    state = model.state_dict()
    del state["lm_head.weight"]
    save_final_model(tmp_path / "headless.pt", state, _meta(model))
    save_checkpoint(tmp_path / "steps", 1, model.state_dict(), None, _meta(model))
    (tmp_path / "steps" / "meta_000001.json").write_text("{")
    save_checkpoint(tmp_path / "list", 1, model.state_dict(), None, _meta(model))
    (tmp_path / "list" / "meta_000001.json").write_text("[]")
    save_final_model(tmp_path / "bare.pt", model.state_dict(), {})
    names = ("junk.pt", "other.pt", "moe.pt", "headless.pt", "steps", "list", "bare.pt", "nowhere")
    for name in names:
        with pytest.raises(UserError) as error:
            load_any(tmp_path / name, CPU)
        assert "\n" not in str(error.value)


def test_files_that_would_run_code_are_not_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Evil(), "meta": {}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_any(tmp_path / "evil.pt", CPU)
    assert not (tmp_path / "ran").exists()


def test_meta_data_of_a_modern_checkpoint_has_upstreams_seven_keys(tmp_path: Path) -> None:
    model = _model("modern")
    save_checkpoint(tmp_path, 1, model.state_dict(), None, _meta(model))
    meta = json.loads((tmp_path / "meta_000001.json").read_text())
    assert len(meta["model_config"]) == 7 and "arch" not in meta["model_config"]
