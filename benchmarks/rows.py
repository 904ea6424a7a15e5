"""How fast documents become rows, and rows are read, beside what upstream's loader does.

python -m benchmarks.rows                                   # the built-in corpus
python -m benchmarks.rows --text ../shared/data/books --seq-len 2048 --rounds 5

`--text` is a directory of parquet shards with a column `text`, or `builtin`. Upstream's loader is
`reference_rows` below, written from its description: batches of 128 documents tokenized with
tiktoken, best-fit from a list of 1000 by linear scan. Ours is what runs in production, `packer.pack`,
with its parquet reading, its file and its fsyncs. Both take one thread and the same documents; rounds
are interleaved, figures are medians of CPU seconds, set-up excluded. On a busy machine trust the ratios.

Then: reading a step's rows, as a share of a training step of a small model (depth 4, 4,096 tokens,
which is the fastest step there is), and resuming at row 10 million of a (sparse) file of rows.
Lines are JSON; the last one holds everything.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from nanochat.builtin import open_source
from nanochat.common import ArgumentParser, run_command_line
from nanochat.files import sha256_file
from nanochat.gpt import build_gpt, config_for_depth
from nanochat.kernels.choices import default_compute_dtype
from nanochat.rows.cache import RowCache
from nanochat.rows.encoder import BatchEncoder
from nanochat.rows.packer import PackJob, PackStats, pack
from nanochat.rows.packing import BUFFER_DOCUMENTS, make_packer
from nanochat.schedule import make_schedule
from nanochat.source import Source, cropped, iter_texts
from nanochat.tokenizer import RustBPETokenizer
from nanochat.trainer import Trainer

REFERENCE_BATCH = 128  # documents that upstream tokenizes at once
RESUME_ROW = 10_000_000
STEP_TOKENS, STEP_SEQUENCE_LEN, STEP_DEPTH = 4096, 512, 4


def main() -> None:
    parser = ArgumentParser(prog="benchmarks.rows", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", default="builtin", help="a directory of shards, or builtin")
    parser.add_argument(
        "--vocab", type=int, default=32768, help="of the tokenizer trained for this"
    )
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken")
    parser.add_argument("--no-step", action="store_true", help="leave the training step out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(args.text)
    with tempfile.TemporaryDirectory(prefix="rows-") as name:
        directory = Path(name)
        tokenizer = train_tokenizer(source, args.vocab, directory / "tokenizer")
        job = make_job(source.shard_path(0), tokenizer, directory, args.seq_len)
        report: dict[str, Any] = {
            "text": args.text,
            "vocab": tokenizer.get_vocab_size(),
            "seq_len": args.seq_len,
            "packing": measure_packing(job, tokenizer, args.rounds),
        }
        print(json.dumps(report["packing"]), flush=True)
        report["reading"] = measure_reading(source, tokenizer, directory, step=not args.no_step)
        print(json.dumps(report["reading"]), flush=True)
        report["resume"] = measure_resuming(source, tokenizer, directory, args.seq_len)
    print(json.dumps(report))


def train_tokenizer(source: Source, vocab_size: int, directory: Path) -> RustBPETokenizer:
    batches = ([text or "" for text in batch] for batch in iter_texts(source.shard_path(0)))
    texts = cropped(batches, max_chars=20_000_000, doc_cap=10_000)
    tokenizer = RustBPETokenizer.train_from_iterator(texts, vocab_size)
    tokenizer.save(directory)
    return tokenizer


def make_job(shard: Path, tokenizer: RustBPETokenizer, directory: Path, seq_len: int) -> PackJob:
    rows = directory / "rows"
    rows.mkdir(exist_ok=True)
    return PackJob(
        shard_path=str(shard),
        tokenizer_dir=str(tokenizer.directory),
        tokenizer_sha256=tokenizer.fingerprint(),
        vocab_size=tokenizer.get_vocab_size(),
        sequence_len=seq_len,
        packing="bestfit",
        directory=str(rows),
        key="bench",
    )


# -- packing -----------------------------------------------------------------------------------


def reference_rows(
    shard: Path, tokenizer: RustBPETokenizer, seq_len: int, batch_rows: int = 8
) -> Iterator[torch.Tensor]:
    """Upstream's loader as it is described: (B, T+1) of int64. Ends with the shard, as ours does."""
    bos, capacity = tokenizer.get_bos_token_id(), seq_len + 1
    documents: list[list[int]] = []

    def batches() -> Iterator[list[str]]:
        file = pq.ParquetFile(shard)
        for group in range(file.num_row_groups):
            texts = file.read_row_group(group, columns=["text"]).column("text").to_pylist()
            for first in range(0, len(texts), REFERENCE_BATCH):
                yield texts[first : first + REFERENCE_BATCH]

    source = batches()
    rows = torch.empty((batch_rows, capacity), dtype=torch.long)
    while True:
        for row in rows:
            filled = 0
            while filled < capacity:
                while len(documents) < BUFFER_DOCUMENTS and (texts := next(source, None)):
                    documents.extend(tokenizer.encode(texts, prepend=bos, num_threads=1))
                if not documents:
                    return
                room, best, best_length = capacity - filled, -1, 0
                for i, document in enumerate(documents):
                    if best_length < len(document) <= room:
                        best, best_length = i, len(document)
                if best < 0:
                    best = min(range(len(documents)), key=lambda i: len(documents[i]))
                taken = documents.pop(best)[:room]
                row[filled : filled + len(taken)] = torch.tensor(taken)
                filled += len(taken)
        yield rows.clone()


