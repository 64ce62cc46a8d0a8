"""Latte gives the same numbers in diffusers' own classes, with the same random weights.

Our tensors go back under the library's names through the converter's tables, and are loaded strictly.
"""

import pytest
import torch
from torch import nn

from minidit.cache.policies.none import NoCache
from minidit.models.latte import Latte
from minidit.presets import KLConfig, LatteConfig, ScheduleConfig
from minidit.sampling import Forward, denoise
from minidit.schedules import make_table_schedule
from minidit.vae.kl import KLVAE
from tests.tensors import randn, random, rel
from weights_convert.layouts import recognise
from weights_convert.names import fit

diffusers = pytest.importorskip("diffusers")

LATTE = LatteConfig(width=48, mlp_width=192, heads=4, depth=2, text_width=24, frames=3)
REL = 2e-5  # fp32 on both sides: nothing but the order of sums; measured 3e-6


def fill(oracle: nn.Module, ours: nn.Module) -> nn.Module:
    """Load our weights into a library's class, with nothing missing and nothing left over."""
    theirs = {name: tuple(t.shape) for name, t in oracle.state_dict().items()}
    tensors, layout = ours.state_dict(), recognise(theirs)
    targets = {name: tuple(t.shape) for name, t in tensors.items()}
    found = fit(theirs, targets, layout.table(ours.config, theirs), layout.drop)
    assert found.problems == [] and not found.dropped
    state = {
        piece.upstream: part.reshape(theirs[piece.upstream])
        for name, pieces in found.pieces.items()
        for piece, part in zip(pieces, tensors[name].chunk(pieces[0].parts), strict=True)
    }
    oracle.load_state_dict(state, strict=True)
    return oracle.eval()


def oracle_transformer(ours: Latte) -> nn.Module:
    c = ours.config
    oracle = diffusers.LatteTransformer3DModel(
        num_attention_heads=c.heads,
        attention_head_dim=c.width // c.heads,
        in_channels=c.channels,
        out_channels=c.out_channels,
        num_layers=c.depth,
        cross_attention_dim=c.width,
        attention_bias=True,
        sample_size=c.sample_size,
        patch_size=c.patch,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=c.eps,
        caption_channels=c.text_width,
        video_length=c.frames,
    )
    return fill(oracle, ours)


@torch.no_grad()
def test_transformer_equals_diffusers():
    ours = random(Latte(LATTE))
    x, t, text = randn(2, 4, 3, 8, 10), torch.tensor([900, 20]), randn(2, 7, 24, seed=2)
    got = ours(x, t, ours.prepare(list(text), x.shape[2:], branches=("a", "b")))
    assert rel(got, oracle_transformer(ours)(x, t, text).sample) < REL


@pytest.mark.parametrize("is_temporal", [False, True])
@torch.no_grad()
def test_autoencoders_equal_diffusers(is_temporal):
    ours = random(KLVAE(KLConfig(widths=(32, 32, 32, 64), is_temporal=is_temporal, chunk=14)))
    blocks = dict(block_out_channels=(32, 32, 32, 64), layers_per_block=2)
    down = ("DownEncoderBlock2D",) * 4
    if is_temporal:
        oracle = diffusers.AutoencoderKLTemporalDecoder(down_block_types=down, **blocks)
    else:
        up = ("UpDecoderBlock2D",) * 4
        oracle = diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, **blocks)
    fill(oracle, ours)
    video, latents = randn(1, 3, 3, 16, 24).clamp(-1, 1), randn(1, 4, 3, 2, 3, seed=1)
    mean, logvar = ours.moments(video)
    found = oracle.encode(video[0].transpose(0, 1)).latent_dist
    assert rel(mean[0].transpose(0, 1), found.mean) < REL
    assert rel(logvar[0].transpose(0, 1), found.logvar) < REL
    options = {"num_frames": 3} if is_temporal else {}
    want = oracle.decode(latents[0].transpose(0, 1) / 0.18215, **options).sample
    assert rel(ours.decode(latents)[0].transpose(0, 1), want) < REL


@torch.no_grad()
def test_a_whole_run_equals_the_pipeline_of_diffusers():
    ours, config = random(Latte(LATTE)), ScheduleConfig("ddim", "leading", 1.0, "linear", "epsilon")
    scheduler = diffusers.DDIMScheduler(beta_end=0.02, clip_sample=False)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )  # for its stride alone: latents are compared
    pipeline = diffusers.LattePipeline(None, None, vae, oracle_transformer(ours), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    noise, text = randn(1, 4, 3, 8, 10), randn(2, 1, 7, 24, seed=2)
    want = pipeline(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        negative_prompt=None,
        video_length=3,
        height=64,
        width=80,
        num_inference_steps=4,
        guidance_scale=7.5,
        latents=noise.clone(),
        output_type="latent",
        clean_caption=False,
    ).frames
    context = ours.prepare([text[0, 0], text[1, 0]], (3, 8, 10), branches=("cond", "uncond"))
    forward = Forward(ours, context, is_batched=True)
    got = denoise(forward, make_table_schedule(config, 4), noise, NoCache(), guidance_scale=7.5).latents
    assert rel(got, want) < 1e-4  # four guided steps
