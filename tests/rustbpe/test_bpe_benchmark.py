"""`benchmarks.bpe` on a small text, without the network."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

import rustbpe


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    draw = random.Random(1)
    words = ["".join(draw.choices("aeiourst", k=draw.randint(1, 9))) for _ in range(900)]
    lines = [f"It's naïve: {' '.join(draw.choices(words, k=9))} 漢字…\n" for _ in range(500)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    offline = {"UV_OFFLINE": "1", "UV_CACHE_DIR": str(cache), "PIP_NO_INDEX": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.bpe", *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | offline,
        capture_output=True,
        text=True,
    )


def test_last_line_has_the_ratios_per_vocabulary_and_threads(
    text: Path, base_dir: Path, tmp_path: Path
) -> None:
    # The libraries that are installed here stand for those that would be fetched.
    for module in (rustbpe, tokenizers):
        package = Path(str(module.__file__)).parent
        directory = base_dir / "benchmarks" / package.name
        directory.mkdir(parents=True)
        (directory / package.name).symlink_to(package)
    arguments = [f"--text={text}", "--vocab=300,400", "--threads=1,2", f"--out={tmp_path / 'out'}"]
    done = run(*arguments, cache=tmp_path / "uv")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    summary = lines[-1]["ratios"]
    assert [(row["vocab"], row["threads"]) for row in summary] == [
        (300, 1),
        (300, 2),
        (400, 1),
        (400, 2),
    ]
    for row in summary:
        assert row["merges_equal"] is True
        assert row["tokenizers_common_share"] > 0.5  # ties go elsewhere there
        for name in ("rustbpe", "tokenizers"):
            for ratio in ("ratio", "cpu_ratio", "rss_ratio"):
                assert row[f"{ratio}_{name}"] > 0
    curve = lines[-2]["curve"]
    assert [point["merges"] for point in curve] == [144]
    measured = lines[:-2]
    assert [row["trainer"] for row in measured] == ["ours", "rustbpe", "tokenizers"] * 4
    for row in measured:
        assert row["merges"] == row["vocab"] - 256
        assert row["counting_s"] + row["merging_s"] == pytest.approx(row["total_s"], abs=0.01)
        assert row["peak_rss_bytes"] > row["idle_rss_bytes"]
    report = json.loads((tmp_path / "out").read_text())
    assert report["ratios"] == summary and report["measurements"] == measured


def test_without_network_it_says_so_and_measures_ours(text: Path, tmp_path: Path) -> None:
    arguments = [f"--text={text}", "--vocab=300", "--threads=1", "--no-curve"]
    done = run(*arguments, cache=tmp_path / "uv")
    assert done.returncode == 0, done.stderr
    for name in ("rustbpe", "tokenizers"):
        assert f"{name}>=" in done.stderr and "cannot be installed (no network?)" in done.stderr
    row = json.loads(done.stdout.splitlines()[-1])["ratios"][0]
    assert row["ratio_rustbpe"] is row["ratio_tokenizers"] is row["merges_equal"] is None


def test_a_text_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    done = run("--text=/nowhere", "--trainers=ours", cache=tmp_path / "uv")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no text /nowhere")
