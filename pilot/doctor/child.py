"""Answers one question about torch, in a process of its own: `python -m pilot.doctor.child QUESTION …`.

The answer is the last line of its output, a JSON object; a broken driver or a missing library ends this process
instead of the doctor.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from pilot.config import RunConfig
from pilot.wire.code_hashes import code_hashes


def main(arguments: list[str]) -> None:
    question, *rest = arguments
    questions: dict[str, Callable[..., dict[str, Any]]] = {
        "torch": about_torch,
        "data": about_data,
        "sizes": about_sizes,
    }
    try:
        answer = questions[question](*rest)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the doctor looks for
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


def about_torch() -> dict[str, Any]:
    import torch

    from nanochat.gpus import driver_version

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    nccl = ""
    if count and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or "",
        "driver": driver_version(),
        "devices": [torch.cuda.get_device_name(i) for i in range(count)],
        "nccl": nccl,
        "mps": torch.backends.mps.is_available(),
    }


def about_data(config: str) -> dict[str, Any]:
    """Nothing is made: the built-in corpus appears with the first run that wants it."""
    import numpy as np

    from nanochat.errors import UserError
    from nanochat.rows.cache import RowCache
    from nanochat.rows.encoder import BatchEncoder
    from nanochat.source import get_source
    from nanochat.tokenizer import get_tokenizer, tokenizer_dir

    run = RunConfig.from_mapping(json.loads(config))
    if run.source == "builtin":
        shards = run.num_shards
        return {"source": "the built-in corpus", "shards": shards, "wanted_shards": shards}
    try:
        source, tokenizer = get_source(run.source), get_tokenizer(tokenizer_dir(run.tokenizer))
        source.ensure([source.val_shard])
        there = [shard for shard in source.present_train() if shard < run.num_shards]
        if not there:
            source.ensure([0])
    except UserError as error:
        return {"error": str(error)}
    if tokenizer.get_vocab_size() != run.vocab_size:
        size = tokenizer.get_vocab_size()
        return {
            "error": f"the tokenizer has {size} tokens, and the run's vocab-size is {run.vocab_size}"
        }
    rows = RowCache(source, tokenizer, sequence_len=run.sequence_len, packing=run.packing)
    encoder = BatchEncoder(tokenizer, dtype=np.dtype(np.uint32))
    return {
        "source": source.name,
        "shards": len(there),
        "wanted_shards": min(run.num_shards, source.num_train_shards),
        "fingerprints": {
            "tokenizer": tokenizer.fingerprint(),
            "packing": rows.fingerprint(),
            "validation shard": str(source.val_shard),
            "corpus": source.manifest_sha256(),
            "rustbpe": encoder.fingerprint(),
            **code_hashes(),
        },
    }


def about_sizes(config: str, gpus: str) -> dict[str, Any]:
    from pilot.run.sizes import sizes

    run = RunConfig.from_mapping(json.loads(config))
    clients = max(1, run.min_clients)
    return sizes(run, rows=run.device_batch_size or 8, gpus=int(gpus), clients=clients).to_json()


if __name__ == "__main__":
    main(sys.argv[1:])
