"""MixCache: equations against tables, the state machine on scripted distances, runs against a reference."""

from dataclasses import replace

import pytest
import torch

import minidit
from minidit.cache.measure import Measurements
from minidit.cache.plan import (
    CFG_DELTA,
    GUIDED,
    GUIDED_FULL,
    PREDICTION,
    REUSE,
    Add,
    Load,
    Mix,
    Plan,
    RunInfo,
    check,
    h,
    recalled,
    residual,
)
from minidit.cache.policies.mixcache import MixCache, choose, default_blocks, interval
from minidit.cache.spec import make_policy, parse
from minidit.cache.store import make_store
from minidit.sampling import denoise, draw_noise, guided_prediction, site_shapes
from minidit.schedules import Step, make_schedule
from minidit.settings import Choices
from tests.cache.reference_mixcache import mixcache_reference

BOTH = ("cond", "uncond")


def run_info(steps=20, *, depth=8, branches=BOTH, family="wan", guidance=None) -> RunInfo:
    guidance = guidance or [4.0] * steps
    table = tuple(Step(i, steps, 1000.0 - i, 1 - i / steps, guidance[i]) for i in range(steps))
    return RunInfo(table, depth, ("attn", "cross", "mlp"), branches, family)


def drive(policy, script, run=None) -> list[str]:
    """Run a policy by hand -> the labels of its plans.

    script: step index -> {site as text: D}; only what the plan measures and has stored before is told
    """
    run = run or run_info()
    policy.reset(run)
    stored, labels = set(), []
    for step in run.steps:
        plan = policy.plan(step)
        check(plan, run.depth)
        assert read_by(plan) <= stored, f"step {step.i} reads what was never stored"
        numbers = script(step.i)
        known = [m for m in plan.measure if m.site in stored and str(m.site) in numbers]
        policy.tell(step, {m: numbers[str(m.site)] for m in known})
        stored |= set(plan.keep)
        labels.append(plan.label)
    return labels


def read_by(plan: Plan) -> set:
    sites = {item.site for item in plan.path if isinstance(item, Load | Add)}
    return sites | ({CFG_DELTA} if plan.fill else set()) | ({GUIDED} if plan.output else set())


def script(**changes):
    """Constant distances: block 2 is the least, then step, block 4, block 6 and cfg."""
    numbers = {
        "guided": 0.05,
        "guided_full": 0.07,
        "cfg_delta": 0.5,
        "h(3)": 0.02,
        "h(5)": 0.06,
        "h(7)": 0.09,
    }
    return lambda i: (
        numbers | {name: value(i) if callable(value) else value for name, value in changes.items()}
    )


def uniform(**options) -> MixCache:
    return MixCache(impact="uniform", **options)


@pytest.mark.parametrize(
    "d_full, acc, eff", [(0.0, 4, 5), (0.0499, 4, 5), (0.05, 3, 4), (0.0999, 3, 4), (0.1, 2, 3), (9.0, 2, 3)]
)
def test_interval_follows_eq6(d_full, acc, eff):
    assert interval(d_full, (0.05, 0.1), (4, 3, 2)) == acc
    assert interval(d_full, (0.05, 0.1), MixCache.variants["eff"]["intervals"]) == eff


@pytest.mark.parametrize(
    "distance, last, chosen",
    [
        ({"step": 0.2, "cfg": 0.03, "block 2": 0.5}, None, "step"),  # 0.2, 0.3, 0.25
        ({"step": 0.4, "cfg": 0.03, "block 2": 0.5}, None, "block 2"),  # 0.4, 0.3, 0.25
        ({"step": 0.4, "cfg": 0.02, "block 2": 0.5}, None, "cfg"),  # 0.4, 0.2, 0.25
        ({"step": 0.4, "cfg": 0.02, "block 2": 0.5}, "cfg", "block 2"),
        ({"step": 0.4, "cfg": 0.02, "block 2": 0.5}, "full", "cfg"),
        ({"step": 0.4}, "step", "full"),
        ({}, None, "full"),
    ],
)
def test_choose_takes_the_least_product_but_never_the_last(distance, last, chosen):
    assert choose(distance, {"step": 1, "cfg": 10, "block 2": 0.5}, last) == chosen