def run_reference(job: PackJob, tokenizer: RustBPETokenizer) -> int:
    batches = reference_rows(Path(job.shard_path), tokenizer, job.sequence_len)
    return sum(batch.numel() for batch in batches)


def run_ours(job: PackJob) -> PackStats:
    for suffix in ("rows", "stats", "state", "partial"):
        job.path(suffix).unlink(missing_ok=True)
    return pack(job, num_threads=1)


def measure_packing(job: PackJob, tokenizer: RustBPETokenizer, rounds: int) -> dict[str, Any]:
    """Tokens packed per CPU second by both, and where the time goes."""
    set_up = statistics.median(cpu_s(lambda: set_up_packer(job)) for _ in range(3))
    ours, theirs, stages = [], [], []
    for _ in range(rounds):
        begun = time.process_time()
        stats = run_ours(job)
        tokens = stats.rows * (job.sequence_len + 1)
        ours.append(tokens / (time.process_time() - begun - set_up))
        begun = time.process_time()
        tokens = run_reference(job, tokenizer)
        theirs.append(tokens / (time.process_time() - begun))
        stages.append(measure_stages(job, tokenizer))
    return {
        "rows": stats.rows,
        "reference_rows": tokens // (job.sequence_len + 1),
        "documents": stats.documents,
        "tokens": stats.tokens,
        "discarded_share": round(stats.discarded_share, 4),
        "tokens_per_cpu_s": round(statistics.median(ours)),
        "reference_tokens_per_cpu_s": round(statistics.median(theirs)),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2),
        "set_up_s": round(set_up, 3),
        "stages_s": {k: round(statistics.median(s[k] for s in stages), 4) for k in stages[0]},
    }


def set_up_packer(job: PackJob) -> None:
    """What a packer does once, whatever its shard's size."""
    tokenizer = RustBPETokenizer.from_directory(job.tokenizer_dir)
    tokenizer.fingerprint()
    BatchEncoder(tokenizer, dtype=job.dtype)


def measure_stages(job: PackJob, tokenizer: RustBPETokenizer) -> dict[str, float]:
    """CPU seconds of each stage by itself, on the whole shard; tiktoken's beside it."""
    seconds: dict[str, float] = {}
    encoder = BatchEncoder(tokenizer, dtype=job.dtype)
    packer = make_packer(
        "bestfit",
        sequence_len=job.sequence_len,
        bos=tokenizer.get_bos_token_id(),
        dtype=job.dtype,
    )

    def stage(name: str, work: Callable[[], Any]) -> Any:
        begun = time.process_time()
        result = work()
        seconds[name] = time.process_time() - begun
        return result

    def write() -> None:
        with open(Path(job.directory) / "stage", "wb", buffering=0) as file:
            for row in rows:
                file.write(row.data)
            os.fsync(file.fileno())

    batches = stage(
        "read", lambda: [[t or "" for t in b] for b in iter_texts(Path(job.shard_path))]
    )
    ids = stage("tokenize", lambda: [one for batch in batches for one in encoder.encode(batch)])
    rows = stage("pack", lambda: list(packer.rows(enumerate(ids))))
    stage("write", write)
    stage(
        "tiktoken",
        lambda: [tokenizer.encode(batch, num_threads=1) for batch in batches],
    )
    return seconds


