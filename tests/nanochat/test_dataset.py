"""Sources and downloads, against a real HTTP server that misbehaves."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat import builtin_corpus, dataset
from nanochat.errors import UserError
from nanochat.source import get_source, iter_texts

from . import http_kit
from .data_kit import texts, write_shard
from .http_kit import download

VAL = 1822  # of FineWeb-EDU


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http_kit.FileServer]:
    """Serves training shards 0..3 and the validation shard of FineWeb-EDU."""
    with http_kit.serve() as server:
        for shard in (0, 1, 2, 3, VAL):
            path = write_shard(tmp_path / "origin", shard, texts(2000, seed=shard))
            server.files[path.name] = path.read_bytes()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nanochat.dataset", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def range_start(headers: dict[str, str]) -> int:
    return int(headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))


def same_as_origin(hub: http_kit.FileServer, *shards: int) -> bool:
    source = get_source()
    return all(
        source.shard_path(shard).read_bytes() == hub.files[source.shard_path(shard).name]
        for shard in shards
    )


def test_command_fetches_the_first_shards_and_the_pinned_validation_shard(hub, base_dir):
    done = command("-n", "2", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert same_as_origin(hub, 0, 1, VAL)
    assert get_source().present() == [0, 1, VAL]
    assert get_source().directory == base_dir / "base_data"
    assert not list(get_source().directory.glob("*.part"))


def test_what_is_there_is_not_fetched_again(hub):
    assert download(1) == []
    hub.requests.clear()
    assert download(2) == []
    assert hub.names() == ["shard_00001.parquet"]


def test_a_cut_connection_is_continued_where_it_broke(hub):
    hub.faults["shard_00000.parquet"] = [http_kit.cut_half_way]
    assert download(1) == []
    assert same_as_origin(hub, 0)
    half = len(hub.files["shard_00000.parquet"]) // 2
    first, second = [range_start(headers) for name, headers in hub.requests if "00000" in name]
    assert first == 0 and half - 65_536 <= second <= half


def test_a_killed_download_is_continued_by_the_next_command(hub):
    released = threading.Event()
    hub.faults["shard_00000.parquet"] = [http_kit.stall_half_way(released)]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanochat.dataset", "-n", "1"], stderr=subprocess.DEVNULL
    )
    part = get_source().directory / "shard_00000.parquet.part"
    while not part.exists() or part.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    released.set()
    assert get_source().present() in ([], [VAL])  # no half shard has a shard's name
    hub.requests.clear()
    assert download(1) == []
    assert same_as_origin(hub, 0, VAL)
    (start,) = [range_start(headers) for name, headers in hub.requests if "00000" in name]
    assert start > 0


@pytest.mark.parametrize("code", [500, 503, 429])
def test_a_passing_server_error_is_retried(hub, code):
    hub.faults["shard_00000.parquet"] = [http_kit.status(code)] * 3
    assert download(1) == []
    assert same_as_origin(hub, 0)


def test_a_lasting_server_error_ends_after_a_bounded_number_of_attempts(hub):
    hub.faults["shard_00000.parquet"] = [http_kit.status(500)] * 100
    failures = download(2, attempts=3)
    assert len(failures) == 1 and "shard_00000" in failures[0] and "HTTP 500" in failures[0]
    assert hub.names().count("shard_00000.parquet") == 3
    assert get_source().present() == [1, VAL]


def test_without_a_network_the_line_says_what_the_system_said(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", f"http://{host}")
        failures = download(1, attempts=1)
    problem = f"(the connection to {host} failed: Connection refused)"
    assert failures and all(line.endswith(problem) for line in failures), failures


def test_a_missing_shard_is_one_clear_line_and_a_nonzero_exit(hub):
    done = command("-n", "5")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "shard_00004.parquet" in errors[0] and "404" in errors[0]
    assert hub.names().count("shard_00004.parquet") == 1
    assert same_as_origin(hub, 0, 1, 2, 3, VAL)


def test_a_server_that_has_nothing_is_given_up_early(hub, monkeypatch):
    hub.files.clear()
    monkeypatch.setattr(dataset, "_HOPELESS_AFTER", 3)
    assert len(download(200)) == 3
    assert len(hub.requests) < 20


def test_a_page_instead_of_a_shard_is_refused(hub):
    hub.faults["shard_00000.parquet"] = [http_kit.body(b"<html>busy</html>")] * 100
    failures = download(1, attempts=2)
    assert "not a parquet file" in failures[0]
    assert get_source().present() == [VAL]
    assert not list(get_source().directory.glob("*.part"))


def test_another_file_than_the_announced_one_is_refused_then_fetched_again(hub):
    hub.announce_sha256 = True
    other = hub.files["shard_00001.parquet"]
    hub.faults["shard_00000.parquet"] = [http_kit.body(other, **{"X-Linked-Etag": f'"{"0" * 64}"'})]
    assert download(1) == []
    assert same_as_origin(hub, 0)


def test_a_server_without_ranges_is_read_from_the_start(hub):
    hub.ranges = False
    hub.faults["shard_00000.parquet"] = [http_kit.cut_half_way]
    assert download(1) == []
    assert same_as_origin(hub, 0)


@pytest.mark.parametrize("extra", [b"", b"more than there is"])
def test_a_partial_file_as_long_as_the_shard_or_longer_is_settled(hub, extra):
    directory = get_source().directory
    directory.mkdir()
    complete = hub.files["shard_00000.parquet"]
    (directory / "shard_00000.parquet.part").write_bytes(complete + extra)
    assert download(1) == []
    assert same_as_origin(hub, 0)


def test_the_token_goes_to_the_hub_only_and_is_never_printed(hub):
    with http_kit.serve() as storage:
        storage.files = hub.files
        elsewhere = storage.url.replace("127.0.0.1", "localhost") + "/shard_00000.parquet"
        hub.faults["shard_00000.parquet"] = [http_kit.redirect(elsewhere)]
        hub.files = {**hub.files}
        del hub.files[f"shard_{VAL:05d}.parquet"]
        done = command("-n", "1", HF_TOKEN="hf_secret")
        sent = {headers.get("Authorization") for _, headers in hub.requests}
        passed_on = {headers.get("Authorization") for _, headers in storage.requests}
    assert sent == {"Bearer hf_secret"} and passed_on == {None}
    assert done.returncode == 2  # validation was missing
    assert "hf_secret" not in done.stdout + done.stderr


def test_climbmix_has_a_directory_and_a_validation_shard_of_its_own(hub, base_dir):
    source = get_source("climbmix")
    assert source.directory == base_dir / "base_data_climbmix"
    assert source.val_shard == source.num_train_shards == 6542


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "say how many"),
        (["-n", "1823"], "out of range"),
        (["--source", "fineweb"], "choose one of fineweb-edu, climbmix, builtin"),
        (["--source", "/no/such/directory"], "existing directory"),
        (["-n", "many"], "invalid int"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(capsys, monkeypatch, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["dataset", *arguments])
    with pytest.raises(SystemExit) as exit:
        dataset.run_command_line(dataset.main)
    errors = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and sentence in errors[0]


def test_the_validation_shard_is_pinned_by_number_whatever_is_on_the_disk(base_dir):
    directory = base_dir / "base_data"
    for shard in (0, 3, 7):
        write_shard(directory, shard, [f"train {shard}"])
    source = get_source()
    assert source.present_train() == [0, 3, 7]
    with pytest.raises(UserError, match=r"shard 1822 .*-n 1 --source fineweb-edu"):
        list(dataset.parquets_iter_batched("val"))
    write_shard(directory, VAL, ["held out"])
    train = [text for batch in dataset.parquets_iter_batched("train") for text in batch]
    assert train == ["train 0", "train 3", "train 7"]
    assert list(dataset.parquets_iter_batched("val")) == [["held out"]]
    assert [Path(path).name for path in dataset.list_parquet_files()] == [
        f"shard_{shard:05d}.parquet" for shard in (0, 3, 7, VAL)
    ]


def test_missing_shards_are_named_with_the_command_that_fetches_them(base_dir):
    write_shard(base_dir / "base_data", 0, ["x"])
    with pytest.raises(UserError, match=r"shard 1 \(and 239 more\).*dataset -n 240 --source"):
        get_source().ensure([*range(240), VAL])
    with pytest.raises(UserError, match="has no shard 1823"):
        get_source().ensure([1823])
    with pytest.raises(UserError, match="--source builtin"):
        get_source("builtin").ensure([0])


def test_a_directorys_highest_shard_is_its_validation_shard(tmp_path):
    for shard in (0, 1, 4):
        write_shard(tmp_path, shard, texts(5, seed=shard))
    (tmp_path / "notes.txt").write_text("not a shard")
    source = get_source(tmp_path)
    assert (source.val_shard, source.num_train_shards) == (4, 4)
    assert source.present() == [0, 1, 4] and source.present_train() == [0, 1]
    assert get_source(source.name) == source
    assert source.manifest_sha256() == ""


def test_no_workers_are_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dataset", "-n", "1", "--workers", "0"])
    with pytest.raises(UserError, match="--workers is 0"):
        dataset.main()


def test_a_directory_is_checked_and_reported(tmp_path, capsys, monkeypatch):
    write_shard(tmp_path, 0, texts(5, seed=0))
    monkeypatch.setattr(sys, "argv", ["dataset", "--source", str(tmp_path)])
    with pytest.raises(UserError, match="put at least two"):
        dataset.main()
    write_shard(tmp_path, 2, texts(6, seed=2))
    dataset.main()
    report = capsys.readouterr().out
    assert "1 training shards and validation shard 2, 11 documents" in report
    assert "1 numbers are missing: 1" in report
    (tmp_path / "shard_00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"shard_00001\.parquet cannot be used"):
        dataset.main()


def test_the_builtin_source_is_made_by_the_command(monkeypatch, capsys):
    documents = [f"a text {'o' * n} " + "with a number of words " * 12 for n in range(40)]
    monkeypatch.setattr(builtin_corpus, "_all_texts", lambda: iter(documents))
    monkeypatch.setattr(sys, "argv", ["dataset", "--source", "builtin"])
    dataset.main()
    source = get_source("builtin")
    assert source.present() == list(range(9)) and source.val_shard == 8
    assert len(source.manifest_sha256()) == 64
    assert "8 training shards and validation shard 8, 40 documents" in capsys.readouterr().out


def test_a_damaged_shard_is_a_sentence_that_names_it(tmp_path):
    path = write_shard(tmp_path, 0, texts(500, seed=0))
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 200] = bytes(200)
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"shard_00000\.parquet is damaged"):
        list(iter_texts(path))


def test_a_truncated_shard_on_the_disk_is_named_and_fetched_again(hub, capsys):
    download(1)
    path = get_source().shard_path(0)
    path.write_bytes(path.read_bytes()[:-100])  # as a killed program leaves it that is not ours
    assert download(1) == []
    assert same_as_origin(hub, 0, VAL)
    assert "shard_00000.parquet cannot be used" in capsys.readouterr().err
