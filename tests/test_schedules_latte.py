"""DDIM over Latte's table of noise levels."""

from dataclasses import replace

import pytest
import torch

from minidit.presets import ScheduleConfig
from minidit.schedules import ddim_step, make_table_schedule
from tests.recordings.base import open_recording
from tests.recordings.latte import run_ddim

LATTE = ScheduleConfig("ddim", "leading", 1.0, betas="linear", prediction="epsilon")


def test_timesteps_and_runs_equal_the_original(goldens):
    recording = open_recording(goldens("latte_ddim"))
    outs = run_ddim(recording).outs
    assert len(outs) == 24  # four variants: four step counts, a run and its last alpha
    for name, out in outs.items():
        want = recording.io[name]
        if "timesteps" in name:
            assert torch.equal(out, want)
        else:
            assert (out - want).abs().max() / want.abs().max() < 5e-6  # measured 5e-7


def test_a_step_keeps_the_share_of_noise():
    x0, noise = torch.tensor([0.3, -1.0]), torch.tensor([2.0, 0.5])
    at = lambda alpha: alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise
    assert torch.allclose(ddim_step(at(0.2), x0, 0.2, 0.7), at(0.7))
    assert torch.allclose(ddim_step(at(0.2), x0, 0.2, 1.0), x0)


def test_the_last_step_ends_clean_or_at_the_first_level():
    clean = make_table_schedule(LATTE, 50)
    floor = make_table_schedule(ScheduleConfig("ddim", "leading-1", 1.0, "linear", "epsilon", False), 50)
    assert clean.timesteps[:2] == (980, 960) and clean.timesteps[-1] == 0 and clean.alphas_next[-1] == 1
    assert floor.timesteps[-1] == 1 and floor.alphas_next[-1] == pytest.approx(1 - 1e-4)
    assert [step.t for step in clean.steps(7.5)] == list(clean.timesteps)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"solver": "euler"}, "unknown solver 'euler'; choose one of ddim"),
        ({"sigma_grid": "karras"}, "unknown sigma_grid 'karras'; choose one of leading"),
        ({"betas": "cosine"}, "unknown betas 'cosine'"),
        ({"prediction": "x"}, "unknown prediction 'x'"),
        ({"shift": 3.0}, "shift=3.0 has no meaning for linear betas"),
    ],
)
def test_what_is_not_known_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_table_schedule(replace(LATTE, **change), 10)
