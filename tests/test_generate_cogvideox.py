"""CogVideoX from a prompt to a video, on small random models."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minidit.__main__ import main
from minidit.cache.seam import BlockCache
from minidit.families import find_family
from minidit.generate import Engine, save_latents
from minidit.presets import PRESETS
from minidit.sampling import NoiseSource
from minidit.schedules import dynamic_guidance
from minidit.settings import Choices
from minidit.text.tokenizers import SentencePiece
from minidit.video import read_settings, read_video, to_frames
from tests.tensors import rel
from tests.tiny_cogvideox import DDIM, DPM, save_tiny

PROMPT = "A red circle moves left to right"
REL = 1e-4  # fp32 sums in another order, through every layer and step


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    schedules = {"2b": DDIM, "5b": DPM, "1.5": DPM}
    return {kind: save_tiny(root / kind, kind, schedule) for kind, schedule in schedules.items()}


@pytest.fixture(scope="module")
def engines(folders) -> dict[str, Engine]:
    return {kind: Engine(folder, device="cpu", dtype="fp32") for kind, folder in folders.items()}


@torch.inference_mode()
def plain_run(engine: Engine, **options) -> Tensor:
    """The same latents by a loop that knows no cache and no engine."""
    settings = engine.resolve(PROMPT, Choices(**options))
    model, forward = engine.module("transformer"), engine.forward(settings, engine.encode(settings))
    schedule, draw = engine.family.schedule(settings), NoiseSource(settings.seed)
    x, state = draw((1, *engine.latent_shape(settings))), schedule.start()
    for step in schedule.steps(settings.guidance_scale):
        h, cond = model.embed(x.expand(2, -1, -1, -1, -1), torch.full((2,), step.t), forward.context)
        for k, block in enumerate(model.blocks):
            h = block(h, cond.at(k), BlockCache())
        positive, negative = model.head(h, cond).split(1)
        guided = negative + step.guidance * (positive - negative)
        noise = [draw(x.shape) for _ in range(schedule.needs_noise)]
        x, state = schedule.step(step.i, x, guided, state, noise)
    return x


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5"])
def test_without_caching_it_is_a_plain_loop_to_the_bit(engines, kind):
    assert torch.equal(engines[kind].generate(PROMPT).latents, plain_run(engines[kind]))


def test_a_prompt_becomes_an_mp4_on_the_command_line(folders, tmp_path):
    output = tmp_path / "out.mp4"
    args = ["generate", PROMPT, "--model", str(folders["1.5"]), "--output", str(output), "--quiet"]
    assert main([*args, "--device", "cpu", "--num-frames", "17", "--solver", "ddim"]) == 0
    frames, fps = read_video(output)
    assert frames.shape == (17, 48, 64, 3) and fps == 8
    settings = read_settings(output)
    assert (settings["solver"], settings["dynamic_cfg"], settings["sigma_grid"]) == ("ddim", True, "trailing")


def test_version_15_makes_a_latent_frame_more_and_drops_the_first(engines):
    engine = engines["1.5"]
    video = engine.generate(PROMPT)
    assert video.latents.shape == (1, 4, 4, 6, 8) and video.frames.shape == (9, 48, 64, 3)
    other = video.latents.clone()
    other[:, :, 0] = 0
    assert np.array_equal(engine.decode(other), video.frames)
    assert engines["5b"].generate(PROMPT).latents.shape == (1, 4, 3, 6, 8)


def test_tiles_are_decoded_where_they_are_asked_for(engines, tmp_path):
    engine = engines["2b"]  # its tiles are of 48 x 40 pixels
    video, tiled = (engine.generate(PROMPT, tiled=choice) for choice in (False, True))
    assert torch.equal(video.latents, tiled.latents) and not np.array_equal(video.frames, tiled.frames)
    want = to_frames(engine.module("vae").decode(video.latents, tiled=True)[0], rounds=True)
    assert np.array_equal(tiled.frames, want)
    latents, output = tmp_path / "a.latents.safetensors", tmp_path / "a.npz"
    save_latents(latents, video.latents, video.settings)
    assert main(["decode", str(latents), "--tiled", "--output", str(output), "--quiet"]) == 0
    assert np.array_equal(read_video(output)[0], want) and read_settings(output)["tiled"]


def test_dynamic_guidance_is_the_releases_own_and_can_be_turned_off(engines):
    engine = engines["5b"]
    settings = engine.resolve(PROMPT, Choices())
    assert settings.dynamic_cfg and settings.solver == "dpm"
    steps = engine.family.schedule(settings).steps(6.0)
    assert [s.guidance for s in steps] == list(dynamic_guidance([s.t for s in steps], 6.0))
    plain = engine.resolve(PROMPT, Choices(dynamic_cfg=False))
    assert {s.guidance for s in engine.family.schedule(plain).steps(6.0)} == {6.0}
    assert not engines["2b"].resolve(PROMPT, Choices()).dynamic_cfg


def test_every_step_of_dpm_takes_noise_of_the_seed(engines):
    engine = engines["5b"]
    settings = engine.resolve(PROMPT, Choices(steps=3))
    text = engine.encode(settings)
    runs = [engine.denoise(replace(settings, seed=seed), text).latents for seed in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1]) and rel(runs[2], runs[0]) > 0.1


@pytest.mark.parametrize(
    "other",
    [
        {"negative_prompt": "a blue square"},
        {"guidance_scale": 1.0},
        {"solver": "ddim"},
        {"dynamic_cfg": False},
        {"flow_shift": 3.0},
        {"seed": 3},
    ],
)
def test_choices_change_the_video(engines, other):
    changed = engines["5b"].generate(PROMPT, **other)
    assert rel(changed.latents, engines["5b"].generate(PROMPT).latents) > 0.01


@torch.inference_mode()
def test_prompts_are_taken_as_they_are_and_padding_is_attended_to(engines):
    engine = engines["2b"]
    found = engine.encode(engine.resolve("red &amp; blue", Choices(negative_prompt="")))
    encoder, tokenizer = engine.module("text_encoder"), SentencePiece(engine.file("tokenizer"))
    for states, prompt in zip(found, ("red &amp; blue", ""), strict=True):
        ids = tokenizer.encode(prompt, 12)
        ids = torch.tensor([ids + [0] * (12 - len(ids))])
        assert torch.equal(states, encoder(ids, torch.ones_like(ids))[0])
        assert not torch.equal(states, encoder(ids, (ids != 0).long())[0])


def test_batched_and_sequential_guidance_give_the_same_video(engines):
    engine = engines["2b"]
    settings = engine.resolve(PROMPT, Choices())
    text = engine.encode(settings)
    runs = [engine.denoise(replace(settings, batched_guidance=b), text).latents for b in (True, False)]
    assert rel(*runs) < REL


@pytest.mark.parametrize(
    "other, message",
    [
        ({"num_frames": 13}, r"num_frames=13 is not 8n\+1; nearest are 9 and 17"),
        ({"width": 40}, "width=40 is not 16n; nearest are 32 and 48"),
        ({"solver": "euler"}, "unknown solver 'euler'; choose one of ddim, dpm"),
        ({"sigma_grid": "wan"}, "unknown sigma_grid 'wan'"),
        ({"flow_shift": 0.0}, "shift=0.0 is not a finite number above 0"),
        ({"solver": "dpm++"}, "unknown solver 'dpm\\+\\+'"),
    ],
)
def test_what_cannot_be_made_is_refused(engines, other, message):
    with pytest.raises(ValueError, match=message):
        engines["5b"].generate(PROMPT, **other)


@pytest.mark.parametrize(
    "name, latent, tokens",
    [
        ("cogvideox-2b", (16, 13, 60, 90), 17550),
        ("cogvideox-5b", (16, 13, 60, 90), 17550),
        ("cogvideox1.5-5b", (16, 22, 96, 170), 44880),
    ],
)
def test_releases_make_their_default_size(name, latent, tokens):
    preset = PRESETS[name]
    family = find_family(preset.family, {n: c for n, (_, c) in preset.components.items()}, preset.schedule)
    d = preset.defaults
    assert family.latent_shape(d.width, d.height, d.num_frames) == latent
    assert family.tokens(latent) == tokens
