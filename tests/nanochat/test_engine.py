"""Generation: the KV cache computes what a full forward computes, and the engine stops where it must."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanochat.engine import Engine, KVCache, sample_next_token, stream_text
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, build_gpt
from nanochat.tokenizer import RustBPETokenizer

from .data_kit import byte_tokenizer

CPU = torch.device("cpu")
SHAPES = [("classic", "L"), ("classic", "SL"), ("modern", "SSSL")]
LENGTH = 150  # longer than a short window of 128


def _model(arch: str, pattern: str = "SL", vocab_size: int = 70, **changes: int) -> GPT:
    """A model with grouped queries and no tensor at a value that would hide its effect."""
    sizes = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "sequence_len": 160}
    config = GPTConfig(
        vocab_size=vocab_size, window_pattern=pattern, arch=arch, **{**sizes, **changes}
    )
    model = build_gpt(config, device=CPU, seed=0, compute_dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.dim() > 1 else 0.5))
    return model


def _cache(model: GPT, rows: int, length: int = LENGTH) -> KVCache:
    c = model.config
    return KVCache(rows, c.n_kv_head, length, c.head_dim, c.n_layer, "cpu", model.compute_dtype)


def _ids(rows: int, length: int = LENGTH) -> Tensor:
    return torch.randint(70, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("arch", "pattern"), SHAPES)
@torch.inference_mode()
def test_decoding_token_by_token_is_the_full_forward_at_every_position(
    arch: str, pattern: str
) -> None:
    model, ids = _model(arch, pattern), _ids(2)
    cache = _cache(model, 2)
    steps = [model(ids[:, t : t + 1], kv_cache=cache) for t in range(LENGTH)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids), rtol=0, atol=2e-5)
    assert cache.get_pos() == LENGTH
    assert cache.cache_seqlens.tolist() == [LENGTH] * 2
    assert cache.cache_seqlens.dtype == torch.int32


@pytest.mark.parametrize(("arch", "pattern"), SHAPES)
@torch.inference_mode()
def test_decoding_in_pieces_of_any_length_is_the_full_forward(arch: str, pattern: str) -> None:
    model, ids = _model(arch, pattern), _ids(3)
    cache = _cache(model, 3)
    pieces = [model(part, kv_cache=cache) for part in ids.split([1, 7, 130, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("arch", "pattern"), SHAPES)
@torch.inference_mode()
def test_one_prompt_is_continued_in_many_ways(arch: str, pattern: str) -> None:
    model, ids = _model(arch, pattern), _ids(3)
    prompt = 135
    ids[:] = torch.cat((ids[:1, :prompt].expand(3, -1), ids[:, prompt:]), dim=1)
    single = _cache(model, 1, prompt)
    first = model(ids[:1, :prompt], kv_cache=single)
    cache = _cache(model, 3)
    cache.prefill(single)
    assert cache.get_pos() == prompt
    rest = [model(ids[:, t : t + 1], kv_cache=cache) for t in range(prompt, LENGTH)]
    expected = model(ids)
    torch.testing.assert_close(first.expand(3, -1, -1), expected[:, :prompt], rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.cat(rest, dim=1), expected[:, prompt:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("arch", ["classic", "modern"])
@torch.inference_mode()
def test_decoding_in_bf16_is_the_full_forward_within_its_rounding(arch: str) -> None:
    exact, ids = _model(arch), _ids(2)
    model = build_gpt(exact.config, device=CPU, seed=0, compute_dtype=torch.bfloat16).eval()
    model.load_state_dict(exact.state_dict())
    cache = _cache(model, 2)
    assert cache.k_cache.dtype == torch.bfloat16
    steps = torch.cat([model(part, kv_cache=cache) for part in ids.split(1, dim=1)], dim=1)
    expected = exact(ids).double()
    for logits in (steps, model(ids)):
        assert float((logits.double() - expected).norm() / expected.norm()) < 0.05


@torch.inference_mode()
def test_a_reset_cache_has_forgotten_everything() -> None:
    model, ids = _model("modern"), _ids(1, 20)
    cache = _cache(model, 1, 20)
    model(_ids(1, 40)[:, 20:], kv_cache=cache)
    cache.reset()
    assert cache.get_pos() == 0 and cache.prev_embedding is None
    assert torch.equal(model(ids, kv_cache=cache), model(ids))


def test_a_cache_that_does_not_fit_is_refused() -> None:
    model = _model("classic")
    with torch.inference_mode():
        full = _cache(model, 1, 8)
        model(_ids(1, 8), kv_cache=full)
        with pytest.raises(ValueError, match="8 \\+ 1 tokens"):
            model(_ids(1, 1), kv_cache=full)
        with pytest.raises(ValueError, match="1 rows, not 2"):
            model(_ids(2, 1), kv_cache=full)
        with pytest.raises(ValueError, match="8 tokens"):
            _cache(model, 1, 7).prefill(full)
        with pytest.raises(ValueError, match="empty"):
            full.prefill(full)
        with pytest.raises(ValueError, match="same model"):
            _cache(_model("classic", n_layer=2), 1).prefill(full)
        with pytest.raises(ValueError, match="more than 1600"):
            model(_ids(1, 1601))


def test_sampling_follows_the_softmax_of_the_k_likeliest() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, -1)
    rng = torch.Generator().manual_seed(0)
    assert sample_next_token(logits, rng, temperature=0.0).unique().tolist() == [2]
    drawn = sample_next_token(logits, rng, temperature=0.5, top_k=2)
    share = float((drawn == 1).double().mean())
    assert set(drawn.unique().tolist()) == {1, 2}
    assert share == pytest.approx(1 / (1 + torch.e**2), abs=0.02)  # logits 2 and 4
    shares = torch.bincount(sample_next_token(logits, rng)[:, 0], minlength=4) / len(logits)
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="temperature"):
        sample_next_token(logits, rng, temperature=-1.0)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be finite"):
            sample_next_token(logits, rng, temperature=wrong)
    with pytest.raises(ValueError, match="top_k"):
        sample_next_token(logits, rng, top_k=0)


@pytest.fixture
def tokenizer(tmp_path: Path) -> RustBPETokenizer:
    return byte_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def engine(tokenizer: RustBPETokenizer) -> Engine:
    return Engine(_model("modern", vocab_size=tokenizer.get_vocab_size()), tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_says_what_the_plain_reference_says(engine: Engine, temperature: float) -> None:
    prompt = [engine.bos, 5, 6, 7]
    reference = list(engine.model.generate(prompt, 20, temperature=temperature, top_k=9, seed=3))
    if engine.bos in reference:
        reference = reference[: reference.index(engine.bos)]
    options = {"max_tokens": 20, "temperature": temperature, "top_k": 9, "seed": 3}
    (sequence,), (mask,) = engine.generate_batch(prompt, **options)  # type: ignore[arg-type]
    assert sequence == prompt + reference
    assert mask == [0] * 4 + [1] * len(reference)
    text = "".join(engine.stream(prompt, **options))  # type: ignore[arg-type]
    assert text == engine.tokenizer.decode(reference)


def test_samples_differ_and_a_seed_repeats_them(engine: Engine) -> None:
    batches = [
        engine.generate_batch([engine.bos], num_samples=4, max_tokens=12, seed=seed)[0]
        for seed in (1, 1, 2)
    ]
    assert batches[0] == batches[1] != batches[2]
    assert len({tuple(row) for row in batches[0]}) == 4


def test_each_sample_ends_at_its_own_stop_token(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bos = engine.bos
    script = iter([[10, bos, 12], [bos, 99, 13], [98, 97, bos], [1, 2, 3]])

    def drawn(*_: object) -> Tensor:
        return torch.tensor(next(script))[:, None]

    monkeypatch.setattr("nanochat.engine.sample_next_token", drawn)
    columns = list(engine.generate([bos], num_samples=3, max_tokens=9))
    assert columns == [
        ([10, bos, 12], [1, 1, 1]),
        ([bos, bos, 13], [1, 0, 1]),
        ([bos, bos, bos], [0, 0, 1]),
    ]
    script = iter([[10, bos, 12], [bos, 99, 13], [98, 97, bos]])
    sequences, masks = engine.generate_batch([bos, 7], num_samples=3, max_tokens=9)
    assert sequences == [[bos, 7, 10], [bos, 7], [bos, 7, 12, 13]]
    assert masks == [[0, 0, 1], [0, 0], [0, 0, 1, 1]]


def test_lengths_end_where_they_must(engine: Engine) -> None:
    full = [engine.bos] * engine.model.config.sequence_len
    assert engine.generate_batch(full)[0] == [full]  # no more than it was trained on, unless told
    assert list(engine.generate([engine.bos], max_tokens=0)) == []
    with pytest.raises(UserError, match="1600 positions"):
        engine.generate_batch(full, max_tokens=1441)
    with pytest.raises(UserError, match="no prompt"):
        engine.generate_batch([])


def test_characters_of_several_tokens_come_whole(tokenizer: RustBPETokenizer) -> None:
    text = "naïve – ok"
    assert list(stream_text(tokenizer, tokenizer.encode(text))) == list(text)
    cut = tokenizer.encode("ï")[:1]
    assert list(stream_text(tokenizer, cut)) == ["�"]


def test_a_seed_that_torch_does_not_take_is_a_sentence(engine: Engine) -> None:
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(UserError, match="out of range"):
            list(engine.generate([1], max_tokens=1, seed=seed))
    for seed in (2**64 - 1, -(2**63)):
        assert len(list(engine.generate([1], max_tokens=1, seed=seed))) == 1


def test_more_samples_than_memory_are_a_sentence(engine: Engine) -> None:
    with pytest.raises(UserError, match="do not fit this device's memory: ask for fewer"):
        list(engine.generate([1], num_samples=10**12, max_tokens=9))
