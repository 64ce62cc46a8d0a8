"""HunyuanVideo from a prompt to a video, on a small random model in the original release's files."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minidit.__main__ import main
from minidit.cache.seam import BlockCache
from minidit.components import part_dtype
from minidit.generate import Engine
from minidit.sampling import draw_noise
from minidit.settings import Choices
from minidit.video import read_settings, read_video, to_frames
from tests.tensors import rel
from tests.tiny_hunyuan_video import save_original
from weights_convert.convert import convert

pytest.importorskip("tokenizers")
PROMPT = "A cat walks on the grass, realistic style."
REL = 1e-4  # fp32 sums in another order, through every layer and step


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hunyuan")
    config = root / "config.json"
    config.write_text(json.dumps({"defaults": {"width": 48, "height": 32, "num_frames": 5, "steps": 3}}))
    convert(save_original(root / "ckpts"), root / "model", config=config)
    return root / "model"


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return Engine(folder, device="cpu", dtype="fp32", keep_text_encoder=True)


@pytest.fixture(scope="module")
def video(engine):
    return engine.generate(PROMPT)


@torch.inference_mode()
def plain_run(engine: Engine, **options) -> Tensor:
    """The same latents by a loop that knows no cache; the branches one after the other."""
    settings = engine.resolve(PROMPT, Choices(**options))
    model, whole = engine.module("transformer"), engine.forward(settings, engine.encode(settings)).context
    contexts = [whole.select((name,)) for name in whole.branches]
    x = draw_noise((1, *engine.latent_shape(settings)), settings.seed)
    schedule = engine.family.schedule(settings)
    state = schedule.start()
    for step in schedule.steps(1.0):
        outs = []
        for context in contexts:
            h, cond = model.embed(x, torch.tensor([step.t]), context)
            for k, block in enumerate(model.blocks):
                h = block(h, cond.at(k), BlockCache())
            outs.append(model.head(h, cond))
        v = outs[0] if len(outs) == 1 else outs[1] + settings.true_cfg * (outs[0] - outs[1])
        x, state = schedule.step(step.i, x, v, state)
    return x


def test_a_prompt_becomes_an_mp4(folder, tmp_path):
    out = tmp_path / "cat.mp4"
    run = [sys.executable, "-m", "minidit", "generate", PROMPT, "--model", folder, "--output", out, "--quiet"]
    done = subprocess.run([str(a) for a in run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "euler (wan grid), shift 7, guidance 6 (embedded), true cfg 1" in done.stdout
    frames, fps = read_video(out)
    assert frames.shape == (5, 32, 48, 3) and fps == 24
    assert read_settings(out)["guidance_scale"] == 6.0


def test_without_caching_it_is_a_plain_loop_to_the_bit(engine, video):
    assert torch.equal(video.latents, plain_run(engine))
    guided = engine.generate(PROMPT, true_cfg=3.0)
    assert torch.equal(guided.latents, plain_run(engine, true_cfg=3.0))


def test_frames_are_the_decoded_latents_cut_to_levels(engine, video):
    decoded = engine.module("vae").decode(video.latents)[0]
    assert np.array_equal(video.frames, to_frames(decoded))
    original = ((decoded / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()
    assert np.abs(video.frames.astype(int) - original).max() <= 1  # the same up to rounding at a level's edge


def test_one_branch_runs_without_true_cfg_and_two_of_different_lengths_with_it(engine):
    rows = []
    model = engine.module("transformer")
    handle = model.blocks[0].register_forward_hook(
        lambda module, args, out: rows.append(tuple(out.shape[:2]))
    )
    engine.generate(PROMPT)
    assert rows == [(1, 12 + 11)] * 3  # 2 x 2 x 3 tokens; ten of the prompt, and the end token
    rows.clear()
    engine.generate(PROMPT, true_cfg=3.0, negative_prompt="two words")
    assert rows == [(1, 12 + 11), (1, 12 + 3)] * 3
    rows.clear()
    engine.generate(PROMPT, true_cfg=3.0, negative_prompt=PROMPT)  # of one length: one batch
    handle.remove()
    assert rows == [(2, 12 + 11)] * 3


@pytest.mark.parametrize(
    "other",
    [
        {"guidance_scale": 1.0},
        {"true_cfg": 3.0},
        {"flow_shift": 3.0},
        {"seed": 1},
        {"solver": "unipc", "sigma_grid": "wan"},
    ],
)
def test_every_choice_changes_the_video(engine, video, other):
    changed = engine.generate(PROMPT, **other)
    assert rel(changed.latents, video.latents) > 0.01 and changed.settings != video.settings


def test_the_negative_prompt_counts_with_true_cfg_alone(engine, video):
    assert torch.equal(engine.generate(PROMPT, negative_prompt="two words").latents, video.latents)
    one, other = (engine.generate(PROMPT, true_cfg=3.0, negative_prompt=text) for text in (None, "two words"))
    assert one.settings.negative_prompt.startswith("Aerial view, aerial view")
    assert rel(other.latents, one.latents) > 0.01


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--true-cfg", "0"], "true_cfg=0.0: 1 turns it off"),
        (["--true-cfg", "nan"], "true_cfg=nan is not a number above 0"),
        (["--size", "40x32"], "width=40 is not 16n; nearest are 32 and 48"),
        (["--num-frames", "6"], "num_frames=6 is not 4n+1; nearest are 5 and 9"),
        (
            ["--cache", "mixcache:levels=cfg,impact=uniform"],
            "levels=cfg cannot act on a run without guidance",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(folder, capsys, options, reason):
    assert main(["generate", PROMPT, "--model", str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert reason in error and len(error.splitlines()) == 1


def test_true_cfg_is_refused_where_guidance_is_not_embedded(capsys):
    assert main(["generate", "a red circle", "--true-cfg", "3"]) == 2
    assert "true_cfg=3.0: only models told their guidance have it" in capsys.readouterr().err


def test_both_text_encoders_are_let_go(folder):
    engine = Engine(folder, device="cpu", dtype="fp32")
    engine.encode(engine.resolve(PROMPT, Choices()))
    assert engine.modules == {}


def test_bf16_is_near_fp32_that_is_told_its_rounded_guidance(engine, folder):
    half = Engine(folder, device="cpu", dtype="bf16", keep_text_encoder=True)
    latents = half.generate(PROMPT).latents
    assert 0 < rel(latents, engine.generate(PROMPT, guidance_scale=6.016).latents) < 0.1


def test_bf16_runs_its_other_parts_in_fp16_as_the_original_does(folder):
    half = Engine(folder, device="cpu", dtype="bf16", keep_text_encoder=True)
    half.generate(PROMPT, steps=1)
    dtypes = {name: next(module.parameters()).dtype for name, module in half.modules.items()}
    assert dtypes.pop("transformer") == torch.bfloat16 and set(dtypes.values()) == {torch.float16}
    assert part_dtype("HunyuanVAE", torch.float32) == torch.float32


def test_a_trace_counts_one_branch_and_then_two(engine, video):
    macs = video.trace["total"]["macs_full"]
    guided = engine.generate(PROMPT, true_cfg=3.0)
    assert guided.trace["total"]["macs_full"] == 2 * macs
    assert replace(guided.settings, true_cfg=1.0) == video.settings


def test_inspect_knows_what_the_release_costs(capsys):
    """2143 TMAC at 544p is the figure of several papers; one branch, as guidance is embedded."""
    assert main(["inspect", "--model", "hunyuan-video", "--size", "960x544", "--num-frames", "129"]) == 0
    printed = capsys.readouterr().out
    assert "67320 video tokens" in printed and "transformer 12.821 B" in printed
    assert "2143 TMAC" in printed and "50 steps: 107.1 PMAC" in printed


def test_tiles_are_not_a_choice(engine):
    with pytest.raises(ValueError, match="tiled: this model's autoencoder always decodes in tiles"):
        engine.resolve(PROMPT, Choices(tiled=True))
