"""What code written for upstream imports is here, under the same names and with the same arguments."""

import importlib
import inspect

import pytest

NAMES = {
    "gpt": "GPT GPTConfig Linear",
    "optim": "MuonAdamW",
    "tokenizer": "RustBPETokenizer get_tokenizer get_token_bytes SPECIAL_TOKENS",
    "engine": "Engine KVCache sample_next_token",
    "checkpoint_manager": "save_checkpoint load_checkpoint build_model load_model "
    "find_largest_model find_last_step",
    "loss_eval": "evaluate_bpb",
    "core_eval": "evaluate_task",
    "dataset": "list_parquet_files parquets_iter_batched",
    "common": "get_base_dir COMPUTE_DTYPE print0 get_dist_info compute_init compute_cleanup "
    "autodetect_device_type",
}
ARGUMENTS = {
    "gpt.GPT.setup_optimizer": "unembedding_lr embedding_lr matrix_lr weight_decay scalar_lr",
    "gpt.GPT.forward": "idx targets kv_cache loss_reduction",
    "gpt.GPT.generate": "tokens max_tokens temperature top_k seed",
    "gpt.GPT.init_weights": "",
    "gpt.GPT.estimate_flops": "",
    "gpt.GPT.num_scaling_params": "",
    "gpt.GPT.get_device": "",
    "engine.KVCache": "batch_size num_heads seq_len head_dim num_layers device dtype",
    "engine.KVCache.prefill": "other",
    "engine.KVCache.get_layer_cache": "layer",
    "engine.KVCache.advance": "num_tokens",
    "engine.KVCache.reset": "",
    "engine.KVCache.get_pos": "",
    "engine.sample_next_token": "logits rng temperature top_k",
    "checkpoint_manager.save_checkpoint": "checkpoint_dir step model_data optimizer_data "
    "meta_data rank",
    "checkpoint_manager.load_checkpoint": "checkpoint_dir step device load_optimizer rank",
    "checkpoint_manager.build_model": "checkpoint_dir step device phase",
    "checkpoint_manager.load_model": "source device phase",
    "dataset.parquets_iter_batched": "split start step",
}


@pytest.mark.parametrize("module", NAMES)
def test_upstreams_names_are_here(module: str) -> None:
    found = importlib.import_module(f"nanochat.{module}")
    for name in NAMES[module].split():
        assert hasattr(found, name), name


@pytest.mark.parametrize("path", ARGUMENTS)
def test_they_take_upstreams_arguments_in_its_order(path: str) -> None:
    module, *names = path.split(".")
    value = importlib.import_module(f"nanochat.{module}")
    for name in names:
        value = getattr(value, name)
    parameters = [p for p in inspect.signature(value).parameters.values() if p.name != "self"]
    wanted = ARGUMENTS[path].split()
    assert [p.name for p in parameters][: len(wanted)] == wanted
    assert all(
        p.default is not p.empty or p.kind is p.KEYWORD_ONLY for p in parameters[len(wanted) :]
    )
