"""EasyCache: k and the rule by hand, and whole runs by hand on every family."""

import pytest
import torch

from minidit.cache.plan import LATENTS, LATENTS_FULL, PREDICTION
from minidit.cache.policies.easycache import MOVED, SIZE, EasyCache, ratio
from minidit.presets import ScheduleConfig
from minidit.schedules import make_schedule
from tests.cache.families import BOTH, FAMILIES, ask, computed_steps, follow, forward_of, rel, run_info
from tests.cache.families import SIZE as LATENT
from tests.tensors import randn


@pytest.mark.parametrize(
    "moved, size, moved_latents, size_latents, k",
    [
        (0.1, 2.0, 0.1, 2.0, 1.0),
        (0.3, 4.0, 0.1, 2.0, 6.0),
        (0.0, 2.0, 0.5, 1.0, 0.0),
        (0.1, 1.0, 0.0, 1.0, None),
    ],
)
def test_k_is_the_way_of_predictions_by_that_of_latents(moved, size, moved_latents, size_latents, k):
    want = float("inf") if k is None else k
    assert ratio(moved, size, moved_latents, size_latents) == pytest.approx(want)


def told(values):
    """Measurements of a computed step: k = 2, mean |prediction| = 4; latents of mean size 1 all along."""
    full = {MOVED[PREDICTION]: 0.05, SIZE[PREDICTION]: (4.0, 4.0)}
    full |= {MOVED[LATENTS_FULL]: 0.1, SIZE[LATENTS_FULL]: (1.0, 1.0)}
    return lambda i, plan: (
        {} if i == 0 else {SIZE[LATENTS]: (1.0, 1.0)} | (full if plan.label == "full" else {})
    )


def computed(policy, run, moves) -> list[int]:
    policy.reset(run)
    plans = ask(policy, run, lambda i: moves[i], told(moves))
    return [i for i, plan in enumerate(plans) if plan.label == "full"]


def test_estimates_add_up_and_start_anew_after_a_computed_step():
    policy = EasyCache(0.1, first=3)
    # every 0.08 of the latents is 2 * 0.08 / 4 = 0.04 of the prediction: .04 .08 | .12 -> computed
    assert computed(policy, run_info(12), [0.08] * 12) == [0, 1, 2, 5, 8, 11]
    assert computed(policy, run_info(12), [0.2] * 12) == list(range(12))  # 0.1 is not below
    assert computed(policy, run_info(12), [0.0] * 12) == [0, 1, 2, 11]


def test_first_steps_are_those_published_scaled():
    still = [0.0] * 100
    for steps, family, first in ((50, "wan", 10), (50, "hunyuan_video", 5), (25, "wan", 5), (100, "wan", 20)):
        policy = EasyCache()
        assert computed(policy, run_info(steps, family), still) == [*range(first), steps - 1]
        assert policy.constants == f"published for {family}"
        assert policy.threshold == (0.025 if family == "hunyuan_video" else 0.05)
    policy.reset(run_info(50, "latte"))
    assert policy.constants == "published for wan, used here"


def test_nothing_is_skipped_before_k_is_known():
    policy, run = EasyCache(9.0, first=2), run_info(5)
    policy.reset(run)
    assert [p.label for p in ask(policy, run, lambda i: 0.0)] == ["full"] * 5


def test_a_run_that_was_cut_off_leaves_nothing_behind():
    policy = EasyCache(0.1, first=3)
    want = computed(policy, run_info(12), [0.08] * 12)
    policy.reset(run := run_info(12))
    for step in run.steps[:5]:
        plan = policy.plan(step)
        policy.decide(step, plan, 0.08)
        policy.tell(step, told(None)(step.i + 1, plan))
    assert computed(policy, run, [0.08] * 12) == want
    assert computed(policy, run_info(6), [0.08] * 6) == [0, 1, 2, 5]


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"first": 1}, {"last": -1}])
def test_unknown_choices_are_refused(options):
    with pytest.raises(ValueError, match="easycache: "):
        EasyCache(**options)


def test_a_run_without_steps_to_skip_is_refused():
    with pytest.raises(ValueError, match="easycache: first=2, last=1 leave none of 3 steps to skip"):
        EasyCache().reset(run_info(3))


@torch.no_grad()
def by_hand(forward, steps: int, threshold: float, first: int):
    """-> latents, the computed steps"""
    schedule = make_schedule(ScheduleConfig("euler", "wan", 3.0), steps)
    x, offsets, computed = randn(1, 4, *LATENT, seed=4), {}, []
    before = full_x = full_out = k = None
    total = 0.0
    mean = lambda y: y.abs().mean().item()
    for step in schedule.steps(3.0):
        skips = False
        if first <= step.i < steps - 1:
            total += k * mean(x - before) / mean(full_out)
            skips = total < threshold
        before = x
        if not skips:
            total = 0.0
            computed.append(step.i)
            t = torch.tensor([step.t])
            outs = {b: forward.model(x, t, forward.context.select((b,)))[:, :4] for b in BOTH}
            if forward.model.__class__.__name__ == "OpenSora":
                outs = {b: -out for b, out in outs.items()}
            if full_x is not None:
                k = mean(outs["cond"] - full_out) / mean(x - full_x)
            full_x, full_out = x, outs["cond"]
            offsets = {b: out - x for b, out in outs.items()}
        outs = {b: x + offsets[b] for b in BOTH}
        v = outs["uncond"] + 3.0 * (outs["cond"] - outs["uncond"])
        x, _ = schedule.step(step.i, x, v, schedule.start())
    return x, computed


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_are_those_by_hand(family):
    for is_batched in (True, False):
        forward = forward_of(family, is_batched=is_batched)
        want, steps = by_hand(forward, 10, 1.0, 3)
        outcome = follow(forward, EasyCache(1.0, first=3), 10, family=family)
        assert computed_steps(outcome) == steps and 4 < len(steps) < 10
        assert rel(outcome.latents, want) < 1e-5
        skipped = [record.plan for record in outcome.records if record.plan.label == "skip"]
        assert all(len(plan.path) == 1 and str(plan.path[0].site) == "offset" for plan in skipped)
