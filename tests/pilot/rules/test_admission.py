"""What may be merged, and who is left out for a while."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from pilot.rules.admission import (
    MAX_NORMS,
    AdmissionBooks,
    Cooling,
    Norm,
    norm_refusal,
    refusal,
    token_refusal,
    update_norm,
)

SHAPES = {"a": (4, 3), "b": (5,), "scalar": ()}


def update(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


WEIGHTS = update(0)


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


MODEL = shapes_of(WEIGHTS)


def test_update_of_the_right_shapes_is_taken() -> None:
    assert refusal(MODEL, MODEL, tokens=1) is None


@pytest.mark.parametrize("tokens", [0, -5])
def test_update_without_tokens_is_refused(tokens: int) -> None:
    assert str(tokens) in (refusal(MODEL, MODEL, tokens=tokens) or "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SHAPES)
def test_update_that_is_not_finite_is_refused(name: str, value: float) -> None:
    bad = update(1)
    bad[name].view(-1)[-1] = value
    assert Norm().add(name, bad[name]) == f"{name} is not finite"


def test_infinities_that_cancel_are_refused() -> None:
    assert Norm().add("a", torch.tensor([[math.inf, -math.inf]])) == "a is not finite"


def test_the_last_value_of_a_large_tensor_is_looked_at() -> None:
    large = torch.zeros(1_000_000)
    assert Norm().add("a", large) is None
    large[-1] = math.nan
    assert Norm().add("a", large) == "a is not finite"


def test_missing_and_strange_tensors_are_refused_by_name() -> None:
    missing = {name: shape for name, shape in MODEL.items() if name != "b"}
    assert "b" in (refusal(missing, MODEL, tokens=1) or "")
    assert "zz" in (refusal(MODEL | {"zz": (1,)}, MODEL, tokens=1) or "")


@pytest.mark.parametrize("shape", [(3, 4), (12,), (4, 3, 1), (0,)])
def test_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    reason = refusal(MODEL | {"a": shape}, MODEL, tokens=1)
    assert reason == f"a has shape {shape}, not (4, 3)"


@pytest.mark.parametrize(
    ("tokens", "rows", "leased", "refused"),
    [
        (32, 4, 4, ""),
        (32, 4, None, ""),
        (33, 4, 4, "reports 33 tokens for 4 rows"),
        (31, 4, 9, "reports 31 tokens for 4 rows"),
        (40, 5, 4, "consumed 5 rows of 4 that were leased"),
        (8, 0, 4, "reports 8 tokens for 0 rows"),
    ],
)
def test_tokens_must_be_those_of_the_rows_and_no_more_than_were_leased(
    tokens: int, rows: int, leased: int | None, refused: str
) -> None:
    reason = token_refusal(tokens, rows=rows, leased_rows=leased, row_tokens=8)
    assert (reason is None) if not refused else (refused in (reason or ""))


def test_norm_is_that_of_all_tensors_together_in_float64() -> None:
    one = update(3, scale=1e18)  # whose squares overflow in fp32
    flat = torch.cat([tensor.reshape(-1) for tensor in one.values()]).double()
    assert update_norm(one) == pytest.approx(float(flat.norm()), rel=1e-12)
    assert update_norm({}) == 0.0


def test_norm_far_above_the_median_of_earlier_ones_is_refused_with_the_figures() -> None:
    earlier = [1.0, 2.0, 1000.0]  # the median, not the mean: one that slipped in does no harm
    assert norm_refusal(20.0, earlier, max_ratio=10) is None
    reason = norm_refusal(20.1, earlier, max_ratio=10)
    assert reason is not None and "10.1 times the median of the last 3" in reason
    assert norm_refusal(0.0, earlier, max_ratio=10) is None


@pytest.mark.parametrize(
    ("earlier", "max_ratio"), [([], 10.0), ([1.0, 1.0], 10.0), ([1.0] * 9, 0.0), ([0.0] * 9, 10.0)]
)
def test_any_norm_will_do_where_there_is_nothing_to_compare_it_with(
    earlier: list[float], max_ratio: float
) -> None:
    assert norm_refusal(1e9, earlier, max_ratio=max_ratio) is None


def test_books_keep_the_norms_of_the_last_merged_updates_only() -> None:
    books = AdmissionBooks()
    for first in range(0, 150, 3):
        books.merged([float(first), first + 1.0, first + 2.0])
    assert len(books.norms) == MAX_NORMS
    assert books.norms == [float(value) for value in range(50, 150)]


class HandClock:
    def __init__(self) -> None:
        self.time_s = 1000.0

    def now_s(self) -> float:
        return self.time_s


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


def test_three_refusals_in_a_row_leave_a_client_out_for_the_cooling_time(clock: HandClock) -> None:
    books = AdmissionBooks()
    cooling = Cooling(books, clock, 300.0)
    for _ in range(2):
        books.refused("a")
        assert cooling.ready("a")
    books.refused("a")
    assert not cooling.ready("a") and cooling.ready("b")
    clock.time_s += 299.0
    assert not cooling.ready("a")
    clock.time_s += 1.0
    assert cooling.ready("a"), "its time is over, also when nobody else is there"
    for _ in range(2):
        books.refused("a")
        assert cooling.ready("a"), "it begins anew"


def test_accepted_reply_forgives_the_refusals_before_it(clock: HandClock) -> None:
    books = AdmissionBooks()
    cooling = Cooling(books, clock, 300.0)
    for _ in range(3):
        books.refused("a")
        books.refused("a")
        books.accepted("a")
    assert cooling.ready("a") and books.in_a_row == {}


def test_resumed_server_lets_the_cooling_time_begin_anew(clock: HandClock) -> None:
    books = AdmissionBooks(in_a_row={"a": 3})
    cooling = Cooling(books, clock, 5.0)
    assert not cooling.ready("a")
    clock.time_s += 5.0
    assert cooling.ready("a")


def test_norm_that_a_mean_in_fp32_could_not_hold_is_refused_whatever_came_before() -> None:
    assert norm_refusal(1e25, [], max_ratio=0) is None
    assert "fp32" in (norm_refusal(1e30, [], max_ratio=10) or "")
