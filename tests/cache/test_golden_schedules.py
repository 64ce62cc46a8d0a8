"""Published schedules: rivals compute the steps that their published rules compute.

golden_schedules.json holds the steps of MagCache, BlockDance, TaylorSeer and FasterCache. Those of PAB are
derived below from VideoSys' rule with a pencil.
"""

import json
from pathlib import Path

import pytest

from minidit.cache.plan import Plan, RunInfo, runs
from minidit.cache.policies.blockdance import BlockDance
from minidit.cache.policies.fastercache import FasterCache
from minidit.cache.policies.magcache import MagCache, nearest, skipped_steps
from minidit.cache.policies.magcache_ratios import RATIOS
from minidit.cache.policies.pab import PAB
from minidit.cache.policies.taylorseer import TaylorSeer
from minidit.presets import PRESETS, ScheduleConfig
from minidit.schedules import Step, make_schedule, make_table_schedule

GOLDEN = json.loads((Path(__file__).parent / "golden_schedules.json").read_text())
BOTH = ("cond", "uncond")


def run_of(steps: int, family: str = "wan", **changes) -> RunInfo:
    table = make_schedule(ScheduleConfig(), steps).steps(5.0)
    subs = ("attn", "mlp") if family == "hunyuan_video" else ("attn", "cross", "mlp")
    values = {"depth": 28, "subs": subs, "branches": BOTH, **changes}
    return RunInfo(table, family=family, **values)


def plans(policy, run: RunInfo) -> list[Plan]:
    policy.reset(run)
    found = []
    for step in run.steps:
        found.append(policy.plan(step))
        policy.tell(step, {})
    return found


def computed(policy, run: RunInfo) -> list[int]:
    """The steps that run every sub-module of every block."""
    every = set(range(run.depth))
    return [
        i for i, plan in enumerate(plans(policy, run)) if runs(plan, run.depth) == every and not plan.subs
    ]


def magcache(name: str) -> tuple[MagCache, RunInfo]:
    """A published setting, such as wan2.1-t2v-14b|E0.24|K6|R0.2."""
    table, threshold, most, retention = name.split("|")
    found = RATIOS[table]
    branches = ("cond",) if found.family == "hunyuan_video" else BOTH
    policy = MagCache(float(threshold[1:]), int(most[1:]), float(retention[1:]), table)
    return policy, run_of(len(found.cond), found.family, branches=branches)


@pytest.mark.parametrize("name", GOLDEN["magcache"])
def test_magcache_computes_the_published_steps(name):
    assert computed(*magcache(name)) == GOLDEN["magcache"][name]


@pytest.mark.parametrize("name", [name for name in GOLDEN["magcache"] if name.startswith("wan")])
def test_magcaches_branches_agree_where_their_settings_are_published(name):
    """So deciding for both at once changes nothing there."""
    policy, run = magcache(name)
    table, n = RATIOS[policy.table], len(run.steps)
    for ratios in (table.cond, table.uncond):
        skips = skipped_steps([ratios], int(n * policy.retention), policy.threshold, policy.max_skip)
        assert [i for i in range(n) if not skips[i]] == GOLDEN["magcache"][name]


@pytest.mark.parametrize(
    "model, tokens, branches, count",
    [
        ("wan2.1-t2v-14b", 32760, BOTH, 18),
        ("wan2.1-t2v-1.3b", 32760, BOTH, 21),
        ("hunyuan-video", 118800, ("cond",), 19),
        ("hunyuan-video", 67320, ("cond",), 18),
        ("open-sora-1.2", 23850, BOTH, 12),
    ],
)
def test_magcache_knows_the_releases_own_setting(model, tokens, branches, count):
    n = 30 if model.startswith("open") else 50
    run = run_of(n, PRESETS[model].family, model=model, tokens=tokens, branches=branches)
    policy = MagCache()
    assert len(computed(policy, run)) == count
    assert policy.constants.startswith(f"published for {model}")


def test_blockdance_computes_the_published_steps():
    as_baseline, as_paper = GOLDEN["blockdance"].values()
    assert computed(BlockDance(**BlockDance.variants["mixcache"]), run_of(50)) == as_baseline
    assert computed(BlockDance(), run_of(50)) == as_paper


def test_taylorseer_computes_the_published_steps():
    official, ported = GOLDEN["taylorseer"].values()
    assert computed(TaylorSeer(), run_of(50)) == official
    assert computed(TaylorSeer(**TaylorSeer.variants["diffusers"]), run_of(50)) == ported


