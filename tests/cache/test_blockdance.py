"""BlockDance: where it resumes, when, and against a run by hand."""

import pytest

from minidit.cache.plan import Load, Run, RunInfo, h
from minidit.cache.policies.blockdance import BlockDance, full_steps, resume_at
from tests.cache.reference_rivals import unrolled
from tests.cache.test_matrix import GUIDANCE, STEPS, sequential_wan, small


@pytest.mark.parametrize("depth, first", [(28, 21), (40, 30), (30, 22), (60, 45), (8, 6), (4, 3)])
def test_the_published_block_scales_with_depth(depth, first):
    assert resume_at(depth) == first


@pytest.mark.parametrize(
    "n, start, stop, group, full",
    [
        (10, 0.4, 0.9, 2, [0, 1, 2, 3, 4, 6, 8, 9]),
        (10, 0.4, 1.0, 4, [0, 1, 2, 3, 4, 8]),
        (10, 0.0, 1.0, 3, [0, 3, 6, 9]),
        (5, 0.9, 0.95, 2, [0, 1, 2, 3, 4]),
    ],
)
def test_groups_lie_between_start_and_stop(n, start, stop, group, full):
    assert [i for i, is_full in enumerate(full_steps(n, start, stop, group)) if is_full] == full


def test_a_group_resumes_behind_the_block_that_its_first_step_has_stored():
    policy, run = BlockDance(block=3), small("wan").info()
    (need,) = policy.reset(run)
    plans = [policy.plan(step) for step in run.steps]
    assert need.site == h(4) and plans[4].keep == (h(4),) and plans[5].path == (Load(h(4)), Run(4))


def test_it_equals_a_run_by_hand():
    stored, full = {}, full_steps(STEPS, 0.3, 1.0, 3)

    def walk(i, branch, h, blocks):
        if full[i]:
            stored[branch] = blocks(h, 0, 3)
        return blocks(stored[branch], 3, 6)

    run = sequential_wan()
    got = run.run(BlockDance(group=3, start=0.3, stop=1.0, block=2)).latents
    want = unrolled(run.forward, run.schedules(STEPS), run.noise, GUIDANCE, walk)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-6


@pytest.mark.parametrize(
    "depth, model, options, said",
    [
        (28, "open-sora-1.2", {}, "published for open-sora-1.2"),
        (40, "wan2.1-t2v-14b", {}, "scaled from 28 blocks"),
        (40, "wan2.1-t2v-14b", {"block": 20}, "typed"),
    ],
)
def test_it_says_where_its_block_is_from(depth, model, options, said):
    run, policy = small("wan").info(), BlockDance(**options)
    policy.reset(RunInfo(run.steps, depth, run.subs, run.branches, "wan", model=model))
    assert policy.constants == said


@pytest.mark.parametrize(
    "options, steps, said",
    [
        (BlockDance.variants["mixcache"], STEPS, "block=20 is none of 0 .. 4 of this model"),
        ({"block": 5}, STEPS, "block=5 is none of 0 .. 4"),
        ({"group": 9}, 2, "none of 2 steps follows a full one"),
        ({"start": 0.8, "stop": 0.85}, STEPS, "none of 10 steps follows a full one"),
    ],
)
def test_what_cannot_act_is_refused(options, steps, said):
    with pytest.raises(ValueError, match=f"blockdance: {said}"):
        BlockDance(**options).reset(small("wan").info(steps))


@pytest.mark.parametrize("options", [{"group": 1}, {"start": 0.9, "stop": 0.5}, {"stop": 1.5}], ids=str)
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValueError, match="blockdance: group="):
        BlockDance(**options)
