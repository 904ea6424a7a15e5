"""Which update of a round is unlike the others: too long, or the wrong way round."""

import math
import random
import statistics

import pytest

from pilot.rules.agreement import MAX_NORM_RATIO, Votes, outliers, undecided

Vector = list[float]


def votes(
    *updates: Vector, steps: list[float] | None = None, momentum: Vector | None = None
) -> Votes:
    gram = [[dot(a, b) for b in updates] for a in updates]
    heading = None
    if momentum is not None:
        heading = [
            dot(u, momentum) / math.sqrt(dot(u, u) * dot(momentum, momentum)) for u in updates
        ]
    names = "abcdefgh"[: len(updates)]
    return Votes(names, steps or [1.0] * len(updates), gram, heading)


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def near(direction: Vector, seed: int, noise: float = 0.5) -> Vector:
    rng = random.Random(seed)
    return [x + noise * rng.gauss(0, 1) for x in direction]


NORTH = [1.0] * 20
HONEST = [near(NORTH, seed) for seed in range(5)]


def scaled(update: Vector, factor: float) -> Vector:
    return [factor * x for x in update]


@pytest.mark.parametrize("count", range(6))
def test_clients_that_agree_are_all_merged(count: int) -> None:
    assert outliers(votes(*HONEST[:count]), min_cosine=-0.25) == {}


@pytest.mark.parametrize("count", [3, 4, 5])
@pytest.mark.parametrize("factor", [1e6, 9.0, -9.0, -1e6])
def test_update_far_longer_than_the_others_is_left_out_in_a_first_round(
    count: int, factor: float
) -> None:
    updates = [scaled(HONEST[0], factor), *HONEST[1:count]]
    (told,) = outliers(votes(*updates), min_cosine=-0.25).items()
    assert (
        told[0] == "a" and f"what the other {count - 1} clients of the round let expect" in told[1]
    )


@pytest.mark.parametrize("count", [3, 5])
def test_update_turned_round_is_left_out_though_it_is_as_long_as_the_others(count: int) -> None:
    updates = [*HONEST[: count - 1], scaled(HONEST[count - 1], -1)]
    (told,) = outliers(votes(*updates), min_cosine=-0.25).items()
    assert told[0] == "abcde"[count - 1]
    assert f"points away from the other {count - 1} clients of the round (cosine -0." in told[1]


def test_two_of_five_that_are_turned_round_are_left_out_one_after_the_other() -> None:
    updates = [scaled(HONEST[0], -4), scaled(HONEST[1], -1), *HONEST[2:]]
    assert set(outliers(votes(*updates), min_cosine=-0.25)) == {"a", "b"}


def test_long_update_that_is_out_decides_nothing_for_the_others() -> None:
    updates = [scaled(HONEST[0], -1e6), scaled(HONEST[1], -1), *HONEST[2:]]
    assert set(outliers(votes(*updates), min_cosine=-0.25)) == {"a", "b"}


def test_more_steps_may_move_as_many_times_further_and_fewer_need_not_move_less() -> None:
    long = scaled(HONEST[0], 1.9 * MAX_NORM_RATIO)
    updates = [long, *HONEST[1:3]]
    assert outliers(votes(*updates, steps=[2.0, 1.0, 1.0]), min_cosine=-1) == {}
    assert set(outliers(votes(*updates, steps=[1.0, 2.0, 2.0]), min_cosine=-1)) == {"a"}


def test_update_that_has_no_part_in_what_the_others_agree_on_is_left_out() -> None:
    """As noise, which is as long as any and points nowhere."""
    others = HONEST[1:3]
    mean = [
        sum(pair)
        for pair in zip(*(scaled(o, 1 / math.sqrt(dot(o, o))) for o in others), strict=True)
    ]
    noise = near([0.0] * len(NORTH), 99)
    nowhere = [n - dot(noise, mean) / dot(mean, mean) * m for n, m in zip(noise, mean, strict=True)]
    (told,) = outliers(votes(nowhere, *others), min_cosine=-0.25).items()
    assert told[0] == "a" and "no part in the direction in which the other 2 clients" in told[1]
    assert outliers(votes(nowhere, *others), min_cosine=-1) == {}
    apart = [near([0.1] * len(NORTH), seed, noise=1.0) for seed in (3, 4)]
    assert outliers(votes(nowhere, *apart), min_cosine=-0.5) == {}, "they hardly agree themselves"


def test_each_rule_can_be_switched_off() -> None:
    turned = [scaled(HONEST[0], -1), *HONEST[1:3]]
    assert outliers(votes(*turned), min_cosine=-1) == {}
    long = [scaled(HONEST[0], 1e6), *HONEST[1:3]]
    assert outliers(votes(*long), min_cosine=-0.25, norms=False) == {}


