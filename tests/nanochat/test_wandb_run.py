"""One run of base_train is one run of W&B, which never stops it."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import base_train

from .run_kit import Call, directory_of, run_arguments


class _FakeWandb:
    """What `wandb.init` is told, and what is logged; out of reach on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.unreachable = False
        monkeypatch.setattr("wandb.init", self._init)

    def _init(self, **options: Any) -> "_FakeWandb":
        self.inits.append(options)
        if self.unreachable and options["mode"] == "online":
            raise RuntimeError("timed out")
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        assert exit_code == 0


def test_a_resumed_run_continues_its_wandb_run(
    base: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = _FakeWandb(monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    train = run_arguments(base, "watched", "--wandb-project", "tests", "--save-every", "2")
    assert call(base_train.main, *train)[0] == 0
    assert call(base_train.main, *train, "--resume-from-step", "2")[0] == 0
    first, second = fake.inits
    assert first["id"] == second["id"] and (first["resume"], second["resume"]) == ("allow",) * 2
    meta = (directory_of(base, "watched") / "meta_000002.json").read_text()
    assert json.loads(meta)["user_config"]["wandb_id"] == first["id"] and "secret" not in meta
    losses = [step for step, values in fake.logged if "train/loss" in values]
    assert losses == [1, 2, 3, 4, 3, 4]
    assert call(base_train.main, *run_arguments(base, "other", "--wandb-project", "tests"))[0] == 0
    assert fake.inits[-1]["id"] != first["id"]


def test_wandb_out_of_reach_is_a_sentence_and_the_run_goes_on_offline(
    base: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = _FakeWandb(monkeypatch)
    fake.unreachable = True
    train = run_arguments(base, "alone", "--wandb-project", "tests", "--wandb-mode", "online")
    code, _, error = call(base_train.main, *train)
    assert code == 0
    assert "warning: W&B cannot be reached, continuing offline: timed out" in error
    assert [init["mode"] for init in fake.inits] == ["online", "offline"]
    assert fake.inits[0]["id"] == fake.inits[1]["id"]
    assert [step for step, values in fake.logged if "train/loss" in values] == [1, 2, 3, 4]
