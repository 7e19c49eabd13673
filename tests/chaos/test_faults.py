"""The plan of faults: seeded, counted, in the kinds that a request can have."""

import pytest
from faults import ALL_KINDS, BURST, KINDS, FaultPlan


def test_a_plan_is_decided_by_its_seed():
    def drawn(seed):
        plan = FaultPlan.from_json({"faults": dict.fromkeys(ALL_KINDS, 3), "rate": 0.3, "seed": seed})
        return [plan.draw(method, f"/{number % 7}") for number in range(60) for method in KINDS]

    assert drawn(1) == drawn(1) != drawn(2)
    assert sum(fault is not None and fault.number == 1 for fault in drawn(1)) == 3 * len(ALL_KINDS)


def test_an_unknown_fault_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown faults \['flood'\]; known: .*truncated"):
        FaultPlan.from_json({"faults": {"flood": 1}})


def test_a_burst_hits_one_object_in_a_row_and_counts_once():
    plan = FaultPlan.from_json({"faults": {"burst": 1}, "rate": 1})
    found = [plan.draw("GET", "/a") for _ in range(BURST + 2)]
    assert plan.draw("GET", "/b") is None
    assert [fault.number for fault in found if fault] == list(range(1, BURST + 1))
    for fault in found[:BURST]:
        plan.record(fault)
    assert plan.report()["counts"] == {"burst": 1}
    assert len(plan.report()["done"]) == BURST


def test_a_fault_that_could_not_be_done_stays_to_be_done():
    plan = FaultPlan.from_json({"faults": {"truncated": 1}, "rate": 1})
    plan.give_back(plan.draw("GET", "/empty"))
    assert plan.report() == {"counts": {}, "left": {"truncated": 1}, "requests": 1, "done": []}
    assert plan.draw("GET", "/full").kind == "truncated"
