"""A small CORE bundle."""

import json
from pathlib import Path
from typing import Any


def make_bundle(directory: Path) -> Path:
    """A bundle of three small tasks in upstream's format."""
    (directory / "eval_data" / "sub").mkdir(parents=True)
    (directory / "core.yaml").write_text(
        "icl_tasks:\n"
        "- label: letters\n  dataset_uri: sub/letters.jsonl\n  num_fewshot: [2]\n"
        '  icl_task_type: multiple_choice\n  continuation_delimiter: "\\nAnswer: "\n'
        "- label: endings\n  dataset_uri: endings.jsonl\n  num_fewshot: [0]\n"
        "  icl_task_type: schema\n"
        "- label: words\n  dataset_uri: words.jsonl\n  num_fewshot: [1]\n"
        "  icl_task_type: language_modeling\n"
    )
    (directory / "eval_meta_data.csv").write_text(
        "Eval Task,Task Category,Random baseline\n"
        "letters,x,50\nendings,x,25.0\nwords,x,0\nunused,x,1\n"
    )
    items: dict[str, list[dict[str, Any]]] = {
        "sub/letters": [{"query": f"{i}", "choices": ["a", "zz"], "gold": 0} for i in range(5)],
        "endings": [
            {"context_options": ["q", "a"], "continuation": "a", "gold": i % 2} for i in range(4)
        ],
        "words": [{"context": f"{i} a", "continuation": "a"} for i in range(4)],
    }
    for name, rows in items.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / "eval_data" / f"{name}.jsonl").write_text(lines)
    return directory
