"""Frames that a run is given: Open-Sora's strategies by table, the schedule that keeps them."""

import pytest
import torch

from minidit.given import Paste, Request, fit_size, nearest, paste, read_prompt, read_strategy
from minidit.presets import ScheduleConfig
from minidit.schedules import MaskedSchedule, make_schedule, size_shift
from tests.recordings.base import open_recording
from tests.recordings.open_sora import run_rflow
from tests.tensors import randn


@torch.no_grad()
def test_timesteps_and_runs_equal_the_original(goldens):
    recording = open_recording(goldens("open_sora_rflow"))
    outs = run_rflow(recording).outs
    assert len(outs) == 23  # ten sizes in two precisions, three runs
    for name, out in outs.items():
        want = recording.io[name]
        assert (out - want).abs().max() / want.abs().max() < 1e-5  # measured 3e-7


def test_larger_and_longer_videos_shift_more():
    assert size_shift(512, 512, 1) == 1.0
    assert size_shift(512, 512, 17) == pytest.approx(5**0.5)
    assert size_shift(1024, 1024, 51) == pytest.approx(2 * 15**0.5)
    assert size_shift(480, 854, 51) != size_shift(480, 854, 51, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="num_frames=16 has no noise schedule"):
        size_shift(512, 512, 16)


@pytest.mark.parametrize(
    "prompt, request_",
    [
        ("a cat", Request("a cat")),
        ('a cat {"reference_path": "a.png;b.mp4"}', Request("a cat", ("a.png", "b.mp4"), "0")),
        ('{"reference_path": "a.png", "mask_strategy": "0,0,-1"}', Request("", ("a.png",), "0,0,-1")),
        ("|0| a cat |1| a dog", Request("a cat")),
    ],
)
def test_prompts_are_taken_apart(prompt, request_):
    assert read_prompt(prompt) == request_


def test_strategies_have_defaults():
    assert read_strategy("") == ()
    assert read_strategy("0") == (Paste(),)
    assert read_strategy("0,1,2,-5,3,0.4;0,1") == (Paste(0, 1, 2, -5, 3, 0.4), Paste(0, 1))
    for bad, message in (("0,0,0,0,1,0,9", "7 values"), ("0,x", "invalid literal"), ("1", "of clip 1")):
        with pytest.raises(ValueError, match=message):
            read_strategy(bad)


@pytest.mark.parametrize("value, want", [(0, 0), (2, 0), (3, 5), (7, 5), (8, 10), (13, 10), (14, 10)])
def test_starts_snap_to_chunks(value, want):
    assert nearest(value, 15) == want  # the last multiple is 10: 15 is past the end


def test_references_are_laid_over_the_noise():
    noise, references = randn(1, 4, 15, 2, 2), [randn(4, 1, 2, 2, seed=1), randn(4, 10, 2, 2, seed=2)]
    given = paste(read_strategy("0;0,1,-5,-5,5,0.5"), references, noise)
    assert given.mask.tolist() == [0.0] + [1.0] * 9 + [0.5] * 5
    assert torch.equal(given.latents[0, :, :1], references[0])
    assert torch.equal(given.latents[0, :, 10:], references[1][:, 5:])
    assert torch.equal(given.latents[:, :, 1:10], noise[:, :, 1:10])


def test_given_frames_wait_for_their_level():
    base = make_schedule(ScheduleConfig("euler", "wan", 1.0), 4)  # t = 1000, 750, 500, 250
    schedule = MaskedSchedule(base, torch.tensor([0.0, 0.5, 1.0]))
    x, velocity, noise = randn(1, 2, 3, 2, 2), randn(1, 2, 3, 2, 2, seed=1), randn(1, 2, 3, 2, 2, seed=2)
    kept, state, plain = x[:, :, 0], schedule.start(), x
    for i in range(4):
        before = x
        x, state = schedule.step(i, x, velocity, state, [noise])
        plain, _ = base.step(i, plain, velocity, base.start())
        assert torch.equal(x[:, :, 0], kept)  # never touched
        assert torch.equal(x[:, :, 2], plain[:, :, 2])  # as without a mask
        if i == 0:
            assert torch.equal(x[:, :, 1], before[:, :, 1])
        if i == 1:  # the next step is at 500: now it gets noise
            assert torch.allclose(x[:, :, 1], (before[:, :, 1] + noise[:, :, 1]) / 2)
        if i >= 2:
            assert not torch.equal(x[:, :, 1], before[:, :, 1])
    assert schedule.needs_noise == 1
    assert MaskedSchedule(base, torch.tensor([0.0, 1.0])).needs_noise == 0


def test_pictures_are_scaled_to_cover_and_cut():
    video = torch.zeros(3, 1, 10, 40)
    video[..., 13:27] = 1.0
    fitted = fit_size(video, 20, 20)
    assert fitted.shape == (3, 1, 20, 20) and fitted.min() > 0.999  # the middle, twice as large
