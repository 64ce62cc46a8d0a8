"""FORA: every sub-module, every N-th step, and against a run by hand."""

import pytest

from minidit.cache.plan import REUSE, sub
from minidit.cache.policies.fora import FORA
from tests.cache.reference_unicp import UnrolledRun
from tests.cache.test_matrix import GUIDANCE, STEPS, sequential_wan, small


def test_fora_recomputes_every_nth_step():
    policy, run = FORA(interval=4), small("latte").info()
    needs = policy.reset(run)
    keys = [(block, name) for block in range(4) for name in ("attn", "cross", "mlp", "t_attn", "t_mlp")]
    assert [need.site for need in needs] == [sub(*key) for key in keys]
    plans = [policy.plan(step) for step in run.steps]
    assert [i for i, plan in enumerate(plans) if not plan.subs] == [0, 4, 8]
    assert dict(plans[1].subs) == dict.fromkeys(keys, REUSE) and not plans[1].keep


def test_only_the_named_sub_modules_are_reused():
    policy, run = FORA(kinds=("attn",)), small("wan").info()
    policy.reset(run)
    assert policy.plan(run.steps[1]).subs == tuple(((block, "attn"), REUSE) for block in range(6))


def test_it_equals_a_run_by_hand():
    run = sequential_wan()
    sources = tuple(i - i % 3 for i in range(STEPS))
    keys = [(block, name) for block in range(6) for name in ("attn", "cross")]
    by_hand = UnrolledRun(run.forward.model, run.forward.context, dict.fromkeys(keys, sources))
    want = by_hand.latents(run.schedules(STEPS), run.noise, GUIDANCE, ["full"] * STEPS)
    got = run.run(FORA(kinds=("attn", "cross"))).latents
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5


def test_all_of_a_models_blocks_are_skipped():
    run = small("open_sora")
    ran, full = run.macs(run.run(FORA(interval=5)))
    assert full / ran == 5.0


@pytest.mark.parametrize(
    "options, steps, said",
    [
        (
            {"kinds": ("attn", "t_attn")},
            STEPS,
            "kinds has 't_attn'; this model's blocks have attn, cross, mlp",
        ),
        ({}, 1, "a run of one step has nothing to reuse"),
    ],
)
def test_what_cannot_act_is_refused(options, steps, said):
    with pytest.raises(ValueError, match=f"^fora: {said}"):
        FORA(**options).reset(small("wan").info(steps))


def test_an_interval_of_one_is_refused():
    with pytest.raises(ValueError, match="^fora: interval=1 recomputes every step"):
        FORA(interval=1)
