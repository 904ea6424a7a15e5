"""What a client has: devices, shards, tokenizer, rows, and fingerprints that all clients must share."""

import hashlib
import logging
import os
import socket
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.builtin import ensure_builtin_tokenizer, prepare_builtin
from nanochat.common import autodetect_device_type, check_device_type
from nanochat.errors import UserError
from nanochat.rows.cache import RowCache
from nanochat.rows.encoder import BatchEncoder
from nanochat.source import Source, get_source
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer, tokenizer_dir
from pilot.config import RunConfig
from pilot.coordination.link import check_run, resolve_url
from pilot.errors import PilotError
from pilot.site.device import check_fp8
from pilot.site.mirror import digest_on_disk, keeps_mirror, mirror_path
from pilot.site.rows import given_rows
from pilot.wire.code_hashes import code_hashes
from pilot.wire.messages import HelloOrder, HelloReply

log = logging.getLogger("pilot.site")


@dataclass(frozen=True)
class SiteData:
    """The data of a run on this site, opened."""

    source: Source
    tokenizer: RustBPETokenizer
    rows: RowCache
    train_shards: list[int]

    def validation_rows(self, first: int, end: int) -> np.ndarray:
        """Validation rows [first, end), (end - first, T+1). Raises UserError if there are fewer."""
        rows = self.rows.rows(self.source.val_shard).read(first, end)
        if len(rows) < end - first:
            raise UserError(
                f"the validation shard {self.source.val_shard} has only {first + len(rows)} rows: "
                f"set eval-rows to at most that number"
            )
        return rows


def open_data(config: RunConfig) -> SiteData:
    """Open the data that the run trains on; the built-in corpus and its tokenizer are made if missing.

    Raises UserError, with the command that repairs it, if anything else is missing.
    """
    directory = tokenizer_dir(config.tokenizer)
    if config.source == "builtin":
        source = prepare_builtin()
        tokenizer = ensure_builtin_tokenizer(directory, config.vocab_size)
    else:
        source = get_source(config.source)
        tokenizer = get_tokenizer(directory)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {tokenizer.get_vocab_size()} tokens, but the run's "
            f"vocab-size is {config.vocab_size}: change vocab-size or choose another tokenizer"
        )
    if config.num_shards > source.num_train_shards:
        raise UserError(
            f"num-shards is {config.num_shards}, but {source.name} has only "
            f"{source.num_train_shards} training shards"
        )
    source.ensure([source.val_shard])
    train_shards = [shard for shard in source.present_train() if shard < config.num_shards]
    if not train_shards:
        source.ensure([0])
    rows = RowCache(source, tokenizer, sequence_len=config.sequence_len, packing=config.packing)
    return SiteData(source, tokenizer, rows, train_shards)


def hello(order: HelloOrder) -> HelloReply:
    """Report what this client has. What a user can repair is not raised: it is the reply's `error`."""
    if order.note:
        log.warning("The server of run %s does not let this client in: %s", order.run, order.note)
    try:
        config = RunConfig.from_mapping(order.config)
        kind = autodetect_device_type() if config.device == "auto" else config.device
        check_fp8(config, torch.device(kind))
        given_rows(config.device_batch_size)  # a mistake is one before work begins
        data = open_data(config)
        validation = data.validation_rows(0, config.eval_rows)
        devices, device_name = _devices(config)
        encoder = BatchEncoder(data.tokenizer, dtype=np.dtype(np.uint32))
    except (UserError, PilotError, OSError) as error:
        return HelloReply(error=str(error), host=socket.gethostname())
    reaches, warning = _redis(order)
    return HelloReply(
        warning=warning,
        redis=reaches,
        devices=devices,
        device_name=device_name,
        host=socket.gethostname(),
        shards=data.train_shards,
        fingerprints={
            "tokenizer": data.tokenizer.fingerprint(),
            "packing": data.rows.fingerprint(),
            "validation shard": str(data.source.val_shard),
            "validation rows": _sha256(validation),
            "corpus": data.source.manifest_sha256(),
            "rustbpe": encoder.fingerprint(),
            **code_hashes(),
        },
        versions={"torch": torch.__version__},
        mirror=_mirror(order, config),
    )


def _sha256(rows: np.ndarray) -> str:
    # as 32 bits, whatever width the cache has on disk
    return hashlib.sha256(np.ascontiguousarray(rows, dtype="<u4").tobytes()).hexdigest()


def _devices(config: RunConfig) -> tuple[int, str]:
    """(number of worker processes to run here, name of their device)."""
    kind = autodetect_device_type() if config.device == "auto" else config.device
    check_device_type(kind)
    if kind == "cuda":
        count = torch.cuda.device_count()
        if config.client_processes > count:
            raise UserError(
                f"client-processes is {config.client_processes}, but this machine has {count} GPUs"
            )
        return config.client_processes or count, torch.cuda.get_device_name(0)
    if kind == "mps" and config.client_processes > 1:
        raise UserError("several processes cannot share the MPS device: set client-processes to 1")
    return config.client_processes or 1, f"{kind} ({os.cpu_count()} cores)"


def _mirror(order: HelloOrder, config: RunConfig) -> str:
    if not keeps_mirror(config):
        return ""
    return digest_on_disk(mirror_path(order.run, order.client))


def _redis(order: HelloOrder) -> tuple[bool, str]:
    """Whether the run's Redis can be used here, and a sentence if not: each order then ends by its seconds."""
    try:
        if resolved := resolve_url(order.redis_url):
            check_run(resolved, order.run)
        return bool(resolved), ""
    except PilotError as error:
        return False, str(error)
