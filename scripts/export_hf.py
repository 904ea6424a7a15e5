"""Write a checkpoint as a folder that transformers loads: model, tokenizer and a model card.

python -m scripts.export_hf --checkpoint RUN --out DIRECTORY

The same tokens and the same logits there, with transformers' own NanoChat class and no code of ours.
"""

from pathlib import Path

import torch

from nanochat.checkpoint_manager import checkpoint_tokenizer, load_any
from nanochat.common import ArgumentParser, run_command_line
from nanochat.model_export import check_exportable, export_model


def main() -> None:
    parser = ArgumentParser(prog="export_hf", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="a path, the name of a run, or a tag")
    parser.add_argument("--out", required=True, type=Path, help="a new directory")
    parser.add_argument("--name", help="the model's name on its card; none: the directory's")
    args = parser.parse_args()
    model, meta = load_any(args.checkpoint, torch.device("cpu"), compute_dtype=torch.float32)
    check_exportable(model)
    tokenizer = checkpoint_tokenizer(meta, model.config)
    out = export_model(model, tokenizer, meta, args.out, name=args.name or args.out.resolve().name)
    print(f"{out}: AutoModelForCausalLM and AutoTokenizer load it")


if __name__ == "__main__":
    run_command_line(main)
