"""Measurements: distances against numbers by hand, what is not finite, batched against sequential."""

import math

import pytest
import torch

from minidit.cache.loop import Recorder
from minidit.cache.measure import Measurements, distance, value
from minidit.cache.plan import GUIDED, Measure, Need, Plan, h
from minidit.cache.store import make_store

BOTH = ("cond", "uncond")
OLD, NEW = [1.0, -2.0, 3.0, -4.0], [2.0, -2.0, 1.0, -4.0]  # differences 1, 0, -2, 0


@pytest.mark.parametrize(
    "norm, want",
    [
        ("l1", 3 / 10),
        ("l2", math.sqrt(5 / 30)),
        ("moments", (-1 / 4, math.sqrt(5 / 4 - 1 / 16))),
        ("abs", (9 / 4, 10 / 4)),
    ],
)
def test_distances_are_those_by_hand(norm, want):
    new, old, found = torch.tensor(NEW), torch.tensor(OLD), Measurements()
    found.add(Measure(GUIDED, norm), new, old)
    assert found.read() == ({Measure(GUIDED, norm): pytest.approx(want, rel=1e-12)}, [])
    assert distance(new, old, norm) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_from_nothing_to_something_is_infinitely_far(norm):
    nothing, something = torch.zeros(3), torch.ones(3)
    assert distance(nothing, nothing, norm) == 0.0
    assert distance(something, nothing, norm) == math.inf
    assert distance(nothing, something, norm) == 1.0


def test_equal_values_have_no_spread():
    same = torch.full((1000,), 0.1)
    assert distance(same + 0.25, same, "moments")[0] == pytest.approx(0.25, rel=1e-6)
    assert distance(same, same, "moments") == (0.0, 0.0)
    assert value("moments", 3.0, 9.0 / 10 - 1e-9, 10) == (0.3, 0.0)  # rounding below zero is zero


def test_several_measurements_are_read_in_one_go():
    found = Measurements()
    assert found.read() == ({}, [])
    new, old = torch.tensor(NEW), torch.tensor(OLD)
    found.add(Measure(GUIDED), new, old)
    found.watch("cond", new)
    found.add(Measure(h(2), "abs", branch="uncond"), new, old)
    found.watch("uncond", old)
    values, broken = found.read()
    assert values == {Measure(GUIDED): pytest.approx(0.3), Measure(h(2), "abs", branch="uncond"): (2.25, 2.5)}
    assert broken == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(bad):
    found = Measurements()
    for name, number in (("cond", 1.0), ("uncond", bad), ("third", 3e38)):
        found.watch(name, torch.tensor([number, number, 3e38]))  # the fp32 sum of large numbers overflows
    assert found.read()[1] == ["uncond"]


def test_batched_and_sequential_branches_measure_the_same():
    draw = torch.Generator().manual_seed(0)
    old, new = (torch.randn(2, 33, 48, generator=draw) for _ in range(2))
    measures = tuple(Measure(h(1), norm, b) for norm in ("l1", "l2", "moments", "abs") for b in BOTH)
    plan, told = Plan(keep=(h(1),), measure=measures), []
    for groups in ((BOTH,), (("cond",), ("uncond",)), (("uncond",), ("cond",))):
        store = make_store([Need(h(1))], BOTH, lambda site, branch: ((1, 33, 48), torch.float32), "cpu")
        for state in (old, new):
            found = Measurements()
            recorder = Recorder(plan, store, found)
            for group in groups:
                recorder.see(h(1), group, state[[BOTH.index(branch) for branch in group]])
        told.append(found.read()[0])
    assert set(told[0]) == set(measures)
    for values in told[1:]:
        for measure in measures:
            assert values[measure] == pytest.approx(told[0][measure], rel=1e-6)
    assert told[0][Measure(h(1), branch="cond")] != told[0][Measure(h(1), branch="uncond")]
