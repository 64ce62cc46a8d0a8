"""Constants fitted by the authors' procedures: formulas by hand, and fits on the embedded model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minidit.cache import fits
from minidit.cache.plan import Need, Plan, h, sub
from minidit.cache.policies.adacache import CODEBOOKS, AdaCache
from minidit.cache.policies.ditfastattn import DiTFastAttn
from minidit.cache.policies.magcache import MagCache
from minidit.cache.policies.teacache import TeaCache
from minidit.cache.policies.teacache_polynomials import polynomial
from minidit.cache.profile import describe, make_profile
from minidit.generate import Engine
from minidit.settings import Choices
from tests.cache.families import ask, run_info
from tests.tensors import rel_l1
from tests.test_generate_latte import folder as latte_folder  # noqa: F401, a fixture
from tests.tiny_cogvideox import DPM, save_tiny

STEPS, LONG, DEPTH = 6, 20, 8  # AdaCache's codebook, stretched to few steps, has nothing to skip
SMALL = dict(steps=STEPS, width=32, height=32, num_frames=5)
PROMPTS = ("a red circle moves right", "a blue star grows")
FITTED = ("teacache", "magcache", "adacache", "ditfastattn")


def test_a_polynomial_is_found_from_points_on_it():
    terms = [3.0, -2.0, 0.5, 1.0, 2.0]
    found = fits.fit_polynomial([(x, polynomial(terms, x)) for x in np.linspace(0.1, 0.9, 12)])
    assert found["coefficients"] == pytest.approx(terms, rel=1e-6)
    assert found["range"] == [0.1, 0.9] and found["r2"] == 1.0


def test_a_polynomial_that_would_be_negative_is_of_a_lower_degree():
    x = np.linspace(0, 1, 9)
    y = np.array([0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5])
    assert fits.lowest(np.polyfit(x, y, 4), 0, 1) < 0  # what four powers would make of them
    terms = fits.fit_polynomial(list(zip(x, y, strict=True)))["coefficients"]
    assert len(terms) == 2 and fits.lowest(terms, 0, 1) >= 0


@pytest.mark.parametrize("count, terms", [(1, 1), (2, 1), (3, 2), (5, 4), (6, 5), (9, 5)])
def test_there_are_fewer_coefficients_than_points(count, terms):
    draw = np.random.default_rng(1)
    points = [(0.1 * i, 5 + draw.normal()) for i in range(count)]
    assert len(fits.fit_polynomial(points)["coefficients"]) == terms
    repeated = fits.fit_polynomial(points * 3)  # as several prompts give the same x
    assert len(repeated["coefficients"]) == terms


def test_r2_is_the_share_of_variance_that_is_explained():
    points = [(x, y) for x in (0.1, 0.2, 0.3, 0.4) for y in (1.0, 3.0)]
    assert fits.fit_polynomial(points)["r2"] == 0.0  # y has nothing to do with x
    points = [(0.0, 1.0), (0.0, 3.0), (1.0, 5.0), (1.0, 7.0), (0.5, 4.0)]  # 2, 4, 6: off by 1 or 0
    found = fits.fit_polynomial(points)
    assert found["coefficients"] == pytest.approx([4.0, 2.0]) and found["r2"] == 0.8  # 1 - 4 / 20
    told = {"signal": "time", "coefficients": [4.0, 2.0], "range": [0.0, 1.0]}
    assert "hardly depends" in fits.describe_teacache({"teacache": told | {"r2": 0.3}})
    assert "hardly depends" not in fits.describe_teacache({"teacache": told | {"r2": 0.8}})


@pytest.mark.parametrize(
    "terms, low, high, least",
    [
        ((1.0, -2.0, 0.0), 0.0, 3.0, -1.0),  # (x - 1)^2 - 1
        ((1.0, -2.0, 0.0), 2.0, 3.0, 0.0),  # its turn lies outside
        ((2.0, 1.0), 0.5, 3.0, 2.0),
        ((0.25,), 0.0, 1.0, 0.25),
    ],
)
def test_the_lowest_value_is_at_a_turn_or_an_end(terms, low, high, least):
    assert fits.lowest(terms, low, high) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize(
    "low, high, wider",
    [(0.123456, 0.323333, (0.1234, 0.3234)), (0.5, 0.5, (0.5, 0.5)), (0.00012341, 7.0, (0.0, 7.0))],
)
def test_a_range_is_rounded_outward(low, high, wider):
    assert fits.outward(low, high) == wider


def test_prompts_are_averaged_step_by_step():
    found = fits.mean_curve([[(0.1, 1.0), (0.2, 2.0)], [(0.1, 3.0), (0.2, 5.0)]])
    assert found == [(0.1, 2.0), (0.2, 3.5)]


def test_ratios_are_means_over_tokens():
    norms = [torch.tensor(row) for row in ([1.0, 2.0], [2.0, 2.0], [1.0, 4.0])]
    assert fits.magnitude_ratios(norms) == [1.0, 1.5, 1.25]


def test_a_replay_computes_what_adacache_would():
    draw = np.random.default_rng(0)
    lengths = []
    for scale in (0.05, 0.3, 1.0, 5.0):
        policy, run = AdaCache(scale=scale), run_info(50)
        policy.reset(run)
        moved = [[float(draw.uniform(0, 0.4) * (gap + 1)) for gap in range(i)] for i in range(50)]

        def told(i, plan, policy=policy, moved=moved):
            """Both branches moved as far, from the step computed last."""
            if plan.label == "skip" or i == 0:
                return {}
            far = moved[i][i - policy.computed - 1]
            return {m: far if m.norm == "l1" else (1.0, 1.0) for m in plan.measure}

        plans = ask(policy, run, told=told)
        want = [i for i, plan in enumerate(plans) if plan.label == "full"]
        table = [(bound, max(1, round(n * 50 / 30))) for bound, n in CODEBOOKS["fast"][0]]
        assert fits.computed_steps(moved, table, 50 / 30, scale) == want
        lengths.append(len(want))
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 2 * lengths[-1]


@pytest.mark.parametrize("wanted, scale", [(20.0, 1.5), (5.0, 6.0), (1e9, 0.01), (0.1, 100.0)])
def test_the_scale_is_bisected(wanted, scale):
    assert fits.find_scale(lambda s: 30 / s, wanted) == pytest.approx(scale, rel=1e-6)


def test_of_counts_in_steps_the_nearest_is_taken():
    count = lambda scale: 30.0 if scale < 2 else 17.0 if scale < 4 else 9.0
    assert count(fits.find_scale(count, 14.0)) == 17.0
    assert count(fits.find_scale(count, 12.0)) == 9.0


@pytest.fixture(scope="module")
def engine():
    torch.set_num_threads(1)
    return Engine("demo", device="cpu", dtype="fp32", keep_text_encoder=True)


@pytest.fixture(scope="module")
def settings(engine):
    return engine.resolve("", Choices(**SMALL))


@pytest.fixture(scope="module")
def profiles(engine, settings):
    """AdaCache's is of LONG steps, and DiTFastAttn's of one prompt."""
    runs = {"adacache": (replace(settings, steps=LONG), PROMPTS), "ditfastattn": (settings, PROMPTS[:1])}
    return {method: make_profile(method, engine, *runs.get(method, (settings, PROMPTS))) for method in FITTED}


class Tensors:
    """Keeps sites and takes them away step by step: by site and branch, a list over steps."""

    def __init__(self, *sites):
        self.sites, self.found = sites, {}

    def reset(self, run):
        return tuple(Need(site) for site in self.sites)

    def plan(self, step):
        return Plan(keep=self.sites)

    def tell(self, step, values):
        pass

    def look(self, after):
        for key, ring in after.snapshot.rings.items():
            self.found.setdefault(key, []).append(ring.slots[0].clone())


def walk(engine, settings, prompts, *sites) -> list[dict]:
    """What Tensors finds in every prompt's uncached run."""
    runs = []
    for one, text in fits.encoded(engine, settings, prompts):
        policy = Tensors(*sites)
        engine.denoise(one, text, policy=policy, keep=policy.look)
        runs.append(policy.found)
    return runs


