"""CORE: prompts, scoring and centring on tasks made by hand, whose answers are known."""

import csv
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanochat.core_bundle import BUNDLE_NAME, Task, ensure_bundle, evaluate_core, load_tasks
from nanochat.core_eval import (
    _losses,
    centred,
    choose_examples,
    cropped,
    evaluate_task,
    render_prompts,
    to_tokens,
)
from nanochat.download import Downloader, DownloadError
from nanochat.errors import UserError
from nanochat.gpt import build_gpt, config_for_depth
from nanochat.tokenizer import RustBPETokenizer

from .bundle_kit import make_bundle
from .data_kit import byte_tokenizer

CPU = torch.device("cpu")


class Bigrams(nn.Module):
    """A model that has read a text: it expects a byte to be followed as it was there."""

    def __init__(self, text: str, vocab_size: int, max_positions: int = 1000) -> None:
        super().__init__()
        counts = torch.full((vocab_size, vocab_size), 0.01)
        data = text.encode()
        for first, second in itertools.pairwise(data):
            counts[first, second] += 1
        self.logits = counts.log()
        self.max_positions = max_positions

    def forward(self, ids: Tensor) -> Tensor:
        assert ids.size(1) <= self.max_positions
        return self.logits[ids]


@pytest.fixture
def tokenizer(tmp_path: Path) -> RustBPETokenizer:
    return byte_tokenizer(tmp_path / "tokenizer")


def _score(
    text: str, tokenizer: RustBPETokenizer, kind: str, items: list[dict[str, Any]], **meta: Any
) -> float:
    model: Any = Bigrams(text, tokenizer.get_vocab_size())
    task = {"task_type": kind, "num_fewshot": 0, "continuation_delimiter": " ", **meta}
    return evaluate_task(model, tokenizer, items, CPU, task)


def test_the_choice_with_the_lowest_mean_loss_is_the_answer(tokenizer: RustBPETokenizer) -> None:
    choices = ["zq", "ababababab", "zz"]  # the long one has the greater sum and the smaller mean
    items = [{"query": "x", "choices": choices, "gold": gold} for gold in (1, 1, 0, 2)]
    assert _score("abababab x a", tokenizer, "multiple_choice", items) == 0.5


def test_what_all_choices_begin_with_does_not_count(tokenizer: RustBPETokenizer) -> None:
    # "qqqq" is expensive, and common to both: the last letter alone decides
    items = [{"query": "x", "choices": ["qqqqb", "qqqqc"], "gold": 1}]
    assert _score("qc", tokenizer, "multiple_choice", items) == 1.0


def test_a_choice_that_another_begins_with_is_scored_too(tokenizer: RustBPETokenizer) -> None:
    items = [{"query": "x", "choices": ["ab", "abzz"], "gold": 0}]
    assert _score("abababab", tokenizer, "multiple_choice", items) == 1.0


def test_a_schema_scores_the_common_ending_behind_each_context(
    tokenizer: RustBPETokenizer,
) -> None:
    items = [
        {"context_options": ["the a", "a long and cheap b"], "continuation": "cd", "gold": gold}
        for gold in (0, 1)
    ]
    # no delimiter: what comes first in the ending depends on the context's last letter
    text = "acd acd a long and cheap"
    assert _score(text, tokenizer, "schema", items[:1], continuation_delimiter="") == 1.0
    assert _score(text, tokenizer, "schema", items[1:], continuation_delimiter="") == 0.0


def test_language_modelling_wants_every_token_right(tokenizer: RustBPETokenizer) -> None:
    text = " abc abc abc"  # after a space comes a, then b, then c
    items = [{"context": "c ", "continuation": c} for c in ("abc", "ab", "abd", "bbc", "abc abd")]
    assert _score(text, tokenizer, "language_modeling", items) == 2 / 5


def test_examples_stand_before_the_question_solved_and_a_blank_line_apart() -> None:
    examples = [
        {"query": "1+1?", "choices": ["3", "2"], "gold": 1},
        {"query": "1+2?", "choices": ["3", "2"], "gold": 0},
    ]
    item = {"query": "2+2?", "choices": ["4", "5"], "gold": 0}
    assert render_prompts("multiple_choice", item, examples, "\nAnswer: ") == [
        "1+1?\nAnswer: 2\n\n1+2?\nAnswer: 3\n\n2+2?\nAnswer: 4",
        "1+1?\nAnswer: 2\n\n1+2?\nAnswer: 3\n\n2+2?\nAnswer: 5",
    ]
    schema = {"context_options": ["Ann, since Ann", "Ann, since Eve"], "continuation": "hid."}
    example = {"context_options": ["A", "B"], "continuation": "c", "gold": 1}
    assert render_prompts("schema", schema, [example], " ") == [
        "B c\n\nAnn, since Ann hid.",
        "B c\n\nAnn, since Eve hid.",
    ]
    text = {"context": " one two \n", "continuation": "three"}
    example = {"context": "x \n", "continuation": "y"}
    assert render_prompts("language_modeling", text, [example], " ") == [
        "x y\n\none two",
        "x y\n\none two three",
    ]
    assert render_prompts("language_modeling", text, [], "")[1] == "one twothree"


