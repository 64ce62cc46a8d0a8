from dataclasses import replace

import pytest
import torch

from minidit.presets import HunyuanVAEConfig
from minidit.vae.hunyuan_video import HunyuanVAE
from tests.recordings.base import load_upstream
from tests.tensors import randn, random, rel

REL = 2e-5  # fp32 on both sides: nothing but the order of sums
CONFIG = HunyuanVAEConfig(widths=(4, 4, 8, 8), res_blocks=1, latent=4, groups=2, tile=32, tile_frames=16)


@pytest.fixture(scope="module")
def vae() -> HunyuanVAE:
    return random(HunyuanVAE(CONFIG))


@torch.no_grad()
def test_equals_diffusers_with_the_same_random_weights():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    oracle = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2
    ).eval()
    oracle.enable_tiling(32, 32, 16, 24, 24, 12)
    vae = load_upstream(HunyuanVAE(CONFIG), CONFIG, oracle.state_dict())
    for frames, height, width in ((5, 16, 24), (1, 40, 32), (21, 40, 32)):
        video = randn(1, 3, frames, height, width, seed=frames)
        mean, logvar = vae.moments(video)
        found = oracle.encode(video).latent_dist
        assert rel(mean, found.mean) < REL and rel(logvar.clamp(-30, 20), found.logvar) < REL
        z = randn(*mean.shape, seed=frames)
        assert rel(vae.decode(z), oracle.decode(z / CONFIG.scale).sample) < REL


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 8, 10, 13])
def test_any_number_of_latent_frames_gives_its_frames_and_comes_back(vae, frames):
    latents = randn(1, 4, frames, 2, 2)
    video = vae.decode(latents)
    assert video.shape == (1, 3, 4 * frames - 3, 16, 16)
    assert vae.encode(video).shape == latents.shape


@pytest.mark.parametrize("height, width", [(4, 4), (5, 4), (4, 9), (7, 6)])
def test_any_sides_come_back(vae, height, width):
    latents = randn(1, 4, 2, height, width)
    video = vae.decode(latents)
    assert video.shape == (1, 3, 5, 8 * height, 8 * width)
    assert vae.encode(video).shape == latents.shape


def test_the_stream_is_the_whole_decode_tile_by_tile(vae):
    latents = randn(1, 4, 8, 2, 2)
    parts = list(vae.decode_stream(latents))
    assert [part.shape[2] for part in parts] == [13, 12, 4]
    assert torch.equal(torch.cat(parts, dim=2), vae.decode(latents))


def test_frames_do_not_depend_on_later_ones():
    """Within a tile, as tiles are blended; the norms, which see a whole tile, are taken out for this."""
    vae = random(HunyuanVAE(CONFIG))
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    latents = randn(1, 4, 3, 2, 2)
    changed = latents.clone()
    changed[:, :, 2] += 1
    video, other = vae.decode(latents), vae.decode(changed)
    assert torch.equal(video[:, :, :5], other[:, :, :5]) and not torch.equal(video[:, :, 5:], other[:, :, 5:])


def test_smaller_inputs_are_not_tiled(vae):
    one = random(HunyuanVAE(replace(CONFIG, tile=64, tile_frames=32)))
    latents = randn(1, 4, 4, 4, 4)
    assert torch.equal(one.decode(latents), vae.decode(latents))
    wide = randn(1, 4, 4, 4, 5)
    assert rel(one.decode(wide), vae.decode(wide)) > 1e-3


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 12, 16), (1, 4, 5, 16, 16), (3, 5, 16, 16)])
def test_odd_videos_are_refused(vae, shape):
    with pytest.raises(ValueError, match="video is "):
        vae.encode(torch.zeros(shape))


def test_odd_latents_are_refused(vae):
    with pytest.raises(ValueError, match=r"latents are \(1, 3, 2, 2, 2\), want \(B, 4, T, H, W\)"):
        vae.decode(torch.zeros(1, 3, 2, 2, 2))
