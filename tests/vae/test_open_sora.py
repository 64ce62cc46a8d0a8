import os

import pytest
import torch

from minidit.presets import OpenSoraVAEConfig
from minidit.vae.open_sora import CausalConv, OpenSoraVAE
from tests.recordings.base import open_recording
from tests.recordings.open_sora import run_open_sora_vae
from tests.tensors import randn, rel

TINY = OpenSoraVAEConfig(
    widths=(8, 8, 16, 16), res_blocks=1, groups=4, time_base=8, time_blocks=1, time_groups=4
)
REL = 2e-5  # fp32: recordings differ in the order of sums only, over some 60 layers


@pytest.fixture(scope="module")
def vae() -> OpenSoraVAE:
    vae, generator = OpenSoraVAE(TINY).requires_grad_(False), torch.Generator().manual_seed(1)
    for name, p in vae.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        is_gain = "norm" in name and name.endswith("weight")
        p.data = noise * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1 * noise + is_gain
    return vae


@pytest.mark.skipif("MINIDIT_GOLDENS" not in os.environ, reason="this recording is too large to ship")
@torch.no_grad()
def test_encode_and_decode_match_the_original(goldens):
    recording = open_recording(goldens("open_sora_vae"))
    outs = run_open_sora_vae(recording).outs
    assert len(outs) == 9  # three clips, encoded to means and to samples, and decoded
    for name, out in outs.items():
        assert rel(out, recording.io[name]) < REL  # measured 4e-6


@pytest.mark.parametrize("frames, latents", [(1, 1), (17, 5), (18, 6), (21, 6), (22, 7), (34, 10), (51, 15)])
@torch.no_grad()
def test_frames_and_latents_match(vae, frames, latents):
    assert vae.latent_frames(frames) == latents
    z = vae.encode(randn(1, 3, frames, 8, 16))
    assert z.shape == (1, 4, latents, 1, 2)
    assert vae.decode(z, num_frames=frames).shape == (1, 3, frames, 8, 16)


@torch.no_grad()
def test_chunks_share_nothing(vae):
    video = randn(1, 3, 25, 8, 8)
    first, second = vae.encode(video[:, :, :17]), vae.encode(video[:, :, 17:])
    assert rel(vae.encode(video), torch.cat((first, second), dim=2)) < 1e-6
    z = randn(1, 4, 7, 1, 1)
    whole, rest = vae.decode(z[:, :, :5], num_frames=17), vae.decode(z[:, :, 5:], num_frames=8)
    assert rel(vae.decode(z, num_frames=25), torch.cat((whole, rest), dim=2)) < 1e-6


@torch.no_grad()
def test_latents_alone_tell_the_frames_they_can_hold(vae):
    for latents, frames in ((1, 1), (2, 8), (5, 17), (6, 21), (15, 51)):
        assert vae.decode(randn(1, 4, latents, 1, 1)).shape[2] == frames


@torch.no_grad()
def test_sides_are_cut_to_whole_cells(vae):
    assert vae.encode(randn(1, 3, 1, 20, 26)).shape == (1, 4, 1, 2, 3)  # 426 pixels have 53 cells


@torch.no_grad()
def test_noise_draws_from_the_distribution(vae):
    video, shapes = randn(1, 3, 17, 8, 8), ((1, 4, 17, 1, 1), (1, 4, 5, 1, 1))
    mean = vae.encode(video)
    assert torch.equal(vae.encode(video, noise=tuple(torch.zeros(s) for s in shapes)), mean)
    drawn = [vae.encode(video, noise=tuple(randn(*s, seed=n) for s in shapes)) for n in (1, 2)]
    assert rel(drawn[0], mean) > 1e-3 and rel(drawn[0], drawn[1]) > 1e-3


@torch.no_grad()
def test_the_image_part_is_decoded_in_tiles_and_the_part_over_time_whole(vae):
    latents, seen = randn(1, 4, 6, 4, 40), []
    options = {"num_frames": 18, "tiled": True}
    parts = list(vae.decode_stream(latents, watch=lambda tiles: seen.extend(tiles) or tiles, **options))
    assert [part.shape[2] for part in parts] == [1] * 18
    assert [tile.shape[2:] for tile in seen] == [(18, 4, 32), (18, 4, 16)]  # of all chunks
    mean, std = vae.statistics(latents.device)
    frames = torch.cat(list(vae.decode_chunks(latents * std + mean, 18)), dim=2)
    want = vae.image.decode(frames, tiled=True)
    assert torch.equal(torch.cat(parts, dim=2), want) and torch.equal(vae.decode(latents, **options), want)
    assert rel(vae.decode(latents, num_frames=18), want) > 0.01


@torch.no_grad()
def test_planes_no_larger_than_a_tile_are_decoded_whole(vae):
    latents = randn(1, 4, 6, 2, 32)
    assert torch.equal(vae.decode(latents, tiled=True), vae.decode(latents))


def test_time_is_causal_and_starts_from_zeros():
    conv, x = CausalConv(2, 3), randn(1, 2, 5, 3, 3)
    other = x.clone()
    other[:, :, 3] += 1
    same = (conv(x) == conv(other)).flatten(3).all(3).all(1)[0]
    assert same.tolist() == [True, True, True, False, False]
    strided = CausalConv(2, 3, stride=2)
    assert strided.before == 1 and strided(randn(1, 2, 20, 3, 3)).shape[2] == 10


def test_a_count_that_does_not_fit_is_refused(vae):
    with pytest.raises(ValueError, match="18 frames have 6 latents, not 5"):
        vae.decode(randn(1, 4, 5, 1, 1), num_frames=18)
    with pytest.raises(ValueError, match=r"latents are \(1, 3, 5, 1, 1\), want \(B, 4, T, H, W\)"):
        vae.decode(randn(1, 3, 5, 1, 1))
