"""Latte from a prompt to a video, on a small random model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minidit.cache.profile import profile_unicp
from minidit.cache.seam import BlockCache
from minidit.components import DEMO
from minidit.generate import Engine
from minidit.models.latte import Latte
from minidit.presets import Defaults, KLConfig, LatteConfig, ScheduleConfig, T5Config
from minidit.profiles import write_profile
from minidit.sampling import draw_noise
from minidit.settings import Choices
from minidit.text.t5 import T5Encoder
from minidit.vae.kl import KLVAE
from minidit.video import read_video, to_frames
from minidit.weights import save_model_folder
from tests.tensors import random, rel

TRANSFORMER = LatteConfig(
    width=48, mlp_width=96, heads=4, depth=4, text_width=32, text_len=120, freq_width=32, frames=4
)
VAE = KLConfig(widths=(8, 8, 16, 16), res_blocks=1, groups=4)
TEXT = T5Config(vocab=2000, width=32, mlp_width=48, heads=4, head_width=8, depth=2, shared_positions=True)
PROMPT = "A red circle moves left to right"
REL = 1e-4  # fp32 sums in another order, through every layer and step


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "latte"
    save_model_folder(
        out,
        family="latte",
        components={
            "transformer": ("Latte", TRANSFORMER, random(Latte(TRANSFORMER), 1)),
            "text_encoder": ("T5Encoder", TEXT, random(T5Encoder(TEXT), 2)),
            "vae": ("KLVAE", VAE, random(KLVAE(VAE), 3)),
            "vae_2": (
                "KLVAE",
                replace(VAE, is_temporal=True),
                random(KLVAE(replace(VAE, is_temporal=True)), 4),
            ),
            "tokenizer": ("SentencePiece", None, DEMO / "tokenizer" / "spiece.model"),
        },
        schedule=ScheduleConfig("ddim", "leading", 1.0, betas="linear", prediction="epsilon"),
        defaults=Defaults(width=32, height=48, num_frames=4, steps=4, guidance_scale=7.5, fps=8),
        source="random weights",
    )
    return out


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return Engine(folder, device="cpu", dtype="fp32")


@torch.inference_mode()
def plain_run(engine: Engine, **options) -> Tensor:
    """The same latents by a loop that knows no cache and no engine."""
    settings = engine.resolve(PROMPT, Choices(**options))
    model, forward = engine.module("transformer"), engine.forward(settings, engine.encode(settings))
    schedule, x = engine.family.schedule(settings), draw_noise((1, *engine.latent_shape(settings)), 0)
    state = schedule.start()
    for step in schedule.steps(settings.guidance_scale):
        h, cond = model.embed(x.expand(2, -1, -1, -1, -1), torch.full((2,), step.t), forward.context)
        for k, block in enumerate(model.blocks):
            h = block(h, cond.at(k), BlockCache())
        positive, negative = model.head(h, cond).split(1)
        x, state = schedule.step(step.i, x, negative + step.guidance * (positive - negative), state)
    return x


def test_a_prompt_becomes_an_mp4(engine, tmp_path):
    video = engine.generate(PROMPT)
    assert video.frames.shape == (4, 48, 32, 3) and video.frames.dtype == np.uint8
    assert video.settings.solver == "ddim" and video.settings.steps == 4
    video.save(tmp_path / "out.mp4")
    frames, fps = read_video(tmp_path / "out.mp4")
    assert frames.shape == video.frames.shape and fps == 8


def test_without_caching_it_is_a_plain_loop_to_the_bit(engine):
    assert torch.equal(engine.generate(PROMPT).latents, plain_run(engine))


def test_videos_go_through_the_temporal_decoder_and_images_through_the_plain_one(engine):
    latents = engine.generate(PROMPT).latents
    temporal, plain = engine.module("vae_2").decode(latents), engine.module("vae").decode(latents)
    assert np.array_equal(engine.decode(latents), to_frames(temporal[0]))
    assert np.array_equal(engine.decode(latents[:, :, :1]), to_frames(plain[0, :, :1]))
    image = engine.generate(PROMPT, num_frames=1)
    assert image.frames.shape == (1, 48, 32, 3)


def test_a_folder_without_the_temporal_decoder_uses_the_plain_one(engine, folder, tmp_path):
    other = tmp_path / "plain"
    shutil.copytree(folder, other)
    manifest = json.loads((other / "model.json").read_text())
    del manifest["components"]["vae_2"]
    (other / "model.json").write_text(json.dumps(manifest))
    plain = Engine(other, device="cpu", dtype="fp32")
    latents = engine.generate(PROMPT).latents
    assert np.array_equal(plain.decode(latents), to_frames(engine.module("vae").decode(latents)[0]))


@pytest.mark.parametrize(
    "other",
    [{"negative_prompt": "a blue square"}, {"guidance_scale": 1.0}, {"sigma_grid": "trailing"}, {"seed": 3}],
)
def test_choices_change_the_video(engine, other):
    assert rel(engine.generate(PROMPT, **other).latents, engine.generate(PROMPT).latents) > 0.01


def test_captions_are_cleaned(engine):
    plain = engine.generate("a red circle moves left to right")
    cleaned = engine.generate("A <b>Red</b> circle moves left to right https://shapes.com/circle")
    assert torch.equal(plain.latents, cleaned.latents)


def test_batched_and_sequential_guidance_give_the_same_video(engine):
    settings = engine.resolve(PROMPT, Choices())
    text = engine.encode(settings)
    runs = [engine.denoise(replace(settings, batched_guidance=b), text).latents for b in (True, False)]
    assert rel(*runs) < REL


@pytest.mark.parametrize(
    "other, message",
    [
        ({"num_frames": 5}, "num_frames=5: this model makes 4 frames, or 1"),
        ({"width": 40}, "width=40 is not 16n; nearest are 32 and 48"),
        ({"solver": "euler"}, "unknown solver 'euler'; choose one of"),
        ({"flow_shift": 2.0}, "shift=2.0 has no meaning for linear betas"),
    ],
)
def test_what_cannot_be_made_is_refused(engine, other, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(PROMPT, **other)


@pytest.mark.parametrize(
    "cache",
    [
        "mixcache:impact=uniform,theta=9",
        "unicp:threshold=0.5,slice=off",
        "unicp:threshold=0.5,maps=on,freeze=on,ratio=0.2",
        "unicp:reuse=off,ratio=0.3,slice_kinds=attn/cross",
        "mixcache:impact=uniform,theta=9+unicp:threshold=0.5,slice=off",
    ],
)
def test_every_method_acts_and_comes_near(engine, cache):
    options = dict(steps=8, num_frames=4)
    if "unicp" in cache and not list(engine.profile_folders[0].glob("unicp-*.json")):
        settings = engine.resolve(PROMPT, Choices(**options))
        write_profile(engine.profile_folders[0], profile_unicp(engine, settings, [PROMPT, "a star"]))
    plain, cached = (engine.generate(PROMPT, cache=c, **options) for c in ("none", cache))
    assert cached.trace["total"]["macs"] < plain.trace["total"]["macs"]
    assert 1e-6 < rel(cached.latents, plain.latents) < 2
    assert cached.frames.shape == plain.frames.shape
