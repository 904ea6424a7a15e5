"""The plan of faults is a function of the seed, and every kind comes."""

from collections import Counter

from benchmarks.chaos.faults import FEDERATION, KINDS, plan

SITES = ("site-a", "site-b", "site-c")


def test_a_seed_gives_the_same_plan_and_another_seed_another() -> None:
    first, again, other = (
        plan(seed, duration_s=600.0, every_s=6.0, sites=SITES) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_each_slot_has_one_fault_and_each_bag_all_kinds() -> None:
    bag = sum(KINDS.values())
    faults = plan(7, duration_s=10.0 * 2 * bag, every_s=10.0, sites=SITES)
    assert [int(fault.at_s // 10) for fault in faults] == list(range(2 * bag))
    assert Counter(fault.kind for fault in faults[:bag]) == Counter(KINDS)
    for fault in faults:
        assert (fault.target in SITES) or fault.target == "server"
        if fault.kind in FEDERATION:
            assert fault.target == "server"


def test_named_kinds_come_in_their_order_and_no_more() -> None:
    kinds = ["kill-redis", "reply-nan"]
    faults = plan(1, duration_s=100.0, every_s=5.0, sites=SITES, kinds=kinds)
    assert [fault.kind for fault in faults] == kinds
