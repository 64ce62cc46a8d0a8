"""DDIM and SDE-DPM-Solver++ over CogVideoX's table of noise levels."""

import math

import pytest
import torch

from minidit.cache.policies.none import NoCache
from minidit.presets import ScheduleConfig
from minidit.sampling import Forward, denoise
from minidit.schedules import dynamic_guidance, make_table_schedule, x0_from_v, zero_snr_alphas
from tests.recordings.base import open_recording
from tests.recordings.cogvideox import run_schedule
from tests.tensors import randn, rel
from tests.tiny_cogvideox import DDIM, DPM, tiny


@pytest.mark.parametrize("component", ["cogvideox_ddim_scheduler", "cogvideox_dpm_scheduler"])
def test_trajectories_equal_the_original(goldens, component):
    recording = open_recording(goldens(component))
    outcome = run_schedule(recording)
    for name, got in outcome.outs.items():
        want = recording.io[name]
        if "timesteps" in name:
            assert torch.equal(got, want)
        else:
            assert rel(got, want) < 2e-6, name  # fp32 samples, fp64 tables; measured 7e-7


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_table_ends_without_any_signal(shift):
    alphas = zero_snr_alphas(shift)
    assert alphas[-1] == 0 and (alphas.diff() < 0).all()
    first = 1 - 0.00085
    assert alphas[0].item() == pytest.approx(first / (shift + (1 - shift) * first), rel=1e-12)


def test_timesteps_run_down_from_the_last_level():
    schedule = make_table_schedule(DDIM, 50)
    assert schedule.timesteps[:3] == (999, 979, 959) and schedule.timesteps[-1] == 19
    assert schedule.alphas_next[:-1] == schedule.alphas[1:] and schedule.alphas_next[-1] == 1
    odd = make_table_schedule(DDIM, 7)  # 1000 / 7 is no whole number: a step of 142 falls short of the next
    assert odd.timesteps == (999, 856, 713, 570, 428, 285, 142)
    assert odd.alphas_next[-1] == zero_snr_alphas(3.0)[0].item() != 1


def test_guidance_jumps_about_as_it_did_in_the_release():
    table = dynamic_guidance(range(999, 0, -20), 6.0)
    assert [round(g, 2) for g in table[:2] + table[-2:]] == [2.29, 2.54, 1.0, 1.12]
    assert all(1 <= g <= 7 for g in table)
    steps = make_table_schedule(DPM, 50).steps(6.0)
    assert tuple(step.guidance for step in steps) == table
    assert {step.guidance for step in make_table_schedule(DPM, 50).steps([2.5] * 50)} == {2.5}


def test_velocity_gives_back_the_clean_sample():
    x0, noise = randn(5, seed=1), randn(5, seed=2)
    for alpha in (0.0, 0.3, 1.0):
        x = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise
        v = alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0
        assert torch.allclose(x0_from_v(x, v, alpha), x0, atol=1e-6)


def test_a_dpm_step_follows_the_formula_in_log_snr():
    """The middle of a run, where every lam is finite, in fp64 as Lu et al. write it."""
    schedule = make_table_schedule(DPM, 10)
    i, x, v, x0_prev, noise = 4, *(randn(6, seed=s).double() for s in range(4))
    before, at, after = schedule.alphas[i - 1], schedule.alphas[i], schedule.alphas_next[i]
    lam = lambda a: math.log(math.sqrt(a / (1 - a)))
    h, r = lam(after) - lam(at), (lam(at) - lam(before)) / (lam(after) - lam(at))
    x0 = at**0.5 * x - (1 - at) ** 0.5 * v
    guess = (1 + 1 / (2 * r)) * x0 - x0_prev / (2 * r)
    want = math.sqrt((1 - after) / (1 - at)) * math.exp(-h) * x - math.expm1(-2 * h) * after**0.5 * guess
    want = want + math.sqrt((1 - after) * (1 - math.exp(-2 * h))) * noise
    state = schedule.start()._replace(x0=x0_prev)
    got, state = schedule.step(i, x, v, state, [noise])
    assert torch.allclose(got, want, rtol=1e-12) and torch.allclose(state.x0, x0)


def test_the_last_dpm_step_returns_the_clean_sample():
    schedule = make_table_schedule(DPM, 10)
    x, v, noise = (randn(6, seed=s) for s in range(3))
    state = schedule.start()._replace(x0=randn(6, seed=4))
    got, state = schedule.step(9, x, v, state, [noise])
    assert torch.equal(got, state.x0)


def test_noise_that_is_missing_or_too_much_is_refused():
    x = randn(3)
    with pytest.raises(ValueError, match="step 0: 0 noise tensors given; pass needs_noise=1 of them"):
        make_table_schedule(DPM, 4).step(0, x, x, make_table_schedule(DPM, 4).start())
    with pytest.raises(ValueError, match="step 0: 1 noise tensors given; pass needs_noise=0 of them"):
        make_table_schedule(DDIM, 4).step(0, x, x, make_table_schedule(DDIM, 4).start(), [x])
    model = tiny("5b")
    context = model.prepare([randn(12, 24)], (1, 2, 2))
    with pytest.raises(
        ValueError, match=r"dpm adds fresh noise at every step; pass draw=NoiseSource\(seed\)"
    ):
        denoise(
            Forward(model, context, True),
            make_table_schedule(DPM, 4),
            randn(1, 4, 1, 2, 2),
            NoCache(),
            guidance_scale=6.0,
        )


def test_a_solver_that_does_not_run_over_a_table_is_refused():
    config = ScheduleConfig("unipc", "trailing", 1.0, betas="zero-snr", prediction="v")
    with pytest.raises(ValueError, match="unknown solver 'unipc'; choose one of ddim, dpm"):
        make_table_schedule(config, 10)
