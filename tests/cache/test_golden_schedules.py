"""Published schedules of other methods in our vocabulary: each policy is a few lines, and acts as published.

golden_schedules.json holds MagCache's ratios and the steps that its rule computes, and those of BlockDance,
TaylorSeer and FasterCache.
"""

import json
from pathlib import Path

import pytest
import torch

import minidit
from minidit.cache.plan import CFG_DELTA, REUSE, RUN_ALL, Add, Load, Mix, Need, Plan, Run, h, residual, runs
from minidit.settings import Choices

GOLDEN = json.loads((Path(__file__).parent / "golden_schedules.json").read_text())
DEPTH = 8


class MagCache:
    """Skip while the accumulated error of the published magnitude ratios stays below a threshold."""

    def __init__(self, ratios, first: int, threshold: float, most: int, inclusive: bool, signed: bool):
        self.ratios, self.first, self.threshold, self.most = ratios, first, threshold, most
        self.inclusive, self.signed = inclusive, signed

    def reset(self, run):
        self.magnitude, self.error, self.skipped = 1.0, 0.0, 0
        site = residual(0, run.depth)
        self.full, self.skip = Plan(keep=(site,)), Plan(path=(Add(site),), label="skip")
        return (Need(site),)

    def plan(self, step):
        if step.i < self.first:
            return self.full
        self.magnitude *= self.ratios[step.i]
        self.skipped += 1
        self.error += 1 - self.magnitude if self.signed else abs(1 - self.magnitude)
        below = self.error <= self.threshold if self.inclusive else self.error < self.threshold
        if below and self.skipped <= self.most:
            return self.skip
        self.magnitude, self.error, self.skipped = 1.0, 0.0, 0
        return self.full

    def tell(self, step, values):
        pass


class Every:
    """Full steps by a rule of the step alone; in between, what `short` says."""

    def __init__(self, is_full, full: Plan, short: Plan, needs: tuple[Need, ...]):
        self.is_full, self.full, self.short, self.needs = is_full, full, short, needs

    def reset(self, run):
        return self.needs

    def plan(self, step):
        return self.full if self.is_full(step.i, step.n) else self.short

    def tell(self, step, values):
        pass


def blockdance(group: int, start: int, stop: int, block: int) -> Every:
    """From step `start` on, groups of one full step and group - 1 that resume after `block`."""
    is_full = lambda i, n: i < start or i >= stop or (i - start) % group == 0
    state = h(block + 1)
    resume = Plan(path=(Load(state), Run(block + 1)))
    return Every(is_full, Plan(keep=(state,)), resume, (Need(state),))


def taylor(is_full) -> Every:
    """The whole stack's residual, continued in a straight line through the last two full steps."""
    site = residual(0, DEPTH)
    forecast = Plan(path=(Add(site, Mix((1.5, -0.5))),))
    return Every(is_full, Plan(keep=(site,)), forecast, (Need(site, 2),))


def cond_only(is_full) -> Every:
    """uncond from the last difference of the branches: FasterCache's schedule, without its frequencies."""
    short = Plan(branches=("cond",), fill=REUSE)
    return Every(is_full, Plan(keep=(CFG_DELTA,)), short, (Need(CFG_DELTA),))


class Step:
    def __init__(self, i: int, n: int):
        self.i, self.n = i, n


class Info:
    depth, branches, steps = DEPTH, ("cond", "uncond"), ()


def computed(policy, n: int, branch: str = "cond") -> list[int]:
    """The steps at which a branch runs every block."""
    policy.reset(Info)
    plans = [policy.plan(Step(i, n)) for i in range(n)]
    full = set(range(DEPTH))
    return [
        i for i, p in enumerate(plans) if runs(p, DEPTH) == full and branch in (p.branches or Info.branches)
    ]


def magcache(name: str) -> tuple[list[MagCache], int]:
    """The policies of a published setting, one per branch."""
    model, threshold, most, start = name.split("|")
    table = GOLDEN["magcache"][model]
    n, branches = table["steps"], table["branches_interleaved"]
    is_sora = model.startswith("opensora")
    first = 6 if is_sora else int(n * float(start[1:]))
    ratios = ([1.0] if is_sora else table["pad_first"]) + table["ratios"]
    inclusive = model.startswith(("hunyuan", "opensora"))
    make = lambda b: MagCache(
        ratios[b::branches], first, float(threshold[1:]), int(most[1:]), inclusive, is_sora
    )
    return [make(b) for b in range(branches)], n


@pytest.mark.parametrize("name", GOLDEN["magcache_computed"])
def test_magcache_computes_the_published_steps(name):
    policies, n = magcache(name)
    assert [computed(policy, n) for policy in policies] == GOLDEN["magcache_computed"][name]


def test_blockdance_computes_the_published_steps():
    as_baseline, as_paper = GOLDEN["blockdance"].values()
    assert computed(blockdance(4, 20, 50, 5), 50) == as_baseline
    assert computed(blockdance(2, 20, 48, 5), 50) == as_paper


def test_taylorseer_computes_the_published_steps():
    official, ported = GOLDEN["taylorseer"].values()
    assert computed(taylor(lambda i, n: i % 5 == 0), 50) == official
    assert computed(taylor(lambda i, n: i < 3 or i % 5 == 4), 50) == ported


def test_fastercache_computes_uncond_at_the_published_steps():
    latte, _, opensora = GOLDEN["fastercache"].values()
    # counters of the originals start at 1
    assert computed(cond_only(lambda i, n: i + 1 < 18 or (i + 1) % 5 == 0), 50, "uncond") == latte
    assert computed(cond_only(lambda i, n: i + 1 <= 11 or (i + 1) % 5 == 0), 30, "uncond") == opensora


@pytest.mark.parametrize(
    "policy",
    [
        blockdance(2, 4, 11, 3),
        taylor(lambda i, n: i < 4 or i % 2 == 0),
        cond_only(lambda i, n: i < 4 or i % 3 == 0),
        MagCache([1.0] + [0.99] * 11, 4, 0.05, 2, False, False),
    ],
    ids=["blockdance", "taylorseer", "cfg", "magcache"],
)
def test_the_embedded_model_runs_under_each(policy):
    engine = minidit.load("demo", device="cpu", dtype="fp32")
    settings = engine.resolve("a red circle grows", Choices(steps=12))
    text = engine.encode(settings)
    plain = engine.denoise(settings, text).latents
    outcome = engine.denoise(settings, text, policy=policy)
    assert any(record.plan not in (RUN_ALL, policy.full) for record in outcome.records)
    error = ((outcome.latents - plain).norm() / plain.norm()).item()
    assert 0 < error < 0.5 and torch.isfinite(outcome.latents).all()  # another video, of the same kind
