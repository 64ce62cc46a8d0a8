"""TeaCache: its polynomials, its rule on scripted signals, and whole runs by hand on every family."""

import pytest
import torch

from minidit.cache.loop import Lane, run_blocks
from minidit.cache.policies.teacache import TeaCache
from minidit.cache.policies.teacache_polynomials import PUBLISHED, polynomial
from minidit.presets import PRESETS
from tests.cache.families import (
    FAMILIES,
    TOKENS,
    ask,
    computed_steps,
    follow,
    forward_of,
    rel,
    run_info,
    skip_by_hand,
)  # fmt: skip

STRAIGHT = (1.0, 0.0)  # the estimate is x itself


def computed(policy, run, xs) -> list[int]:
    policy.reset(run)
    return [i for i, plan in enumerate(ask(policy, run, lambda i: xs[i])) if plan.label == "full"]


@pytest.mark.parametrize(
    "coefficients, x, y",
    [((), 2.0, 0.0), ((3.0,), 2.0, 3.0), ((1.0, -2.0, 5.0), 3.0, 8.0), ((2.0, 0.0, 0.0, 1.0), 0.5, 1.25)],
)
def test_polynomials_have_the_highest_power_first(coefficients, x, y):
    assert polynomial(coefficients, x) == y


@pytest.mark.parametrize("x, y", [(0.01, -10.6), (0.05, -4.1), (0.13, 0.005)])
def test_wans_polynomial_gives_the_known_values(x, y):
    """So far below 0 where x is small, that it has to be looked after."""
    terms = PUBLISHED["wan2.1-t2v-14b", "time"].coefficients
    assert polynomial(terms, x) == pytest.approx(y, abs=0.05 if y < -1 else 5e-4)


@pytest.mark.parametrize("key", PUBLISHED, ids="-".join)
def test_published_numbers_are_of_known_releases_and_rise(key):
    model, signal = key
    assert model in PRESETS and signal in ("time", "time_mod", "input")
    assert len(PUBLISHED[key].coefficients) == 5
    assert list(PUBLISHED[key].thresholds) == sorted(PUBLISHED[key].thresholds)


def test_estimates_add_up_and_start_anew_after_a_computed_step():
    xs = [0, 0.3, 0.3, 0.3, 0.3, 0.9, 1.2, 0.1, 0.1, 0.1]
    policy = TeaCache(1.0, coefficients=STRAIGHT)
    # sums: .3 .6 .9 | 1.2 -> computed | .9 | 2.1 -> computed | .1 .2 | the last step always
    assert computed(policy, run_info(10), xs) == [0, 4, 6, 9]
    # by estimates 2 x: .6 | 1.2 -> computed | .6 | 1.2 -> | 1.8 -> | 2.4 -> | .2 .4
    assert computed(TeaCache(1.0, coefficients=(2.0, 0.0)), run_info(10), xs) == [0, 2, 4, 5, 6, 9]


def test_first_and_last_steps_are_computed():
    xs = [0.0] * 10
    assert computed(TeaCache(1.0, coefficients=STRAIGHT), run_info(10), xs) == [0, 9]
    policy = TeaCache(1.0, coefficients=STRAIGHT, signal="time_mod")
    assert computed(policy, run_info(10), xs) == [0, 1, 2, 3, 4]  # the authors' use_ret_steps
    assert computed(TeaCache(1.0, coefficients=STRAIGHT, first=3, last=2), run_info(10), xs) == [
        0,
        1,
        2,
        8,
        9,
    ]


def test_a_sum_equal_to_the_threshold_is_computed():
    assert computed(TeaCache(0.5, coefficients=STRAIGHT), run_info(5), [0, 0.25, 0.25, 0.5, 0]) == [
        0,
        2,
        3,
        4,
    ]


def test_releases_have_their_own_numbers():
    for model, family, signal, slow, fast in (
        ("wan2.1-t2v-14b", "wan", "time", 0.14, 0.2),
        ("wan2.1-t2v-1.3b", "wan", "time", 0.05, 0.08),
        ("hunyuan-video", "hunyuan_video", "input(0,attn)", 0.1, 0.15),
        ("cogvideox1.5-5b", "cogvideox", "time", 0.1, 0.3),
        ("open-sora-1.2", "open_sora", "input(0,attn)", 0.1, 0.2),
        ("latte-1", "latte", "input(0,attn)", 0.1, 0.2),
    ):
        policy, run = TeaCache(), run_info(50, family, model)
        needs = policy.reset(run)
        assert (policy.threshold, policy.constants) == (slow, f"published for {model}")
        assert str(needs[0].site) == signal
        policy = TeaCache(**TeaCache.variants["fast"])
        policy.reset(run)
        assert policy.threshold == fast
    policy = TeaCache(signal="time_mod")
    policy.reset(run_info(50, "wan", "wan2.1-t2v-14b"))
    assert policy.terms == PUBLISHED["wan2.1-t2v-14b", "time_mod"].coefficients


FITTED = {"teacache": {"signal": "input", "coefficients": [2.0, 0.0], "range": [0.1, 0.4]}}


def test_a_profile_brings_signal_polynomial_and_range():
    policy = TeaCache(1.0, profile=FITTED)
    assert str(policy.reset(run_info(10))[0].site) == "input(0,attn)"
    assert (policy.constants, policy.terms, policy.range) == ("profile", [2.0, 0.0], [0.1, 0.4])
    assert not TeaCache.needs_profile({"coefficients": STRAIGHT}) and TeaCache.needs_profile({})


