"""What the ranks of one group agree to compute with, on machines of any kind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import gpus
from nanochat.errors import UserError
from nanochat.gpt import Linear
from pilot import plan
from pilot.errors import PilotError
from pilot.site import device as device_module
from pilot.site.data import hello
from pilot.site.device import agree_on_device
from pilot.site.ranks import Ranks
from pilot.site.rows import ROWS_KEY, ROWS_VARIABLE, given_rows, rows_of_node
from pilot.wire.messages import HelloOrder

from ..worker_kit import BATCH_ROWS, site_config


class _Follower(Ranks):
    """The second of two ranks, to whom rank 0 has said `told`."""

    told: dict[str, Any]

    def broadcast_json(self, value: Any) -> Any:
        return {**value, **self.told}


def _follower(**told: Any) -> Ranks:
    ranks = _Follower(1, 2, torch.device("cpu"), None)
    object.__setattr__(ranks, "told", told)
    return ranks


def test_every_rank_takes_rank_0s_dtype_and_rows(site: Path) -> None:
    ranks = _follower(dtype="bfloat16", rows=3)
    assert agree_on_device(site_config(site), ranks, step_rows=BATCH_ROWS) == (torch.bfloat16, 3)


def test_ranks_with_gpus_of_two_kinds_are_refused(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "capability_of", lambda _: (7, 5))
    with pytest.raises(PilotError, match=r"capability 8\.0, rank 1 has 7\.5"):
        agree_on_device(site_config(site), _follower(capability=[8, 0]), step_rows=8)


def test_machine_without_fp8_says_so_in_its_hello_and_to_an_order(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 304, "sequence_len": 16}
    config = site_config(site, fp8=True, device="auto", **sizes)
    reply = hello(HelloOrder(run="r", config=config.to_mapping(), redis_url=""))
    assert "fp8 needs an NVIDIA GPU" in reply.error and "\n" not in reply.error
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    with pytest.raises(UserError, match="fp8 needs an NVIDIA GPU"):
        agree_on_device(config, ranks, step_rows=8)
    agree_on_device(site_config(site, **sizes), ranks, step_rows=8)


def test_runs_model_trains_in_fp8_if_its_configuration_says_so(site: Path) -> None:
    for fp8 in (False, True):
        config = site_config(site, fp8=fp8, device="auto", vocab_size=304)
        device = torch.device("meta")
        model = plan.build_model(config, device=device, compute_dtype=torch.bfloat16)
        assert model.fp8 is fp8
        assert {m.fp8 for m in model.transformer.h.modules() if isinstance(m, Linear)} == {fp8}


def test_one_rank_alone_takes_what_its_device_has_room_for(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    dtype, rows = agree_on_device(
        site_config(site, device_batch_size=0), ranks, step_rows=BATCH_ROWS
    )
    assert (dtype, rows) == (torch.float32, min(BATCH_ROWS, gpus.DEFAULT_ROWS))
    monkeypatch.setenv(ROWS_VARIABLE, "4")
    assert agree_on_device(site_config(site), ranks, step_rows=8)[1] == 4, (
        "the machine's own word wins"
    )


def test_rows_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given_rows(6) == 6
    for wrong in ("many", "-1", "1.5", "²", str(1 << 40)):
        monkeypatch.setenv(ROWS_VARIABLE, wrong)
        with pytest.raises(PilotError, match=ROWS_VARIABLE):
            given_rows(6)


def test_rows_of_a_node_are_whole_numbers() -> None:
    assert rows_of_node({"name": "a"}) is None
    assert [rows_of_node({ROWS_KEY: rows}) for rows in (0, 16)] == [0, 16]
    for wrong in ("16", 1.5, True, -1, 1 << 40):
        with pytest.raises(PilotError, match="in --node-config is"):
            rows_of_node({ROWS_KEY: wrong})


def test_rows_that_are_no_number_are_the_answer_to_a_hello(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = HelloOrder(run="r", config=site_config(site).to_mapping(), redis_url="")
    assert hello(order).error == ""
    monkeypatch.setenv(ROWS_VARIABLE, "many")
    assert hello(order).error.startswith(f"{ROWS_VARIABLE} is 'many'")
