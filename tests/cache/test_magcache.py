"""MagCache: the accumulated error by hand, whose ratios are taken, and what it refuses."""

from dataclasses import replace

import pytest

from minidit.cache.plan import Add, Need, residual
from minidit.cache.policies.magcache import MagCache, error, nearest_table, skipped_steps
from minidit.cache.policies.magcache_ratios import RATIOS
from tests.cache.reference_rivals import unrolled
from tests.cache.test_matrix import GUIDANCE, STEPS, sequential_wan, small

RATIO = {"cond": [1.0] + [0.9] * (STEPS - 1), "uncond": [1.0] + [0.9] * (STEPS - 1)}


def of_profile(ratios: dict = RATIO, **options) -> MagCache:
    return MagCache(profile={"magcache": {"ratios": ratios}}, **options)


def steps(skips) -> list[int]:
    return [i for i, skipped in enumerate(skips) if skipped]


def test_an_errors_sign_counts_only_where_the_authors_let_it():
    assert error(0.9, False) == pytest.approx(0.1) and error(1.1, False) == pytest.approx(0.1)
    assert error(1.1, True) == pytest.approx(-0.1)


@pytest.mark.parametrize(
    "threshold, max_skip, first, skipped",
    [
        # products of 0.9: 0.9, 0.81, 0.729; errors 0.1, then 0.1 + 0.19, then 0.1 + 0.19 + 0.271
        (0.05, 9, 2, []),
        (0.2, 9, 2, [2, 4, 6, 8]),
        (0.3, 9, 2, [2, 3, 5, 6, 8, 9]),
        (0.6, 9, 2, [2, 3, 4, 6, 7, 8]),
        (0.6, 1, 2, [2, 4, 6, 8]),
        (0.6, 9, 7, [7, 8, 9]),
        (0.6, 9, 0, [1, 2, 3, 5, 6, 7, 9]),  # the first step has nothing to take from
    ],
)
def test_errors_accumulate_until_a_step_is_computed(threshold, max_skip, first, skipped):
    assert steps(skipped_steps([RATIO["cond"]], first, threshold, max_skip)) == skipped


def test_a_step_is_skipped_where_both_branches_would():
    jumpy = [1.0] + [0.9, 0.5] * 5
    alone = [steps(skipped_steps([r[:10]], 2, 0.3, 9)) for r in (RATIO["cond"], jumpy)]
    assert alone == [[2, 3, 5, 6, 8, 9], [3, 5, 7, 9]]
    assert steps(skipped_steps([RATIO["cond"], jumpy[:10]], 2, 0.3, 9)) == [3, 5, 7, 9]


@pytest.mark.parametrize("is_inclusive, skipped", [(True, [2, 4]), (False, [])])
def test_an_error_at_the_threshold_is_skipped_where_the_authors_do(is_inclusive, skipped):
    ratios = [1.0, 1.0, 0.75, 0.75, 0.75]  # exact in binary
    assert steps(skipped_steps([ratios], 2, 0.25, 9, is_inclusive=is_inclusive)) == skipped


def test_a_skipped_step_adds_the_residual_of_all_blocks():
    policy, run = of_profile(threshold=0.3), small("wan").info()
    assert policy.reset(run) == (Need(residual(0, 6)),)
    plans = [policy.plan(step) for step in run.steps]
    assert [plan.label for plan in plans] == ["full", "full", "skip", "skip", "full"] + [
        "skip",
        "skip",
        "full",
    ] + [
        "skip",
        "skip",
    ]
    assert plans[0].keep == (residual(0, 6),) and plans[2].path == (Add(residual(0, 6)),)


def test_it_equals_a_run_by_hand():
    stored, skipped = {}, (2, 3, 5, 6, 8, 9)

    def walk(i, branch, h, blocks):
        if i in skipped:
            return h + stored[branch]
        end = blocks(h, 0, 6)
        stored[branch] = end - h
        return end

    run = sequential_wan()
    got = run.run(of_profile(threshold=0.3)).latents
    want = unrolled(run.forward, run.schedules(STEPS), run.noise, GUIDANCE, walk)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-6


def test_a_profile_comes_before_a_published_table_and_a_typed_table_before_both():
    run = replace(small("wan").info(), model="wan2.1-t2v-14b")
    said = {}
    for name, policy in (
        ("profile", of_profile()),
        ("published", MagCache()),
        ("typed", of_profile(table="wan2.1-t2v-1.3b")),
    ):
        policy.reset(run)
        said[name] = policy.constants
    assert said == {
        "profile": "profile",
        "published": "published for wan2.1-t2v-14b at 50 steps",
        "typed": "typed: wan2.1-t2v-1.3b at 50 steps",
    }


@pytest.mark.parametrize(
    "model, tokens, table",
    [
        ("", 0, ""),
        ("cogvideox-2b", 17550, ""),
        ("wan2.1-t2v-14b", 75600, "wan2.1-t2v-14b"),
        ("hunyuan-video", 118800, "hunyuan-video"),
        ("hunyuan-video", 67320, "hunyuan-video-544p"),
        ("hunyuan-video", 1000, "hunyuan-video-544p"),
    ],
)
def test_of_two_sizes_the_nearer_table_is_taken(model, tokens, table):
    assert nearest_table(replace(small("wan").info(), model=model, tokens=tokens)) == table


def test_tables_have_a_ratio_for_every_step_and_begin_with_one():
    for name, table in RATIOS.items():
        assert len(table.cond) == (30 if "sora" in name else 40 if "i2v" in name else 50)
        assert table.cond[0] == 1 and (not table.uncond or len(table.uncond) == len(table.cond))
        assert all(0.7 < ratio < 1.3 for ratio in table.cond + table.uncond)


@pytest.mark.parametrize(
    "policy, family, said",
    [
        (MagCache(), "wan", "no ratios are published for this model, and it has no profile; make one with"),
        (
            MagCache(table="hunyuan-video"),
            "wan",
            "table=hunyuan-video is of hunyuan_video, this model of wan",
        ),
        (
            of_profile({"cond": RATIO["cond"]}),
            "wan",
            r"its ratios \(profile\) are of runs with no uncond branch",
        ),
        (of_profile(threshold=0.01), "wan", "threshold=0.01 skips none of 10 steps"),
        (of_profile(retention=0.95, threshold=0.01), "wan", "threshold=0.01 skips none of 10 steps"),
    ],
)
def test_what_cannot_act_is_refused(policy, family, said):
    with pytest.raises(ValueError, match=f"^magcache: {said}"):
        policy.reset(small(family).info())


def test_a_second_branch_that_was_not_measured_is_refused():
    run = replace(small("hunyuan_video").info(), model="hunyuan-video", branches=("cond", "uncond"))
    with pytest.raises(ValueError, match=r"its ratios \(published .*\) are of runs with no uncond"):
        MagCache().reset(run)


@pytest.mark.parametrize("options", [{"table": "wan3"}, {"retention": 1.0}, {"max_skip": 0}], ids=str)
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValueError, match="magcache: "):
        MagCache(**options)
