"""CogVideoX gives the same numbers in diffusers' own classes, with the same random weights.

Our tensors go back under the library's names through the converter's tables, and are loaded strictly.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minidit.cache.policies.none import NoCache
from minidit.models.cogvideox import CogVideoX
from minidit.presets import CogVideoXConfig, CogVideoXVAEConfig
from minidit.sampling import Forward, denoise
from minidit.schedules import make_table_schedule
from minidit.vae.cogvideox import CogVideoXVAE
from tests.tensors import randn, random, rel
from tests.tiny_cogvideox import DDIM, V1
from weights_convert.layouts import recognise
from weights_convert.names import fit

diffusers = pytest.importorskip("diffusers")

REL = 2e-5  # fp32 on both sides: nothing but the order of sums; measured 2e-6
KINDS = {
    "2b": replace(V1, positions="sincos", mlp_width=256),
    "5b": replace(V1, mlp_width=256),
    "1.5": replace(V1, positions="rope", patch=(2, 2, 2), mlp_width=256),
}
VAE = CogVideoXVAEConfig(scale=0.8, widths=(4, 4, 8, 8), res_blocks=2, latent=4, groups=2, tile=(48, 40))


def fill(oracle: nn.Module, ours: nn.Module) -> nn.Module:
    """Load our weights into a library's class, with nothing missing and nothing left over."""
    theirs = {name: tuple(t.shape) for name, t in oracle.state_dict().items()}
    tensors, layout = ours.state_dict(), recognise(theirs)
    targets = {name: tuple(t.shape) for name, t in tensors.items()}
    found = fit(theirs, targets, layout.table(ours.config, theirs), layout.drop)
    assert found.problems == [] and not found.dropped
    shares: dict[str, dict[int, Tensor]] = {}
    for name, pieces in found.pieces.items():
        for piece, part in zip(pieces, tensors[name].chunk(pieces[0].parts), strict=True):
            shares.setdefault(piece.upstream, {})[piece.share[0]] = part
    state = {
        name: torch.cat([by[i] for i in sorted(by)]).reshape(theirs[name]) for name, by in shares.items()
    }
    oracle.load_state_dict(state, strict=True)
    return oracle.eval()


def library_transformer(config: CogVideoXConfig, size: tuple[int, int, int]) -> nn.Module:
    """size: latent (T, H, W) of the 2B table; the others take their rotations as an input."""
    frames, side = config.patch[0], config.patch[1]
    base = {"sincos": size[1:], "rope-cropped": [side * n for n in config.base_grid], "rope": (60, 60)}
    height, width = base[config.positions]
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.channels,
        out_channels=config.channels,
        time_embed_dim=config.time_width,
        text_embed_dim=config.text_width,
        num_layers=config.depth,
        sample_frames=4 * size[0] - 3,
        sample_height=height,
        sample_width=width,
        patch_size=side,
        patch_size_t=frames if frames > 1 else None,
        max_text_seq_length=config.text_len,
        use_rotary_positional_embeddings=config.positions != "sincos",
    )


def library_vae() -> nn.Module:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=VAE.widths,
        latent_channels=VAE.latent,
        layers_per_block=VAE.res_blocks,
        norm_num_groups=VAE.groups,
        scaling_factor=VAE.scale,
        sample_height=2 * VAE.tile[0],
        sample_width=2 * VAE.tile[1],
    )


def pipeline(config: CogVideoXConfig, size: tuple[int, int, int], scheduler=None) -> tuple[CogVideoX, object]:
    """Our transformer, and the library's pipeline around the same weights."""
    ours = random(CogVideoX(config))
    return ours, diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=fill(library_vae(), random(CogVideoXVAE(VAE), 3)),
        transformer=fill(library_transformer(config, size), ours),
        scheduler=scheduler or diffusers.CogVideoXDDIMScheduler(),
    )


@pytest.mark.parametrize("kind, size", [("2b", (3, 6, 8)), ("5b", (3, 10, 8)), ("1.5", (4, 6, 10))])
@torch.no_grad()
def test_transformer_equals_diffusers(kind, size):
    config, text = KINDS[kind], [randn(12, 24, seed=1), randn(12, 24, seed=2)]
    ours, pipe = pipeline(config, size)
    x, t = randn(2, 4, *size), torch.tensor([999, 20])
    table = None
    if config.positions != "sincos":
        table = pipe._prepare_rotary_positional_embeddings(8 * size[1], 8 * size[2], size[0], "cpu")
    want = pipe.transformer(x.transpose(1, 2), torch.stack(text), t, image_rotary_emb=table).sample
    got = ours(x, t, ours.prepare(text, size, branches=("a", "b")))
    assert rel(got, want.transpose(1, 2)) < REL


@pytest.mark.parametrize("frames", [1, 9, 13, 17])
@torch.no_grad()
def test_vae_equals_diffusers(frames):
    ours = random(CogVideoXVAE(VAE), 3)
    oracle = fill(library_vae(), ours)
    video = randn(1, 3, frames, 56, 48, seed=3).clamp(-1, 1)
    latents = randn(1, 4, 1 + (frames - 1) // 4, 7, 6, seed=4)
    for tiled in (False, True):
        oracle.enable_tiling() if tiled else oracle.disable_tiling()
        mean, logvar = ours.moments(video, tiled=tiled)
        found = oracle.encode(video).latent_dist
        assert rel(mean, found.mean) < REL
        assert rel(logvar.clamp(-30, 20), found.logvar) < REL
        want = oracle.decode(latents / VAE.scale).sample
        assert rel(ours.decode(latents, tiled=tiled), want) < REL


@torch.no_grad()
def test_a_whole_run_equals_the_pipeline():
    size, text = (4, 6, 8), [randn(12, 24, seed=1), randn(12, 24, seed=2)]
    ours, pipe = pipeline(
        KINDS["1.5"],
        size,
        diffusers.CogVideoXDDIMScheduler(
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
            prediction_type="v_prediction",
            beta_schedule="scaled_linear",
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    noise = randn(1, 4, *size)
    want = pipe(
        prompt_embeds=text[0][None],
        negative_prompt_embeds=text[1][None],
        latents=noise.transpose(1, 2),
        height=48,
        width=64,
        num_frames=9,
        num_inference_steps=5,
        guidance_scale=6.0,
        use_dynamic_cfg=True,
        max_sequence_length=12,
        output_type="latent",
    ).frames
    context = ours.prepare(text, size, branches=("cond", "uncond"))
    schedule = make_table_schedule(replace(DDIM, dynamic_guidance=True), 5)
    got = denoise(Forward(ours, context, True), schedule, noise, NoCache(), guidance_scale=6.0).latents
    assert rel(got.transpose(1, 2), want) < 1e-4