def test_examples_are_other_items_and_always_the_same() -> None:
    data = [{"query": str(i)} for i in range(12)]
    for number in range(12):
        chosen = choose_examples(data, number, 10)
        assert chosen == choose_examples(data, number, 10)
        assert data[number] not in chosen and len({e["query"] for e in chosen}) == 10
    assert choose_examples(data, 0, 3) != choose_examples(data, 1, 3)
    assert choose_examples(data, 0, 0) == []
    # pinned, as upstream draws them: random.Random(1234 + number).sample
    assert [e["query"] for e in choose_examples(data, 0, 3)] == ["8", "2", "1"]


def test_the_first_token_that_counts(tokenizer: RustBPETokenizer) -> None:
    def starts(kind: str, *prompts: str) -> list[int]:
        return [start for _, start in to_tokens(kind, list(prompts), tokenizer)]

    # BOS is token 0; bytes follow
    assert starts("multiple_choice", "q ab", "q ac") == [4, 4]
    assert starts("multiple_choice", "q a", "q ab") == [3, 3]
    assert starts("schema", "one x yz", "three q yz") == [6, 8]
    assert starts("language_modeling", "q", "q a") == [2]
    assert to_tokens("language_modeling", ["q", "q a"], tokenizer)[0][0][0] == 256
    with pytest.raises(UserError, match="empty continuation"):
        to_tokens("language_modeling", ["q", "q"], tokenizer)


def test_prompts_longer_than_the_model_lose_their_beginning(tokenizer: RustBPETokenizer) -> None:
    assert cropped(([1, 2, 3, 4, 5], 3), 4) == ([2, 3, 4, 5], 2)
    assert cropped(([1, 2, 3, 4, 5], 1), 2) == ([4, 5], 1)
    model: Any = Bigrams("abab", tokenizer.get_vocab_size(), max_positions=16)
    items = [{"query": "x" * 50, "choices": ["abab", "zz"], "gold": 0}]
    task = {"task_type": "multiple_choice", "num_fewshot": 0, "continuation_delimiter": " "}
    assert evaluate_task(model, tokenizer, items, CPU, task) == 1.0


def test_padding_changes_no_score(tokenizer: RustBPETokenizer) -> None:
    """A real model: an option gets the loss that it has alone, whatever stands beside it."""
    config = config_for_depth(1, vocab_size=tokenizer.get_vocab_size(), sequence_len=32)
    model = build_gpt(config, device=CPU, seed=0, compute_dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    options = to_tokens("multiple_choice", ["q yes", "q no, never in a hundred"], tokenizer)
    together, _ = _losses(model, options, 256, CPU)
    for row, option in enumerate(options):
        alone, _ = _losses(model, [option], 256, CPU)
        length = len(option[0]) - 1
        torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=1e-5)


def test_centring_makes_guessing_zero_and_all_right_one() -> None:
    assert centred(0.25, 0.25) == 0.0 and centred(1.0, 0.25) == 1.0
    assert centred(0.4, 0.0) == 0.4
    assert centred(0.1, 0.5) == pytest.approx(-0.8)


def test_tasks_that_cannot_be_scored_are_refused(tokenizer: RustBPETokenizer) -> None:
    item = {"query": "x", "choices": ["a", "b"], "gold": 0}
    with pytest.raises(UserError, match="unknown type of task 'essay'"):
        _score("a", tokenizer, "essay", [item])
    with pytest.raises(UserError, match="1 items has too few for 1-shot"):
        _score("a", tokenizer, "multiple_choice", [item], num_fewshot=1)


# -- the bundle --------------------------------------------------------------------------------