def test_outside_its_range_a_polynomial_warns_once():
    policy, run = TeaCache(1.0, profile=FITTED), run_info(10)
    policy.reset(run)
    with pytest.warns(
        UserWarning, match="at step 3 the signal moves by 0.5, the polynomial gives 1"
    ) as found:
        ask(policy, run, lambda i: 0.2 if i < 2 else 0.5)
    assert len(found) == 1


def test_an_estimate_below_nothing_warns_where_the_range_is_unknown():
    policy, run = TeaCache(), run_info(50, "wan", "wan2.1-t2v-14b")
    policy.reset(run)
    with pytest.warns(UserWarning, match="at step 2 .* the polynomial gives -10.6.*outside=clamp"):
        plans = ask(policy, run, lambda i: 0.01)
    assert sum(plan.label == "full" for plan in plans) == 2  # as published: nothing is computed any more


def test_clamped_estimates_stay_in_range_and_above_nothing():
    run = run_info(10)
    policy = TeaCache(1.0, profile=FITTED, outside="clamp")
    assert computed(policy, run, [0.0] * 10) == [0, 5, 9]  # 0.1 each time, twice that
    assert computed(policy, run, [9.0] * 10) == [0, 2, 4, 6, 8, 9]  # 0.4
    policy = TeaCache(1.0, coefficients=(1.0, -0.5), outside="clamp")
    assert computed(policy, run, [0.0, 0.0, 1.0, 0.0, 1.0, 0, 0, 0, 0, 0]) == [0, 4, 9]


def test_refusal_stops_the_run():
    policy, run = TeaCache(1.0, profile=FITTED, outside="refuse"), run_info(10)
    policy.reset(run)
    with pytest.raises(ValueError, match="teacache: at step 2 the signal moves by 0.9"):
        ask(policy, run, lambda i: 0.9)


@pytest.mark.parametrize(
    "options, run, said",
    [
        ({}, run_info(), "no polynomial is known for this model and signal=time; fit one"),
        ({}, run_info(50, "hunyuan_video"), "no polynomial is known for this model and signal=input"),
        ({"signal": "input"}, run_info(50, "wan", "wan2.1-t2v-14b"), "for wan2.1-t2v-14b and signal=input"),
        ({"signal": "time", "profile": FITTED}, run_info(), "signal=time"),
        ({"signal": "time_mod", "coefficients": STRAIGHT}, run_info(50, "cogvideox"), "cogvideox projects"),
        ({"coefficients": STRAIGHT, "first": 5, "last": 5}, run_info(10), "leave none of 10 steps"),
    ],
)
def test_what_cannot_run_is_refused_by_name(options, run, said):
    with pytest.raises(ValueError) as error:
        TeaCache(**options).reset(run)
    assert str(error.value).startswith("teacache: ") and said in str(error.value)


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"threshold": "quick"}, {"signal": "h"}, {"outside": "x"}]
)
def test_unknown_choices_are_refused(options):
    with pytest.raises(ValueError, match="teacache: "):
        TeaCache(**options)


def test_a_run_that_was_cut_off_leaves_nothing_behind():
    policy, run = TeaCache(1.0, coefficients=STRAIGHT), run_info(10)
    want = computed(policy, run, xs := [0.3] * 10)
    policy.reset(run)
    for step in run.steps[:3]:
        policy.decide(step, policy.plan(step), 0.3)
    assert computed(policy, run, xs) == want
    assert computed(policy, run_info(6), [0.3] * 6) == [0, 4, 5]


@torch.no_grad()
def signal_by_hand(forward, site: str, starts):
    """Of cond."""
    start, cond = starts["cond"]
    if site != "input":
        return cond.time if site == "time" else cond.mod
    seen = []
    probe = lambda branches, block, name, module, inputs, out: seen.append(inputs[0][:, :TOKENS])
    run_blocks(forward.model.blocks, [Lane(("cond",), start, cond)], probe=probe)
    return seen[0]


SIGNALS = [(family, site) for family in FAMILIES for site in ("time", "input")]
SIGNALS += [(family, "time_mod") for family in ("wan", "open_sora", "latte")]


@pytest.mark.parametrize("family, site", SIGNALS)
def test_runs_are_those_by_hand(family, site):
    past = {"old": None, "total": 0.0}

    def is_skipped(i, x, starts):
        new, old = signal_by_hand(forward, site, starts), past["old"]
        past["old"] = new
        if i == 0 or i == 7:
            return False
        moved = ((new - old).abs().mean() / old.abs().mean()).item()
        past["total"] += 0.9 * moved + 0.05
        skips = past["total"] < threshold
        past["total"] *= skips
        return skips

    threshold = 1.3 if site == "input" else 2.2  # random weights: two steps are far apart
    for is_batched in (True, False):
        forward = forward_of(family, is_batched=is_batched)
        past.update(old=None, total=0.0)
        want, steps = skip_by_hand(forward, 8, is_skipped)
        options = {"signal": site, "coefficients": (0.9, 0.05), "first": 1, "last": 1}
        outcome = follow(forward, TeaCache(threshold, **options), 8, family=family)
        assert computed_steps(outcome) == steps and 2 < len(steps) < 8
        assert rel(outcome.latents, want) < 1e-5
