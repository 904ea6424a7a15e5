"""All benchmarks start alike, and end with a line of JSON."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from zygote import Zygote

ROOT = Path(__file__).parents[1]
# what others start, and the package's docstring
_NO_BENCHMARKS = {"bpe_child", "client_memory_child", "__init__"}
NAMES = sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - _NO_BENCHMARKS)


@pytest.mark.parametrize("name", NAMES)
def test_each_starts_as_a_module_and_says_what_it_takes(name: str, zygote: Zygote) -> None:
    done = zygote.run(["-m", f"benchmarks.{name}", "--help"], env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: benchmarks.{name} ")


@pytest.mark.parametrize("name", NAMES)
def test_each_prints_json_last_and_only_json(name: str) -> None:
    tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or ""
    assert f"python -m benchmarks.{name}" in docstring
    (main,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    printed = [call for call in ast.walk(main) if _called(call) == "print"]
    assert printed, "it prints no result"
    for call in printed:
        assert isinstance(call, ast.Call) and _called(call.args[0]) == "json.dumps"
    assert ast.unparse(tree.body[-1]).endswith("run_command_line(main)")


@pytest.fixture(scope="module")
def overhead(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`round_overhead` on the smallest model: a real federation, then Flower's echo in it."""
    command = [sys.executable, "-m", "benchmarks.round_overhead", "--sizes", "tiny"]
    command += ["--ways", "new,flower", "--rounds", "2", "--limit", "500"]
    command += ["--dir", str(tmp_path_factory.mktemp("overhead"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["sizes"]["tiny"]


def test_the_phases_of_each_round_add_up_to_it(overhead: dict[str, Any]) -> None:
    new = overhead["new"]
    assert [one["round"] for one in new["rounds"]] == [1, 2]
    for one in new["rounds"]:
        assert sum(one["phases"].values()) == pytest.approx(one["round_s"], abs=0.01)
        assert one["fixed_s"] <= one["round_s"]
        assert {"dispatch", "start", "snapshot"} <= one["phases"].keys()
        for client in one["clients"].values():
            assert client["training_s"] > 0 and 0 <= client["goodput"] <= 1
    assert new["fixed_s"] == new["rounds"][1]["fixed_s"]


def test_both_ways_send_the_same_bytes_and_the_processes_are_known(
    overhead: dict[str, Any],
) -> None:
    new, floor = overhead["new"], overhead["flower"]
    assert new["bytes_down_per_client"] == floor["bytes_down"] >= 4 * overhead["parameters"]
    assert 0 < new["bytes_up_per_client"] == floor["bytes_up"] < overhead["parameters"]
    assert len(floor["rounds"]) == 2 and floor["round_s"] > 0
    peaks = new["peak_rss_bytes"]
    assert {"serverapp", "superlink", "supernode", "clientapp", "worker"} <= peaks.keys()
    assert min(peaks.values()) > 1 << 20
    assert "over_flower_s" in overhead["goal"] and "of_old" not in overhead["goal"]


def test_a_client_whose_upload_takes_long_is_not_declared_dead(tmp_path: Path) -> None:
    """1.3 MB on 1 Mbit/s: ten seconds each way, beside heartbeats on the same wire."""
    command = [sys.executable, "-m", "benchmarks.links", "--quick", "--limit", "500"]
    done = subprocess.run(
        [*command, "--dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads(done.stdout)["runs"]
    assert (found["silent"], found["refused"]) == (0, 0)
    assert found["bytes_up"] >= 4 * found["parameters"]
    on_the_wire_s = found["bytes_up"] / 125_000
    assert min(found["sending_s"]) > 0.9 * on_the_wire_s > 5, "it was slow enough to tell"
    assert 0 < found["utilisation"] <= 1
    assert list(found["utilisation_of"]) == ["60", "300", "600", "1800"]


def _called(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""
