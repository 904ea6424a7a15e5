"""Shards as other programs leave them: what can be read is read, and what is wrong is said by file and row."""

import logging
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, source
from nanochat.errors import UserError
from nanochat.rows.cache import RowCache
from nanochat.source import get_source, iter_texts
from nanochat.tokenizer import RustBPETokenizer
from scripts import tok_train

from .data_kit import byte_tokenizer, texts, write_shard


def bad_strings() -> pa.Array:
    """A string array whose rows 1 and 3 are not UTF-8, as writers that check nothing leave it."""
    data = pa.array([b"good", b"b\xffd", None, b"\xed\xa0\x80x"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 4, data.buffers())


REPAIRED = ["good", "b\ufffdd", None, "\ufffd\ufffd\ufffdx"]


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view()),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_every_kind_of_string_column_is_text_and_bad_utf8_costs_its_bytes_only(
    tmp_path, kind, caplog
):
    good, bad = tmp_path / "shard_00000.parquet", tmp_path / "shard_00001.parquet"
    texts_ = ["one", None, "", "zwei \u6f22", "one"]
    strings = pa.array(texts_, pa.string())
    to_kind = pa.Array.dictionary_encode if pa.types.is_dictionary(kind) else None
    as_kind = (lambda array: to_kind(array).cast(kind)) if to_kind else (lambda a: a.cast(kind))
    pq.write_table(pa.table({"n": range(5), "text": as_kind(strings)}), good)
    source.check_shard(good)
    assert [text for batch in iter_texts(good, batch_documents=2) for text in batch] == texts_
    assert not caplog.records
    repaired: list[int] = []
    pq.write_table(pa.table({"text": as_kind(bad_strings())}), bad)
    found = [t for batch in iter_texts(bad, batch_documents=3, repaired=repaired) for t in batch]
    assert found == REPAIRED and repaired == [1, 3]
    assert not caplog.records
    list(iter_texts(bad))
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{bad}: 2 documents are not UTF-8, the first one is row 1 (from 0): "
        "U+FFFD stands for their wrong bytes"
    )


def test_bad_utf8_that_arrow_itself_refuses_is_said_with_what_to_do(tmp_path):
    kind = pa.dictionary(pa.int8(), pa.large_string())
    path = tmp_path / "shard_00000.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b"]).dictionary_encode().cast(kind)}), path)
    assert list(iter_texts(path)) == [["a", "b"]]
    pq.write_table(pa.table({"text": bad_strings().dictionary_encode().cast(kind)}), path)
    with pytest.raises(UserError, match=r"not UTF-8, in a column .*: write it as plain strings"):
        list(iter_texts(path))


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([b"x"]), "binary"),
        (pa.array([b"x"]).dictionary_encode(), "dictionary<values=binary"),
        (pa.array([["x"]]), "list<"),
        (pa.array([{"a": "x"}]), "struct<a: string>"),
        (pa.array([None]), "null"),
        (pa.array([1]), "int64"),
    ],
)
def test_another_type_of_column_is_named(tmp_path, column, kind):
    path = tmp_path / "shard_00000.parquet"
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(ValueError, match=f"no string column 'text' .its type is {kind}"):
        source.check_shard(path)
    with pytest.raises(UserError, match=f"shard_00000.*its type is {kind}"):
        list(iter_texts(path))


@pytest.mark.parametrize("entry", ["directory", "dangling link", "link to itself"])
def test_an_entry_that_cannot_be_opened_is_a_sentence_everywhere(
    tmp_path, base_dir, monkeypatch, capsys, entry
):
    for number in (0, 1, 2):
        path = write_shard(tmp_path / "mine", number, texts(50, seed=number))
        if number == 1:
            path.unlink()
            if entry == "directory":
                path.mkdir()
            else:
                path.symlink_to("nowhere" if entry == "dangling link" else path.name)
    path = tmp_path / "mine" / "shard_00001.parquet"
    tokenizer = byte_tokenizer(base_dir / "tokenizer")
    with pytest.raises(UserError, match=r"shard_00001\.parquet (cannot be read|is missing)"):
        list(iter_texts(path))
    cache = RowCache(get_source(path.parent), tokenizer, sequence_len=16, packing="stream")
    with pytest.raises(UserError, match=r"shard_00001\.parquet cannot be read"):
        cache.rows(1)
    for main, name in ((dataset.main, "dataset"), (tok_train.main, "tok_train")):
        monkeypatch.setattr(sys, "argv", [name, "--source", str(tmp_path / "mine")])
        with pytest.raises(UserError, match=r"shard_00001\.parquet"):
            main()


def test_the_check_reads_every_shard_to_its_end_and_names_all_that_are_bad(
    tmp_path, monkeypatch, capsys
):
    for number in range(4):
        path = write_shard(tmp_path, number, texts(2000, seed=number))
        if number in (1, 2):
            data = bytearray(path.read_bytes())
            data[len(data) * 3 // 4 : len(data) * 3 // 4 + 200] = bytes(200)
            path.write_bytes(bytes(data))
    pq.write_table(pa.table({"text": bad_strings()}), tmp_path / "shard_00000.parquet")
    monkeypatch.setattr(sys, "argv", ["dataset", "--source", str(tmp_path)])
    with pytest.raises(UserError, match=r"shard_00001\.parquet is damaged behind row \d+ "):
        dataset.main()
    said = capsys.readouterr().err
    assert "shard_00002.parquet is damaged behind row" in said
    assert "shard_00000.parquet: 2 documents are not UTF-8, the first one is row 1" in said


def test_numbers_are_written_as_ranges():
    assert source.number_ranges([0, 1, 2, 3, 7, 9, 10]) == "0..3, 7, 9..10"
    assert source.number_ranges([]) == ""


def test_packing_repairs_bad_utf8_and_tells_once_by_file_and_row(tmp_path, base_dir, caplog):
    directory = tmp_path / "mine"
    write_shard(directory, 1, texts(5, seed=1))
    path = directory / "shard_00000.parquet"
    pq.write_table(pa.table({"text": bad_strings()}), path)
    tokenizer = byte_tokenizer(base_dir / "tokenizer")
    with caplog.at_level(logging.WARNING):
        cache = RowCache(get_source(directory), tokenizer, sequence_len=3, packing="stream")
        rows = cache.rows(0).read(0, 100)
        cache.close()
    ids = [tokenizer.encode(text, prepend="<|bos|>") for text in REPAIRED if text]
    assert rows[0].tolist() == ids[0][:4]
    assert {0xBD, 0xEF, 0xBF} <= set(rows.ravel().tolist())  # of U+FFFD
    (record,) = caplog.records
    assert f"{path}: 2 documents are not UTF-8, the first one is row 1" in record.getMessage()


def test_the_tokenizer_is_trained_on_repaired_text(tmp_path, monkeypatch, caplog):
    directory = tmp_path / "mine"
    write_shard(directory, 1, texts(5, seed=1))
    pq.write_table(pa.table({"text": bad_strings()}), directory / "shard_00000.parquet")
    options = tok_train.Options(max_chars=1000, doc_cap=0, vocab_size=266)
    trained = tok_train.train(get_source(directory), options, tmp_path / "tok")
    expected = RustBPETokenizer.train_from_iterator([text for text in REPAIRED if text], 266)
    assert trained.fingerprint() == expected.fingerprint()
    assert "2 documents are not UTF-8" in caplog.text