@pytest.mark.parametrize(
    "depth, family, blocks",
    [
        (40, "wan", (10, 20, 30)),
        (42, "cogvideox", (10, 20, 30)),
        (60, "hunyuan_video", (30, 40, 50)),
        (30, "wan", (7, 15, 22)),
        (8, "wan", (2, 4, 6)),
        (4, "hunyuan_video", (1, 2)),
        (2, "wan", (0,)),
        (1, "wan", ()),
    ],
)
def test_default_candidates_by_depth(depth, family, blocks):
    assert default_blocks(depth, family) == blocks
    if blocks:
        assert set(drive(uniform(), script(), run_info(depth=depth, family=family))) != {"full"}


def test_warm_up_lasts_until_step_distance_is_below_theta():
    assert drive(uniform(), script())[:4] == ["full", "full", "block 2", "step"]  # the earliest there is
    late = drive(uniform(), script(guided=lambda i: 0.1 if i < 6 else 0.099))
    assert late[:8] == ["full"] * 7 + ["block 2"]  # equal to theta is not below; step 6 is told before step 7
    assert set(drive(uniform(theta=0.01), script())) == {"full"}
    assert set(drive(uniform(), script(), run_info(2))) == {"full"}


def test_warm_up_ends_once_unless_relatch():
    rising = script(guided=lambda i: 0.05 if i < 4 else 0.5)
    assert drive(uniform(), rising)[5:12] == ["block 2", "block 4", "full"] * 2 + ["block 2"]
    # steps 2-4 are block 2, step, full; D_step of step 4 ends the phase
    assert drive(uniform(relatch=True), rising)[2:] == ["block 2", "step", "full"] + ["full"] * 15
    back = script(guided=lambda i: 0.5 if i in (4, 5) else 0.05)
    assert drive(uniform(relatch=True), back)[4:9] == ["full", "full", "full", "block 2", "step"]
    within = script(guided=lambda i: 0.5 if i == 2 else 0.05)  # told by the first of two cached steps
    assert drive(uniform(relatch=True), within)[2:6] == ["block 2", "full", "block 2", "step"]


def test_full_step_drift_sets_the_next_interval():
    drift = {4: 0.2, 6: 0.01, 10: 0.07}  # D_full of the full steps
    labels = drive(uniform(), script(guided_full=lambda i: drift.get(i, 0.07)))
    # from step 1 the middle interval, then 2, 4, 3; what is between is cached
    assert [i for i, label in enumerate(labels) if label == "full"] == [0, 1, 4, 6, 10, 13, 16, 19]
    eff = drive(uniform(intervals=(5, 4, 3)), script(guided_full=lambda i: {5: 0.2, 8: 0.01}.get(i, 0.07)))
    assert [i for i, label in enumerate(eff) if label == "full"] == [0, 1, 5, 8, 13, 17]


def test_warm_up_drift_leaves_the_first_interval_alone():
    script_ = script(guided=lambda i: 0.5 if i < 5 else 0.05, guided_full=lambda i: 0.9 if i < 6 else 0.07)
    assert [i for i, label in enumerate(drive(uniform(), script_)) if label == "full"][6:] == [8, 11, 14, 17]


def test_fixed_interval_overrides_eq6():
    labels = drive(uniform(interval=6), script(guided_full=lambda i: 0.01 * i))
    assert [i for i, label in enumerate(labels) if label == "full"] == [0, 1, 7, 13, 19]
    assert set(drive(uniform(interval=1), script())) == {"full"}


@pytest.mark.parametrize(
    "mode, told",
    [
        ("full", {"guided", "cfg_delta", "h(3)", "h(5)", "h(7)", "guided_full"}),
        ("cfg", {"guided", "h(3)", "h(5)", "h(7)"}),
        ("block 2", {"guided", "h(5)", "h(7)"}),
        ("block 4", {"guided", "h(7)"}),
        ("block 6", {"guided"}),
        ("step", set()),
    ],
)
def test_a_mode_measures_and_keeps_what_it_computes(mode, told):
    policy = uniform()
    policy.reset(run_info())
    plan = policy.plans[mode]
    assert {str(m.site) for m in plan.measure} == told
    assert set(plan.keep) == {m.site for m in plan.measure}  # so nothing that is told was a copy
    assert not {m.site for m in plan.measure} & read_by(plan)
    assert plan.label == mode


