"""AB-Cache: the weights, the order of steps, and guidance that varies."""

import pytest

from minidit.cache.plan import GUIDED, PREDICTION, Load, Mix, Need, Plan
from minidit.cache.policies.abcache import ABCache, weights
from tests.cache.test_matrix import STEPS, small


@pytest.mark.parametrize("order, want", [(1, (1,)), (2, (2, -1)), (3, (3, -3, 1)), (4, (4, -6, 4, -1))])
def test_weights_are_the_signed_binomials(order, want):
    assert weights(order) == want


@pytest.mark.parametrize("order", [1, 2, 3])
def test_polynomials_of_lower_degree_are_continued_exactly(order):
    value = lambda i: 2.0 + i ** (order - 1)
    assert sum(w * value(5 - j) for j, w in enumerate(weights(order), 1)) == value(5)


def test_after_the_warm_up_every_sixth_step_runs():
    policy, run = ABCache(), small("wan").info(15)
    assert policy.reset(run) == (Need(GUIDED, 2),)
    plans = [policy.plan(step) for step in run.steps]
    assert [i for i, plan in enumerate(plans) if plan.keep] == [0, 1, 7, 13]
    assert plans[2] == Plan(output=Mix((2.0, -1.0)), label="step") == plans[14]
    assert plans[0] == plans[7] == Plan(keep=(GUIDED,))


def test_the_order_is_lower_while_fewer_predictions_are_known():
    policy, run = ABCache(order=3, warmup=1, interval=2), small("wan").info()
    policy.reset(run)
    orders = [len(plan.output.coefficients) for step in run.steps if (plan := policy.plan(step)).output]
    assert orders == [1, 2, 3, 3, 3]


def test_where_guidance_varies_each_branch_is_extrapolated_before_it():
    policy, run = ABCache(), small("cogvideox").info()
    assert len({step.guidance for step in run.steps}) > 1
    assert policy.reset(run) == (Need(PREDICTION, 2),)
    plan = policy.plan(run.steps[2])
    assert plan.path == (Load(PREDICTION, Mix((2.0, -1.0))),) and plan.output is None


def test_the_first_order_repeats_the_last_prediction():
    run = small("wan")
    outcome = run.run(ABCache(order=1, interval=2))
    assert {record.plan.output for record in outcome.records} == {None, Mix((1.0,))}


def test_a_run_that_is_all_warm_up_is_refused():
    with pytest.raises(ValueError, match="^abcache: warmup=10 leaves none of 10 steps"):
        ABCache(warmup=STEPS).reset(small("wan").info())


@pytest.mark.parametrize("options", [{"order": 0}, {"warmup": 0}, {"interval": 1}], ids=str)
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValueError, match="^abcache: order="):
        ABCache(**options)
