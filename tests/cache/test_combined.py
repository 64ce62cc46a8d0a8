"""Two methods together: whose plan is whose, and UniCP inside a scripted method against a run by hand."""

from dataclasses import replace

import pytest

from minidit.cache.plan import (
    CFG_DELTA,
    GUIDED,
    REUSE,
    RUN_ALL,
    Gate,
    Load,
    Measure,
    Mix,
    Need,
    Plan,
    Run,
    h,
    sub,
)
from minidit.cache.policies.combined import Combined
from minidit.cache.policies.none import NoCache
from minidit.cache.policies.unicp import UniCP
from minidit.presets import ScheduleConfig
from minidit.sampling import denoise
from minidit.schedules import make_schedule
from tests.cache.reference_unicp import FIRST, UnrolledRun
from tests.cache.test_unicp import (
    STEPS,
    embedded_run,
    mixed_profile,
    random_bases,
    run_info,
    sample,
)
from tests.tensors import rel

SCRIPT = ["full", "full", "step", "cfg", "cfg", "full", "block", "block"]
MODES = {
    "full": Plan(keep=(GUIDED, CFG_DELTA, h(FIRST))),
    "step": Plan(output=REUSE, label="step"),
    "cfg": Plan(branches=("cond",), fill=REUSE, keep=(GUIDED,), label="cfg"),
    "block": Plan(path=(Load(h(FIRST)), Run(FIRST)), keep=(GUIDED, CFG_DELTA), label="block"),
}


class Scripted:
    """Does what a list says, and remembers what it was asked and told."""

    def __init__(self, script: list[str]):
        self.script, self.told = script, []

    def reset(self, run) -> tuple[Need, ...]:
        return Need(GUIDED), Need(CFG_DELTA), Need(h(FIRST))

    def plan(self, step) -> Plan:
        return MODES[self.script[step.i]]

    def tell(self, step, values) -> None:
        self.told.append((step.i, values))


class Gated(NoCache):
    """Asks for a number after two blocks, and skips the rest of them where it is below 1."""

    def plan(self, step) -> Plan:
        return Plan(path=(Run(0, 2), Run(2)), gate=Gate(0, Measure(h(2))))

    def decide(self, step, plan: Plan, value: float) -> Plan:
        assert plan == self.plan(step)  # its own plan, not the one that was made of it
        return replace(plan, path=(Run(0, 2), Load(h(8)))) if value < 1 else plan


def test_an_inner_method_that_cannot_refine_is_refused():
    with pytest.raises(ValueError, match="NoCache cannot act inside the blocks of UniCP"):
        Combined(UniCP(), NoCache())


def test_both_have_their_needs():
    inner = UniCP(profile=mixed_profile())
    needs = Combined(Scripted(SCRIPT), inner).reset(run_info(depth=8))
    assert needs == (*Scripted(SCRIPT).reset(None), *inner.reset(run_info(depth=8)))
    assert {need.site.kind for need in needs} == {"guided", "cfg_delta", "h", "sub"}


def test_the_outer_plan_stays_and_both_are_told():
    outer = Scripted(SCRIPT)
    policy, info = Combined(outer, UniCP(profile=mixed_profile())), run_info(depth=8)
    policy.reset(info)
    for step in info.steps:
        plan, own = policy.plan(step), MODES[SCRIPT[step.i]]
        assert replace(plan, subs=(), keep=own.keep) == own and plan.keep[: len(own.keep)] == own.keep
        policy.tell(step, {Measure(GUIDED): 0.5})
    assert outer.told == [(i, {Measure(GUIDED): 0.5}) for i in range(STEPS)]
    assert policy.inner.kept  # told() made the inner one's plans history


@pytest.mark.parametrize("script", [SCRIPT, ["full", "step"] * 4, ["full", "cfg", "cfg", "cfg"] * 2], ids=str)
def test_unicp_inside_another_method_equals_the_hand_unrolled_run(script):
    forward, noise = embedded_run()
    policy, bases = Combined(Scripted(script), UniCP(profile=mixed_profile())), random_bases()
    schedule = make_schedule(ScheduleConfig("unipc"), STEPS)
    run = denoise(forward, schedule, noise, policy, guidance_scale=4.0, constants=bases)
    sources = policy.inner.sources
    by_hand = UnrolledRun(forward.model, forward.context, sources, policy.inner.widths, bases)
    assert rel(run.latents, by_hand.latents(schedule, noise, 4.0, script)) < 1e-6  # the same fp32 operations
    kinds = {type(how) for record in run.records for _, how in record.plan.subs}
    assert Mix in kinds and len(kinds) == 2  # reused and sliced
    assert rel(run.latents, sample(forward, noise, Scripted(script))) > 1e-3  # and it does act


def test_a_source_that_the_outer_method_skips_is_run_where_it_is_needed_first():
    policy, info = Combined(Scripted(["full", "step"] * 4), UniCP(profile=mixed_profile())), run_info(depth=8)
    policy.reset(info)
    key = next(key for key, sources in policy.inner.sources.items() if sources[:4] == (0, 1, 1, 3))
    plans = []
    for step in info.steps:
        plans.append(policy.plan(step))
        policy.tell(step, {})
    assert key not in dict(plans[2].subs)  # step 2 would reuse step 1, which was skipped
    assert sub(*key) not in plans[1].keep and plans[1].subs == ()


def test_a_gate_is_decided_by_the_outer_method_and_refined_anew():
    policy, info = Combined(Gated(), UniCP(profile=mixed_profile())), run_info(depth=8)
    policy.reset(info)
    first = policy.plan(info.steps[0])
    assert {site.first for site in first.keep} == set(range(8))
    decided = policy.decide(info.steps[0], first, 0.5)
    assert decided.path == (Run(0, 2), Load(h(8))) and {site.first for site in decided.keep} == {0, 1}
    policy.tell(info.steps[0], {})
    second = policy.plan(info.steps[1])
    reused = {block for (block, _), how in second.subs if how == REUSE}
    assert reused == {0, 1}  # the blocks that the gate skipped have stored nothing


def test_an_outer_method_that_runs_everything_leaves_the_inner_one_as_it_is_alone():
    together, alone = Combined(NoCache(), UniCP(profile=mixed_profile())), UniCP(profile=mixed_profile())
    info = run_info(depth=8)
    together.reset(info)
    alone.reset(info)
    for step in info.steps:
        assert together.plan(step) == alone.refine(step, RUN_ALL)
        together.tell(step, {})
        alone.tell(step, {})
