import os

import pytest
import torch

from minidit.presets import KLConfig
from minidit.vae.kl import KLVAE
from tests.recordings.base import load_upstream, open_recording
from tests.recordings.latte import frames_of, kl_vae
from tests.tensors import randn, rel

TINY = KLConfig(widths=(8, 8, 16, 16), res_blocks=1, latent=3, groups=4)
TEMPORAL = KLConfig(widths=(8, 8, 16, 16), res_blocks=1, latent=3, groups=4, is_temporal=True, chunk=4)
REL = 2e-5  # fp32: recordings differ in the order of sums only, over some 40 layers


def tiny_vae(config: KLConfig) -> KLVAE:
    vae, generator = KLVAE(config).requires_grad_(False), torch.Generator().manual_seed(1)
    for name, p in vae.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise * p[0].numel() ** -0.5
        else:
            p.data = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return vae


too_large = pytest.mark.skipif("MINIDIT_GOLDENS" not in os.environ, reason="too large to ship")


@pytest.mark.parametrize(
    "name", ["latte_vae_kl", pytest.param("latte_vae_temporal_decoder", marks=too_large)]
)
@torch.no_grad()
def test_encode_and_decode_match_the_original(goldens, name):
    recording = open_recording(goldens(name))
    io, vae = recording.io, kl_vae(recording)
    mean, logvar = vae.moments(io["in.pixels"][:, :, None])
    assert rel(mean[:, :, 0], io["out.encode_mean"]) < REL
    assert rel(logvar[:, :, 0], io["out.encode_logvar"]) < REL
    video = vae.decode(io["in.latents"])  # measured 1e-6
    assert rel(video.transpose(1, 2).flatten(0, 1), io["out.decode_float"]) < REL
    levels = frames_of(video).int() - io["out.video_uint8"].int()  # truncated: a last bit may show
    assert levels.abs().max() <= 1 and (levels != 0).float().mean() < 1e-3


@torch.no_grad()
def test_the_plain_decoder_takes_frames_alone_and_the_temporal_one_chunks():
    latents = randn(1, 3, 6, 2, 3)
    other = latents.clone()
    other[:, :, 4] += 1
    changed = lambda vae: (vae.decode(latents) != vae.decode(other)).flatten(3).any(3).any(1)[0].tolist()
    assert changed(tiny_vae(TINY)) == [False, False, False, False, True, False]
    assert changed(tiny_vae(TEMPORAL)) == [False, False, False, False, True, True]  # 4 + 2 frames


@pytest.mark.parametrize("config, sizes", [(TINY, [1, 1, 1, 1, 1]), (TEMPORAL, [4, 1])])
@torch.no_grad()
def test_decode_stream_yields_the_frames_of_decode_as_they_come(config, sizes):
    vae, latents = tiny_vae(config), randn(1, 3, 5, 2, 3)
    parts = list(vae.decode_stream(latents))
    assert [part.shape[2] for part in parts] == sizes
    assert torch.equal(torch.cat(parts, dim=2), vae.decode(latents))


@torch.no_grad()
def test_tiles_equal_those_of_diffusers_with_the_same_random_weights():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    oracle = diffusers.AutoencoderKL(
        block_out_channels=TINY.widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=256,  # a tile
    ).eval()
    oracle.enable_tiling()
    vae = load_upstream(KLVAE(TINY), TINY, oracle.state_dict())
    latents = randn(1, 3, 2, 36, 40)  # strides of 24 cells do not divide them evenly
    got, want = vae.decode(latents, tiled=True), oracle.decode(latents[0].transpose(0, 1) / TINY.scale).sample
    assert rel(got[0].transpose(0, 1), want) < REL
    assert rel(vae.decode(latents), got) > 0.01


@torch.no_grad()
def test_the_temporal_decoder_decodes_chunk_by_chunk_within_a_tile():
    vae, latents, seen = tiny_vae(TEMPORAL), randn(1, 3, 6, 20, 40), []
    parts = list(vae.decode_stream(latents, tiled=True, watch=lambda tiles: seen.extend(tiles) or tiles))
    video = vae.decode(latents, tiled=True)
    assert [part.shape[2] for part in parts] == [4, 2] and torch.equal(torch.cat(parts, dim=2), video)
    left, right = (vae.decode(tile) for tile in (latents[..., :32], latents[..., 24:]))
    assert [tile.shape[4] for tile in seen] == [32, 16] and video.shape == (1, 3, 6, 160, 320)
    assert torch.equal(video[..., :192], left[..., :192]) and torch.equal(video[..., 256:], right[..., 64:])
    assert rel(video[..., 224], (left[..., 224] + right[..., 32]) / 2) < 1e-6


@pytest.mark.parametrize("config", [TINY, TEMPORAL])
@torch.no_grad()
def test_planes_no_larger_than_a_tile_are_decoded_whole(config):
    vae, latents = tiny_vae(config), randn(1, 3, 2, 32, 32)
    assert torch.equal(vae.decode(latents, tiled=True), vae.decode(latents))


@torch.no_grad()
def test_a_batch_equals_its_videos_alone():
    vae, latents = tiny_vae(TEMPORAL), randn(2, 3, 5, 2, 3)
    for i in range(2):  # the original lets a chunk of a batch straddle two videos; here none does
        assert rel(vae.decode(latents[i : i + 1]), vae.decode(latents)[i : i + 1]) < REL


@torch.no_grad()
def test_latents_are_scaled_with_the_config():
    vae, video = tiny_vae(TINY), randn(1, 3, 2, 16, 16)
    assert vae.encode(video).shape == (1, 3, 2, 2, 2)
    assert torch.equal(vae.encode(video), vae.moments(video)[0] * 0.18215)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"video is \(1, 3, 2, 7, 16\), want .* sides of at least 8"):
        tiny_vae(TINY).encode(torch.zeros(1, 3, 2, 7, 16))
    with pytest.raises(ValueError, match=r"latents are \(1, 4, 2, 2, 2\), want \(B, 3, T, H, W\)"):
        tiny_vae(TINY).decode(torch.zeros(1, 4, 2, 2, 2))