@pytest.mark.parametrize("who", [0, 1])
def test_of_two_that_disagree_the_one_against_the_momentum_is_left_out(who: int) -> None:
    pair = HONEST[:2]
    pair[who] = scaled(pair[who], -9)
    assert outliers(votes(*pair), min_cosine=-0.25) == {}, "in a first round nobody can tell"
    (told,) = outliers(votes(*pair, momentum=NORTH), min_cosine=-0.25).items()
    assert told[0] == "ab"[who] and "from the outer momentum" in told[1]


def test_two_of_which_either_may_be_wrong_are_told() -> None:
    pair = votes(scaled(HONEST[0], -1), HONEST[1])
    assert "the updates of a and b point away from each other (cosine -0." in undecided(pair, {})
    assert undecided(pair, {"a": "out"}) == undecided(votes(*HONEST[:2]), {}) == ""
    three = votes(scaled(HONEST[0], -1), *HONEST[1:3])
    assert undecided(three, outliers(three, min_cosine=-0.25)) == ""


def test_two_that_agree_may_both_turn_against_the_momentum() -> None:
    pair = [scaled(one, -1) for one in HONEST[:2]]
    assert outliers(votes(*pair, momentum=NORTH), min_cosine=-0.25) == {}


def test_update_of_zeros_is_no_outlier() -> None:
    """As at the end of a run, where the learning rate is 0."""
    zeros = [0.0] * len(NORTH)
    assert outliers(votes(zeros, zeros, zeros), min_cosine=-0.25) == {}
    assert outliers(votes(zeros, *HONEST[1:3]), min_cosine=-0.25) == {}


def test_figures_for_operators_are_those_of_plain_vectors() -> None:
    updates, steps, momentum = (
        [near(NORTH, seed, 1.0) for seed in range(4)],
        [1.0, 3.0, 2.0, 9.0],
        NORTH,
    )
    found = votes(*updates, steps=steps, momentum=momentum).figures({"a", "b", "c"})
    mean = [
        sum(s * x for s, x in zip(steps[:3], at, strict=True)) / 6
        for at in zip(*updates[:3], strict=True)
    ]

    def cosine(one: Vector, other: Vector) -> float:
        return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))

    assert found["update_norm"] == pytest.approx(math.sqrt(dot(mean, mean)))
    assert found["momentum_cosine"] == pytest.approx(cosine(mean, momentum))
    pairs = [cosine(updates[i], updates[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["client_cosine"] == pytest.approx(sum(pairs) / 3)
    alone = votes(updates[0]).figures({"a"})
    assert alone["client_cosine"] is None and alone["momentum_cosine"] is None
    assert alone["update_norm"] == pytest.approx(math.sqrt(dot(updates[0], updates[0])))
    assert set(votes().figures({"a"}).values()) == {None}


def test_all_at_once_is_what_plain_vectors_say_one_by_one() -> None:
    updates = [scaled(near(NORTH, seed, 1.0), 1.0 + seed) for seed in range(6)] + [[0.0] * 20]
    found, left = votes(*updates), [0, 2, 3, 5, 6]

    def unit(update: Vector) -> Vector:
        length = math.sqrt(dot(update, update))
        return scaled(update, 1 / length) if length else update

    def cosine(i: int, others: list[int]) -> float:
        mean = [sum(at) for at in zip(*(unit(updates[j]) for j in others), strict=True)]
        return dot(unit(updates[i]), unit(mean))

    def but(i: int, indices: list[int]) -> list[int]:
        return [j for j in indices if j != i]

    assert found.cosines(left) == pytest.approx([cosine(i, but(i, left)) for i in left])
    assert found.cosine(2, 5) == pytest.approx(cosine(2, [5]))
    aims = []
    for i in left:
        among = statistics.median(cosine(j, but(j, but(i, left))) for j in but(i, left))
        aims.append(cosine(i, but(i, left)) / among if dot(updates[i], updates[i]) else math.nan)
    assert found.aims(left) == pytest.approx(aims, nan_ok=True)


def test_a_thousand_clients_are_judged_before_the_next_round() -> None:
    """Each with each others' mean, one by one, would take days."""
    directions = [[math.cos(i / 900), math.sin(i / 900)] for i in range(1000)]
    directions[400] = [-1.0, -1.0]
    gram = [[dot(one, other) for other in directions] for one in directions]
    many = Votes([f"c{i}" for i in range(1000)], [1.0] * 1000, gram)
    assert set(outliers(many, min_cosine=-0.25)) == {"c400"}
    assert many.figures(many.clients)["client_cosine"] == pytest.approx(0.9, abs=0.05)