def test_what_a_step_did_not_compute_keeps_its_distance():
    # every step tells its own index, so that the time of each number shows
    policy, run = uniform(theta=99.0, interval=20, levels=("step", "cfg", "block")), run_info()
    policy.reset(run)
    order = ["full", "full", "cfg", "block 2", "step", "block 6", "cfg", "block 4", "full"]
    want = {  # the step whose D each mode holds after steps 2.., as in the table of the held measurements
        "cfg": dict(step=2, cfg=1, b2=2, b4=2, b6=2),
        "block 2": dict(step=3, cfg=1, b2=2, b4=3, b6=3),
        "step": dict(step=3, cfg=1, b2=2, b4=3, b6=3),
        "block 6": dict(step=5, cfg=1, b2=2, b4=3, b6=3),
    }
    for step, mode in zip(run.steps, order, strict=False):
        policy.plan(step)
        policy.mode = mode
        policy.tell(step, {m: float(step.i) for m in policy.plans[mode].measure if step.i > 0})
        if step.i in (2, 3, 4, 5):
            held = {name.replace("block ", "b"): d for name, d in policy.distance.items()}
            assert held == want[mode], mode
    assert {*policy.distance.values()} == {8.0}


def test_penalty_forbids_a_mode_in_the_next_step_only():
    assert drive(uniform(interval=9), script())[2:9] == ["block 2", "step"] * 3 + ["block 2"]
    # the last cached step and the first after a full one may be alike
    assert drive(uniform(interval=2), script())[2:7] == ["block 2", "full"] * 2 + ["block 2"]
    assert drive(uniform(interval=9, penalty=False), script())[2:9] == ["block 2"] * 7


def test_a_single_mode_under_penalty_alternates_with_full_steps():
    labels = drive(uniform(levels=("step",), interval=5), script())
    assert labels[2:8] == ["step", "full"] * 3
    assert drive(uniform(levels=("step",), interval=5, penalty=False), script())[2:8] == ["step"] * 4 + [
        "full",
        "step",
    ]


def test_a_full_step_without_candidates_starts_the_next_interval():
    known_late = lambda i: {"guided": 0.05, "guided_full": 0.07} | ({"cfg_delta": 0.02} if i >= 4 else {})
    labels = drive(uniform(levels=("cfg",), penalty=False, interval=3), known_late)
    assert labels[:11] == ["full"] * 5 + ["cfg", "cfg", "full"] * 2


def test_levels_limit_the_choice():
    for level, expected in (("step", "step"), ("cfg", "cfg"), ("block", "block 2")):
        labels = drive(uniform(levels=(level,), penalty=False), script())
        assert set(labels) == {"full", expected}
    policy = uniform(levels=("step", "cfg"))
    assert not any(need.site.kind == "h" for need in policy.reset(run_info()))


def test_a_run_without_guidance_has_no_cfg_mode():
    policy, run = uniform(), run_info(branches=("cond",))
    needs = policy.reset(run)
    assert CFG_DELTA not in {need.site for need in needs}
    assert set(drive(policy, script(cfg_delta=0.0), run)) == {"full", "block 2", "step"}
    assert all(policy.plans[mode].fill is None for mode in ("full", "step", "block 2"))
    with pytest.raises(ValueError, match="levels=cfg cannot act on a run without guidance"):
        uniform(levels=("cfg",)).reset(run)


def test_block_mode_fills_or_runs_uncond():
    filled, ran = uniform(), uniform(block_uncond="run")
    needs = {need.site: need.branches for need in filled.reset(run_info())}
    assert needs[h(3)] == ("cond",) and filled.plans["block 2"].branches == ("cond",)
    assert filled.plans["block 2"].fill == REUSE
    needs = {need.site: need.branches for need in ran.reset(run_info())}
    assert needs[h(3)] == () and ran.plans["block 2"].branches == () and ran.plans["block 2"].fill is None
    assert ran.plans["cfg"].branches == ("cond",)


def test_residual_adds_what_the_first_blocks_added():
    policy = uniform(residual=True, blocks=(2,))
    assert residual(0, 3) in {need.site for need in policy.reset(run_info())}
    assert policy.plans["block 2"].path[0] == Add(residual(0, 3))
    numbers = {"guided": 0.05, "guided_full": 0.07, "cfg_delta": 0.5, "residual(0,3)": 0.01}
    assert drive(policy, lambda i: numbers)[2:5] == ["block 2", "step", "full"]


