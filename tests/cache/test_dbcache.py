"""FBCache and DBCache: the gate, what is compared with what, and against a run by hand."""

from dataclasses import replace

import pytest

from minidit.cache.plan import Add, Gate, Measure, Plan, Run, residual
from minidit.cache.policies.dbcache import DBCache, FBCache
from tests.cache.reference_rivals import unrolled
from tests.cache.test_matrix import GUIDANCE, STEPS, sequential_wan, small


class Steps:
    """Asks a policy for its plans, and answers its gates from a list."""

    def __init__(self, policy, values: list[float]):
        self.policy, self.values = policy, values
        policy.reset(small("wan").info())

    def labels(self) -> list[str]:
        found = []
        for step, value in zip(small("wan").info().steps, self.values, strict=False):
            plan = self.policy.plan(step)
            found.append(self.policy.decide(step, plan, value).label if plan.gate else plan.label)
            self.policy.tell(step, {})
        return found


def test_the_gate_stands_behind_the_first_blocks():
    policy = DBCache(front=2, back=1, warmup=0)
    policy.reset(small("wan").info())
    step = small("wan").info().steps[1]
    plan = policy.plan(step)
    assert plan == Plan(path=(Run(0, 2), Run(2)), gate=Gate(0, Measure(residual(0, 2))))
    hit = policy.decide(step, plan, 0.01)
    assert hit.path == (Run(0, 2), Add(residual(2, 5)), Run(5)) and hit.keep == ()
    miss = policy.decide(step, plan, 0.5)
    assert miss.path == plan.path and miss.keep == (residual(0, 2), residual(2, 5))


def test_warm_up_steps_run_in_full():
    assert Steps(DBCache(warmup=3), [0.0] * 6).labels() == ["full"] * 3 + ["hit"] * 3
    assert Steps(FBCache(warmup=0), [0.0] * 3).labels() == ["full", "hit", "hit"]


def test_no_more_steps_in_a_row_are_cached_than_allowed():
    policy = FBCache(max_continuous=2)
    assert Steps(policy, [0.0] * 8).labels() == ["full", "hit", "hit", "full", "hit", "hit", "full", "hit"]


@pytest.mark.parametrize("value, label", [(0.0599, "hit"), (0.06, "full"), (float("nan"), "full")])
def test_a_step_is_cached_below_the_threshold(value, label):
    assert Steps(FBCache(), [1.0, value]).labels() == ["full", label]


def test_the_signal_is_kept_of_the_branch_that_decides_alone():
    signal, middle = DBCache(front=2, warmup=0).reset(small("wan").info())
    assert (signal.site, signal.branches) == (residual(0, 2), ("cond",))
    assert (middle.site, middle.branches) == (residual(2, 6), ())


def test_first_block_cache_is_one_block_in_front_and_none_behind():
    first, dual = FBCache(), DBCache(threshold=0.06, front=1, back=0, warmup=1)
    run = small("wan").info()
    assert first.reset(run) == dual.reset(run) and first.ask == dual.ask and first.hit == dual.hit


@pytest.mark.parametrize("depth, front", [(40, 8), (28, 7), (8, 2), (3, 1)])
def test_the_front_is_eight_blocks_or_a_quarter(depth, front):
    policy = DBCache(warmup=0)
    policy.reset(replace(small("wan").info(), depth=depth))
    assert policy.ask.gate.measure.site == residual(0, front)


@pytest.mark.parametrize("back", [0, 2])
def test_it_equals_a_run_by_hand(back):
    """The signal is compared with that of the last computed step, not of the step before."""
    threshold, end = 0.4, 6 - back
    signals, middles, hits, is_hit = {}, {}, [], False

    def walk(i, branch, h, blocks):
        nonlocal is_hit
        start = blocks(h, 0, 2)
        new = start - h
        if branch == "cond":  # it decides for both
            old = signals.get("cond")
            is_hit = i > 0 and ((new - old).abs().sum() / old.abs().sum()).item() < threshold
            hits.append(is_hit)
        if is_hit:
            return blocks(start + middles[branch], end, 6)
        signals[branch] = new
        behind = blocks(start, 2, end)
        middles[branch] = behind - start
        return blocks(behind, end, 6)

    run = sequential_wan()
    policy = DBCache(threshold=threshold, front=2, back=back, warmup=0)
    outcome = run.run(policy)
    want = unrolled(run.forward, run.schedules(STEPS), run.noise, GUIDANCE, walk)
    labels = ["hit" if is_hit else "full" for is_hit in hits]
    assert [record.plan.label for record in outcome.records] == labels
    assert labels.count("full") > 2 and "hit" in labels  # else this test would see nothing
    assert ((outcome.latents - want).abs().max() / want.abs().max()).item() < 1e-6


@pytest.mark.parametrize(
    "options, said",
    [
        ({"front": 4, "back": 2, "warmup": 0}, "front=4 and back=2 leave none of 6 blocks"),
        ({"warmup": 10}, "warmup=10 is all of 10 steps"),
    ],
)
def test_what_cannot_act_is_refused(options, said):
    with pytest.raises(ValueError, match=f"^dbcache: {said}"):
        DBCache(**options).reset(small("wan").info())


def test_first_block_cache_is_refused_by_its_own_name():
    with pytest.raises(ValueError, match="^fbcache: warmup=1 is all of 1 steps"):
        FBCache().reset(small("wan").info(1))
    with pytest.raises(ValueError, match="^fbcache: threshold=0"):
        FBCache(threshold=0.0)
