from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minidit.vae.cogvideox import CausalConv, CogVideoXVAE, LatentNorm, chunks, stretch
from tests.recordings.base import open_recording
from tests.recordings.cogvideox import run_vae
from tests.tensors import randn, random, rel
from tests.tiny_cogvideox import VAE
from tests.vae.calls import CallsOf

REL = 2e-5  # fp32: what is compared differs in the order of sums only, over some 40 layers


def tiny_vae() -> CogVideoXVAE:
    return random(CogVideoXVAE(VAE), 3)


def test_encode_and_decode_match_the_original(goldens):
    recording = open_recording(goldens("cogvideox_vae"))
    for name, got in run_vae(recording).outs.items():
        assert rel(got, recording.io[name]) < REL, name  # measured 1e-6


@pytest.mark.parametrize(
    "frames, size, want",
    [
        (1, 2, [1]),
        (2, 2, [2]),
        (3, 2, [3]),
        (5, 2, [3, 2]),
        (13, 2, [3, 2, 2, 2, 2, 2]),
        (49, 8, [9] + [8] * 5),
    ],
)
def test_the_first_chunk_takes_the_remainder(frames, size, want):
    assert [part.shape[2] for part in chunks(torch.zeros(1, 1, frames, 1, 1), size)] == want


@pytest.mark.parametrize("frames", [1, 3, 5, 7])
@torch.no_grad()
def test_an_odd_latent_count_gives_four_frames_each_after_the_first(frames):
    vae, z = tiny_vae(), randn(1, 4, frames, 3, 2)
    parts = list(vae.decode_stream(z))
    video = torch.cat(parts, dim=2)
    assert video.shape == (1, 3, 4 * frames - 3, 24, 16)
    assert [part.shape[2] for part in parts[1:]] == [8] * (len(parts) - 1)
    assert vae.encode(video).shape == z.shape


@torch.no_grad()
def test_a_batch_equals_its_videos_alone():
    vae, video, latents = tiny_vae(), randn(2, 3, 9, 16, 24), randn(2, 4, 3, 2, 3)
    for i in range(2):
        assert rel(vae.encode(video[i : i + 1]), vae.encode(video)[i : i + 1]) < REL
        assert rel(vae.decode(latents[i : i + 1]), vae.decode(latents)[i : i + 1]) < REL


@torch.no_grad()
def test_nothing_depends_on_later_chunks():
    vae, latents = tiny_vae(), randn(1, 4, 7, 2, 3)
    whole = vae.decode(latents)
    other = latents.clone()
    other[:, :, 5:] = 0
    changed = vae.decode(other)
    assert torch.equal(whole[:, :, :17], changed[:, :, :17])  # 1 + 4 * 4 frames of the first two chunks
    assert rel(changed[:, :, 17:], whole[:, :, 17:]) > 0.01


@torch.no_grad()
def test_a_convolution_carries_two_frames_from_chunk_to_chunk():
    conv, x, state = random(CausalConv(3, 5)), randn(1, 3, 6, 4, 4), {}
    parts = torch.cat([conv(part, state) for part in x.split((1, 3, 2), dim=2)], dim=2)
    first = torch.cat((x[:, :, :1], x[:, :, :1], x), dim=2)  # the first frame stands for what came before
    want = nn.Conv3d.forward(conv, first)
    assert rel(parts, want) < REL
    assert torch.equal(state[conv], x[:, :, -2:])


@torch.no_grad()
def test_latents_scale_and_shift_each_cell_of_the_decoders_norm():
    norm = random(LatentNorm(2, 6, 1e-6, latent=4))
    x, z = randn(1, 6, 5, 8, 4), randn(1, 4, 3, 4, 2, seed=1)
    at = lambda cells: (
        torch.stack(  # first frame alone, the others in pairs; cells of 2 x 2
            [cells[:, :, 0 if t == 0 else 1 + (t - 1) // 2] for t in range(5)], dim=2
        )
        .repeat_interleave(2, 3)
        .repeat_interleave(2, 4)
    )
    want = F.group_norm(x, 2, norm.norm.weight, norm.norm.bias) * norm.scale(at(z)) + norm.shift(at(z))
    assert rel(norm(x, z), want) < 1e-4  # group_norm's eps here is 1e-5
    assert torch.equal(stretch(z, (5, 8, 4)), at(z))


@torch.no_grad()
def test_tiling_leaves_small_videos_alone_and_changes_large_ones_a_little():
    vae, small, large = tiny_vae(), randn(1, 4, 3, 6, 5), randn(1, 4, 3, 8, 7)
    assert torch.equal(vae.decode(small, tiled=True), vae.decode(small))
    plain, tiled = vae.decode(large), vae.decode(large, tiled=True)
    assert plain.shape == tiled.shape and not torch.equal(plain, tiled)


@torch.no_grad()
def test_tiles_are_decoded_one_after_the_other_and_stream_as_chunks():
    vae, latents, seen = tiny_vae(), randn(1, 4, 5, 8, 7), []
    calls = CallsOf(vae.decoder)
    parts = list(vae.decode_stream(latents, tiled=True, watch=lambda tiles: seen.extend(tiles) or tiles))
    assert torch.equal(torch.cat(parts, dim=2), vae.decode(latents, tiled=True))
    assert [part.shape[2] for part in parts] == [9, 8]
    assert [tile.shape[3:] for tile in seen] == [(6, 5), (6, 3), (3, 5), (3, 3)]  # strides of 5 and 4 cells
    assert calls.shapes[:8] == [(n, *tile.shape[3:]) for tile in seen for n in (3, 2)]
    assert calls.most_pasts == 1


def test_a_tile_that_would_leave_gaps_is_refused():
    vae = CogVideoXVAE(replace(VAE, tile=(32, 40)))
    with pytest.raises(ValueError, match="tiles of .* would leave gaps"):
        vae.decode_stream(randn(1, 4, 1, 2, 2), tiled=True)


@pytest.mark.parametrize("shape", [(1, 3, 3, 2, 2), (4, 3, 2, 2), (1, 4, 0, 2, 2)])
def test_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"latents of shape .*, want \(B, 4, T, H, W\)"):
        tiny_vae().decode(torch.zeros(shape))
