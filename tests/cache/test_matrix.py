"""Every method on every family: it acts, or it is refused by name with the reason before step 0.

Models are tiny with random weights, so steps are far apart and thresholds are wide open: what is tested is
that a method does its work on a family, not how good it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import pytest
import torch
from torch import Tensor, nn

from minidit.cache.macs import full_macs, plan_macs
from minidit.cache.plan import REUSE, RunInfo
from minidit.cache.policies.none import NoCache
from minidit.cache.spec import METHODS, make_policy, parse
from minidit.models.latte import Latte
from minidit.models.open_sora import OpenSora
from minidit.models.wan import Wan
from minidit.presets import ScheduleConfig
from minidit.sampling import Forward, NoiseSource, Outcome, denoise
from minidit.schedules import Schedule, TableSchedule, make_schedule, make_table_schedule
from tests import tiny_cogvideox, tiny_hunyuan_video
from tests.models import test_latte, test_open_sora, test_wan
from tests.tensors import randn, random

STEPS, BOTH = 10, ("cond", "uncond")
GUIDANCE = 4.0


@dataclass(frozen=True)
class Small:
    """A family's tiny model on a small video, and its way to sample."""

    family: str
    forward: Forward
    size: tuple[int, int, int]  # latent (T, H, W)
    schedules: Callable[[int], Schedule | TableSchedule]

    @property
    def noise(self) -> Tensor:
        return randn(1, 4, *self.size, seed=4)

    def run(self, policy, steps: int = STEPS) -> Outcome:
        return denoise(
            self.forward,
            self.schedules(steps),
            self.noise,
            policy,
            guidance_scale=GUIDANCE,
            family=self.family,
            draw=NoiseSource(9),
        )

    @cached_property
    def plain(self) -> Tensor:
        return self.run(NoCache()).latents

    def info(self, steps: int = STEPS) -> RunInfo:
        model = self.forward.model
        table = self.schedules(steps).steps(GUIDANCE)
        return RunInfo(
            table, len(model.blocks), model.subs, self.forward.branches, self.family, tokens=self.tokens
        )

    @property
    def tokens(self) -> int:
        shape = self.forward.model.state_shape(self.forward.context)[0]
        return self.forward.video_tokens or shape[1]

    def macs(self, outcome: Outcome) -> tuple[int, int]:
        """Multiply-adds of a run, and of an uncached one."""
        table = cache(lambda width: self.forward.model.macs(self.size, 8, width))
        branches = self.forward.branches
        ran = sum(plan_macs(record.plan, branches, table) for record in outcome.records)
        return ran, len(outcome.records) * full_macs(branches, table)


def make_wan(is_batched: bool = True) -> Small:
    model, size = random(Wan(replace(test_wan.TINY, depth=6))), (3, 4, 6)
    context = model.prepare([randn(8, 16, seed=2), randn(3, 16, seed=3)], size, branches=BOTH)
    schedules = lambda n: make_schedule(ScheduleConfig("unipc"), n)
    return Small("wan", Forward(model, context, is_batched), size, schedules)


def make_hunyuan_video() -> Small:
    """As released: guidance is an input, and there is one branch."""
    model, size = tiny_hunyuan_video.tiny(), (3, 4, 6)
    context = model.prepare([tiny_hunyuan_video.text(5, seed=5)], size, branches=("cond",))
    forward = Forward(model, context, False, video_tokens=18)
    return Small(
        "hunyuan_video", forward, size, lambda n: make_schedule(ScheduleConfig("euler", "wan", 7.0), n)
    )


def make_cogvideox() -> Small:
    """With fresh noise at every step, and guidance that varies."""
    model, size = tiny_cogvideox.tiny("5b"), (2, 4, 6)
    context = model.prepare([randn(12, 24, seed=2), randn(12, 24, seed=3)], size, branches=BOTH)
    forward = Forward(model, context, True, video_tokens=context.video_tokens)
    return Small("cogvideox", forward, size, lambda n: make_table_schedule(tiny_cogvideox.DPM, n))