def cpu_s(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


# -- reading -----------------------------------------------------------------------------------


def measure_reading(
    source: Source, tokenizer: RustBPETokenizer, directory: Path, *, step: bool
) -> dict[str, Any]:
    """Reading the rows of a step, and that step, alternately."""
    cache = RowCache(
        source,
        tokenizer,
        sequence_len=STEP_SEQUENCE_LEN,
        packing="bestfit",
        directory=directory / "reading",
    )
    shard = cache.rows(0)
    count = STEP_TOKENS // STEP_SEQUENCE_LEN
    total = cache.wait_packed(0) or 0
    take = make_step() if step else None
    reads, steps = [], []
    for n in range(8 if step else 200):
        first = n * 977 * count % max(1, total - count)  # not the next ones: nothing is read ahead
        begun = time.perf_counter()
        rows = shard.read(first, first + count)
        reads.append(time.perf_counter() - begun)
        if take is not None:
            begun = time.perf_counter()
            take(rows)
            steps.append(time.perf_counter() - begun)
    cache.close()
    read_s = statistics.median(reads)
    step_s = statistics.median(steps[1:]) if steps else None
    return {
        "rows_a_step": count,
        "read_s": round(read_s, 7),
        "step_s": None if step_s is None else round(step_s, 4),
        "share": None if step_s is None else round(read_s / step_s, 6),
    }


def make_step() -> Callable[[np.ndarray], None]:
    device = torch.device("cpu")
    config = config_for_depth(STEP_DEPTH, vocab_size=4096, sequence_len=STEP_SEQUENCE_LEN)
    model = build_gpt(
        config, device=device, seed=0, compute_dtype=default_compute_dtype(device.type)
    )
    trainer = Trainer(model, model.setup_optimizer(), device=device, device_batch_rows=8)
    hyper = make_schedule("pilot", total_steps=1000, weight_decay=0.0).at(0)

    def take(rows: np.ndarray) -> None:
        trainer.step(rows % config.vocab_size, hyper=hyper)

    return take


# -- resuming ----------------------------------------------------------------------------------


def measure_resuming(
    source: Source, tokenizer: RustBPETokenizer, directory: Path, seq_len: int
) -> dict[str, Any]:
    """From nothing to the rows behind row 10 million, as a resumed run asks for them."""
    options: dict[str, Any] = {
        "sequence_len": seq_len,
        "packing": "bestfit",
        "directory": directory / "resume",
    }
    before = RowCache(source, tokenizer, **options)
    before.wait_packed(0)
    job = before.rows(0).job
    before.close()
    stats = replace(pack_stats(job), rows=RESUME_ROW + 1000)
    os.truncate(job.path("rows"), stats.rows * job.row_bytes)  # sparse: it takes no room
    job.path("stats").write_text(json.dumps(vars(stats)))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        cache = RowCache(source, tokenizer, **options)
        rows = cache.rows(0).read(RESUME_ROW, RESUME_ROW + 8)
        times.append(time.perf_counter() - begun)
        assert len(rows) == 8
        cache.close()
    hashing = cpu_s(lambda: sha256_file(source.shard_path(0)))
    shutil.rmtree(directory / "resume")
    return {"row": RESUME_ROW, "seconds": round(statistics.median(times), 5), "hash_s": hashing}


def pack_stats(job: PackJob) -> PackStats:
    stats = job.complete()
    assert stats is not None
    return stats


if __name__ == "__main__":
    run_command_line(main)
