"""Row caches, with real packing processes that are stopped, killed and doubled."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import files
from nanochat.errors import UserError
from nanochat.rows import cache as cache_module
from nanochat.rows.cache import RowCache
from nanochat.rows.packing import PACKINGS
from nanochat.rows.stream import RowStream, Segment
from nanochat.source import get_source

from ...waiting import until
from ..data_kit import byte_tokenizer, texts, write_shard
from .cache_kit import T, reference

# What another process of the site does: read a shard whole and print its hash.
_READ_ALL = """
import hashlib, sys
from nanochat.rows.cache import RowCache
from nanochat.dataset import get_source
from nanochat.tokenizer import get_tokenizer
cache = RowCache(get_source(sys.argv[1]), get_tokenizer(), sequence_len=31, packing="stream")
rows = cache.rows(int(sys.argv[2]))
print(rows._packer._process.pid if rows._packer else 0, flush=True)
print(hashlib.sha256(rows.read(0, 10**9).tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard 0 takes much longer to pack than any test lasts (800 MB of text, a small file)."""
    directory = tmp_path_factory.mktemp("large")
    write_shard(directory, 1, texts(5, seed=1))
    documents = pa.array(["pack my box with five dozen liquor jugs " * 10] * 20_000)
    table = pa.table({"text": documents})
    with pq.ParquetWriter(directory / "shard_00000.parquet", table.schema) as writer:
        for _ in range(100):
            writer.write_table(table, row_group_size=1000)
    return directory


def packer_of(rows: cache_module.ShardRows) -> psutil.Process:
    assert rows._packer is not None
    return psutil.Process(rows._packer._process.pid)


# --- what is packed


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_are_those_of_the_packing_rule(make_cache, tokenizer, packing):
    rows = make_cache(packing=packing).rows(1)
    expected = reference(tokenizer, texts(60, seed=1), packing)
    everything = rows.read(0, 10**9)
    assert everything.dtype == np.uint16
    np.testing.assert_array_equal(everything, expected)
    assert rows.num_rows == len(expected)
    np.testing.assert_array_equal(rows.read(3, 7), expected[3:7])
    assert rows.read(len(expected) - 2, 10**9).shape == (2, T + 1)
    assert rows.read(10**9, 10**9 + 5).shape == (0, T + 1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_empty_missing_tiny_and_very_long_documents(make_cache, tokenizer, mine, packing):
    documents = ["", None, "a", "b", "", "x" * 100_000, "c", *texts(20, seed=9), None, " " * 5000]
    write_shard(mine, 0, documents)
    rows = make_cache(packing=packing).rows(0)
    expected = reference(tokenizer, documents, packing)
    np.testing.assert_array_equal(rows.read(0, 10**9), expected)
    assert rows.stats is not None and rows.stats.documents == len(documents) - 4


def test_a_shard_shorter_than_a_row_has_none(make_cache, mine):
    write_shard(mine, 0, ["short"])
    cache = make_cache()
    assert cache.rows(0).read(0, 5).shape == (0, T + 1)
    assert cache.known_rows == {0: 0}


def test_a_large_vocabulary_is_stored_in_uint32(mine, tmp_path):
    tokenizer = byte_tokenizer(tmp_path / "wide", num_pairs=65_536)
    cache = RowCache(get_source(mine), tokenizer, sequence_len=T, packing="stream")
    rows = cache.rows(1).read(0, 10**9)
    cache.close()
    assert rows.dtype == np.uint32 == cache.dtype
    assert rows[0, 0] == tokenizer.get_bos_token_id() > 65_536
    np.testing.assert_array_equal(rows, reference(tokenizer, texts(60, seed=1), "stream"))


def test_validation_rows_of_ones_own_directory_come_from_its_last_shard(make_cache, tokenizer):
    cache = make_cache()
    rows = cache.rows(cache.source.val_shard).read(0, 4)
    np.testing.assert_array_equal(rows, reference(tokenizer, texts(60, seed=2), "stream")[:4])


def test_the_share_discarded_is_reported(make_cache, caplog):
    caplog.set_level("INFO", logger="nanochat.rows.cache")
    rows = make_cache(packing="bestfit").rows(0)
    rows.read(0, 10**9)
    assert rows.stats is not None
    in_rows = rows.stats.rows * (T + 1)
    assert rows.stats.discarded_tokens == rows.stats.tokens - in_rows > 0
    share = f"{100 * rows.stats.discarded_share:.1f} % of {rows.stats.tokens} tokens discarded"
    assert share in caplog.text


# --- the cache


def test_a_shard_can_be_waited_for_until_it_is_packed(make_cache, tokenizer):
    cache = make_cache()
    assert cache.wait_packed(1) == len(reference(tokenizer, texts(60, seed=1), "stream"))
    assert cache.known_rows == {1: cache.wait_packed(1)}


def test_packed_rows_are_not_packed_again(make_cache, monkeypatch):
    first = make_cache().rows(0).read(0, 10**9)
    monkeypatch.setattr(cache_module, "_PackerProcess", lambda *_: pytest.fail("packed again"))
    np.testing.assert_array_equal(make_cache().rows(0).read(0, 10**9), first)


@pytest.mark.parametrize("damage", ["truncated", "no statistics"])
def test_a_damaged_cache_file_is_packed_again(make_cache, base_dir, damage):
    first = make_cache().rows(0).read(0, 10**9)
    (path,) = (base_dir / "rows").glob("*.rows")
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.with_suffix(".stats").unlink()
    np.testing.assert_array_equal(make_cache().rows(0).read(0, 10**9), first)


def test_a_shards_hash_is_remembered_until_the_file_is_touched(mine, tmp_path, monkeypatch):
    path, directory = mine / "shard_00000.parquet", tmp_path / "rows"
    directory.mkdir()
    first = files.remembered_sha256(path, directory)
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256_file", lambda path: pytest.fail("it was hashed again"))
        assert files.remembered_sha256(path, directory) == first
    stat = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"!")  # as long, and no older by its mtime
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = files.remembered_sha256(path, directory)
    assert changed == hashlib.sha256(path.read_bytes()).hexdigest() != first
    for remembered in directory.iterdir():
        remembered.write_text("")  # cut short
    assert files.remembered_sha256(path, directory) == changed


def test_another_shard_tokenizer_length_or_packing_is_another_file(
    make_cache, mine, base_dir, tmp_path
):
    make_cache().rows(0).read(0, 9999)
    make_cache(packing="bestfit").rows(0).read(0, 9999)
    make_cache(sequence_len=T + 1).rows(0).read(0, 9999)
    other = byte_tokenizer(tmp_path / "other", num_pairs=1)
    cache = RowCache(get_source(mine), other, sequence_len=T, packing="stream")
    cache.rows(0).read(0, 9999)
    cache.close()
    write_shard(mine, 0, texts(60, seed=77))  # replaced by another of the same number
    make_cache().rows(0).read(0, 9999)
    assert len(list((base_dir / "rows").glob("*.rows"))) == 5


def test_fingerprints_are_equal_on_sites_that_agree(make_cache, large):
    assert make_cache().fingerprint() == make_cache(large).fingerprint()
    others = [make_cache(packing="bestfit"), make_cache(sequence_len=7)]
    assert len({cache.fingerprint() for cache in [make_cache(), *others]}) == 3


def test_mistakes_are_sentences(make_cache, mine, tokenizer):
    with pytest.raises(UserError, match="choose one of bestfit, stream"):
        make_cache(packing="tight")
    with pytest.raises(UserError, match="too short"):
        make_cache(sequence_len=0)
    (mine / "shard_00001.parquet").unlink()
    with pytest.raises(UserError, match=r"shard 1 of .* is not in"):
        make_cache().rows(1)


# --- packing processes


def test_rows_are_served_while_the_rest_is_being_packed(make_cache, large, tokenizer):
    rows = make_cache(large).rows(0)
    head = rows.read(0, 100)
    assert rows.num_rows is None and rows.stats is None
    document = "pack my box with five dozen liquor jugs " * 10
    np.testing.assert_array_equal(head, reference(tokenizer, [document] * 12, "stream")[:100])


def test_waiting_for_rows_ends_when_it_should_stop(make_cache, large):
    cache = make_cache(large)
    stops = iter([False, False, True])
    assert cache.wait_packed(0, should_stop=lambda: next(stops)) is None
    far = cache.rows(0).read(10**9, 10**9 + 1, should_stop=lambda: True)
    assert far.shape == (0, T + 1)
    stream = RowStream(cache, [Segment(0, 0, 10**9, None), Segment(0, 1, 0, None)])
    assert len(stream.read(5, should_stop=lambda: True)) == 0
    assert stream.position == (0, 0, 10**9, None)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_killed_packer_is_taken_over_where_it_stopped(make_cache, mine, tokenizer, packing):
    documents = texts(40_000, seed=5, words=4)
    write_shard(mine, 0, documents)
    rows = make_cache(packing=packing).rows(0)
    packer = packer_of(rows)
    state = rows.job.path("state")
    until(state.exists, every_s=0.005)
    packer.send_signal(signal.SIGKILL)
    packer.wait()
    assert rows.num_rows is None, "the packer was done before it could be killed"
    durable = json.loads(state.read_text())["rows"]
    partial = rows.job.path("partial")
    again = make_cache(packing=packing).rows(0)
    sizes = [durable]
    while again.num_rows is None:
        with contextlib.suppress(FileNotFoundError):  # it has its final name
            sizes.append(partial.stat().st_size // again.job.row_bytes)
    everything = again.read(0, 10**9)
    np.testing.assert_array_equal(everything, reference(tokenizer, documents, packing))
    np.testing.assert_array_equal(rows.read(0, 10**9), everything)
    assert min(sizes) >= durable >= 4096
    assert not state.exists() and not partial.exists()


def test_a_packer_of_another_process_is_waited_for_and_taken_over(make_cache, large, tokenizer):
    other = subprocess.Popen(
        [sys.executable, "-c", _READ_ALL, str(large), "0"], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    packer = psutil.Process(int(other.stdout.readline()))
    until((rows := make_cache(large).rows(0)).job.partial_rows)
    rows.read(0, 50)
    assert psutil.pid_exists(packer.pid)
    other.kill()
    other.communicate()
    until(lambda: not packer.is_running())  # a packer dies with its parent
    assert rows.num_rows is None
    beyond = rows.job.partial_rows() + 1000
    assert len(rows.read(beyond - 1, beyond)) == 1  # ours continued
    assert packer_of(rows).pid != packer.pid


def test_a_packer_ends_with_its_cache(make_cache, large):
    cache = make_cache(large)
    packer = packer_of(cache.rows(0))
    cache.close()
    assert not packer.is_running()


def test_processes_that_pack_the_same_shard_at_once_read_the_same_rows(mine, tokenizer):
    write_shard(mine, 0, texts(3000, seed=6))
    command = [sys.executable, "-c", _READ_ALL, str(mine), "0"]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    hashes = {reader.communicate()[0].split()[1] for reader in readers}
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    expected = reference(tokenizer, texts(3000, seed=6), "stream")
    assert hashes == {hashlib.sha256(expected.tobytes()).hexdigest()}


def test_a_corrupt_shard_is_a_sentence_for_every_reader(make_cache, mine):
    path = mine / "shard_00000.parquet"
    path.write_bytes(b"PAR1" + bytes(1000) + b"PAR1")
    caches = [make_cache(), make_cache()]
    for cache in caches:
        with pytest.raises(UserError, match=r"shard_00000\.parquet is damaged"):
            cache.rows(0).read(0, 1)
    with pytest.raises(UserError, match=r"shard_00000\.parquet is damaged"):
        caches[0].rows(0).read(0, 1)  # asked again: told again


def test_a_shard_that_is_corrupt_further_on_serves_no_row_behind_that(make_cache, mine):
    path = write_shard(mine, 0, texts(3000, seed=3))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes(20_000)
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"shard_00000\.parquet is damaged"):
        make_cache().rows(0).read(0, 10**9)


def test_a_packer_that_always_dies_is_not_started_for_ever(make_cache, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"died 3 times.*exit code 1"):
        make_cache().rows(0).read(0, 1)


def test_a_tokenizer_replaced_while_in_use_is_noticed(make_cache, base_dir):
    cache = make_cache()
    byte_tokenizer(base_dir / "tokenizer", num_pairs=3)
    with pytest.raises(UserError, match="was replaced while it was in use"):
        cache.rows(0).read(0, 1)
