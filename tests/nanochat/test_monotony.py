"""Text that repeats one thing costs what other text costs: counted here, timed by `benchmarks.monotony`."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import monotony
from nanochat import text as module
from nanochat.rows.encoder import BatchEncoder
from nanochat.text import has_long_space, space_pieces
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer_export import merges

LIMIT = module.LONGEST_SPACE


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return monotony.tokenizer_of_all()


def test_the_guard_against_long_runs_looks_at_each_run_once() -> None:
    text = "x" + " " * (3 * LIMIT) + "y" + "\n" * LIMIT
    begins = [at for at in range(0, len(text), 997) if module._LONG_SPACE.match(text, at)]
    assert begins == [], "tried in the middle of a run, it costs the run's length each time"
    assert module._LONG_SPACE.match(text, 1) and module._LONG_SPACE.match(text, 2 + 3 * LIMIT)


@pytest.mark.parametrize("run", [LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT, 2 * LIMIT + 5])
def test_long_runs_are_cut_where_they_were_always_cut(run: int) -> None:
    text = "\n".join(["a", " " * run, "b", "\t" * run + "c"])
    before = re.split(rf"(\s{{{LIMIT}}})", text)
    pieces = list(space_pieces(text))
    assert [piece for piece in pieces if piece] == [piece for piece in before if piece]
    assert "".join(pieces) == text
    assert has_long_space(text) == (len(before) > 1)


@pytest.mark.parametrize("kind", monotony.KINDS)
def test_both_encoders_agree_and_twice_the_text_is_twice_the_tokens(
    kind: str, tokenizer: RustBPETokenizer
) -> None:
    encoder = BatchEncoder(tokenizer, dtype=np.dtype("<u2"))
    unit = len(monotony.KINDS[kind].encode())
    size = max(9_000 // unit, 1) * unit  # whole units
    text = monotony.text_of(kind, size)
    assert len(text.encode()) == size
    ids, twice = (tokenizer.encode(t) for t in (text, text * 2))
    assert encoder.encode([text])[0].tolist() == ids and tokenizer.decode(ids) == text
    assert abs(len(twice) - 2 * len(ids)) <= 20


class Counted(dict[bytes, int]):
    """Ranks that count how often they are asked."""

    asked = 0

    def get(self, *arguments: object) -> int:  # type: ignore[override]  # as it is called
        self.asked += 1
        return super().get(*arguments)  # type: ignore[call-overload,no-any-return]


def test_the_export_asks_in_proportion_to_the_bytes_of_the_vocabulary() -> None:
    asked = []
    for length in (1 << 10, 1 << 12):
        ranks = Counted(monotony.ranks_of("a" * length))
        assert max(map(len, ranks)) >= length // 4
        assert all(ranks[a + b] > max(ranks[a], ranks[b]) for a, b in merges(ranks))
        asked.append(ranks.asked / sum(map(len, ranks)))
    assert asked[1] <= 3 and asked[1] <= 1.2 * asked[0]


def test_the_benchmark_covers_every_work_and_says_the_highest_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bytes", "2000", "--repeat", "1", "--kinds", "spaces,joined emoji"]
    monkeypatch.setattr(sys, "argv", ["monotony", *arguments])
    monotony.main()
    *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [row["kind"] for row in rows] == ["spaces", "joined emoji"]
    for row in rows:
        assert set(row["seconds"]) == set(row["ratio"]) >= {"guard", "rustbpe", "train", "pack"}
    assert set(last) == {"bytes", "slowest", "highest_ratio"} and last["bytes"] == 2000


def test_a_vocabulary_with_tokens_as_long_as_its_text_encodes(tmp_path: Path) -> None:
    ranks = monotony.ranks_of("ab" * 3000)
    longest = max(ranks, key=len)
    assert len(longest) >= 2048
    trained = RustBPETokenizer.train_from_iterator(["ab" * 3000], 265 + 11)
    encoder = BatchEncoder(trained, dtype=np.dtype("<u2"))
    for text in ("ab" * 3000, "ba" * 2999, "ab" * 1027 + "c"):
        assert encoder.encode([text])[0].tolist() == trained.encode(text)