@pytest.fixture(scope="module")
def walked(engine, settings):
    return walk(engine, settings, PROMPTS, h(0), h(DEPTH))


def residuals(found, branch):
    return [b - a for a, b in zip(found[h(0), branch], found[h(DEPTH), branch], strict=True)]


def test_teacaches_polynomial_is_that_of_tensors_by_hand(engine, settings, walked, profiles):
    one, text = fits.encoded(engine, settings, PROMPTS)[0]
    forward, times = engine.forward(one, text), []
    with torch.inference_mode():
        for step in engine.family.schedule(one).steps(one.cfg_scale):
            x = torch.zeros(1, *engine.latent_shape(one))
            context = forward.context.select(("cond",))
            times.append(forward.model.embed(x, torch.tensor([step.t]), context)[1].time)
    xs = [rel_l1(*pair) for pair in zip(times[1:], times, strict=False)]
    rows = [residuals(found, branch) for found in walked for branch in ("cond", "uncond")]
    ys = [np.mean([rel_l1(row[i], row[i - 1]) for row in rows]) for i in range(1, STEPS)]
    data = profiles["teacache"].data["teacache"]
    assert data["signal"] == "time" and data["prompts"] == 2
    low, high = data["range"]
    assert low <= min(xs) and max(xs) <= high and high - low < 1.01 * (max(xs) - min(xs))
    degree = len(data["coefficients"]) - 1
    want = np.polyval(np.polyfit(xs, ys, degree), xs)
    got = [polynomial(data["coefficients"], x) for x in xs]
    assert got == pytest.approx(want, rel=1e-3)  # fp32 sums in another order, through a high power
    assert data["r2"] == pytest.approx(1 - np.var(ys - want) / np.var(ys), abs=1e-3)


