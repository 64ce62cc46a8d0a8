"""FasterCache: published schedules, weights by hand, and whole runs by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minidit.cache.plan import CFG_DELTA, Mix, Spectrum, sub
from minidit.cache.policies.fastercache import SCRIPTS, FasterCache
from minidit.presets import ScheduleConfig
from minidit.sampling import weigh_spectrum
from minidit.schedules import make_schedule
from tests.cache.families import BOTH, SIZE, ask, follow, forward_of, rel, run_info
from tests.tensors import randn

GOLDEN = json.loads((Path(__file__).parent / "golden_schedules.json").read_text())["fastercache"]
UNCOND, ATTENTION, OPEN_SORA = GOLDEN.values()


def plans(policy, run) -> list:
    policy.reset(run)
    return ask(policy, run)


@pytest.mark.parametrize(
    "family, steps, want", [("latte", 50, UNCOND), ("cogvideox", 50, UNCOND), ("open_sora", 30, OPEN_SORA)]
)
def test_uncond_is_computed_at_the_published_steps(family, steps, want):
    for options in ({}, {"attention": False}):
        found = plans(FasterCache(**options), run_info(steps, family))
        assert [i for i, plan in enumerate(found) if not plan.branches] == want


def test_attention_is_computed_at_the_published_steps():
    """And where uncond comes back after it has been away, which the list of the rule alone leaves out."""
    found = plans(FasterCache(cfg=False), run_info(50, "cogvideox"))
    assert [i for i, plan in enumerate(found) if not plan.subs] == ATTENTION
    found = plans(FasterCache(), run_info(50, "cogvideox"))
    back = {i for i in UNCOND if i > 17}
    assert [i for i, plan in enumerate(found) if not plan.subs] == sorted(back | set(ATTENTION))


def test_attention_continues_the_last_two_outputs():
    found = plans(FasterCache(cfg=False), run_info(30, "open_sora", depth=3))
    w = (20 - 7) / 20 * 0.9
    subs = dict(found[19].subs)
    assert set(subs) == {(k, name) for k in range(3) for name in ("attn", "t_attn")}
    assert set(subs.values()) == {Mix((1 + w, -w))}
    assert found[18].keep == tuple(sub(*key) for key in subs)
    assert dict(plans(FasterCache(cfg=False, w=0.0), run_info(30, "open_sora"))[19].subs)[0, "attn"] == Mix(
        (1.0, -0.0)
    )


def test_weights_grow_until_the_difference_is_taken_anew():
    found = plans(FasterCache(attention=False), run_info(50, "cogvideox"))
    fills = [plan.fill for plan in found]
    assert fills[16] is None and CFG_DELTA in found[16].keep
    by_hand = lambda low, high: Spectrum(pytest.approx(1.1**low), pytest.approx(1.1**high))
    # low while c <= 40, high from c = 30 on; c = 20 and 40 run both branches
    assert [fills[i].low for i in (17, 18)] == [pytest.approx(1.1), pytest.approx(1.21)]
    for i, low, high in ((17, 1, 0), (20, 1, 0), (23, 4, 0), (30, 1, 1), (38, 4, 4), (40, 0, 1), (43, 0, 4)):
        want = by_hand(low, high)
        assert (fills[i].low, fills[i].high) == (want.low, want.high)


def test_lattes_high_frequencies_are_an_else():
    fills = [plan.fill for plan in plans(FasterCache(attention=False), run_info(50, "latte"))]
    assert fills[42] == Spectrum(pytest.approx(1.331), 1.0)
    assert fills[46] == Spectrum(1.0, pytest.approx(1.21))  # c = 46 and 47


def test_bounds_scale_with_the_steps_and_periods_do_not():
    found = plans(FasterCache(attention=False), run_info(100, "cogvideox"))
    alone = [i + 1 for i, plan in enumerate(found) if plan.branches]
    assert alone[0] == 36 and all(c % 5 for c in alone)  # 18 of 50
    half = plans(FasterCache(cfg=False), run_info(25, "latte"))
    assert [i + 1 for i, plan in enumerate(half) if plan.subs] == list(range(8, 25, 2))


def test_other_models_go_by_timesteps():
    policy = FasterCache()
    found = plans(policy, run_info(50, "wan"))
    assert policy.constants == "diffusers' defaults"
    t = [1000 * (1 - i / 50) for i in range(50)]
    # diffusers counts its iterations from 0, and runs both branches where their number is a multiple of 5
    assert [bool(plan.branches) for plan in found] == [t[i] < 641 and i % 5 != 0 for i in range(50)]
    assert not any(plan.subs for i, plan in enumerate(found) if t[i] >= 681)
    alone = plans(FasterCache(cfg=False), run_info(50, "hunyuan_video", branches=("cond",)))
    assert [bool(plan.subs) for plan in alone] == [t[i] < 681 and i % 2 != 0 for i in range(50)]
    policy.reset(run_info(50, "latte"))
    assert policy.constants == "published for latte"


def test_a_run_that_was_cut_off_leaves_nothing_behind():
    policy, run = FasterCache(), run_info(50, "cogvideox")
    want = plans(policy, run)
    policy.reset(run)
    for step in run.steps[:23]:
        policy.plan(step)
    assert plans(policy, run) == want
    assert len(plans(policy, run_info(20, "cogvideox"))) == 20


def test_what_cannot_run_is_refused_by_name():
    with pytest.raises(ValueError, match="fastercache: this run has no uncond branch to skip"):
        FasterCache().reset(run_info(50, "hunyuan_video", branches=("cond",)))
    apart = replace(run_info(), cfg_ranks=2)
    with pytest.raises(ValueError, match="fastercache: each branch has ranks of its own"):
        FasterCache().reset(apart)
    FasterCache(cfg=False).reset(apart)
    FasterCache(cfg=False).reset(run_info(50, "hunyuan_video", branches=("cond",)))
    with pytest.raises(ValueError, match="fastercache: kinds has 't_attn'; this model has attn, mlp"):
        FasterCache(kinds=("t_attn",)).reset(run_info(50, "cogvideox"))
    with pytest.raises(ValueError, match="leave nothing to do"):
        FasterCache(attention=False, cfg=False)


@torch.no_grad()
def by_hand(forward, steps: int):
    """CogVideoX's script at so many steps, over plain tensors: a branch at a time."""
    model, stretch = forward.model, 50 / steps
    schedule = make_schedule(ScheduleConfig("euler", "wan", 3.0), steps)
    x, past, delta, weights, held = randn(1, 4, *SIZE, seed=4), {b: [] for b in BOTH}, None, [1.0, 1.0], ()
    for step in schedule.steps(3.0):
        i, c = step.i + 1, (step.i + 1) * stretch
        alone = step.i > 0 and c >= 18 and i % 5 != 0
        names = ("cond",) if alone else BOTH
        reuses = c >= 18 and i % 3 != 0 and set(names) <= set(held) and all(len(past[b]) > 1 for b in names)
        outs = {}
        for b in names:
            h, cond = model.embed(x, torch.tensor([step.t]), forward.context.select((b,)))
            attended = []
            for k, block in enumerate(model.blocks):
                cache = Continuing(past[b], k) if reuses else Noting(attended)
                h = block(h, cond.at(k), cache)
            if not reuses:
                past[b] = [attended, *past[b]][:2]
            outs[b] = model.head(h, cond)
        held = held if reuses else names
        if alone:
            weights[0] *= 1.1 if c <= 40 else 1.0
            weights[1] *= 1.1 if c >= 30 else 1.0
            outs["uncond"] = outs["cond"] + weigh_spectrum(delta, Spectrum(*weights))
        else:
            delta, weights = outs["uncond"] - outs["cond"], [1.0, 1.0]
        v = outs["uncond"] + 3.0 * (outs["cond"] - outs["uncond"])
        x, _ = schedule.step(step.i, x, v, schedule.start())
    return x


class Noting:
    def __init__(self, attended):
        self.attended = attended

    def run(self, name, module, *inputs):
        out = module(*inputs)
        if name == "attn":
            self.attended.append(out)
        return out


class Continuing:
    def __init__(self, past, k):
        (new, old), w = (outputs[k] for outputs in past), 0.3
        self.out = new + w * (new - old)

    def run(self, name, module, *inputs):
        return self.out if name == "attn" else module(*inputs)


def test_runs_are_those_by_hand():
    for is_batched in (True, False):
        forward = forward_of("cogvideox", is_batched=is_batched)
        outcome = follow(forward, FasterCache(), 16, family="cogvideox")
        labels = {record.plan.label for record in outcome.records}
        assert {"full", "reuse, cond only", "cond only, reuse", "cond only"} & labels == labels
        assert rel(outcome.latents, by_hand(forward, 16)) < 1e-5


def test_every_script_is_of_a_family_or_the_rest():
    assert set(SCRIPTS) == {"open_sora", "latte", "cogvideox", ""}
