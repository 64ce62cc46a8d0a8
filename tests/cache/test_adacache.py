"""AdaCache: codebooks and the rule by hand, and whole runs by hand on every family."""

import pytest
import torch

from minidit.cache.loop import Lane, run_blocks
from minidit.cache.plan import sub
from minidit.cache.policies.adacache import CODEBOOKS, AdaCache, pooled, rate
from tests.cache.families import (
    BOTH,
    FAMILIES,
    ask,
    computed_steps,
    follow,
    forward_of,
    rel,
    run_info,
    skip_by_hand,
)  # fmt: skip

FAST, SLOW, HUNDRED = (CODEBOOKS[name][0] for name in ("fast", "slow", "hundred"))


@pytest.mark.parametrize(
    "codebook, rates",
    [
        (FAST, (6, 6, 5, 4, 3, 2, 1, 1)),
        (SLOW, (3, 3, 2, 1, 1, 1, 1, 1)),
        (HUNDRED, (12, 6, 6, 3, 3, 3, 3, 3)),
    ],
)
def test_codebooks_are_the_published_ones(codebook, rates):
    assert tuple(rate(c, codebook) for c in (0.0, 0.079, 0.08, 0.2, 0.3, 0.39, 0.5, 7.0)) == rates


def test_distances_of_branches_are_those_of_one_batch():
    draw = torch.Generator().manual_seed(0)
    new, old = (torch.randn(2, 30, generator=draw) * torch.tensor([[1.0], [5.0]]) for _ in range(2))
    l1 = lambda a, b: ((a - b).abs().sum() / b.abs().sum()).item()
    sizes = [row.abs().mean().item() for row in old]
    assert pooled([l1(*pair) for pair in zip(new, old, strict=True)], sizes) == pytest.approx(l1(new, old))
    assert pooled([0.0], [0.0]) == 0.0


def computed(policy, run, change) -> list[int]:
    """change: the relative L1 of a computed step from the computed one before, by step"""
    policy.reset(run)

    def told(i, plan):
        if plan.label == "skip" or i == 0:
            return {}
        return {m: change if m.norm == "l1" else (1.0, 1.0) for m in plan.measure}

    return [i for i, plan in enumerate(ask(policy, run, told=told)) if plan.label == "full"]


@pytest.mark.parametrize(
    "variant, steps, change, want",
    [
        # c is the change by the steps between: at 1 it is 0.3 -> 3, at 4 0.1 -> 5, at 9 0.06 -> 6, ...
        ("fast", 30, 0.3, [0, 1, 4, 9, 15, 21, 27, 28, 29]),
        ("fast", 30, 0.0, [0, 1, 7, 13, 19, 25, 28, 29]),
        ("fast", 30, 99.0, list(range(30))),
        ("slow", 30, 0.1, [0, 1, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29]),
        ("hundred", 100, 0.0, [0, 1, 13, 25, 37, 49, 61, 73, 85, 97, 98, 99]),
        # at twice the steps c counts twice and reaches twice as far: 1: 0.6 -> 2, 3: 0.3 -> 6, ...
        ("fast", 60, 0.3, [0, 1, 3, 9, 19, 31, 43, 55, 58, 59]),
    ],
)
def test_the_last_change_sets_the_next_step(variant, steps, change, want):
    assert computed(AdaCache(**AdaCache.variants[variant]), run_info(steps, "open_sora"), change) == want


def test_the_scale_is_that_of_the_option_then_of_the_profile():
    run, profile = run_info(30, "wan"), {"adacache": {"scale": 2.0}}
    for policy, bound, source in (
        (AdaCache(), 0.08, "codebook published for open-sora-1.2"),
        (AdaCache(profile=profile), 0.16, "profile"),
        (AdaCache(scale=3.0, profile=profile), 0.24, "codebook published for open-sora-1.2"),
    ):
        policy.reset(run)
        assert policy.table[0] == (pytest.approx(bound), 6) and policy.constants == source
    policy = AdaCache()
    policy.reset(run_info(30, "open_sora", depth=28))
    assert policy.constants == "published for open-sora-1.2"
    assert not AdaCache.needs_profile({"scale": 1.0}) and AdaCache.needs_profile({})


@pytest.mark.parametrize(
    "family, depth, site",
    [
        ("open_sora", 28, sub(13, "t_attn")),
        ("latte", 14, sub(6, "t_attn")),
        ("wan", 40, sub(20, "attn")),
        ("hunyuan_video", 60, sub(30, "attn")),
    ],
)
def test_the_change_is_measured_in_the_middle(family, depth, site):
    needs = AdaCache().reset(run_info(30, family, depth=depth))
    assert needs[0].site == site


@pytest.mark.parametrize(
    "options, run, said",
    [
        ({"block": 8}, run_info(30), "block=8; this model's blocks 0 .. 7 have attn"),
        ({"name": "t_attn"}, run_info(30), "name=t_attn"),
        ({}, run_info(4), "4 steps leave none to skip"),
    ],
)
def test_what_cannot_run_is_refused_by_name(options, run, said):
    with pytest.raises(ValueError, match=f"adacache: .*{said}"):
        AdaCache(**options).reset(run)
    for odd in ({"codebook": "quick"}, {"scale": 0.0}):
        with pytest.raises(ValueError, match="adacache: "):
            AdaCache(**odd)


def test_a_run_that_was_cut_off_leaves_nothing_behind():
    policy, run = AdaCache(), run_info(30, "open_sora")
    want = computed(policy, run, 0.3)
    policy.reset(run)
    for step in run.steps[:8]:
        measured = {m: 9.0 if m.norm == "l1" else (1.0, 1.0) for m in policy.plan(step).measure}
        policy.tell(step, measured if step.i else {})
    assert computed(policy, run, 0.3) == want


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_are_those_by_hand(family):
    """One residual for all blocks, and c over both branches, in a run of 10 steps."""
    block, name = (
        (1 if family != "hunyuan_video" else 2),
        "t_attn" if family in ("open_sora", "latte") else "attn",
    )
    stretch, scale = 10 / 30, 4.0  # random weights change much from step to step
    for is_batched in (True, False):
        forward = forward_of(family, is_batched=is_batched)
        state = {"next": 0, "last": -1, "old": None}

        def outputs(starts):
            seen = []

            def probe(branches, k, sub_name, module, inputs, out):
                if (k, sub_name) == (block, name):
                    seen.append(out[:, :18])

            for branch in BOTH:
                start, cond = starts[branch]
                run_blocks(forward.model.blocks, [Lane((branch,), start, cond)], probe=probe)  # noqa: B023
            return torch.cat(seen)

        def is_skipped(i, x, starts):
            if i < state["next"] and i < 8:  # noqa: B023
                return True
            new, old = outputs(starts), state["old"]  # noqa: B023
            state["next"] = i + 1  # noqa: B023
            if old is not None:
                c = ((new - old).abs().sum() / old.abs().sum()).item() / (i - state["last"]) * stretch  # noqa: B023
                steps = next((r for bound, r in FAST if c < bound * scale), 1)
                state["next"] = i + max(1, round(steps * stretch))  # noqa: B023
            state.update(last=i, old=new)  # noqa: B023
            return False

        want, steps = skip_by_hand(forward, 10, is_skipped)
        outcome = follow(forward, AdaCache(scale=scale), 10, family=family)
        assert computed_steps(outcome) == steps and 4 < len(steps) < 10
        assert rel(outcome.latents, want) < 1e-5
