"""Previews: what they show, that every family has them, and that they change nothing."""

import math

import numpy as np
import pytest
import torch

from minidit.__main__ import main
from minidit.generate import Engine
from minidit.presets import ScheduleConfig
from minidit.preview import Preview, clean_guess, step_weights
from minidit.sampling import Snapshot
from minidit.schedules import State, make_schedule, make_table_schedule, x0_from_epsilon, x0_from_velocity
from minidit.settings import Choices
from minidit.video import read_settings, read_video
from tests.test_generate_hunyuan_video import folder as hunyuan_folder  # noqa: F401 (fixtures, all of these)
from tests.test_generate_latte import folder as latte_folder  # noqa: F401
from tests.test_generate_open_sora import folder as open_sora_folder  # noqa: F401
from tests.tiny_cogvideox import DDIM, DPM, save_tiny

PROMPT = "a red circle moves left to right"
SMALL = ["--size", "32x32", "--num-frames", "5", "--steps", "4", "--device", "cpu", "--quiet"]


def run(engine: Engine, path, every: int, **choices):
    """Denoise with a preview -> (the latents without one, with one, and every step's snapshot)"""
    settings = engine.resolve(PROMPT, Choices(**choices))
    text, seen = engine.encode(settings), []
    preview = Preview(path, every, engine.family.schedule(settings), engine.decode, settings)

    def keep(checkpoint):
        preview.show(checkpoint.snapshot)
        seen.append(checkpoint.snapshot)

    plain = engine.denoise(settings, text)
    return plain.latents, engine.denoise(settings, text, keep=keep).latents, seen


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_a_preview_is_the_middle_frame_of_the_guess_and_changes_nothing(tmp_path, solver):
    engine, path = Engine("demo", device="cpu", dtype="fp32"), tmp_path / "p.png"
    size = dict(width=32, height=32, num_frames=17, steps=4)
    plain, shown, seen = run(engine, path, 2, solver=solver, **size)
    assert torch.equal(shown, plain)
    settings = read_settings(path)
    assert (settings["preview_of_step"], settings["prompt"]) == (4, PROMPT)
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
    # at the last step the guess is what the run ends with
    picture = read_video(path)[0]
    want = engine.decode(seen[-1].x[:, :, 2:3])
    assert picture.shape == (1, 32, 32, 3) and np.abs(picture.astype(int) - want).max() <= 1


@pytest.mark.parametrize("family", ["hunyuan", "latte", "open_sora", "cogvideox", "cogvideox-1.5"])
def test_every_family_decodes_one_latent_frame(tmp_path, request, family):
    if family.startswith("cogvideox"):
        kind, schedule = ("1.5", DPM) if family.endswith("1.5") else ("2b", DDIM)
        folder = save_tiny(tmp_path / "model", kind, schedule)
    else:
        folder = request.getfixturevalue(f"{family}_folder")
    engine, path = Engine(folder, device="cpu", dtype="fp32"), tmp_path / "p.png"
    plain, shown, _ = run(engine, path, 2, steps=3)
    assert torch.equal(shown, plain)
    settings = engine.resolve(PROMPT, Choices())
    assert read_video(path)[0].shape == (1, settings.height, settings.width, 3)
    assert read_settings(path)["preview_of_step"] == 2


def test_the_guess_of_a_solver_without_history_is_that_of_its_formula():
    generator = torch.Generator().manual_seed(0)
    x, prediction = (torch.randn(1, 2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    euler = make_schedule(ScheduleConfig("euler", "wan", 3.0), 9)
    ddim = make_table_schedule(
        ScheduleConfig("ddim", "leading", 1.0, betas="linear", prediction="epsilon"), 9
    )
    for i in (0, 4, 8):
        for schedule, want in (
            (euler, x0_from_velocity(x, prediction, euler.sigmas[i])),
            (ddim, x0_from_epsilon(x, prediction, ddim.alphas[i])),
        ):
            after, state = schedule.step(i, x, prediction, State())
            snapshot = Snapshot(after, state, {}, [None] * (i + 1))
            assert torch.allclose(clean_guess(schedule, snapshot, x), want, rtol=0, atol=1e-9)
            assert clean_guess(schedule, snapshot, None) is None  # the first step after --resume


def test_a_preview_looks_only_at_the_steps_that_it_needs(tmp_path):
    engine, path = Engine("demo", device="cpu", dtype="fp32"), tmp_path / "p.png"
    settings = engine.resolve(PROMPT, Choices(width=32, height=32, num_frames=5, steps=8, solver="euler"))
    preview = Preview(path, 3, engine.family.schedule(settings), engine.decode, settings)
    seen = []

    def keep(checkpoint):
        seen.append(len(checkpoint.snapshot.records))
        preview.show(checkpoint.snapshot)

    engine.denoise(settings, engine.encode(settings), keep=keep, wants=preview.wants)
    assert seen == [2, 3, 5, 6, 8] and read_settings(path)["preview_of_step"] == 6


def test_a_guess_that_the_solver_keeps_is_taken():
    schedule = make_schedule(ScheduleConfig("unipc", "wan", 3.0), 4)
    guess = torch.ones(1, 1, 1, 2, 2)
    assert clean_guess(schedule, Snapshot(guess * 2, State(x0=guess), {}, [None]), None) is guess


def test_a_step_keeps_and_takes_shares_that_lead_to_the_clean_end():
    euler = make_schedule(ScheduleConfig("euler", "wan", 3.0), 5)
    assert step_weights(euler, 4) == (0.0, 1.0)  # the last step ends at the guess
    keep, share = step_weights(euler, 1)
    assert math.isclose(keep + share, 1.0)


def test_the_command_line_writes_a_preview(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["generate", PROMPT, *SMALL, "--output", "v.npz", "--preview", "p.png"]
    assert main([*args, "--preview-every", "2"]) == 0
    assert read_settings("p.png")["preview_of_step"] == 4
    capsys.readouterr()
    for wrong in (["--preview", "p.jpg"], ["--preview-every", "0"], ["--preview", "missing/p.png"]):
        assert main([*args, *wrong]) == 2
        line = capsys.readouterr().err
        assert line.startswith("minidit: ") and line.count("\n") == 1