def test_a_bundle_is_read_evaluated_and_reported(
    tmp_path: Path, tokenizer: RustBPETokenizer
) -> None:
    tasks = load_tasks(make_bundle(tmp_path / "bundle"))
    letters, endings, words = tasks
    assert (letters.num_fewshot, letters.continuation_delimiter) == (2, "\nAnswer: ")
    assert (endings.continuation_delimiter, endings.random_baseline) == (" ", 0.25)
    assert words.task_type == "language_modeling" and len(words.items()) == 4
    model: Any = Bigrams("a a a a", tokenizer.get_vocab_size())
    lines: list[str] = []
    result = evaluate_core(model, tokenizer, CPU, tasks, say=lines.append)
    # schema: " a" is likelier behind a than behind q, which is right half the time
    assert result.accuracy == {"letters": 1.0, "endings": 0.5, "words": 1.0}
    assert result.centred == {"letters": 1.0, "endings": pytest.approx(1 / 3), "words": 1.0}
    assert result.core == pytest.approx(7 / 9)
    assert "letters: accuracy=1.0000 centred=1.0000 (2-shot, 5 items)" in lines
    path = result.save(tmp_path / "out", "mine")
    rows = list(csv.reader(path.open()))
    assert rows[0] == ["Task", "Accuracy", "Centered"] and rows[-1] == ["CORE", "", "0.777778"]
    entry = json.loads((tmp_path / "out" / "mine.json").read_text())
    assert entry["core_metric"] == result.core and entry["results"] == result.accuracy
    assert result.table().splitlines()[-1].split() == ["CORE", "0.777778"]


def test_fewer_items_are_the_first_of_a_pinned_shuffle(tmp_path: Path) -> None:
    task = load_tasks(make_bundle(tmp_path / "bundle"))[0]
    everything = task.items()
    assert task.items(3) == everything[:3]
    assert [item["query"] for item in everything] == ["1", "0", "3", "2", "4"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "core.yaml").unlink(), "not CORE's bundle"),
        (lambda d: (d / "core.yaml").write_text("icl_tasks: []"), "names no task"),
        (lambda d: (d / "core.yaml").write_text("- [}"), "not CORE's bundle"),
        (lambda d: (d / "eval_meta_data.csv").write_text("a,b\n1,2\n"), "not CORE's bundle"),
        (lambda d: (d / "eval_data" / "words.jsonl").write_text("{"), "words.jsonl cannot be read"),
        (lambda d: (d / "eval_data" / "words.jsonl").unlink(), "words.jsonl cannot be read"),
        (
            lambda d: (d / "eval_data" / "words.jsonl").write_text('{"a": 1}\n{"a": 2}\n'),
            "is not a valid language_modeling item",
        ),
    ],
)
def test_a_damaged_bundle_is_a_sentence(
    damage: Any, said: str, tmp_path: Path, tokenizer: RustBPETokenizer
) -> None:
    directory = make_bundle(tmp_path / "bundle")
    damage(directory)
    model: Any = Bigrams("a a a a", tokenizer.get_vocab_size())
    with pytest.raises(UserError, match=said) as error:
        evaluate_core(model, tokenizer, CPU, load_tasks(directory))
    assert "\n" not in str(error.value)


class _Hub(Downloader):
    """Serves one file, or no network at all."""

    def fetch(self, url: str, path: Path, *, check: Any = None) -> None:
        served: Path | None = getattr(type(self), "served", None)
        if served is None:
            raise DownloadError("given up")
        path.write_bytes(served.read_bytes())


def test_the_bundle_is_fetched_once_or_a_sentence_says_how(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"eval_bundle\.zip and copy it to .*eval_bundle\.zip"):
        ensure_bundle(downloader=_Hub())
    make_bundle(tmp_path / BUNDLE_NAME)
    archive = tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / BUNDLE_NAME).rglob("*"):
            file.write(path, path.relative_to(tmp_path))
    monkeypatch.setattr(_Hub, "served", archive, raising=False)
    directory = ensure_bundle(downloader=_Hub())
    assert directory == base_dir / BUNDLE_NAME
    assert [task.label for task in load_tasks(directory)] == ["letters", "endings", "words"]
    monkeypatch.setattr(_Hub, "served", None)
    assert ensure_bundle(downloader=_Hub()) == directory  # not fetched again
    assert not list(base_dir.glob("*.zip")) and not list(base_dir.glob(".eval_bundle.*/"))


def test_a_copied_archive_is_taken_and_a_broken_one_refused(base_dir: Path) -> None:
    archive = base_dir / f"{BUNDLE_NAME}.zip"
    archive.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="cannot be unpacked"):
        ensure_bundle(downloader=_Hub())
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("other/core.yaml", "x")
    with pytest.raises(UserError, match=r"holds no eval_bundle/core\.yaml"):
        ensure_bundle(downloader=_Hub())
    assert not (base_dir / BUNDLE_NAME).exists()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("eval_bundle/core.yaml", "x")
    assert ensure_bundle(downloader=_Hub()) == base_dir / BUNDLE_NAME


def test_a_task_says_what_evaluate_task_needs(tmp_path: Path) -> None:
    task = Task(
        label="x",
        task_type="schema",
        num_fewshot=3,
        continuation_delimiter=" ",
        data_path=tmp_path,
        random_baseline=0.5,
    )
    assert task.meta == {"task_type": "schema", "num_fewshot": 3, "continuation_delimiter": " "}