def make_open_sora() -> Small:
    model, size = random(OpenSora(replace(test_open_sora.TINY, depth=4))), (3, 5, 6)
    text = [randn(5, 16, seed=2), None]
    context = model.prepare(text, size, video=test_open_sora.VIDEO, branches=BOTH)
    schedules = lambda n: make_schedule(ScheduleConfig("euler", "wan", 4.8), n)
    return Small("open_sora", Forward(model, context, True), size, schedules)


def make_latte() -> Small:
    model, size = random(Latte(replace(test_latte.TINY, depth=4))), (3, 4, 6)
    context = model.prepare([randn(5, 16, seed=2), randn(5, 16, seed=3)], size, branches=BOTH)
    config = ScheduleConfig("ddim", "leading", 1.0, betas="linear", prediction="epsilon")
    return Small("latte", Forward(model, context, True), size, lambda n: make_table_schedule(config, n))


MAKERS = {
    "wan": make_wan,
    "hunyuan_video": make_hunyuan_video,
    "cogvideox": make_cogvideox,
    "open_sora": make_open_sora,
    "latte": make_latte,
}


@cache
def small(family: str) -> Small:
    with torch.inference_mode():
        return MAKERS[family]()


SPECS = {  # method -> how it is asked for here: 10 steps, 4 to 6 blocks, random weights
    "mixcache": "mixcache:impact=uniform,theta=100,delta=5/10",
    "unicp": "unicp:threshold=0.5,slice=off",
    "mixcache+unicp": "mixcache:impact=uniform,theta=100,delta=5/10+unicp:threshold=0.5,slice=off",
    "planned": "planned",
    "teacache": "teacache:threshold=2,coefficients=0/0/0/1/0",
    "magcache": "magcache",
    "easycache": "easycache:threshold=100",
    "adacache": "adacache:scale=100",
    "abcache": "abcache:interval=3",
    "cfg-gating": "cfg-gating",
    "blockdance": "blockdance",
    "delta-dit": "delta-dit",
    "fbcache": "fbcache:threshold=10,max_continuous=2",
    "dbcache": "dbcache:threshold=10,warmup=3,max_continuous=2",
    "fora": "fora",
    "pab": "pab",
    "taylorseer": "taylorseer:interval=3",
    "ditfastattn": "ditfastattn",
    "fastercache": "fastercache",
    "toca": "toca",
    "duca": "duca",
}
NOT_METHODS = {"none", "replay"}
REFUSED = {  # (method, family) -> what it says
    ("cfg-gating", "hunyuan_video"): "cfg-gating: this run has one guidance branch",
    (
        "fastercache",
        "hunyuan_video",
    ): "fastercache: this run has no uncond branch to skip; use fastercache:att",
}


def profile(family: str) -> dict:
    """Made by hand: magnitudes that hardly change, and attention that drifts slowly."""
    run = small(family).info()
    kinds = [name for name in run.subs if name in ("attn", "cross", "t_attn", "t_cross")]
    reach = lambda i: range(1, min(6, STEPS - 1 - i) + 1)
    errors = [[[0.2 * k for k in reach(i)] for _ in range(run.depth)] for i in range(STEPS)]
    ratios = {branch: [1.0] + [0.97] * (STEPS - 1) for branch in run.branches}
    ways = ["full", "reuse", "window", "share", "window-share"]
    if len(run.branches) == 1:
        ways = ways[:3]
    rows = [[ways[i % len(ways)]] * run.depth for i in range(STEPS)]
    return {
        "magcache": {"ratios": ratios},
        "ditfastattn": {"depth": run.depth, "window": 2, "of": run.tokens, "map": {"attn": rows}},
        "steps": STEPS, "depth": run.depth, "tokens": run.tokens, "max_window": 6, "basis": "two-sided",
        "errors": dict.fromkeys(kinds, errors), "head_width": 12, "widths": [8], "slice_losses": [],
    }  # fmt: skip


def plan_profile() -> dict:
    """Forecasts that get worse the farther they reach, of steps that matter alike."""
    table = lambda scale: [[[scale * k for k in range(1, STEPS - a)]] * a for a in range(STEPS)]
    return {"errors": table(0.1), "ahead": table(0.3), "impact": [1.0] * STEPS}


def make(spec: str, family: str = "wan"):
    return make_policy(parse(spec), lambda method: plan_profile() if method == "planned" else profile(family))