def test_magcaches_ratios_are_those_of_tensors_by_hand(walked, profiles):
    data = profiles["magcache"].data["magcache"]
    assert set(data["ratios"]) == {"cond", "uncond"} and data["spread"] > 0
    for branch, ratios in data["ratios"].items():
        rows = [[r[0].norm(dim=1) for r in residuals(found, branch)] for found in walked]
        want = [np.mean([(row[i] / row[i - 1]).mean().item() for row in rows]) for i in range(1, STEPS)]
        assert ratios == pytest.approx([1.0, *want], abs=1e-5)  # as they are rounded


def test_adacaches_distances_are_those_of_tensors_by_hand(engine, settings):
    settings, site = replace(settings, steps=LONG), sub(DEPTH // 2, "attn")
    (found,) = walk(engine, settings, PROMPTS[:1], site)
    outs = [torch.cat(pair) for pair in zip(found[site, "cond"], found[site, "uncond"], strict=True)]
    ((one, text),) = fits.encoded(engine, settings, PROMPTS[:1])
    policy = fits.EveryStep(scale=1.0)
    engine.denoise(one, text, policy=policy)
    assert [len(moved) for moved in policy.moved] == [min(i, 4) for i in range(LONG)]  # 6 of 30 is 4 of 20
    for i, moved in enumerate(policy.moved):
        want = [rel_l1(outs[i], outs[i - back]) for back in range(1, len(moved) + 1)]
        assert moved == pytest.approx(want, rel=1e-5)


def run_with(engine, settings, profile, policy_class, **options):
    """A run of the first prompt with a fitted profile -> the outcome."""
    one, text = fits.encoded(engine, settings, PROMPTS)[0]
    return engine.denoise(one, text, policy=policy_class(profile=profile.data, **options))


def test_runs_with_fitted_constants_act(engine, settings, profiles):
    options = {"teacache": {"threshold": 1.0, "outside": "refuse"}, "magcache": {}}
    classes = {"teacache": TeaCache, "magcache": MagCache}
    for method, given in options.items():
        outcome = run_with(engine, settings, profiles[method], classes[method], **given)
        skipped = sum(record.plan.label == "skip" for record in outcome.records)
        assert 0 < skipped < STEPS, method


def test_a_run_at_the_fitted_scale_computes_about_as_many_steps(engine, settings, profiles):
    data = profiles["adacache"].data["adacache"]
    outcome = run_with(engine, replace(settings, steps=LONG), profiles["adacache"], AdaCache)
    computed = sum(record.plan.label == "full" for record in outcome.records)
    assert data["computed"] == pytest.approx(LONG / fits.SPEEDUP, abs=0.6)  # a mean of two whole numbers
    assert abs(computed - data["computed"]) <= 1  # prompts differ, and a skipped step changes the next ones


def test_a_found_map_is_what_the_search_has_run(engine, settings, profiles):
    data = profiles["ditfastattn"].data["ditfastattn"]
    rows = data["map"]["attn"]
    assert (len(rows), len(rows[0]), data["depth"]) == (STEPS, DEPTH, DEPTH)
    assert rows[0] == ["full"] * DEPTH and len({way for row in rows for way in row}) > 2
    tokens = engine.family.tokens(engine.latent_shape(settings))
    assert (data["of"], data["window"]) == (tokens, tokens // 8)
    outcome = run_with(engine, settings, profiles["ditfastattn"], DiTFastAttn)
    one, text = fits.encoded(engine, settings, PROMPTS)[0]
    searched = fits.Calibration(engine, one, text, ["attn"])
    for step, row in enumerate(rows):
        searched.finish(step, row)
    assert torch.equal(outcome.latents, searched.x)


def test_trying_ways_leaves_nothing_behind(engine, settings):
    one, text = fits.encoded(engine, settings, PROMPTS)[0]
    tried, plain = (fits.Calibration(engine, one, text, ["attn"]) for _ in range(2))
    for step in range(2):
        assert tried.loss(step, ["full"] * DEPTH) == 0.0
        if step:
            window, reuse = (tried.loss(step, [way] * DEPTH) for way in ("window", "reuse"))
            assert window > 0 and reuse > 0 and window != reuse
            assert tried.loss(step, ["window"] * DEPTH) == window
        for calibration in (tried, plain):
            calibration.finish(step, ["full"] * DEPTH)
    assert torch.equal(tried.x, plain.x)


@pytest.mark.parametrize("threshold, way", [(0.0, "full"), (1e9, "reuse")])
def test_the_threshold_decides_how_much_is_left_out(engine, settings, threshold, way):
    short = replace(settings, steps=2)
    profile = fits.profile_ditfastattn(
        engine, short, PROMPTS[:1], threshold=threshold, report=lambda line: None
    )
    assert profile.data["ditfastattn"]["map"]["attn"] == [["full"] * DEPTH, [way] * DEPTH]


def test_without_guidance_nothing_is_shared(engine):
    settings = engine.resolve("", Choices(**SMALL | {"steps": 3, "guidance_scale": 1.0}))
    quiet = dict(report=lambda line: None)
    found = fits.profile_ditfastattn(engine, settings, PROMPTS[:1], threshold=0.5, **quiet)
    rows = found.data["ditfastattn"]["map"]["attn"]
    assert not {"share", "window-share"} & {way for row in rows for way in row}
    assert set(fits.profile_magcache(engine, settings, PROMPTS[:1], **quiet).data["magcache"]["ratios"]) == {
        "cond"
    }


def test_every_fit_works_on_attention_along_axes(latte_folder):  # noqa: F811
    engine = Engine(latte_folder, device="cpu", dtype="fp32", keep_text_encoder=True)
    settings = engine.resolve("", Choices(steps=6))
    found = {method: make_profile(method, engine, settings, PROMPTS).data for method in FITTED}
    assert found["teacache"]["teacache"]["signal"] == "input"
    data = found["ditfastattn"]["ditfastattn"]
    _, frames, *_ = engine.latent_shape(settings)
    assert set(data["map"]) == {"attn", "t_attn"}
    assert data["of"] == engine.family.tokens(engine.latent_shape(settings)) // frames
    assert not {"window", "window-share"} & {way for row in data["map"]["t_attn"] for way in row}
    for policy in (TeaCache(profile=found["teacache"]), DiTFastAttn(profile=found["ditfastattn"])):
        one, text = fits.encoded(engine, settings, PROMPTS)[0]
        assert torch.isfinite(engine.denoise(one, text, policy=policy).latents).all()


def test_every_fit_works_where_the_text_goes_along(tmp_path):
    engine = Engine(save_tiny(tmp_path / "model", "5b", DPM), device="cpu", dtype="fp32")
    settings = engine.resolve("", Choices(steps=6))
    found = {method: make_profile(method, engine, settings, PROMPTS).data for method in FITTED}
    assert found["teacache"]["teacache"]["signal"] == "time"
    one, text = fits.encoded(engine, settings, PROMPTS)[0]
    rows = engine.forward(one, text).shapes["cond"][0][1]
    assert found["ditfastattn"]["ditfastattn"]["of"] == rows > engine.family.tokens(engine.latent_shape(one))
    for policy in (
        MagCache(threshold=9.0, profile=found["magcache"]),
        DiTFastAttn(profile=found["ditfastattn"]),
    ):
        assert torch.isfinite(engine.denoise(one, text, policy=policy).latents).all()


def test_the_time_as_the_blocks_see_it_can_be_the_signal(engine, settings):
    profile = make_profile("teacache:signal=time_mod", engine, settings, PROMPTS[:1])
    assert profile.data["teacache"]["signal"] == "time_mod"


def test_what_is_found_is_told_in_words(profiles):
    said = {method: describe(profile) for method, profile in profiles.items()}
    assert "signal time, which moves by 0." in said["teacache"] and "R^2 " in said["teacache"]
    assert "ratios " in said["magcache"] and "computes 0, " in said["magcache"]
    assert f" of {LONG} steps" in said["adacache"]
    assert said["ditfastattn"].startswith("attn  ") and said["ditfastattn"].endswith(f"of {STEPS * DEPTH}")


@pytest.mark.parametrize("steps", [30, 50])
@pytest.mark.parametrize("method", FITTED)
def test_the_embedded_model_brings_its_constants(engine, method, steps):
    settings = engine.resolve("a green star moves up", Choices(steps=steps, cache=method))
    policy, _ = engine.policy(settings)
    engine.check_cache(settings)  # refuses what does not fit
    assert policy.profile is not None
