"""TaylorSeer: the weights of the polynomial, the order of steps, and against a run by hand."""

import pytest

from minidit.cache.plan import Add, Mix, Need, residual, sub
from minidit.cache.policies.taylorseer import TaylorSeer, weights
from tests.cache.reference_rivals import unrolled
from tests.cache.test_matrix import GUIDANCE, STEPS, sequential_wan, small


@pytest.mark.parametrize(
    "anchors, at, want",
    [
        ((9,), 11, (1,)),  # of one output: reuse
        ((5, 0), 7, (1.4, -0.4)),  # the line through both, two steps on
        ((9, 5, 2), 11, (1.625, -0.7917, 0.1667)),  # the published recursion by hand
        ((9, 5, 2), 9, (1, 0, 0)),
    ],
)
def test_weights_follow_the_recursion_of_differences(anchors, at, want):
    assert weights(anchors, at) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("order", [0, 1])
def test_polynomials_up_to_a_line_are_continued_exactly(order):
    values = lambda i: 3.0 - 2.0 * i**order
    anchors = (9, 4, 1)[: order + 1]
    assert sum(w * values(a) for w, a in zip(weights(anchors, 12), anchors, strict=True)) == values(12)


def test_the_weights_of_every_order_sum_to_one():
    for anchors in ((9, 5, 2), (12, 9, 6, 3), (5, 4)):
        assert sum(weights(anchors, 14)) == pytest.approx(1)


def test_every_sub_module_of_every_block_is_forecast():
    policy, run = TaylorSeer(interval=3, order=2), small("latte").info()
    needs = policy.reset(run)
    keys = [(block, name) for block in range(4) for name in run.subs]
    assert needs == tuple(Need(sub(*key), 3) for key in keys)
    full, first, *_ = plans = [policy.plan(step) for step in run.steps]
    assert full.keep == tuple(sub(*key) for key in keys)
    assert dict(first.subs) == dict.fromkeys(keys, Mix((1.0,)))  # one output is known so far
    assert dict(plans[4].subs)[0, "attn"].coefficients == pytest.approx((4 / 3, -1 / 3))
    assert len(dict(plans[7].subs)[0, "attn"].coefficients) == 3


def test_the_lite_form_keeps_one_tensor_and_its_predecessors():
    policy = TaylorSeer(interval=3, lite=True)
    assert policy.reset(small("wan").info()) == (Need(residual(0, 6), 2),)
    plan = policy.plan(small("wan").info().steps[5])
    assert plan.path[0].site == residual(0, 6) and isinstance(plan.path[0], Add)
    assert plan.path[0].mix.coefficients == pytest.approx((5 / 3, -2 / 3))


def test_the_lite_form_equals_a_run_by_hand():
    stored: dict[str, list] = {"cond": [], "uncond": []}  # (step, residual), newest first

    def walk(i, branch, h, blocks):
        known = stored[branch]
        if i % 3 == 0:
            known.insert(0, (i, blocks(h, 0, 6) - h))
        elif len(known) > 1:
            (now, new), (then, old) = known[:2]
            return h + new + (i - now) * (new - old) / (now - then)
        return h + known[0][1]

    run = sequential_wan()
    got = run.run(TaylorSeer(interval=3, lite=True)).latents
    want = unrolled(run.forward, run.schedules(STEPS), run.noise, GUIDANCE, walk)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5  # sums in another order


def test_a_forecast_step_runs_no_sub_module():
    run = small("open_sora")
    ran, full = run.macs(run.run(TaylorSeer(interval=5)))
    assert full / ran == 5.0


@pytest.mark.parametrize(
    "options, steps, said",
    [({"warmup": 10}, STEPS, "warmup=10 leaves none of 10 steps"), ({}, 1, "leaves none of 1 steps")],
)
def test_what_cannot_act_is_refused(options, steps, said):
    with pytest.raises(ValueError, match=f"taylorseer: .*{said}"):
        TaylorSeer(**options).reset(small("wan").info(steps))


@pytest.mark.parametrize(
    "options", [{"interval": 1}, {"order": -1}, {"warmup": 0}, {"warmup": 3, "first": 2}], ids=str
)
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValueError, match="taylorseer: interval="):
        TaylorSeer(**options)
