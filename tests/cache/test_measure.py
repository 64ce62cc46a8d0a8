"""Measurements: distances against numbers by hand, what is not finite, batched against sequential."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from minidit import sampling
from minidit.cache import measure as measuring
from minidit.cache.measure import Measurements, distance, value
from minidit.cache.plan import GUIDED, Gate, Measure, Need, Plan, h
from minidit.cache.recorder import Recorder
from minidit.cache.store import make_store
from minidit.models.wan import Head, Wan
from minidit.presets import ScheduleConfig, WanConfig
from minidit.schedules import make_schedule
from minidit_kernels.rel_l1 import distance_sums
from minidit_kernels.tuning import INTERPRET

BOTH = ("cond", "uncond")
DEVICE = "cpu" if INTERPRET else "cuda"  # where kernels run
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
    found.watch({"cond": new})
    found.add(Measure(h(2), "abs", branch="uncond"), new, old)
    found.watch({"uncond": old})
    values, broken = found.read()
    assert values == {Measure(GUIDED): pytest.approx(0.3), Measure(h(2), "abs", branch="uncond"): (2.25, 2.5)}
    assert broken == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(bad):
    found = Measurements()
    seen = {"cond": 1.0, "uncond": bad, "third": 3e38}  # the fp32 sum of large numbers overflows
    found.watch({name: torch.tensor([number, number, 3e38]) for name, number in seen.items()})
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


@pytest.fixture(params=["reference", "triton"])
def impl(request, monkeypatch):
    """Measurements by the definition and by the kernel."""
    monkeypatch.setattr(measuring, "distance_sums", partial(distance_sums, impl=request.param))
    return request.param


@pytest.mark.parametrize("depth", [1, 3])
def test_a_value_is_measured_before_it_is_kept(impl, depth):
    """In one pass: against every age there is, the text behind the video is kept and not measured."""
    draw = torch.Generator().manual_seed(depth)
    states = [torch.randn(2, 8, 16, generator=draw).to(DEVICE) for _ in range(5)]
    ages = tuple(Measure(h(1), "l1", branch, age) for branch in BOTH for age in range(depth))
    plan = Plan(keep=(h(1),), measure=(*ages, Measure(h(1), "l2")))
    store = make_store([Need(h(1), depth)], BOTH, lambda site, branch: ((1, 8, 16), torch.float32), DEVICE)
    for n, state in enumerate(states):
        found = Measurements()
        Recorder(plan, store, found, video_tokens=6).see(h(1), BOTH, state)
        values, _ = found.read()
        known = [m for m in plan.measure if m.age < n]
        assert set(values) == set(known)
        for measure in known:
            row = BOTH.index(measure.branch)
            new, old = state[row, :6], states[n - 1 - measure.age][row, :6]
            difference, size = (new - old).double(), old.double()
            want = (
                difference.abs().sum() / size.abs().sum()
                if measure.norm == "l1"
                else difference.norm() / size.norm()
            )
            assert values[measure] == pytest.approx(want.item(), rel=1e-6)
        for row, branch in enumerate(BOTH):
            entries = store.entries(h(1), branch)
            want = [states[n - age][row : row + 1] for age in range(min(n + 1, depth))]
            assert all(torch.equal(a, b) for a, b in zip(entries, want, strict=True))


def test_one_launch_serves_every_branch_norm_and_the_store(monkeypatch):
    launches = []
    count = lambda pairs: launches.append(len(pairs)) or distance_sums(pairs)
    monkeypatch.setattr(measuring, "distance_sums", count)
    measures = tuple(Measure(h(1), norm, branch) for norm in ("l1", "l2", "abs") for branch in BOTH)
    store = make_store([Need(h(1))], BOTH, lambda site, branch: ((1, 8, 16), torch.float32), "cpu")
    recorder = Recorder(Plan(keep=(h(1),), measure=measures), store, Measurements())
    recorder.see(h(1), BOTH, torch.ones(2, 8, 16))
    assert launches == []  # nothing to compare with yet: a plain copy
    recorder.see(h(1), BOTH, torch.zeros(2, 8, 16))
    assert launches == [2]
    assert len(recorder.measurements.read()[0]) == 6


def test_a_gate_reads_the_store_before_it_is_overwritten(impl):
    gate = Gate(0, Measure(h(1)))
    plan = Plan(keep=(h(1),), measure=(Measure(h(1), "l2"),), gate=gate)
    store = make_store([Need(h(1))], ("cond",), lambda site, branch: ((1, 2, 4), torch.float32), DEVICE)
    store.push(h(1), "cond", torch.full((1, 2, 4), 2.0, device=DEVICE))
    found = Measurements()
    recorder = Recorder(plan, store, found)
    recorder.see(h(1), ("cond",), torch.full((1, 2, 4), 3.0, device=DEVICE))
    assert recorder.gate_value == pytest.approx(0.5)
    assert found.read()[0] == {Measure(h(1), "l2"): pytest.approx(0.5)}  # the gate's own number is not told
    assert store.entries(h(1), "cond")[0].eq(3).all()


def test_sums_are_sent_once_and_read_as_often_as_wanted():
    found = Measurements()
    found.add(Measure(GUIDED), torch.tensor(NEW), torch.tensor(OLD))
    found.send()
    assert found.read() == found.read() == ({Measure(GUIDED): pytest.approx(0.3)}, [])


@pytest.mark.gpu
def test_a_card_reads_back_in_one_copy():
    new, old, found = torch.tensor(NEW).cuda(), torch.tensor(OLD).cuda(), Measurements()
    for norm in ("l1", "l2", "moments", "abs"):
        found.add(Measure(GUIDED, norm), new, old)
    found.watch({"cond": new, "uncond": old / 0})
    found.send()
    assert found.numbers.is_pinned() and found.numbers.shape == (6, 7)
    values, broken = found.read()
    assert values[Measure(GUIDED)] == pytest.approx(0.3) and broken == ["uncond"]


class Diary:
    """Runs everything and measures the guided prediction; notes who was called when."""

    def __init__(self):
        self.notes: list[str] = []
        self.full = Plan(keep=(GUIDED,), measure=(Measure(GUIDED),))

    def reset(self, run) -> tuple[Need, ...]:
        return (Need(GUIDED),)

    def plan(self, step) -> Plan:
        self.notes.append(f"plan {step.i}")
        return self.full

    def tell(self, step, values) -> None:
        self.notes.append(f"tell {step.i}")


def denoise(policy: Diary, on_step=None) -> sampling.Outcome:
    """Four steps of a tiny model."""
    torch.manual_seed(0)
    model = Wan(WanConfig(32, 64, 2, 2, channels=4, text_width=16, text_len=6)).eval().requires_grad_(False)
    forward = sampling.Forward(model, model.prepare([torch.ones(3, 16)], (1, 4, 4)), is_batched=True)
    schedule, noise = make_schedule(ScheduleConfig(), 4), sampling.draw_noise((1, 4, 1, 4, 4), 0)
    return sampling.denoise(forward, schedule, noise, policy, guidance_scale=1.0, on_step=on_step)


def test_values_are_told_before_the_next_plan():
    policy = Diary()
    denoise(policy)
    assert policy.notes == [f"{call} {i}" for i in range(4) for call in ("plan", "tell")]


def test_the_host_runs_a_step_ahead_where_no_values_are_needed(monkeypatch):
    seen = {}
    for ahead in (False, True):
        monkeypatch.setattr(sampling, "runs_ahead", lambda policy, x, ahead=ahead: ahead)
        policy, latents = Diary(), []
        outcome = denoise(policy, on_step=lambda record, x, latents=latents: latents.append(x))
        seen[ahead] = outcome, latents
        assert [record.step.i for record in outcome.records] == [0, 1, 2, 3]
    assert policy.notes == ["plan 0", "plan 1", "tell 0", "plan 2", "tell 1", "plan 3", "tell 2", "tell 3"]
    (plain, plain_latents), (early, early_latents) = seen.values()
    assert [r.values for r in early.records] == [r.values for r in plain.records]
    assert len(early_latents) == 4
    assert all(torch.equal(a, b) for a, b in zip(early_latents, plain_latents, strict=True))


def test_running_ahead_is_for_cards_and_policies_that_say_so():
    card, cpu = SimpleNamespace(is_cuda=True), torch.zeros(1)
    silent, table = Diary(), Diary()
    table.needs_values = False
    assert sampling.runs_ahead(table, card)
    assert not sampling.runs_ahead(silent, card) and not sampling.runs_ahead(table, cpu)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_step_that_is_not_finite_is_named(monkeypatch, ahead):
    class Spoiled(Diary):
        def plan(self, step) -> Plan:
            if step.i == 2:
                monkeypatch.setattr(Head, "forward", lambda *inputs: torch.full((1, 4, 1, 4, 4), math.nan))
            return super().plan(step)

    monkeypatch.setattr(sampling, "runs_ahead", lambda policy, x: ahead)
    with pytest.raises(ValueError, match="step 3 of 4: the cond prediction is not finite"):
        denoise(Spoiled())
