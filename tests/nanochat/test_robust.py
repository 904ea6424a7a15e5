"""What goes wrong outside: full disks, truncated files, wrong tokenizers, documents of any length.

Nothing is left half-written, nothing is silently wrong. (Corrupt shards, killed and doubled packers and
vocabularies beyond 16 bits are in rows/test_cache, interrupted runs in test_resume.)
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.checkpoint_manager import (
    build_model,
    checkpoint_tokenizer,
    load_any,
    load_checkpoint,
    save_checkpoint,
    save_final_model,
)
from nanochat.errors import UserError
from nanochat.files import write_all
from nanochat.gpt import GPT, GPTConfig, build_gpt
from nanochat.rows.cache import RowCache
from nanochat.rows.packing import PACKINGS
from nanochat.source import get_source
from nanochat.tokenizer import get_tokenizer

from . import http_kit
from .data_kit import byte_tokenizer, full_disk, texts, write_shard
from .http_kit import download

CPU = torch.device("cpu")


def _model(vocab_size: int = 300, arch: str = "classic") -> GPT:
    config = GPTConfig(
        sequence_len=16,
        vocab_size=vocab_size,
        n_layer=2,
        n_head=2,
        n_kv_head=2,
        n_embd=32,
        arch=arch,
    )
    return build_gpt(config, device=CPU, seed=0, compute_dtype=torch.float32)


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# -- documents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_of_one_token_and_of_a_million(
    packing: str, base_dir: Path, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(base_dir / "tokenizer")
    million = "0123456 " * 125_000
    documents = ["a", "", *("bc" * (n % 2) + "d" for n in range(50)), million, "e"]
    for shard in (0, 1):
        write_shard(tmp_path, shard, documents)
    T = 1023
    cache = RowCache(get_source(tmp_path), tokenizer, sequence_len=T, packing=packing)
    rows = cache.rows(0).read(0, 10**9)
    stats = cache.rows(0).stats
    cache.close()
    tokens = sum(1 + len(text) for text in documents if text)
    assert stats is not None and (stats.documents, stats.tokens) == (53, tokens)
    assert (rows[:, 0] == tokenizer.get_bos_token_id()).all()
    assert rows.size == stats.rows * (T + 1)
    if (
        packing == "stream"
    ):  # every token once: only a row's own BOS is added, and the last row lost
        assert stats.rows == -(-tokens // T) - 1 or stats.rows == tokens // T
        text = tokenizer.decode(rows[rows < 256].tolist())
        everything = "".join(documents)
        assert everything.startswith(text) and len(everything) - len(text) <= T
    else:  # a document longer than a row fills one; the rest of it is discarded, and counted
        assert stats.discarded_tokens == tokens - rows.size


# -- full disks --------------------------------------------------------------------------------


def test_a_disk_that_fills_up_while_packing_is_a_sentence_and_packing_goes_on_later(
    base_dir: Path, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(base_dir / "tokenizer")
    for shard in (0, 1):
        write_shard(tmp_path, shard, texts(500, seed=shard))

    def cache() -> RowCache:
        return RowCache(get_source(tmp_path), tokenizer, sequence_len=31, packing="stream")

    broken = cache()
    with full_disk(20_000):
        with pytest.raises(UserError, match=r"cannot write rows .*make room") as error:
            broken.rows(0).read(0, 10**9)
    assert "\n" not in str(error.value)
    assert broken.known_rows == {} and not list((base_dir / "rows").glob("*.rows"))
    broken.close()
    later, reference = (
        cache(),
        RowCache(
            get_source(tmp_path),
            tokenizer,
            sequence_len=31,
            packing="stream",
            directory=tmp_path / "elsewhere",
        ),
    )
    rows = later.rows(0).read(0, 10**9)
    np.testing.assert_array_equal(rows, reference.rows(0).read(0, 10**9))
    assert rows.nbytes > 20_000
    later.close()
    reference.close()


def test_rows_that_a_real_disk_has_no_room_for_are_packed_once_it_has(
    base_dir: Path, tmp_path: Path, small_disk: Path
) -> None:
    tokenizer = byte_tokenizer(base_dir / "tokenizer")
    for shard in (0, 1):
        write_shard(tmp_path, shard, texts(2000, seed=shard))

    def read(directory: Path) -> np.ndarray[Any, Any]:
        # rows of 66 bytes, so that the disk ends within one of them
        source = get_source(tmp_path)
        options: dict[str, Any] = {"sequence_len": 32, "packing": "stream", "directory": directory}
        with contextlib.closing(RowCache(source, tokenizer, **options)) as cache:
            return np.array(cache.rows(0).read(0, 10**9))

    rows = read(tmp_path / "elsewhere")
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * ((1 << 20) - rows.nbytes // 2))
    with pytest.raises(UserError, match=r"cannot write rows .*No space left.*make room") as error:
        read(small_disk / "rows")
    assert "\n" not in str(error.value) and not list((small_disk / "rows").glob("*.rows"))
    filler.unlink()
    np.testing.assert_array_equal(read(small_disk / "rows"), rows)


def test_a_disk_that_takes_a_part_of_what_is_written_gets_the_rest(tmp_path: Path) -> None:
    class Partial(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data[:3]))

    with Partial(tmp_path / "rows", "wb") as file:
        write_all(file, np.arange(5, dtype=np.uint16).data)
        write_all(file, b"")
        write_all(file, b"end")
    assert (tmp_path / "rows").read_bytes() == np.arange(5, dtype=np.uint16).tobytes() + b"end"


def test_a_model_that_a_real_disk_has_no_room_for_leaves_the_one_before(small_disk: Path) -> None:
    model = _model()
    meta = {"model_config": model.config.to_meta(), "step": 1}
    save_final_model(small_disk / "final_model.pt", model.state_dict(), meta)
    before = _files(small_disk)
    large = {"w": torch.zeros(1 << 18)}
    with pytest.raises(OSError, match="No space left"):
        save_final_model(small_disk / "final_model.pt", large, meta)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(small_disk, 2, large, None, meta)
    assert _files(small_disk) == before


@pytest.mark.parametrize("written_before", [False, True])
def test_a_disk_that_fills_up_while_saving_leaves_what_was_there(
    written_before: bool, tmp_path: Path
) -> None:
    model = _model()
    meta = {"model_config": model.config.to_meta(), "step": 1}
    if written_before:
        save_checkpoint(tmp_path, 1, model.state_dict(), None, meta)
        save_final_model(tmp_path / "final_model.pt", model.state_dict(), meta)
    before = _files(tmp_path)
    with full_disk(20_000):
        with pytest.raises(OSError):
            save_checkpoint(tmp_path, 1, model.state_dict(), None, {**meta, "step": 2})
        with pytest.raises(OSError):
            save_final_model(tmp_path / "final_model.pt", model.state_dict(), {**meta, "step": 2})
    assert _files(tmp_path) == before


def test_a_disk_that_fills_up_while_downloading_is_a_line_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with http_kit.serve() as server:
        for shard in (0, 1822):
            path = write_shard(tmp_path / "origin", shard, texts(2000, seed=shard))
            server.files[path.name] = path.read_bytes()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with full_disk(50_000):
            failures = download(1)
        assert len(failures) == 2 and all("cannot write" in line for line in failures)
        assert get_source().present() == []
        assert download(1) == []
        assert get_source().present() == [0, 1822]


# -- checkpoints -------------------------------------------------------------------------------


def test_a_checkpoint_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    model = _model()
    meta = {"model_config": model.config.to_meta(), "step": 1}
    save_final_model(tmp_path / "final_model.pt", model.state_dict(), meta)
    save_checkpoint(tmp_path, 1, model.state_dict(), {"state": {}}, meta)
    for name in ("final_model.pt", "model_000001.pt", "optim_000001_rank0.pt"):
        path = tmp_path / name
        whole = path.read_bytes()
        for length in (0, 1, len(whole) // 3, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError, match=f"{name} cannot be read") as error:
                load_checkpoint(tmp_path, 1, CPU, True) if "optim" in name else load_any(path, CPU)
            assert "\n" not in str(error.value)
        path.write_bytes(whole)
    path = tmp_path / "meta_000001.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"meta_000001\.json is not JSON"):
        load_any(tmp_path / "model_000001.pt", CPU)


def test_another_tokenizer_of_the_same_size_is_refused(base_dir: Path, tmp_path: Path) -> None:
    trained_with = byte_tokenizer(base_dir / "tokenizer", num_pairs=2)
    model = _model(vocab_size=trained_with.get_vocab_size())
    meta: dict[str, Any] = {
        "model_config": model.config.to_meta(),
        "data": {"tokenizer": "tokenizer", "tokenizer_sha256": trained_with.fingerprint()},
    }
    save_checkpoint(tmp_path, 1, model.state_dict(), None, meta)
    assert build_model(tmp_path, 1, CPU, "eval")[1].fingerprint() == trained_with.fingerprint()

    path = base_dir / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("{1,2}", "{1,3}"))  # as many tokens, another split
    assert get_tokenizer().get_vocab_size() == model.config.vocab_size
    for load in (
        lambda: build_model(tmp_path, 1, CPU, "eval"),
        lambda: checkpoint_tokenizer(meta, model.config),
    ):
        with pytest.raises(UserError, match="not the one that the model was trained with"):
            load()
    # another program's checkpoint names none: only the size can be compared
    del meta["data"]
    assert checkpoint_tokenizer(meta, model.config).get_vocab_size() == model.config.vocab_size


@pytest.mark.parametrize("arch", ["classic", "modern"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_checkpoint_has_the_dtypes_of_its_format(
    arch: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Tables in the compute dtype (fp16: fp32), everything else in fp32; as upstream writes it."""
    config = _model(arch=arch).config
    model = build_gpt(config, device=CPU, seed=0, compute_dtype=dtype)
    save_checkpoint(tmp_path, 3, model.state_dict(), None, {"model_config": config.to_meta()})
    state = torch.load(tmp_path / "model_000003.pt", weights_only=True)
    table = torch.float32 if dtype == torch.float16 else dtype
    for name, tensor in state.items():
        is_table = name == "transformer.wte.weight" or name.startswith("value_embeds.")
        assert tensor.dtype == (table if is_table else torch.float32), name
    assert type(state).__name__ in ("OrderedDict", "dict")


def test_a_modern_checkpoint_from_before_the_residual_scalars_has_them_at_one(
    tmp_path: Path,
) -> None:
    model = _model(arch="modern")
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("_lambdas")}
    config = {**model.config.to_meta(), "arch": "modern"}
    del config["window_pattern"]
    save_final_model(tmp_path / "old.pt", state, {"model_config": config})
    loaded, _ = load_any(tmp_path / "old.pt", CPU)
    assert loaded.resid_lambdas.tolist() == [1.0, 1.0] and loaded.x0_lambdas.tolist() == [0.0, 0.0]
    assert loaded.config.window_pattern == "L"
