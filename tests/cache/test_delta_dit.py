"""Delta-DiT: which blocks are skipped when, and the right sign of what stands in for them."""

import pytest
import torch

from minidit.cache.plan import Add, Run, residual
from minidit.cache.policies.delta_dit import DeltaDiT
from tests.cache.reference_rivals import unrolled
from tests.cache.test_matrix import GUIDANCE, STEPS, sequential_wan, small


def test_rear_blocks_are_skipped_early_and_front_blocks_later():
    policy, run = DeltaDiT(share=0.5, boundary=0.6), small("wan").info()
    policy.reset(run)
    early = (Run(0, 3), Add(residual(3, 6)))
    late = (Add(residual(0, 3)), Run(3))
    paths = [policy.plan(step).path for step in run.steps]
    assert paths == [(Run(),), early] * 3 + [(Run(),), late] * 2


def test_full_steps_are_counted_anew_from_the_boundary():
    """Its step would else want a front residual that none has stored; two full ones in a row save less."""
    policy, run = DeltaDiT(boundary=0.5), small("wan").info()
    policy.reset(run)
    labels = [policy.plan(step).label for step in run.steps]
    assert labels == ["full", "rear", "full", "rear", "full", "full", "front", "full", "front", "full"]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_residual_is_end_minus_start(sign):
    """By hand; with start minus end, as a known re-implementation has it, another video comes out."""
    stored = {}

    def walk(i, branch, h, blocks):
        first, last = (3, 6) if i < 6 else (0, 3)
        start = blocks(h, 0, first)
        if i % 2 == 0:
            end = blocks(start, first, last)
            stored[branch] = end - start
        else:
            end = start + sign * stored[branch]
        return blocks(end, last, 6)

    run = sequential_wan()
    got = run.run(DeltaDiT(share=0.5)).latents
    want = unrolled(run.forward, run.schedules(STEPS), run.noise, GUIDANCE, walk)
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error < 1e-6 if sign == 1 else error > 0.1


def test_the_published_speed_follows_from_the_defaults():
    """Every second step three quarters of the blocks: 1.6 times fewer multiply-adds, as reported."""
    run = small("latte")  # 4 blocks
    ran, full = run.macs(run.run(DeltaDiT()))
    assert full / ran == pytest.approx(1.6, rel=1e-9)


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_no_block_to_skip_or_to_run_is_refused(share):
    with pytest.raises(ValueError, match="delta-dit: nothing to skip: . of 6 blocks"):
        DeltaDiT(share=share).reset(small("wan").info())


def test_a_run_of_one_step_is_refused():
    with pytest.raises(ValueError, match="delta-dit: nothing to skip: .* 1 steps"):
        DeltaDiT().reset(small("wan").info(1))


@pytest.mark.parametrize("options", [{"interval": 1}, {"share": 1.0}, {"boundary": 1.5}], ids=str)
def test_options_without_sense_are_refused(options):
    with pytest.raises(ValueError, match="delta-dit: interval="):
        DeltaDiT(**options)


def test_latents_stay_finite_at_the_longest_interval():
    assert torch.isfinite(small("wan").run(DeltaDiT(interval=10)).latents).all()
