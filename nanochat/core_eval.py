"""CORE: how well a base model does 22 tasks from a few examples in its context (arXiv 2406.11794).

Prompts, choice of examples and scoring agree with upstream's, so that figures compare. Three kinds
of task: in `multiple_choice` one query is continued by each choice, in `schema` each of several
contexts by one text, and the option whose text has the lowest mean loss is the answer; in
`language_modeling` the likeliest tokens must be the continuation, all of them.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nanochat.agreement import PeerFailed
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.tokenizer import RustBPETokenizer

TASK_TYPES = ("multiple_choice", "schema", "language_modeling")
_ITEM_KEYS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}

_EXAMPLES_SEED = 1234  # plus the item's number: its examples are the same in every run
_BETWEEN_EXAMPLES = "\n\n"

Item = dict[str, Any]
# (token ids with BOS, index of the first scored token); it is scored to its end
Scored = tuple[list[int], int]


def evaluate_task(
    model: GPT,
    tokenizer: RustBPETokenizer,
    data: Sequence[Item],
    device: torch.device,
    task_meta: dict[str, Any],
    *,
    tick: Callable[[], None] | None = None,
) -> float:
    """The share of the items that `model` gets right; each rank does its share of the items.

    task_meta: `task_type`, `num_fewshot` and `continuation_delimiter`. `tick` is called before each
    item. All ranks of a process group call it together; what raises on one of them, `tick` included,
    raises on all. Raises UserError for a task of another type, or with too few items.
    """
    if task_meta["task_type"] not in TASK_TYPES:
        raise UserError(
            f"unknown type of task {task_meta['task_type']!r}: known are {', '.join(TASK_TYPES)}"
        )
    if len(data) <= task_meta["num_fewshot"]:
        raise UserError(
            f"a task of {len(data)} items has too few for {task_meta['num_fewshot']}-shot"
        )
    grouped = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    correct, error = 0, None
    try:
        for number in range(rank, len(data), world_size):
            if tick is not None:
                tick()
            correct += is_correct(number, model, tokenizer, data, device, task_meta)
    except Exception as caught:  # noqa: BLE001 - whatever it is, the others wait for us below
        error = caught
    total = torch.tensor([correct, error is not None], dtype=torch.int64, device=device)
    if grouped:
        dist.all_reduce(total)
    if error is not None:
        raise error
    if total[1]:
        raise PeerFailed
    return int(total[0]) / len(data)


def check_item(kind: str, item: Item) -> None:
    """Raise ValueError unless it is an item of a task of that type, which can be scored."""
    for key in _ITEM_KEYS[kind]:
        if key not in item:
            raise ValueError(f"it has no {key!r}")
    options = item.get("choices", item.get("context_options"))
    if options is not None and not 0 <= item["gold"] < len(options):
        raise ValueError(f"the answer {item['gold']} is none of its {len(options)} options")
    texts = [item.get("query", ""), item.get("context", ""), item.get("continuation", "")]
    if not all(isinstance(text, str) for text in [*texts, *(options or [])]):
        raise ValueError("it holds something else than text")


def centred(accuracy: float, random_baseline: float) -> float:
    """0 for what guessing gets (`random_baseline`, a share), 1 for everything right."""
    return (accuracy - random_baseline) / (1.0 - random_baseline)


@torch.inference_mode()
def is_correct(
    number: int,
    model: GPT,
    tokenizer: RustBPETokenizer,
    data: Sequence[Item],
    device: torch.device,
    task_meta: dict[str, Any],
) -> bool:
    """Whether the model gets item `number` of `data` right."""
    kind, item = task_meta["task_type"], data[number]
    examples = choose_examples(data, number, task_meta["num_fewshot"])
    prompts = render_prompts(kind, item, examples, task_meta["continuation_delimiter"])
    options = [cropped(one, model.max_positions) for one in to_tokens(kind, prompts, tokenizer)]
    losses, likeliest = _losses(model, options, tokenizer.get_bos_token_id(), device)
    if kind == "language_modeling":
        (tokens, start), (guesses,) = options[0], likeliest.tolist()
        return bool(guesses[start - 1 : len(tokens) - 1] == tokens[start:])
    means = [
        float(losses[row, start - 1 : len(tokens) - 1].mean())
        for row, (tokens, start) in enumerate(options)
    ]
    return means.index(min(means)) == item["gold"]


def choose_examples(data: Sequence[Item], number: int, count: int) -> list[Item]:
    """`count` other items, drawn without replacement; the same ones for the same item always."""
    others = [i for i in range(len(data)) if i != number]
    drawn = random.Random(_EXAMPLES_SEED + number).sample(others, count) if count else []
    return [data[i] for i in drawn]


def render_prompts(kind: str, item: Item, examples: Sequence[Item], delimiter: str) -> list[str]:
    """The texts that are scored for one item, each behind the solved examples.

    One per choice or context; for language modelling two, without and with the continuation.
    """

    def solved(example: Item) -> str:
        if kind == "multiple_choice":
            return f"{example['query']}{delimiter}{example['choices'][example['gold']]}"
        if kind == "schema":
            context = example["context_options"][example["gold"]]
            return f"{context}{delimiter}{example['continuation']}"
        return f"{example['context'].strip()}{delimiter}{example['continuation']}"

    head = "".join(solved(example) + _BETWEEN_EXAMPLES for example in examples)
    if kind == "multiple_choice":
        return [f"{head}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if kind == "schema":
        tail = f"{delimiter}{item['continuation']}"
        return [f"{head}{context}{tail}" for context in item["context_options"]]
    # A space at the end would be part of the continuation's first token
    question = f"{head}{item['context'].strip()}{delimiter}"
    return [question.strip(), question + item["continuation"]]


def to_tokens(kind: str, prompts: list[str], tokenizer: RustBPETokenizer) -> list[Scored]:
    """Ids of what is scored, with the index of the first token that counts.

    That is where the choices begin to differ, or where the contexts end to; of texts of which one is
    the beginning (end) of another at least one token counts.
    """
    rows: list[list[int]] = tokenizer.encode(prompts, prepend="<|bos|>", num_threads=1)
    shortest = min(len(row) for row in rows)
    if kind == "schema":
        common = _common_length(row[::-1] for row in rows)
        return [(row, max(1, len(row) - common)) for row in rows]
    common = _common_length(rows)
    if kind == "multiple_choice":
        return [(row, max(1, min(common, shortest - 1))) for row in rows]
    whole = rows[1]
    if common == len(whole):
        raise UserError("an item has an empty continuation: the evaluation bundle is damaged")
    return [(whole, common)]


def _common_length(rows: Iterable[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    alike = 0
    for column in zip(*rows, strict=False):  # to the end of the shortest
        if len(set(column)) > 1:
            break
        alike += 1
    return alike


def cropped(option: Scored, longest: int) -> Scored:
    """The last `longest` tokens: a model has no more positions than that."""
    tokens, start = option
    surplus = max(0, len(tokens) - longest)
    return tokens[surplus:], max(1, start - surplus)


def _losses(
    model: GPT, options: Sequence[Scored], bos: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(cross entropy of the next token, the likeliest next token), (options, T-1) each.

    Shorter rows are padded at the end, which no earlier position can see.
    """
    length = max(len(tokens) for tokens, _ in options)
    filled = [tokens + [bos] * (length - len(tokens)) for tokens, _ in options]
    ids = torch.tensor(filled, dtype=torch.long, device=device)
    logits = model(ids)[:, :-1]  # (options, T-1, vocab_size)
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses, logits.argmax(dim=-1)
