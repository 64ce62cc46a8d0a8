"""Planned steps: a profile decides which are computed, the others are forecast; how that is measured."""

from dataclasses import replace

import pytest
import torch

from minidit.cache.forecasts import Fit, impact_at, measure_forecasts, smoothed, trajectory
from minidit.cache.plan import CFG_DELTA, GUIDED, PREDICTION, REUSE, RunInfo
from minidit.cache.policies.planned import Planned
from minidit.generate import Engine
from minidit.schedules import Step
from minidit.settings import Choices

N = 10


@pytest.fixture(scope="module")
def engine():
    return Engine("demo", dtype="fp32", keep_text_encoder=True)


@pytest.fixture(scope="module")
def run(engine):
    settings = engine.resolve("a red circle moves right", Choices(steps=N, seed=3))
    return settings, engine.encode(settings)


@pytest.fixture(scope="module")
def profile(engine, run):
    return measure_forecasts(engine, run[0], [run], points=2, report=lambda line: None)


def info(guidance=(4.0,) * N, branches=("cond", "uncond")) -> RunInfo:
    steps = tuple(Step(i, N, 900.0 - i, 0.9, g, 0) for i, g in enumerate(guidance))
    return RunInfo(steps, 8, ("attn", "cross", "mlp"), branches, "wan")


def test_a_share_of_the_steps_is_computed_and_the_rest_forecast(engine, run, profile):
    settings, text = run
    outcome = engine.denoise(settings, text, policy=Planned(share=0.6, profile=profile))
    labels = [record.plan.label for record in outcome.records]
    assert labels.count("full") == 6 and labels.count("forecast") == 4
    trace = engine.trace(settings, outcome)
    assert trace["total"]["macs"] == pytest.approx(0.6 * trace["total"]["macs_full"])
    assert torch.isfinite(outcome.latents).all()


def test_forecasts_beat_repeating_the_last_prediction(engine):
    """On the embedded model with its own profile, of prompts that are not this one."""
    settings = engine.resolve("a green circle moves left", Choices(cache="planned", seed=5))
    text = engine.encode(settings)
    clean, planned = (
        engine.denoise(replace(settings, cache=cache), text).latents for cache in ("none", "planned")
    )

    class Repeats(Planned):
        def plan(self, step):
            plan = super().plan(step)
            return plan if plan.output is None else replace(plan, output=REUSE)

    profile = engine.policy(settings)[0].profile
    repeated = engine.denoise(settings, text, policy=Repeats(profile=profile)).latents
    assert (planned - clean).norm() < 0.5 * (repeated - clean).norm()


def test_everything_computed_is_the_uncached_run(engine, run, profile):
    settings, text = run
    all_of_it = engine.denoise(settings, text, policy=Planned(share=1.0, profile=profile)).latents
    assert torch.equal(all_of_it, engine.denoise(settings, text).latents)


def test_varying_guidance_forecasts_its_parts(profile):
    policy = Planned(share=0.5, profile=profile)
    needs = policy.reset(info(guidance=tuple(1.0 + i for i in range(N))))
    assert [(need.site, need.depth, need.branches) for need in needs] == [
        (PREDICTION, 2, ("cond",)), (CFG_DELTA, 2, ("cond",)),
    ]  # fmt: skip
    plans = [policy.plan(step) for step in info().steps]
    skipped = [plan for plan in plans if plan.label == "forecast"]
    assert skipped and all(plan.branches == ("cond",) and plan.fill == plan.path[0].mix for plan in skipped)
    assert [need.site for need in policy.reset(info())] == [GUIDED]


def test_a_line_is_forecast_without_error():
    fit = Fit(6, reach=4)
    fit.add([torch.full((1, 1, 1, 1, 1), 3 + 2.0 * i) for i in range(6)])
    tables = fit.tables()
    assert tables["ahead"][3][0] == [1.0, 2.0, 0.0] and tables["ahead"][3][1] == [0.5, 1.0, 0.0]
    assert tables["ahead"][0] == [] and len(tables["ahead"][1]) == 1
    assert all(error < 1e-6 for rows in tables["errors"] for row in rows for error in row)


def test_the_fit_is_least_squares_over_all_runs():
    draw = torch.Generator().manual_seed(0)
    runs = [[torch.randn(1, 2, 1, 3, 3, generator=draw) for _ in range(5)] for _ in range(3)]
    fit = Fit(5, reach=3)
    for guided in runs:
        fit.add(guided)
    b, a, j = 1, 2, 4
    behind = torch.cat([v[a] - v[b] for v in runs]).flatten().double()
    wanted = torch.cat([v[j] - v[a] for v in runs]).flatten().double()
    c = (behind @ wanted / (behind @ behind)).item()
    errors = [(v[a] + c * (v[a] - v[b]) - v[j]).norm().item() for v in runs]
    tables = fit.tables()
    assert tables["ahead"][a][0][1] == pytest.approx(c, rel=1e-3)
    assert tables["errors"][a][0][1] == pytest.approx(sum(errors) / 3, rel=1e-3)


def test_impact_of_the_last_step_is_its_step_in_noise(engine, run):
    """Nothing comes after it: an error e in the velocity moves the latents by |sigma_n - sigma_n-1| e."""
    settings, text = run
    steps = engine.family.schedule(settings).steps(settings.cfg_scale)
    clean = trajectory(engine, settings, text)
    assert impact_at(engine, settings, text, clean, N - 1) == pytest.approx(steps[-1].sigma, rel=1e-3)


def test_impacts_are_interpolated_in_the_logarithm():
    found = smoothed({2: 1.0, 6: 16.0, 9: 4.0}, N, around=0)
    assert found == pytest.approx([1, 1, 1, 2, 4, 8, 16, 10.08, 6.35, 4], rel=1e-3)
    last = smoothed({i: float(i) for i in range(2, N)}, N)
    assert last[8:] == [8.0, 9.0] and last[5] != 5.0  # the leap at the end is not smoothed away


def test_what_it_cannot_do_is_refused(profile):
    with pytest.raises(ValueError, match="share=0 is not above 0"):
        Planned(share=0)
    with pytest.raises(ValueError, match="planned needs a profile of this model at 10 steps"):
        Planned().reset(info())
    short = replace(info(), steps=info().steps[:5])
    with pytest.raises(ValueError, match="at 5 steps"):
        Planned(profile=profile).reset(short)