def test_fastercache_computes_the_published_steps():
    latte, cogvideox, open_sora = GOLDEN["fastercache"].values()
    uncond = lambda found: [i for i, plan in enumerate(found) if "uncond" in (plan.branches or BOTH)]
    with_attention = lambda found: [i for i, plan in enumerate(found) if not plan.subs]
    for family, steps, want in (("latte", 50, latte), ("cogvideox", 50, latte), ("open_sora", 30, open_sora)):
        assert uncond(plans(FasterCache(attention=False), run_of(steps, family))) == want
    assert with_attention(plans(FasterCache(cfg=False), run_of(50, "cogvideox"))) == cogvideox


def pab_run(model: str, table) -> RunInfo:
    preset = PRESETS[model]
    subs = {
        "latte": ("attn", "cross", "mlp", "t_attn", "t_mlp"),
        "open_sora": ("attn", "cross", "mlp", "t_attn", "t_cross", "t_mlp"),
        "cogvideox": ("attn", "mlp"),
    }
    return RunInfo(table, preset.transformer.depth, subs[preset.family], BOTH, preset.family, model=model)


def computed_subs(found: list[Plan], block: int, name: str) -> list[int]:
    return [i for i, plan in enumerate(found) if (block, name) not in dict(plan.subs)]


def test_pab_computes_lattes_published_steps():
    """Timesteps 980, 960, ..., 0: those strictly between 100 and 800 are steps 10 to 43."""
    table = make_table_schedule(PRESETS["latte-1"].schedule, 50).steps(7.5)
    found = plans(PAB(), pab_run("latte-1", table))
    outside = [*range(10), *range(44, 50)]
    every = lambda n: sorted({*outside, *range(0, 50, n)})
    for block in (0, 27):
        assert computed_subs(found, block, "attn") == every(2)
        assert computed_subs(found, block, "t_attn") == every(3)
        assert computed_subs(found, block, "cross") == every(6)
    # the steps of 720, 640, 560, 480, 400 are 13, 17, 21, 25, 29, and two steps take from each
    taken = {14, 15, 18, 19, 22, 23, 26, 27, 30, 31}
    for name in ("mlp", "t_mlp"):
        assert computed_subs(found, 4, name) == [i for i in range(50) if i not in taken]
        assert computed_subs(found, 5, name) == list(range(50))


def test_pab_computes_open_soras_published_steps():
    """At its own size the schedule visits 863.6, 787.4 and 674.9 at steps 13, 17 and 21."""
    shift = 4.843  # of 854x480, 51 frames
    table = make_schedule(ScheduleConfig("euler", "wan", shift), 30).steps(7.0)
    found = plans(PAB(), pab_run("open-sora-1.2", table))
    inside = range(9, 26)  # 930.2 is step 8, 918.7 step 9; 492.0 is step 25, 427.0 step 26
    assert [i for i, step in enumerate(table) if 450 < step.t < 930] == list(inside)
    for name, every in (("attn", 2), ("t_attn", 4), ("cross", 6), ("t_cross", 6)):
        want = [i for i in range(30) if i not in inside or i % every == 0]
        assert computed_subs(found, 27, name) == want
    assert computed_subs(found, 0, "mlp") == [i for i in range(30) if i not in (14, 15, 18, 19, 22, 23)]


def test_pab_computes_cogvideoxs_published_steps():
    table = make_table_schedule(PRESETS["cogvideox-2b"].schedule, 50).steps(6.0)
    found = plans(PAB(), pab_run("cogvideox-2b", table))
    # 999, 979, ...: strictly between 100 and 850 are steps 8 (839) to 44 (119)
    assert computed_subs(found, 0, "attn") == [*range(8), *range(8, 45, 2), *range(45, 50)]
    assert computed_subs(found, 0, "mlp") == list(range(50))


def test_other_step_counts_take_the_nearest_published_ratios():
    table = [float(i) for i in range(50)]
    assert nearest(table, 50) == tuple(table)
    assert nearest(table, 3) == (0.0, 24.0, 49.0)  # 24.5 rounds to the even one, as numpy does
    assert nearest(table, 1) == (49.0,)
    assert nearest([1.0, 2.0], 4) == (1.0, 1.0, 2.0, 2.0)


def test_steps_are_counted_by_their_index_not_by_their_timestep():
    """Timesteps may coincide, and nothing may be keyed by them."""
    run = run_of(20)
    same = RunInfo(
        tuple(Step(s.i, s.n, 500.0, s.sigma, s.guidance) for s in run.steps), 28, run.subs, BOTH, "wan"
    )
    assert computed(BlockDance(), same) == computed(BlockDance(), run)
