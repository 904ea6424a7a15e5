"""All benchmarks start alike, and end with a line of JSON."""

import ast
import os
from pathlib import Path

import pytest
from zygote import Zygote

ROOT = Path(__file__).parents[1]
# what `bpe` starts for each trainer, and the package's docstring
_NO_BENCHMARKS = {"bpe_child", "__init__"}
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


def _called(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""
