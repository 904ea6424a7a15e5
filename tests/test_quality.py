"""The laboratory of whole federations: what it says can be trusted."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from zygote import Zygote

from benchmarks.quality.__main__ import summary
from benchmarks.quality.case import Case, Outcome
from benchmarks.quality.cases import EXPERIMENTS, SCALES
from benchmarks.quality.laboratory import Laboratory
from benchmarks.quality.text import Corpus, corpus
from nanochat.errors import UserError

from .nanochat.data_kit import texts, write_shard

SMOKE = SCALES["smoke"]
SHAPE = SMOKE.shape
FEDAVG = (("outer-lr", 1.0), ("outer-optimizer", "fedavg"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quality")
    for number in range(3):
        write_shard(directory / "text", number, texts(200, seed=number, words=80))
    return directory / "text"


@pytest.fixture(scope="module")
def rows(text: Path) -> Corpus:
    return corpus(text, text.parent / "cache", **SHAPE)


def test_one_client_whose_work_is_taken_as_it_is_does_what_plain_training_does(
    rows: Corpus,
) -> None:
    plain = Laboratory(SMOKE, Case(name="plain"), 3, rows).run()
    one = Laboratory(SMOKE, Case(name="one", clients=1, steps=4, config=FEDAVG), 3, rows).run()
    assert one.rounds == 8 and one.bpb == pytest.approx(plain.bpb, rel=1e-5)
    other = Laboratory(SMOKE, Case(name="plain"), 4, rows).run()
    assert other.bpb != pytest.approx(plain.bpb, rel=1e-5), "a seed changes something"


def test_the_tokens_of_a_round_are_whose_the_case_says(rows: Corpus) -> None:
    def rounds(**fields: object) -> tuple[int, int]:
        case = Case(name="c", config=FEDAVG, **fields)  # type: ignore[arg-type]
        laboratory = Laboratory(SMOKE, case, 0, rows)
        return laboratory.run().rounds, laboratory.tokens

    total, step = SMOKE.total_tokens, SMOKE.batch_tokens
    assert rounds(clients=2, steps=4) == (total // (2 * 4 * step), total)
    assert rounds(clients=2, steps=4, batch="federation") == (total // (4 * step), total)
    assert rounds(clients=2, steps=2, speeds=(1.0, 3.0)) == (total // (8 * step), total)


def test_who_is_away_does_nothing_and_somebody_stays(rows: Corpus) -> None:
    case = Case(name="c", clients=4, steps=1, away=0.5, away_rounds=2, config=FEDAVG)
    laboratory = Laboratory(SMOKE, case, 0, rows)
    there = [laboratory._present(number) for number in range(40)]
    assert all(there) and any(len(one) < 4 for one in there)
    assert there[0::2] != [*there[2::2], []] and there[0::2] == there[1::2]
    everybody = Laboratory(SMOKE, Case(name="c", clients=3, config=FEDAVG), 0, rows)
    assert everybody._present(7) == [0, 1, 2]


def test_one_client_with_the_default_outer_step_does_what_plain_training_does(rows: Corpus) -> None:
    plain = Laboratory(SMOKE, Case(name="plain"), 3, rows).run()
    one = Laboratory(SMOKE, Case(name="one", clients=1, steps=4), 3, rows).run()
    assert one.bpb == pytest.approx(plain.bpb, rel=1e-5)


def test_inner_states_are_averaged_and_momentum_is_shortened_with_the_rates(rows: Corpus) -> None:
    two = Case(name="c", clients=2, steps=2, batch="federation")
    found = Laboratory(SMOKE, two.but("average", inner="average"), 0, rows)
    found._round(0)
    one, other = (found.states[i]["state"] for i in range(2))
    for key, own in one.items():
        for name, value in own.items():
            torch.testing.assert_close(value, other[key][name], rtol=0, atol=0)
    numbers = {"outer-lr": 0.7, "outer-momentum": 0.9}
    annealed = two.but("annealed", momentum_follows_lr=True, config=numbers)
    found = Laboratory(SMOKE, annealed, 0, rows)
    found.outer = {"momentum.x": torch.ones(2)}
    found._anneal(0.0)
    assert found.outer["momentum.x"].tolist() == [1.0, 1.0]
    found._anneal(0.8 * SMOKE.total_tokens)  # half of the warmdown
    torch.testing.assert_close(found.outer["momentum.x"], torch.full((2,), 0.5))


def _laboratory(rows: Corpus, **fields: Any) -> Laboratory:
    return Laboratory(
        SMOKE, Case(name="c", **{"batch": "federation", "steps": 2} | fields), 0, rows
    )


def test_the_batch_of_a_round_is_shared_by_those_who_are_there(rows: Corpus) -> None:
    batch = SMOKE.batch_tokens // SMOKE.sequence_len  # 8 rows
    by_speed = _laboratory(rows, clients=3, speeds=(1.0, 2.0, 5.0))
    assert by_speed._work([0, 1, 2]) == {0: (2, 1), 1: (2, 2), 2: (2, 5)}
    assert by_speed._work([2]) == {2: (2, batch)}
    equal = _laboratory(rows, clients=3, speeds=(0.5, 1.0, 1.5), shares="equal")
    assert equal._work([0, 1, 2]) == {0: (1, 3), 1: (2, 3), 2: (3, 2)}
    fixed = _laboratory(rows, clients=4, batch="client", batch_factor=0.25)
    assert fixed._work([0, 1]) == {0: (2, 2), 1: (2, 2)}
    phases = _laboratory(rows, clients=1, phases=((0.5, 1), (0.9, 3)))
    steps = []
    for done in (0.0, 0.49, 0.5, 0.9, 31 / 32):
        phases.tokens = round(done * SMOKE.total_tokens)
        steps.append(phases._work([0])[0][0])
    assert steps == [1, 1, 3, 2, 1], "the last round has the steps that the run still lacks"


def test_who_is_there_follows_a_trace_or_the_run(rows: Corpus) -> None:
    sun = _laboratory(rows, clients=4, trace=((0, 1), (2, 3)), away_rounds=2)
    assert [sun._present(n) for n in range(5)] == [[0, 1], [0, 1], [2, 3], [2, 3], [0, 1]]
    joins = _laboratory(rows, clients=2, trace=((0,), (0, 1)), away_rounds=0, alone=0.25)
    assert joins._present(9) == [0]
    joins.tokens = SMOKE.total_tokens // 2
    assert joins._present(9) == [0, 1]
    alone = _laboratory(rows, clients=2, alone=0.25)
    assert alone._present(0) == [0]
    alone.tokens = SMOKE.total_tokens // 4
    assert alone._present(0) == [0, 1]


def test_a_late_reply_is_refused_without_a_trace_or_merged_in_the_next_round(rows: Corpus) -> None:
    refused = _laboratory(rows, clients=1, late=1.0)
    first = {name: tensor.clone() for name, tensor in refused.weights.items()}
    refused._round(0)
    assert (refused.tokens, refused.refused) == (0, 2 * SMOKE.batch_tokens)
    assert refused.states == {0: None} and refused._places(17) == list(range(17))
    for name, tensor in refused.weights.items():
        assert torch.equal(tensor, first[name])
    held = _laboratory(rows, clients=2, late=1.0, late_weight=0.5)
    held._round(0)
    assert held.tokens == 0 and [reply.weight for reply in held._held] == [256.0, 256.0]
    held._round(1)
    assert held.tokens == 2 * SMOKE.batch_tokens and len(held.norms) == 1


def test_a_delayed_merge_is_the_one_of_the_round_before(rows: Corpus) -> None:
    behind, ahead = (
        _laboratory(rows, clients=1, delayed=share, config=FEDAVG) for share in (0.0, 1.0)
    )
    first = {name: tensor.clone() for name, tensor in behind.weights.items()}
    for laboratory in (behind, ahead):
        laboratory._round(0)
        assert laboratory.tokens == 2 * SMOKE.batch_tokens and not laboratory.norms
        assert torch.equal(laboratory.weights["lm_head.weight"], first["lm_head.weight"])
    update = ahead._held[0].update
    torch.testing.assert_close(
        ahead._start(0), {name: first[name] - tensor for name, tensor in update.items()}
    )
    assert behind._start(0) is behind.weights
    plain = Laboratory(SMOKE, Case(name="plain"), 0, rows).run()
    assert ahead.run().bpb == pytest.approx(plain.bpb, rel=1e-4), "one client, all of it ahead"
    assert behind.run().bpb != pytest.approx(plain.bpb, rel=1e-3)


def test_a_client_that_was_away_begins_without_its_state_if_only_recent_ones_count(
    rows: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(
        "nanochat.optim.MuonAdamW.load_state_dict", lambda self, state: loaded.append(1)
    )
    fields: dict[str, Any] = {"clients": 2, "trace": ((0, 1), (0,), (0, 1)), "steps": 1}
    counts = {}
    for inner in ("keep", "recent"):
        loaded.clear()
        laboratory = _laboratory(rows, inner=inner, **fields)
        for number in range(3):
            laboratory._round(number)
        counts[inner] = len(loaded)
    assert counts == {"keep": 3, "recent": 2}


def test_a_form_of_the_wire_keeps_its_rest_by_client(rows: Corpus) -> None:
    def run(wire: str) -> tuple[Laboratory, Outcome]:
        config = (*FEDAVG, ("wire-up", wire))
        case = Case(name="c", clients=2, steps=4, batch="federation", config=config)
        laboratory = Laboratory(SMOKE, case, 0, rows)
        return laboratory, laboratory.run()

    _, plain = run("float32")
    coded, outcome = run("int4")
    assert plain.sent == 4.0 and 0.4 < outcome.sent < 0.6, (
        "half a byte, less of rows that nobody has trained"
    )
    assert outcome.bpb != plain.bpb and outcome.bpb == pytest.approx(plain.bpb, rel=0.02)
    assert sorted(coded.rests) == [0, 1]
    assert any(bool(tensor.any()) for tensor in coded.rests[0].values())
    assert not torch.equal(coded.rests[0]["lm_head.weight"], coded.rests[1]["lm_head.weight"])


def test_a_step_down_in_few_bits_costs_little_and_the_last_one_is_whole(rows: Corpus) -> None:
    """What clients hold differs from what the outer step wants, until the end."""
    case = Case(name="pair", clients=2, steps=3, batch="federation")
    outcomes = {}
    for down in ("full", "int4"):
        laboratory = Laboratory(SMOKE, case.but(down, config={"wire-down": down}), 0, rows)
        outcomes[down] = laboratory.run()
    assert outcomes["full"].received == 4.0 and 0.4 < outcomes["int4"].received < 0.6
    assert outcomes["int4"].bpb != outcomes["full"].bpb
    assert outcomes["int4"].bpb == pytest.approx(outcomes["full"].bpb, rel=0.02)
    assert not laboratory.residual, "the last model has all of it"
    laboratory.tokens = 0
    before = laboratory.weights
    change = {name: 0.01 * torch.randn(tensor.shape) for name, tensor in before.items()}
    wanted = {name: tensor + change[name] for name, tensor in before.items()}
    held = laboratory._received(before, {name: tensor.clone() for name, tensor in wanted.items()})
    residual = dict(laboratory.residual)
    assert residual and all(bool(tensor.any()) for tensor in residual.values())
    for name, tensor in residual.items():
        torch.testing.assert_close(held[name] + tensor, wanted[name], rtol=0, atol=2e-6)
    laboratory.tokens = SMOKE.total_tokens
    last = laboratory._received(held, {name: tensor + 1 for name, tensor in held.items()})
    for name, tensor in last.items():
        assert torch.equal(tensor, held[name] + 1 + residual.get(name, torch.zeros(()))), name


def test_the_wire_is_tried_with_each_code_up_down_and_both_ways() -> None:
    def pair(case: Case) -> tuple[object, object]:
        config = dict(case.config)
        return config.get("wire-up", "float32"), config.get("wire-down", "full")

    for steps in (10, 3):
        tried = {
            pair(case) for case in EXPERIMENTS["wire"] if case.clients == 4 and case.steps == steps
        }
        for code in ("int8", "int4", "sparse"):
            assert tried >= {("float32", "full"), (code, "full"), ("float32", code), (code, code)}


def test_every_experiment_names_its_cases_once_and_can_be_configured(rows: Corpus) -> None:
    for cases in EXPERIMENTS.values():
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert Laboratory(SMOKE, case, 0, rows).config.total_tokens == SMOKE.total_tokens


def test_too_little_text_is_a_sentence(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens for training, 100,000,065 are needed"):
        corpus(text, tmp_path, **SHAPE | {"tokens": 10**8})


def test_the_summary_compares_the_same_seeds() -> None:
    def one(case: str, seed: int, bpb: float) -> dict[str, object]:
        return {"case": case, "seed": seed, "bpb": bpb}

    runs = [one("plain", 0, 2.0), one("plain", 1, 4.0), one("x", 0, 2.1), one("x", 1, 4.2)]
    assert summary(runs) == {
        "plain": {"bpb": 3.0, "seeds": 2, "over_plain_percent": 0.0},
        "x": {"bpb": 3.15, "seeds": 2, "over_plain_percent": 5.0, "ci95_percent": 0.0},
    }


def test_the_command_goes_on_where_it_was_interrupted(
    text: Path, tmp_path: Path, zygote: Zygote
) -> None:
    out, picture = tmp_path / "out.jsonl", tmp_path / "curves.html"
    command = ["-m", "benchmarks.quality", "--text", text, "--out", out, "--scale", "smoke"]
    command += ["--experiment", "plain", "--seeds", "1", "--jobs", "1", "--cases", "x 0"]
    command += ["--cache", tmp_path / "cache", "--picture", picture]
    environment = {**os.environ, "COLUMNS": "200"}
    first = zygote.run(command, env=environment)
    assert first.returncode == 0, first.stderr
    lines = out.read_text().splitlines()
    assert sorted(json.loads(line)["case"] for line in lines) == [
        "plain, lr x 0.25",
        "plain, lr x 0.5",
    ]
    out.write_text(lines[0] + "\n" + lines[1][:40] + "\n")
    second = zygote.run(command, env=environment)
    assert second.returncode == 0, second.stderr
    assert "a torn line" in second.stderr
    assert json.loads(second.stdout.splitlines()[-1]) == json.loads(first.stdout.splitlines()[-1])
    assert picture.read_text().count("<polyline") == 2
