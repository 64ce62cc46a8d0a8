"""UniCP: the searches by table, the map under an outer policy, the method against a hand-unrolled run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minidit
from minidit.cache.calibrate import make_bases
from minidit.cache.plan import REUSE, RUN_ALL, Load, Plan, Run, RunInfo, Slice, h, sub
from minidit.cache.policies.none import NoCache
from minidit.cache.policies.unicp import (
    UniCP,
    at_most,
    block_width,
    narrowest,
    nearest_width,
    saves,
    search_windows,
    threshold_value,
)
from minidit.models.wan import Wan
from minidit.presets import ScheduleConfig
from minidit.sampling import Forward, denoise
from minidit.schedules import make_schedule
from minidit.weights import load_into, read_manifest
from tests.cache.reference_unicp import UnrolledRun
from tests.tensors import rel

BRANCHES = ("cond", "uncond")
STEPS, SIZE = 8, (3, 4, 4)  # latent (T, H, W): 12 tokens


def profile(errors: dict, losses: list | None = None, **changes) -> dict:
    """A profile of that error table, [kind][i][block][k - 1], and slices that cost nothing."""
    rows = next(iter(errors.values()))
    free = [[[0.0, 0.0, 0.0] for _ in rows[0]] for _ in rows]
    return {
        "steps": len(rows),
        "depth": len(rows[0]),
        "tokens": 32760,
        "max_window": 6,
        "errors": errors,
        "basis": "two-sided",
        "head_width": 32,
        "widths": [28, 24, 20],
        "slice_losses": losses or free,
    } | changes


def drift(*blocks: list[float], steps: int = STEPS) -> list:
    """An error table where outputs drift steadily: between steps i and i + k of block b, k * blocks[b][i]."""
    reach = lambda i: range(1, min(6, steps - 1 - i) + 1)
    return [[[k * rate[i] for k in reach(i)] for rate in blocks] for i in range(steps)]


def run_info(steps: int = STEPS, depth: int = 2, branches=BRANCHES) -> RunInfo:
    table = make_schedule(ScheduleConfig("euler"), steps).steps(4.0)
    return RunInfo(table, depth, ("attn", "cross", "mlp"), branches, "wan")


def begin(policy, info: RunInfo | None = None):
    info = info or run_info()
    policy.reset(info)
    return policy, info.steps


def embedded_model() -> Wan:
    folder = Path(minidit.__file__).parent / "demo"
    model = Wan(read_manifest(folder).components["transformer"].config)
    return load_into(model, folder, "transformer", device="cpu", dtype=torch.float32)


def embedded_run(is_batched: bool = False) -> tuple[Forward, torch.Tensor]:
    """The embedded model on random text, a small video, and its noise."""
    g = torch.Generator().manual_seed(3)
    model = embedded_model()
    text = [torch.randn(n, 128, generator=g) for n in (5, 1)]
    with torch.inference_mode():
        context = model.prepare(text, SIZE, branches=BRANCHES)
    return Forward(model, context, is_batched), torch.randn(1, 8, *SIZE, generator=g)


def random_bases(depth: int = 8, heads: int = 6) -> dict:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(depth, 2, heads, 64, 32, generator=g, dtype=torch.float64)
    return make_bases({k: tuple(x[k].mT @ x[k]) for k in range(depth)}, "two-sided")


def mixed_profile(widths: tuple[int, ...] = (28, 26, 22, 20)) -> dict:
    """Windows of several lengths, different ones for every sub-module, and slices in two of three blocks."""
    g = torch.Generator().manual_seed(5)
    table = lambda: drift(*(0.06 * torch.rand(8, STEPS, generator=g)).tolist())
    losses = [[[0.01, 0.04, 0.06, 0.09] if k % 3 else [0.06] * 4 for k in range(8)] for _ in range(STEPS)]
    return profile({"attn": table(), "cross": table()}, losses, widths=list(widths))


def sample(forward: Forward, noise: torch.Tensor, policy, constants: dict | None = None) -> torch.Tensor:
    schedule = make_schedule(ScheduleConfig("unipc"), STEPS)
    return denoise(forward, schedule, noise, policy, guidance_scale=4.0, constants=constants).latents


@pytest.mark.parametrize(
    "errors, threshold, strict, literal",
    [
        ([[0.9, 0.9], [0.9], []], 0.1, (0, 1, 2), (0, 1, 2)),
        ([[0.0, 0.0], [0.0], []], 0.1, (0, 0, 0), (0, 0, 0)),
        ([[0.1, 0.1], [0.1], []], 0.1, (0, 1, 2), (0, 1, 2)),  # below the threshold, not at it
        ([[0.2, 0.05], [0.2], []], 0.1, (0, 1, 2), (0, 0, 0)),  # a spike inside the window
        ([[0.0, 0.5, 0.0], [0.0, 0.0], [0.0], []], 0.1, (0, 0, 2, 2), (0, 0, 0, 0)),
        # windows do not overlap: step 1 is served, so what it could serve does not count
        ([[0.0, 0.5], [0.0, 0.0], [0.5, 0.5], [0.5], []], 0.1, (0, 0, 2, 3, 4), (0, 0, 2, 3, 4)),
        ([[0.0], [0.0], [0.0], [0.0], []], 0.1, (0, 0, 2, 2, 4), (0, 0, 2, 2, 4)),  # K = 1
        ([[0.0] * 9, [0.0] * 9], 0.1, (0, 0), (0, 0)),  # rows longer than the run
        ([[float("nan")], []], 0.1, (0, 1), (0, 1)),
    ],
)
def test_windows_are_the_longest_that_the_errors_allow(errors, threshold, strict, literal):
    assert search_windows(errors, threshold, "strict") == strict
    assert search_windows(errors, threshold, "literal") == literal


def test_max_window_limits_the_windows():
    table = {kind: drift([0.0] * 8) for kind in ("attn", "cross")}
    policy, _ = begin(UniCP(max_window=2, profile=profile(table)), run_info(depth=1))
    assert policy.sources[0, "attn"] == (0, 0, 0, 3, 3, 3, 6, 6)
    policy, _ = begin(UniCP(profile=profile(table)), run_info(depth=1))
    assert policy.sources[0, "attn"] == (0, 0, 0, 0, 0, 0, 0, 7)


@pytest.mark.parametrize(
    "losses, width",
    [([0.01, 0.02, 0.03], 20), ([0.01, 0.02, 0.05], 24), ([0.06, 0.0, 0.0], 32), ([0.01, 0.09, 0.01], 28)],
)
def test_slicing_stops_at_the_first_width_that_costs_too_much(losses, width):
    assert narrowest(losses, (28, 24, 20), 32, 0.05) == width


def test_a_block_takes_the_fewest_removed_of_its_steps():
    assert block_width([[0.0, 0.0, 0.0], [0.0, 0.0, 0.9]], (28, 24, 20), 32, 0.05) == 24
    assert block_width([[0.0, 0.0, 0.0], [0.9, 0.9, 0.9]], (28, 24, 20), 32, 0.05) == 32


@pytest.mark.parametrize(
    "wanted, given",
    [
        ((32, 32), (32, 32)),
        ((20, 24, 20), (20, 24, 20)),
        ((20, 20, 24, 28, 28), (20, 20, 28, 28, 28)),  # 24 gives way to the wider 28
        ((20, 24, 24, 24, 28), (20, 24, 24, 24, 32)),  # cheaper than two that widen
    ],
)
def test_a_run_has_at_most_two_slice_widths_and_none_is_narrower_than_wanted(wanted, given):
    assert at_most(wanted, 32) == given


@pytest.mark.parametrize("tokens, widths", [(80, {}), (120, {0: 20}), (400, {0: 20}), (449, {0: 20})])
def test_slices_that_save_nothing_are_not_taken(tokens, widths):
    """Narrower scores save tokens * (32 - n) per token and head, and turning q and k costs 2 * 32 * n."""
    assert [saves(n, 32, tokens) for n in (28, 24, 20)] == [tokens > 448, tokens > 192, tokens > 106]
    table = {kind: drift([0.5] * 8) for kind in ("attn", "cross")}
    policy, _ = begin(UniCP(profile=profile(table, tokens=tokens)), run_info(depth=1))
    assert policy.widths == widths
    losses = [[[0.01, 0.02, 0.9]]] * 8  # 20 costs too much, and of the wider ones only some are worth it
    policy, _ = begin(UniCP(profile=profile(table, losses, tokens=tokens)), run_info(depth=1))
    assert policy.widths == ({0: 24} if tokens > 192 else {})


@pytest.mark.parametrize("ratio, width", [(0.1, 28), (0.25, 24), (0.4, 20), (0.9, 20)])
def test_a_ratio_takes_the_nearest_width(ratio, width):
    assert nearest_width((28, 24, 20), 32, ratio) == width


def test_thresholds_have_the_papers_names():
    assert [threshold_value(f"E{n}") for n in range(1, 6)] == [0.025, 0.05, 0.075, 0.125, 0.175]
    assert threshold_value(0.3) == 0.3


def test_slices_are_judged_at_the_steps_that_run_alone():
    """The loss at step 1 is too high, but step 1 reuses step 0."""
    table = {kind: drift([0.03] * 8) for kind in ("attn", "cross")}
    losses = [[[0.9] * 3 if i == 1 else [0.0] * 3] for i in range(8)]
    policy, _ = begin(UniCP(profile=profile(table, losses)), run_info(depth=1))
    assert policy.sources[0, "attn"][1] == 0 and policy.widths == {0: 20}
    policy, _ = begin(UniCP(reuse=False, profile=profile(table, losses)), run_info(depth=1))
    assert policy.widths == {}


def test_a_ratio_slices_every_block_whatever_it_costs():
    table = {kind: drift([0.5] * 8) for kind in ("attn", "cross")}
    losses = [[[0.9] * 3] for _ in range(8)]
    policy, steps = begin(UniCP(reuse=False, ratio=0.25, profile=profile(table, losses)), run_info(depth=1))
    assert [policy.plan(step).subs for step in steps] == [(((0, "attn"), Slice(24)),)] * 8


def test_the_ramp_lowers_the_threshold_of_early_blocks():
    table = {kind: drift([0.04] * 8, [0.04] * 8) for kind in ("attn", "cross")}
    policy, _ = begin(UniCP(ramp=True, slice=False, profile=profile(table)))
    assert policy.sources[0, "attn"] == tuple(range(8)) and policy.sources[1, "attn"] == (
        0,
        0,
        2,
        2,
        4,
        4,
        6,
        6,
    )


def simple() -> UniCP:
    """Block 0: attention in windows of 4 steps, sliced where it runs; block 1 runs always, in full."""
    attn = [[[0.015 * k for k in range(1, 7)][: 7 - i], [0.9] * 6] for i in range(8)]
    cross = drift([0.9] * 8, [0.9] * 8)
    losses = [[[0.0] * 3, [0.9] * 3] for _ in range(8)]
    return UniCP(profile=profile({"attn": attn, "cross": cross}, losses))


def follow(policy: UniCP, steps, outer: dict[int, Plan]) -> list[Plan]:
    """The refined plan of every step; steps not in `outer` run everything."""
    plans = []
    for step in steps:
        plans.append(policy.refine(step, outer.get(step.i, RUN_ALL)))
        policy.tell(step, {})
    return plans


ATTN = (0, "attn")
RUN_SLICED, REUSED, SKIPPED = ((ATTN, Slice(20)),), ((ATTN, REUSE),), Plan(output=REUSE)


def test_the_map_alone_runs_keeps_and_reuses():
    policy = simple()
    assert [need.site for need in policy.reset(run_info())] == [sub(*ATTN)]
    plans = follow(policy, run_info().steps, {})
    assert [plan.subs for plan in plans] == [RUN_SLICED, REUSED, REUSED, REUSED] * 2
    assert [bool(plan.keep) for plan in plans] == [True, False, False, False] * 2
    assert plans[0].keep == (sub(*ATTN),)


def test_labels_say_what_a_step_does():
    policy, steps = begin(simple())
    labels = []
    for step in steps:
        labels.append(policy.plan(step).label)
        policy.tell(step, {})
    assert labels == ["slice", "reuse", "reuse", "reuse"] * 2


def test_a_skipped_source_is_made_up_for_by_the_next_step_that_runs():
    policy, steps = begin(simple())
    plans = follow(policy, steps, {4: SKIPPED, 5: SKIPPED})
    assert [plan.subs for plan in plans[4:]] == [
        (),
        (),
        (),
        REUSED,
    ]  # 6 runs in full: no slice was judged there
    assert plans[6].keep == (sub(*ATTN),) and not plans[5].keep


def test_a_step_skipped_inside_a_window_changes_nothing():
    policy, steps = begin(simple())
    assert follow(policy, steps, {1: SKIPPED})[2].subs == REUSED


def test_a_branch_without_the_source_makes_both_run():
    policy, steps = begin(simple())
    alone = Plan(branches=("cond",), fill=REUSE)
    plans = follow(policy, steps, {4: alone, 5: alone})
    assert [plan.subs for plan in plans[4:]] == [RUN_SLICED, REUSED, (), REUSED]
    assert plans[6].keep == (sub(*ATTN),)


def test_a_block_that_the_outer_plan_does_not_run_is_left_alone():
    policy, steps = begin(simple())
    late = Plan(path=(Load(h(1)), Run(1)))
    plans = follow(policy, steps, {4: late, 5: RUN_ALL})
    assert plans[4].subs == () and plans[5].subs == () and plans[5].keep == (sub(*ATTN),)


def test_an_operation_of_the_outer_plan_stands():
    policy, steps = begin(simple())
    taken = Plan(subs=((ATTN, Slice(28)),), keep=(h(1),), label="mine")
    assert policy.refine(steps[0], taken) == taken


def test_refining_twice_is_refining_once():
    """After a gate the plan is refined again; only tell() makes it history."""
    policy, steps = begin(simple())
    first = policy.refine(steps[0], RUN_ALL)
    assert policy.refine(steps[0], RUN_ALL) == first
    assert policy.refine(steps[0], SKIPPED).subs == ()
    policy.tell(steps[0], {})
    assert policy.refine(steps[1], RUN_ALL).subs == ()  # the skipped plan was the last: nothing is stored


@pytest.mark.parametrize(
    "options, said",
    [
        ({"profile": None}, "make one with python -m minidit profile --cache unicp"),
        ({"maps": True}, "wan has attn, cross, mlp; use maps=off"),
        ({"kinds": ("attn", "temporal")}, "blocks have attn, cross, mlp"),
        ({"kinds": ("mlp",)}, "knows attn, cross, not 'mlp'"),
        ({"basis": "pca"}, "basis is two-sided"),
        ({"max_window": 9}, "goes up to 6"),
        (
            {"profile": profile({"attn": drift([0.1] * 8), "cross": drift([0.1] * 8)}, depth=3)},
            "and 3 blocks",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_refused_before_step_0(options, said):
    table = {kind: drift([0.1] * 8, [0.1] * 8) for kind in ("attn", "cross")}
    with pytest.raises(ValueError, match=said):
        UniCP(**({"profile": profile(table)} | options)).reset(run_info())


@pytest.mark.parametrize(
    "options",
    [
        {"window": "loose"},
        {"basis": "svd"},
        {"threshold": "E6"},
        {"threshold": -1.0},
        {"slice": False, "reuse": False},
        {"slice": False, "ratio": 0.2},
        {"ratio": 1.5},
        {"max_window": 0},
    ],
    ids=str,
)
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValueError, match="unicp: "):
        UniCP(**options)


def test_the_policy_equals_the_hand_unrolled_run():
    forward, noise = embedded_run()
    policy, bases = UniCP(profile=mixed_profile()), random_bases()
    got = sample(forward, noise, policy, bases)
    assert set(policy.widths.values()) == {26}
    served = {key for key, sources in policy.sources.items() if len(set(sources)) < STEPS}
    assert len(served) > 8 and len({sources for sources in policy.sources.values()}) > 8
    by_hand = UnrolledRun(forward.model, forward.context, policy.sources, policy.widths, bases)
    want = by_hand.latents(make_schedule(ScheduleConfig("unipc"), STEPS), noise, 4.0, ["full"] * STEPS)
    assert rel(got, want) < 1e-6  # the same fp32 operations, so what remains is a different order of a few
    assert rel(got, sample(forward, noise, NoCache())) > 1e-3  # and it does act


def test_batched_guidance_gives_the_same_plans():
    noise, runs = embedded_run()[1], []
    for is_batched in (False, True):
        policy = UniCP(profile=mixed_profile())
        runs.append(sample(embedded_run(is_batched)[0], noise, policy, random_bases()))
    assert rel(*runs) < 1e-4  # matrix products of two rows round differently


def test_a_map_that_never_acts_changes_no_bit():
    forward, noise = embedded_run()
    policy = UniCP(threshold=1e-9, profile=mixed_profile())
    assert torch.equal(sample(forward, noise, policy), sample(forward, noise, NoCache()))


def test_an_aborted_run_leaves_nothing_behind():
    forward, noise = embedded_run()
    policy, bases = UniCP(profile=mixed_profile()), random_bases()
    want = sample(forward, noise, policy, bases)
    policy.reset(run_info(depth=8))
    for step in run_info(depth=8).steps[:5]:
        policy.plan(step)
        policy.tell(step, {})
    assert torch.equal(sample(forward, noise, policy, bases), want)


def test_one_branch_is_enough():
    forward, noise = embedded_run()
    context = forward.context.select(("cond",))
    alone = replace(forward, context=context)
    schedule = make_schedule(ScheduleConfig("euler"), STEPS)
    policy = UniCP(profile=mixed_profile())
    run = denoise(alone, schedule, noise, policy, guidance_scale=1.0, constants=random_bases())
    assert any(plan.subs and REUSE in dict(plan.subs).values() for plan in (r.plan for r in run.records))
