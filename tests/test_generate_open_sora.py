"""Open-Sora from a prompt to a video, on a small random model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minidit.cache.profile import profile_unicp
from minidit.cache.seam import BlockCache
from minidit.components import DEMO
from minidit.generate import Engine
from minidit.models.open_sora import OpenSora
from minidit.presets import Defaults, OpenSoraConfig, OpenSoraVAEConfig, ScheduleConfig, T5Config
from minidit.profiles import write_profile
from minidit.sampling import NoiseSource, draw_noise
from minidit.settings import Choices
from minidit.text.t5 import T5Encoder
from minidit.vae.open_sora import OpenSoraVAE
from minidit.video import read_video, to_frames, write_video
from minidit.weights import save_model_folder
from tests.tensors import random, rel

TRANSFORMER = OpenSoraConfig(
    width=48, mlp_width=96, heads=4, depth=4, text_width=32, text_len=120, freq_width=32
)
VAE = OpenSoraVAEConfig(
    widths=(8, 8, 16, 16), res_blocks=1, groups=4, time_base=8, time_blocks=1, time_groups=4
)
TEXT = T5Config(vocab=2000, width=32, mlp_width=48, heads=4, head_width=8, depth=2, shared_positions=True)
PROMPT = "A red circle moves left to right"
SMALL = dict(width=24, height=40, num_frames=17, steps=3)  # 5x3 latents: an odd grid


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "open_sora"
    save_model_folder(
        out,
        family="open_sora",
        components={
            "transformer": ("OpenSora", TRANSFORMER, random(OpenSora(TRANSFORMER), 1)),
            "text_encoder": ("T5Encoder", TEXT, random(T5Encoder(TEXT), 2)),
            "vae": ("OpenSoraVAE", VAE, random(OpenSoraVAE(VAE), 3)),
            "tokenizer": ("SentencePiece", None, DEMO / "tokenizer" / "spiece.model"),
        },
        schedule=ScheduleConfig("euler", "wan", 1.0),
        defaults=Defaults(**SMALL, guidance_scale=7.0, fps=24),
        source="random weights",
    )
    return out


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return Engine(folder, device="cpu", dtype="fp32")


@torch.inference_mode()
def plain_run(engine: Engine) -> Tensor:
    """The same latents by a loop that knows no cache and no engine."""
    settings = engine.resolve(PROMPT, Choices())
    model, forward = engine.module("transformer"), engine.forward(settings, engine.encode(settings))
    schedule, x = engine.family.schedule(settings), draw_noise((1, *engine.latent_shape(settings)), 0)
    state = schedule.start()
    for step in schedule.steps(settings.guidance_scale):
        h, cond = model.embed(x.expand(2, -1, -1, -1, -1), torch.full((2,), step.t), forward.context)
        for k, block in enumerate(model.blocks):
            h = block(h, cond.at(k), BlockCache())
        positive, null = model.head(h, cond).split(1)
        x, state = schedule.step(step.i, x, null + step.guidance * (positive - null), state)
    return x


def picture(folder: Path, name: str, frames: int, seed: int = 0) -> Path:
    """A file of smooth random pixels."""
    x = torch.rand(1, 3, frames, 4, 4, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(x, (frames, 48, 48))[0] * 2 - 1
    write_video(folder / name, to_frames(x), fps=8, settings={"minidit": "a test"})
    return folder / name


def asking(path: Path, strategy: str) -> str:
    return PROMPT + " " + json.dumps({"reference_path": str(path), "mask_strategy": strategy})


def test_a_prompt_becomes_an_mp4(engine, tmp_path):
    video = engine.generate(PROMPT)
    assert video.frames.shape == (17, 40, 24, 3) and video.latents.shape == (1, 4, 5, 5, 3)
    video.save(tmp_path / "out.mp4")
    frames, fps = read_video(tmp_path / "out.mp4")
    assert frames.shape == video.frames.shape and fps == 24


def test_without_caching_it_is_a_plain_loop_to_the_bit(engine):
    assert torch.equal(engine.generate(PROMPT).latents, plain_run(engine))


def test_levels_are_rounded(engine):
    latents = engine.generate(PROMPT).latents
    pixels = engine.module("vae").decode(latents)[0].clamp(-1, 1)
    want = ((pixels + 1) / 2 * 255 + 0.5).floor().permute(1, 2, 3, 0)  # half up, as the original does
    assert np.array_equal(engine.decode(latents), want.to(torch.uint8).numpy())


@pytest.mark.parametrize(
    "other",
    [
        {"num_frames": 1},
        {"num_frames": 25},
        {"width": 32},
        {"width": 426, "height": 240, "num_frames": 1, "steps": 1},
    ],
)
def test_other_sizes(engine, other):
    video = engine.generate(PROMPT, **other)
    size = SMALL | other
    assert video.frames.shape == (size["num_frames"], size["height"] // 8 * 8, size["width"] // 8 * 8, 3)


@pytest.mark.parametrize(
    "other",
    [{"fps": 12}, {"guidance_scale": 1.0}, {"flow_shift": 2.0}, {"seed": 3}, {"solver": "unipc"}],
)
def test_choices_change_the_video(engine, other):
    assert rel(engine.generate(PROMPT, **other).latents, engine.generate(PROMPT).latents) > 1e-3


def test_the_shift_follows_the_size(engine):
    sigmas = lambda **other: engine.family.schedule(engine.resolve(PROMPT, Choices(**other))).sigmas
    assert sigmas()[1] < sigmas(num_frames=34)[1] < sigmas(num_frames=34, width=64)[1]


def test_captions_are_cleaned_and_scored(engine):
    plain = engine.generate(PROMPT).latents
    same = "a <b>red</b> circle moves left to right aesthetic score: 6.5."
    assert torch.equal(engine.generate(same).latents, plain)
    own = PROMPT + " aesthetic score: big."  # digits are unknown to this tokenizer
    assert not torch.equal(engine.generate(own).latents, plain)


def test_a_kept_picture_is_the_first_latent_frame_to_the_bit(engine, tmp_path):
    path = picture(tmp_path, "first.png", 1)
    prompt = asking(path, "0")
    settings = engine.resolve(prompt, Choices())
    given = []
    for source in (NoiseSource(0), lambda shape: torch.zeros(shape)):
        noise = source((1, *engine.latent_shape(settings)))
        given.append(engine.family.given(engine, settings, noise, source))
    drawn, mean = given
    assert drawn.mask.tolist() == [0, 1, 1, 1, 1]
    video, plain = engine.generate(prompt), engine.generate(PROMPT)
    assert torch.equal(video.latents[:, :, :1], drawn.latents[:, :, :1])  # a draw of the reference's own
    assert rel(mean.latents[:, :, :1], engine.module("vae").encode(reference_pixels(path))) < 1e-6
    assert rel(drawn.latents[:, :, :1], mean.latents[:, :, :1]) > 1e-3
    assert rel(video.latents[:, :, 1:], plain.latents[:, :, 1:]) > 0.01  # the others know of it


def reference_pixels(path: Path) -> Tensor:
    """48x48 to 40x24: scaled by 5/6, the middle 24 columns cut out."""
    frames = torch.from_numpy(read_video(path)[0]).permute(3, 0, 1, 2) / 127.5 - 1
    scaled = torch.nn.functional.interpolate(frames.transpose(0, 1), (40, 40), mode="bicubic", antialias=True)
    return scaled[..., 8:32].transpose(0, 1).clamp(-1, 1)[None]


def test_a_video_can_be_kept_edited_or_placed(engine, tmp_path):
    path = picture(tmp_path, "clip.mp4", 17)
    latents = {s: engine.generate(asking(path, s)).latents for s in ("0,0,0,0,5,0", "0,0,0,0,5,0.5")}
    kept, edited = latents.values()
    for frame in range(5):
        assert not torch.equal(kept[:, :, frame], edited[:, :, frame])
    again = engine.generate(asking(path, "0,0,0,0,5,0"), steps=1).latents
    assert torch.equal(again, kept)  # nothing was left to do


@pytest.mark.parametrize(
    "prompt, other, message",
    [
        (PROMPT, {"num_frames": 18}, r"num_frames=18 is neither 1 nor 17n\+4m; try 17"),
        (PROMPT, {"num_frames": 5}, "num_frames=5 is neither 1 nor"),
        (PROMPT, {"width": 30}, "width=30 is not 8n; nearest are 24 and 32"),
        (PROMPT, {"negative_prompt": "blue"}, "leave the negative prompt empty"),
        (PROMPT, {"sigma_grid": "diffusers"}, "sigma_grid='diffusers'; choose one of wan, bf16"),
        (PROMPT + " {nonsense}", {}, "is not JSON"),
        (PROMPT + ' {"mask": "0"}', {}, "the prompt's JSON has mask; known are"),
        (PROMPT + ' {"mask_strategy": "1"}', {}, "mask_strategy is of clip 1, but one clip is made"),
        (PROMPT + ' {"mask_strategy": "0"}', {}, "mask_strategy names reference 0 of 0"),
        (PROMPT + ' {"reference_path": "no.png"}', {}, "reference no.png does not exist"),
        (PROMPT + ' {"mask_strategy": "a"}', {}, "mask_strategy 'a': invalid literal"),
    ],
)
def test_what_cannot_be_made_is_refused(engine, prompt, other, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompt, **other)


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
    options = dict(steps=8, num_frames=17)
    if "unicp" in cache and not list(engine.profile_folders[0].glob("unicp-*.json")):
        settings = engine.resolve(PROMPT, Choices(**options))
        write_profile(engine.profile_folders[0], profile_unicp(engine, settings, [PROMPT, "a star"]))
    plain, cached = (engine.generate(PROMPT, cache=c, **options) for c in ("none", cache))
    assert cached.trace["total"]["macs"] < plain.trace["total"]["macs"]
    assert 1e-6 < rel(cached.latents, plain.latents) < 2
    assert cached.frames.shape == plain.frames.shape
