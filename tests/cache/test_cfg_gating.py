"""CFG gating: when uncond is left out, and what takes its place."""

from dataclasses import replace

import pytest
import torch

from minidit.cache.plan import CFG_DELTA, Mix, Plan
from minidit.cache.policies.cfg_gating import CFGGating
from minidit.sampling import guide
from tests.cache.test_matrix import GUIDANCE, STEPS, sequential_wan, small


def full_steps(**options) -> list[int]:
    policy, run = CFGGating(**options), small("wan").info()
    policy.reset(run)
    return [step.i for step in run.steps if not policy.plan(step).branches]


@pytest.mark.parametrize(
    "options, full",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"start": 0.8}, list(range(8))),
        ({"start": 0.0}, [0]),  # a difference has to be known
        ({"start": 0.3, "every": 3}, [0, 1, 2, 5, 8]),
    ],
)
def test_both_branches_run_up_to_the_start_and_every_so_often_after_it(options, full):
    assert full_steps(**options) == full


def test_cond_runs_alone_and_uncond_is_filled():
    policy, run = CFGGating(gain=0.5), small("wan").info()
    policy.reset(run)
    assert policy.plan(run.steps[0]) == Plan(keep=(CFG_DELTA,))
    assert policy.plan(run.steps[5]) == Plan(branches=("cond",), fill=Mix((0.5,)), label="cfg")


@pytest.mark.parametrize("gain", [0.0, 1.0])
@torch.inference_mode()
def test_it_equals_a_run_by_hand(gain):
    run = sequential_wan()
    forward, schedule = run.forward, run.schedules(STEPS)
    x, state, delta = run.noise, schedule.start(), None
    for step in schedule.steps(GUIDANCE):
        t = torch.tensor([step.t])
        predict = lambda branch, x=x, t=t: forward.model(x, t, forward.context.select((branch,)))
        cond = predict("cond")
        if step.i < 5:
            delta = predict("uncond") - cond
        uncond = cond + (1.0 if step.i < 5 else gain) * delta
        guided = cond if step.i >= 5 and gain == 0 else guide({"cond": cond, "uncond": uncond}, GUIDANCE)
        x, state = schedule.step(step.i, x, guided, state)
    got = run.run(CFGGating(gain=gain)).latents
    assert ((got - x).abs().max() / x.abs().max()).item() < 1e-5  # cond + (uncond - cond) rounds


def test_one_branch_is_refused():
    with pytest.raises(ValueError, match="^cfg-gating: this run has one guidance branch"):
        CFGGating().reset(small("hunyuan_video").info())


def test_branches_with_ranks_of_their_own_are_refused():
    with pytest.raises(ValueError, match="^cfg-gating: each branch has ranks of its own"):
        CFGGating().reset(replace(small("wan").info(), cfg_ranks=2))


def test_a_start_at_the_end_is_refused():
    with pytest.raises(ValueError, match="^cfg-gating: start=0.99 is the end of 10 steps"):
        CFGGating(start=0.99).reset(small("wan").info())


@pytest.mark.parametrize("options", [{"start": 1.0}, {"start": -0.1}, {"every": 1}], ids=str)
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValueError, match="^cfg-gating: start="):
        CFGGating(**options)