def test_per_step_divides_by_the_age_of_what_is_stored():
    policy, run = uniform(per_step=True, theta=9.0, levels=("step",), penalty=False), run_info()
    told = {}
    policy.reset(run)
    for step in run.steps[:6]:
        plan = policy.plan(step)
        policy.tell(step, {m: 0.6 for m in plan.measure if step.i > 0})
        told[step.i] = (plan.label, policy.distance.get("step"), policy.distance.get("cfg"))
    # steps 2 and 3 reuse step 1: at step 4 the stored prediction is three steps old
    assert told[1] == ("full", 0.6, 0.6) and told[3] == ("step", 0.6, 0.6)
    assert told[4] == ("full", pytest.approx(0.2), pytest.approx(0.2))


def test_impact_comes_from_the_profile():
    curve = {"2": [1.0] * 8 + [99.0] * 12, "4": [1.0] * 20, "6": [1.0] * 20}
    profile = {"impact": {"step": 50.0, "cfg": 0.001, "block": curve}}
    labels = drive(MixCache(profile=profile, penalty=False), script())
    assert set(labels) == {"full", "cfg"}  # 0.5 * 0.001 is the least
    profile["impact"]["cfg"] = 50.0
    labels = drive(MixCache(profile=profile, penalty=False), script())
    assert set(labels[2:8]) == {"full", "block 2"} and set(labels[8:]) == {"full", "block 4"}  # I by step
    assert set(drive(MixCache(profile=profile, impact="uniform", penalty=False), script())) == {
        "full",
        "block 2",
    }


def test_what_cannot_be_done_is_refused():
    profile = {"impact": {"step": 1.0, "cfg": 1.0, "block": {"2": [1.0] * 20}}}
    with pytest.raises(ValueError, match="python -m minidit profile --cache mixcache"):
        MixCache().reset(run_info())
    with pytest.raises(ValueError, match="has blocks 2, not 4 at 20 steps"):
        MixCache(profile=profile).reset(run_info())
    with pytest.raises(ValueError, match="has blocks 2, not 2 at 30 steps"):
        MixCache(profile=profile, blocks=(2,)).reset(run_info(30))
    with pytest.raises(ValueError, match="blocks=7 leaves nothing to run"):
        uniform(blocks=(2, 7)).reset(run_info())
    for options in (
        {"levels": ("token",)},
        {"block_uncond": "skip"},
        {"impact": "guess"},
        {"delta": (0.2, 0.1)},
        {"delta": (0.1,)},
        {"intervals": (4, 3)},
        {"interval": 0},
    ):
        with pytest.raises(ValueError, match=f"mixcache: .*{next(iter(options))}="):
            MixCache(**options)


def test_options_are_read_from_a_spec():
    text = "mixcache:eff:theta=0.2,delta=0.3/0.4,blocks=2/5,levels=step/block,interval=6,residual=on"
    policy = make_policy(parse(text), lambda name: None)
    assert (policy.theta, policy.delta, policy.intervals) == (0.2, (0.3, 0.4), (5, 4, 3))
    assert (policy.blocks, policy.levels, policy.fixed, policy.residual) == (
        (2, 5),
        ("step", "block"),
        6,
        True,
    )


def test_guidance_that_varies_is_recombined():
    run = run_info(guidance=[1.0 + i / 4 for i in range(20)])
    policy = uniform(block_uncond="run")  # whose other rings are of both branches
    assert {need.site: need.branches for need in policy.reset(run)}[PREDICTION] == ("cond",)
    plan = policy.plans["step"]
    assert recalled(plan).mix == Mix() and plan.fill == REUSE and plan.output is None
    assert drive(policy, script(), run) == drive(uniform(), script())
    assert PREDICTION not in {need.site for need in uniform().reset(run_info())}


STEPS = 24  # of the runs on the embedded model
IMPACT = {  # under which all three levels act there
    "step": 1.0,
    "cfg": 0.4,
    "block": {str(i): [0.4 + 0.06 * s for s in range(STEPS)] for i in (2, 4, 6)},
}


