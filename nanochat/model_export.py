"""Write a classic model as a folder that transformers loads with its own NanoChat class.

No code of ours is needed there. The weights are written in fp32, which is what was trained; the fp32
logits are then the same (transformers 5.23 on a CPU, depth 4 and 12: no bit differs).
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanochat.common import user_path
from nanochat.errors import UserError
from nanochat.files import atomic_write_json, atomic_write_text, fsync_dir
from nanochat.gpt import GPT
from nanochat.gpt_config import GPTConfig
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer_export import export_hf as export_tokenizer

_BLOCK_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def export_model(
    model: GPT, tokenizer: RustBPETokenizer, meta: dict[str, Any], out: Path, *, name: str
) -> Path:
    """Make the folder `out`, whole or not at all; returns it.

    Raises UserError for a model that the class cannot compute, and if `out` holds something.
    """
    check_exportable(model)
    out = user_path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: name a new directory")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            folder = Path(temporary) / "model"
            folder.mkdir()
            export_tokenizer(tokenizer, folder, sequence_len=model.config.sequence_len)
            bos = tokenizer.get_bos_token_id()
            atomic_write_json(folder / "config.json", hf_config(model.config, bos=bos))
            ends = {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": bos}
            atomic_write_json(folder / "generation_config.json", ends)
            card = model_card(model, meta, name=name, vocab_size=tokenizer.get_vocab_size())
            atomic_write_text(folder / "README.md", card)
            weights = folder / "model.safetensors"
            save_file(hf_weights(model), weights, metadata={"format": "pt"})
            weights.chmod(0o644)  # it makes a file for its owner alone
            with open(weights, "rb+") as file:
                os.fsync(file.fileno())
            if out.exists():
                out.rmdir()
            shutil.move(folder, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out} ({error}): make room there") from error
    fsync_dir(out.parent)
    return out


def check_exportable(model: GPT) -> None:
    """Raise UserError, with what to use instead, for what transformers' class cannot compute."""
    if model.config.is_modern:
        raise UserError(
            "transformers has no class for the modern architecture: use the checkpoint with "
            "scripts.chat_cli and scripts.base_eval, or with nanochat, whose layout it has; "
            "--arch classic trains a model that can be exported"
        )
    if any(window < model.config.sequence_len for window in model.windows):
        raise UserError(
            f"transformers' class has no attention windows and this model has "
            f"{model.config.pattern!r}: use the checkpoint with scripts.chat_cli and "
            "scripts.base_eval; --window-pattern L trains a model that can be exported"
        )


def hf_config(config: GPTConfig, *, bos: int) -> dict[str, Any]:
    """The content of `config.json`, a NanoChatConfig."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "rms_norm_eps": torch.finfo(torch.float32).eps,  # F.rms_norm's default
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "final_logit_softcapping": 15.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": bos,
        "pad_token_id": None,  # a padding row of the table would get no gradient
        "dtype": "float32",
    }


def hf_weights(model: GPT) -> dict[str, Tensor]:
    """The weights by transformers' names, fp32, without the rows that pad the vocabulary."""

    def fp32(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()

    state, vocab_size = model.state_dict(), model.config.vocab_size
    weights = {
        "model.embed_tokens.weight": fp32(state["transformer.wte.weight"][:vocab_size]),
        "lm_head.weight": fp32(state["lm_head.weight"][:vocab_size]),
    }
    for layer in range(model.config.n_layer):
        for ours, theirs in _BLOCK_NAMES.items():
            tensor = state[f"transformer.h.{layer}.{ours}.weight"]
            weights[f"model.layers.{layer}.{theirs}.weight"] = fp32(tensor)
    return weights


def model_card(model: GPT, meta: dict[str, Any], *, name: str, vocab_size: int) -> str:
    """README.md of the folder: what it is, what it was trained on, how well it did, how to use it."""
    config, data = model.config, meta.get("data", {})
    parameters = model.num_scaling_params()["total"]
    tokens = meta.get("tokens")
    if tokens is None and meta.get("step") and meta.get("total_batch_size"):
        tokens = meta["step"] * meta["total_batch_size"]
    bpb = meta.get("val_bpb")
    facts = {
        "Parameters": f"{parameters:,}",
        "Trained on": data.get("source", "unknown"),
        "Tokens": f"{tokens:,}" if tokens else "unknown",
        "Optimizer steps": f"{meta['step']:,}" if meta.get("step") else "unknown",
        "Federated rounds": f"{meta['rounds']:,}" if meta.get("rounds") else None,
        "Validation": (
            f"{bpb:.4f} bits per byte ({data.get('eval_rows', '?')} rows of shard "
            f"{data.get('val_shard', '?')})"
            if bpb is not None
            else "not measured"
        ),
        "Rows": f"{config.sequence_len} tokens, packed as {data.get('packing', 'unknown')}",
        "Positions": f"trained on {config.sequence_len}; further ones are computed, and untrained",
        "Tokenizer": f"byte-pair, {vocab_size:,} tokens, SHA-256 {data.get('tokenizer_sha256', '?')}",
    }
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation"),
        *("tags:", "- nanochat", "---", "", f"# {name}", ""),
        f"A nanochat model of {config.n_layer} layers. It is a base model: it completes text and is not "
        "instruction-tuned.",
        *("", "| | |", "|---|---|"),
        *(f"| {key} | {value} |" for key, value in facts.items() if value is not None),
        *("", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
        *('tokenizer = AutoTokenizer.from_pretrained("this folder")',),
        *('model = AutoModelForCausalLM.from_pretrained("this folder")',),
        *('ids = tokenizer("The capital of France is", return_tensors="pt")',),
        *("print(tokenizer.decode(model.generate(**ids, max_new_tokens=32)[0]))", "```", ""),
        "Texts of unequal length are padded on the left with `<|bos|>` (`padding=True`); pass the "
        "attention mask with them.",
        *("", "## Configuration", "", "| key | value |", "|---|---|"),
        *(f"| `{key}` | `{value}` |" for key, value in config.to_meta().items()),
    ]
    settings = meta.get("user_config", {})
    if settings:
        lines += ["", "## Settings of the run", "", "| key | value |", "|---|---|"]
        lines += [f"| `{key}` | `{value}` |" for key, value in sorted(settings.items())]
    return "\n".join(lines) + "\n"