def test_every_method_is_tested_here():
    assert set(SPECS) | NOT_METHODS == set(METHODS)


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("method", SPECS)
def test_a_method_acts_on_a_family_or_says_why_not(method, family):
    run, policy = small(family), make(SPECS[method], family)
    if (method, family) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[method, family]):
            policy.reset(run.info())
        return
    outcome = run.run(policy)
    ran, full = run.macs(outcome)
    assert ran < full, [record.plan.label for record in outcome.records]
    assert torch.isfinite(outcome.latents).all()
    assert not torch.equal(outcome.latents, run.plain)
    assert outcome.cache_bytes > 0


OUTERS = [name for name, method in METHODS.items() if {"step", "cfg", "block"} & set(method.levels.split())]
OUTERS = [name for name in OUTERS if "attention" not in METHODS[name].levels]


@pytest.mark.parametrize("outer", OUTERS)
def test_unicp_acts_inside_the_blocks_that_an_outer_method_runs(outer):
    run = small("wan")
    alone, both = run.run(make(SPECS[outer])), run.run(make(SPECS[outer] + "+unicp:threshold=0.5,slice=off"))
    assert any(how == REUSE for record in both.records for _, how in record.plan.subs)
    assert run.macs(both)[0] < run.macs(alone)[0]
    assert torch.isfinite(both.latents).all() and not torch.equal(both.latents, alone.latents)


# state: nothing of one run is seen by the next, and no branch sees another


@pytest.mark.parametrize("method", SPECS)
def test_an_aborted_run_leaves_nothing_behind(method):
    class Stop(Exception):
        pass

    class Aborting:
        """Breaks off in mid-run, after a few plans."""

        def __init__(self, policy):
            self.policy, self.reset, self.tell = policy, policy.reset, policy.tell

        def plan(self, step):
            if step.i == 7:
                raise Stop
            return self.policy.plan(step)

        def decide(self, step, plan, value):
            return self.policy.decide(step, plan, value)

    run, policy = small("wan"), make(SPECS[method])
    with pytest.raises(Stop):
        run.run(Aborting(policy))
    assert torch.equal(run.run(policy).latents, run.run(make(SPECS[method])).latents)


OF_A_STEP_COUNT = {"unicp", "mixcache+unicp", "ditfastattn", "planned"}  # their profiles are


@pytest.mark.parametrize("method", SPECS)
def test_another_number_of_steps_starts_afresh(method):
    run, policy = small("wan"), make(SPECS[method])
    run.run(policy)
    if method in OF_A_STEP_COUNT:
        with pytest.raises(ValueError, match="is of 10 steps and 6 blocks, this run of 13|at 13 steps"):
            policy.reset(run.info(13))
        return
    again, fresh = run.run(policy, 13), run.run(make(SPECS[method]), 13)
    assert [r.plan for r in again.records] == [r.plan for r in fresh.records]
    assert torch.equal(again.latents, fresh.latents)


@cache
def sequential_wan() -> Small:
    with torch.inference_mode():
        return make_wan(is_batched=False)


@pytest.mark.parametrize("method", SPECS)
def test_batched_and_sequential_guidance_follow_the_same_plans(method):
    """With state kept by branch: in one that is not, uncond would take what cond has stored."""
    batched, sequential = (run.run(make(SPECS[method])) for run in (small("wan"), sequential_wan()))
    assert [r.plan for r in batched.records] == [r.plan for r in sequential.records]
    error = (batched.latents - sequential.latents).abs().max() / batched.latents.abs().max()
    assert error < 1e-4  # matrix products of two rows round differently


class InPlace(nn.Module):
    """A block that writes its result over the state it is given."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, h, cond, cache):
        return h.copy_(self.block(h, cond, cache))


@cache
def in_place_wan() -> Small:
    run = make_wan()
    run.forward.model.blocks = nn.ModuleList(map(InPlace, run.forward.model.blocks))
    return run


@pytest.mark.parametrize("method", SPECS)
def test_blocks_that_write_in_place_change_nothing(method):
    """What is kept is a copy: with references, other engines' residuals became zero without a word."""
    want, got = (run.run(make(SPECS[method])).latents for run in (small("wan"), in_place_wan()))
    assert (got - want).abs().max() / want.abs().max() < 1e-5  # other memory, another order of sums