@pytest.fixture(scope="module")
def demo():
    torch.set_num_threads(1)
    engine = minidit.load("demo", device="cpu", dtype="fp32")
    settings = engine.resolve("a blue star moves right", Choices(steps=STEPS, seed=3))
    text = engine.encode(settings)
    return engine, settings, text


@pytest.fixture(scope="module")
def start(demo):
    """(forward, schedule, noise)"""
    engine, settings, text = demo
    noise = draw_noise((1, *engine.latent_shape(settings)), settings.seed)
    return engine.forward(settings, text), make_schedule(engine.manifest.schedule, STEPS), noise


def run_policy(start, policy, guidance=4.0, **options):
    outcome = denoise(*start, policy, guidance_scale=guidance, **options)
    return outcome.latents, [record.plan.label for record in outcome.records]


@pytest.mark.parametrize(
    "options, guidance",
    [
        ({}, 4.0),
        ({"penalty": False}, 4.0),
        ({"block_uncond": "run"}, 4.0),
        ({"residual": True}, 4.0),
        ({"levels": ("step",), "penalty": False}, 4.0),
        ({"levels": ("cfg",), "penalty": False}, 4.0),
        ({"levels": ("block",), "penalty": False}, 4.0),
        ({"intervals": (5, 4, 3)}, [4.0 + 0.1 * i for i in range(STEPS)]),
    ],
    ids=["default", "no-penalty", "run-uncond", "residual", "step", "cfg", "block", "eff-varying-guidance"],
)
def test_equals_a_hand_unrolled_run(start, options, guidance):
    common = {"theta": 0.2, "delta": (0.1, 0.2), **options}
    for is_batched in (True, False):
        run = (replace(start[0], is_batched=is_batched), *start[1:])
        want, modes = mixcache_reference(*run, guidance, impact=IMPACT, candidates=(2, 4, 6), **common)
        levels = {mode.split()[0] for mode in modes}
        assert levels == {"full", *options.get("levels", ("step", "cfg", "block"))}
        latents, labels = run_policy(run, MixCache(profile={"impact": IMPACT}, **common), guidance)
        assert labels == modes
        # the same operations in the same order; what is left is the rounding of a fused sum
        assert (latents - want).abs().max() <= 1e-6 * want.abs().max()


def test_cond_only_steps_leave_uncond_alone(start):
    forward, schedule, noise = start
    run = RunInfo(schedule.steps(4.0), 8, forward.model.subs, BOTH, "wan")
    policy = MixCache(impact="uniform", block_uncond="run")
    store = make_store(policy.reset(run), BOTH, site_shapes(forward, noise), "cpu")
    with torch.inference_mode():
        for step, mode in zip(run.steps, ("full", "cfg", "step"), strict=False):
            before = {key: ring.slots.clone() for key, ring in store.rings.items()}
            guided_prediction(forward, noise, step, policy.plans[mode], store, Measurements(), policy)
            changed = {key for key, ring in store.rings.items() if not torch.equal(ring.slots, before[key])}
            states = {(h(k), branch) for k in (3, 5, 7) for branch in BOTH}
            shared = {(site, "") for site in (GUIDED, GUIDED_FULL, CFG_DELTA)}
            assert (
                changed
                == {
                    "full": states | shared,
                    "cfg": {key for key in states if key[1] == "cond"} | {(GUIDED, "")},
                    "step": set(),
                }[mode]
            )


def test_a_run_after_an_aborted_or_another_one_is_a_fresh_one(demo, start):
    engine, settings, text = demo
    policy = lambda: uniform(theta=0.2)
    fresh = run_policy(start, policy())
    used = policy()

    def stop(record, x):
        if record.step.i == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_policy(start, used, on_step=stop)
    again = run_policy(start, used)
    assert torch.equal(again[0], fresh[0]) and again[1] == fresh[1]

    for choices in (Choices(steps=12, seed=3), Choices(steps=STEPS, seed=3, width=32, height=32)):
        other = engine.resolve("a blue star moves right", choices)
        after = engine.denoise(other, text, policy=used)
        alone = engine.denoise(other, text, policy=policy())
        assert torch.equal(after.latents, alone.latents)
        assert [r.plan for r in after.records] == [r.plan for r in alone.records]
