"""Pyramid Attention Broadcast: windows and ranges by table, state by branch, and against a run by hand."""

import pytest

from minidit.cache.plan import REUSE, RunInfo, sub
from minidit.cache.policies.pab import PAB, mlp_reuses, reuses
from minidit.schedules import Step
from tests.cache.reference_unicp import UnrolledRun
from tests.cache.test_matrix import BOTH, GUIDANCE, STEPS, sequential_wan

TIMES = (950.0, 800.0, 700.0, 500.0, 300.0, 100.0, 50.0)


def run_at(times: tuple[float, ...], subs=("attn", "cross", "mlp"), family="wan", depth=6) -> RunInfo:
    table = tuple(Step(i, len(times), t, t / 1000, 4.0) for i, t in enumerate(times))
    return RunInfo(table, depth, subs, BOTH, family)


@pytest.mark.parametrize(
    "every, reused",
    [(1, []), (2, [3]), (3, [2, 4]), (4, [2, 3]), (10, [2, 3, 4])],
)
def test_a_kind_is_reused_strictly_inside_its_window_between_multiples_of_its_range(every, reused):
    assert [i for i, r in enumerate(reuses(TIMES, every, (100, 800))) if r] == reused


@pytest.mark.parametrize(
    "listed, skip, reused",
    [
        ((500.0,), 2, [4, 5]),
        ((510.0,), 2, [4, 5]),  # of a timestep that is not visited, the nearest step
        ((700.0, 500.0), 2, [4, 5]),  # the second one runs, though the first would serve it
        ((50.0,), 2, []),  # nothing follows
        ((), 2, []),
    ],
)
def test_mlps_are_reused_after_the_steps_nearest_to_the_listed_timesteps(listed, skip, reused):
    assert [i for i, r in enumerate(mlp_reuses(TIMES, listed, skip)) if r] == reused


def test_an_output_is_kept_by_the_step_before_it_is_reused():
    policy, run = PAB(), run_at(TIMES)
    needs = policy.reset(run)
    plans = [policy.plan(step) for step in run.steps]
    assert {need.site for need in needs} == {sub(b, name) for b in range(6) for name in ("attn", "cross")}
    # attn: range 2, reused at step 3 alone; cross: range 6, reused at 2, 3 and 4
    assert [plan.label for plan in plans] == ["full", "full", "reuse", "reuse", "reuse", "full", "full"]
    assert set(plans[1].keep) == {sub(b, "cross") for b in range(6)}
    assert set(plans[2].keep) == {sub(b, "attn") for b in range(6)}
    assert dict(plans[3].subs) == {(b, name): REUSE for b in range(6) for name in ("attn", "cross")}
    assert plans[3].keep == ()


def test_mlps_are_reused_in_the_first_blocks_of_families_that_have_timesteps_for_them():
    subs = ("attn", "cross", "mlp", "t_attn", "t_cross", "t_mlp")
    policy = PAB()
    for depth, blocks in ((28, 5), (4, 1), (11, 2)):
        policy.reset(run_at((900.0, 864.0, 820.0, 800.0, 300.0), subs, "open_sora", depth))
        for name in ("mlp", "t_mlp"):
            assert [b for (b, n), _ in policy.plans[2].subs if n == name] == list(range(blocks))
    policy = PAB(mlp=False)
    policy.reset(run_at((900.0, 864.0, 820.0, 800.0, 300.0), subs, "open_sora"))
    assert not any(name.endswith("mlp") for plan in policy.plans for (_, name), _ in plan.subs)


def test_both_branches_run_to_their_own_outputs():
    """By hand, with outputs kept by branch; a state without branches lets uncond replay cond's attention."""
    run = sequential_wan()
    policy = PAB(window=(50.0, 990.0), cross=3)
    got = run.run(policy)
    sources = {}
    for key in [(block, name) for block in range(6) for name in ("attn", "cross")]:
        row: list[int] = []
        for i, record in enumerate(got.records):
            row.append(row[-1] if key in dict(record.plan.subs) else i)
        sources[key] = tuple(row)
    assert sources[0, "attn"] != sources[0, "cross"] and len(set(sources[0, "attn"])) < STEPS
    by_hand = UnrolledRun(run.forward.model, run.forward.context, sources)
    want = by_hand.latents(run.schedules(STEPS), run.noise, GUIDANCE, ["full"] * STEPS)
    assert ((got.latents - want).abs().max() / want.abs().max()).item() < 1e-5


@pytest.mark.parametrize(
    "options, family, said",
    [
        ({}, "latte", "published for latte"),
        ({}, "wan", "defaults"),
        ({"spatial": 3}, "latte", "typed"),
        ({"window": (0.0, 900.0)}, "latte", "typed"),
    ],
)
def test_it_says_where_its_constants_are_from(options, family, said):
    policy = PAB(**options)
    policy.reset(run_at(TIMES, ("attn", "cross", "mlp", "t_attn", "t_mlp"), family))
    assert policy.constants == said


@pytest.mark.parametrize("options", [{"window": (960.0, 990.0)}, {"spatial": 1, "cross": 1}], ids=str)
def test_what_cannot_act_is_refused(options):
    with pytest.raises(ValueError, match="^pab: no step of 7 between timesteps .* reuses anything"):
        PAB(**options).reset(run_at(TIMES))


@pytest.mark.parametrize("options", [{"spatial": 0}, {"window": (100.0,)}], ids=str)
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValueError, match="^pab: "):
        PAB(**options)
