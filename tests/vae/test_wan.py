import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from minidit.presets import WAN21_MEAN, WAN21_STD, WanVAEConfig
from minidit.vae.wan import CausalConv, ChannelNorm, WanVAE
from tests.recordings.base import load_upstream
from tests.tensors import randn, rel
from tests.vae.calls import CallsOf

TINY = WanVAEConfig(base=4, latent=3, mean=(0.2, -0.5, 0.0), std=(1.5, 0.7, 2.0), res_blocks=1)
REL = 2e-5  # fp32: chunks and recordings differ in the order of sums only, over some 40 layers


def tiny_vae() -> WanVAE:
    """Random weights that keep activations near 1, biases and gains included."""
    vae = WanVAE(TINY)
    generator = torch.Generator().manual_seed(1)
    for name, p in vae.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise * p[0].numel() ** -0.5
        else:
            p.data = 0.1 * noise + (1.0 if "norm" in name else 0.0)
    return vae


@pytest.fixture
def recorded(goldens) -> tuple[WanVAE, dict[str, Tensor]]:
    folder = goldens("wan_vae")
    config = WanVAEConfig(base=6, latent=16, mean=WAN21_MEAN, std=WAN21_STD)
    vae = load_upstream(WanVAE(config), config, load_file(folder / "weights.safetensors"))
    return vae, load_file(folder / "io.safetensors")


@pytest.mark.parametrize("chunk", [1, 2, None])
@torch.no_grad()
def test_encode_and_decode_match_the_original(recorded, chunk):
    vae, io = recorded
    assert rel(vae.encode(io["in.video"], chunk=chunk), io["out.mu"]) < REL
    assert rel(vae.decode(io["in.z"], chunk=chunk), io["out.decoded"]) < REL
    assert rel(vae.decode(io["out.mu"], chunk=chunk), io["out.decoded_of_mu"]) < REL


@pytest.mark.parametrize("chunk", [2, 3, None])
@torch.no_grad()
def test_chunk_size_does_not_change_the_result(chunk):
    vae, video, latents = tiny_vae(), randn(1, 3, 17, 16, 24), randn(1, 3, 5, 2, 3)
    for got, want in zip(vae.moments(video, chunk=chunk), vae.moments(video), strict=True):
        assert rel(got, want) < REL
    assert rel(vae.decode(latents, chunk=chunk), vae.decode(latents)) < REL


@torch.no_grad()
def test_a_batch_equals_its_videos_alone():
    vae, video, latents = tiny_vae(), randn(2, 3, 9, 16, 24), randn(2, 3, 3, 2, 3)
    for i in range(2):  # on a CPU a single video takes another convolution
        assert rel(vae.encode(video[i : i + 1]), vae.encode(video)[i : i + 1]) < REL
        assert rel(vae.decode(latents[i : i + 1]), vae.decode(latents)[i : i + 1]) < REL


def test_chunk_size_does_not_change_the_gradients():
    vae, video = tiny_vae(), randn(1, 3, 9, 16, 16)
    grads = []
    for chunk in (1, None):
        vae.zero_grad()
        mu, logvar = vae.moments(video, chunk=chunk)
        (vae.decode(mu, chunk=chunk).square().mean() + logvar.square().mean()).backward()
        grads.append({name: p.grad for name, p in vae.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        assert rel(grads[1][name], grad) < 1e-3, (
            name
        )  # sums of cancelling terms lose more digits than the output


@torch.no_grad()
def test_nothing_depends_on_later_frames():
    vae, video, latents = tiny_vae(), randn(1, 3, 13, 16, 16), randn(1, 3, 4, 2, 2)
    for cut in (1, 2, 3):
        pixels = 1 + 4 * (cut - 1)
        assert torch.equal(vae.encode(video[:, :, :pixels]), vae.encode(video)[:, :, :cut])
        assert torch.equal(vae.decode(latents[:, :, :cut]), vae.decode(latents)[:, :, :pixels])


@torch.no_grad()
def test_later_frames_depend_on_earlier_ones():
    vae, video, latents = tiny_vae(), randn(1, 3, 9, 16, 16), randn(1, 3, 3, 2, 2)
    other_video, other_latents = video.clone(), latents.clone()
    other_video[:, :, 4] += 1
    other_latents[:, :, 1] += 1
    assert rel(vae.encode(other_video)[:, :, 2], vae.encode(video)[:, :, 2]) > 1e-3
    assert rel(vae.decode(other_latents)[:, :, 5:], vae.decode(latents)[:, :, 5:]) > 1e-3


@torch.no_grad()
def test_a_call_leaves_nothing_behind():
    vae, video = tiny_vae(), randn(1, 3, 5, 16, 16)
    before = vae.encode(video)
    vae.encode(randn(1, 3, 9, 24, 8, seed=3))
    stream = vae.decode_stream(randn(1, 3, 3, 2, 2))
    next(stream)  # abandoned half-way
    assert torch.equal(vae.encode(video), before)


@torch.no_grad()
def test_decode_stream_yields_the_frames_of_decode_as_they_come():
    vae, latents = tiny_vae(), randn(1, 3, 4, 2, 2)
    parts = list(vae.decode_stream(latents, chunk=2))
    assert [part.shape[2] for part in parts] == [1, 8, 4]
    assert torch.equal(torch.cat(parts, dim=2), vae.decode(latents, chunk=2))


@torch.no_grad()
def test_tiles_equal_those_of_diffusers_with_the_same_random_weights():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    oracle = diffusers.AutoencoderKLWan(base_dim=4, z_dim=3, num_res_blocks=1, dim_mult=[1, 2, 4, 4]).eval()
    oracle.enable_tiling()
    vae = load_upstream(WanVAE(TINY), TINY, oracle.state_dict())
    for frames, height, width in ((2, 36, 40), (3, 10, 33)):  # strides of 24 cells do not divide them evenly
        latents = randn(1, 3, frames, height, width)
        mean, std = vae.statistics(latents.device)
        got, want = vae.decode(latents, tiled=True), oracle.decode(latents * std + mean).sample
        assert rel(got.clamp(-1, 1), want) < 1e-4  # whole planes of this size too are up to 5e-5 apart
        assert rel(vae.decode(latents), got) > 0.01 and want.abs().mean() < 0.5  # hardly clamped


@torch.no_grad()
def test_tiles_are_decoded_one_after_the_other_and_stream_as_chunks():
    vae, latents, seen = tiny_vae(), randn(1, 3, 4, 33, 8), []
    calls = CallsOf(vae.decoder)
    watch = lambda tiles: seen.extend(tiles) or tiles
    parts = list(vae.decode_stream(latents, chunk=2, tiled=True, watch=watch))
    assert [part.shape[2] for part in parts] == [1, 8, 4]
    assert calls.shapes == [(n, *tile.shape[3:]) for tile in seen for n in (1, 2, 1)] and len(seen) == 2
    assert calls.most_pasts == 1
    assert torch.equal(torch.cat(parts, dim=2), vae.decode(latents, chunk=2, tiled=True))


@torch.no_grad()
def test_planes_no_larger_than_a_tile_are_decoded_whole():
    vae, latents = tiny_vae(), randn(1, 3, 2, 32, 20)
    assert torch.equal(vae.decode(latents, tiled=True), vae.decode(latents))


@torch.no_grad()
def test_latents_are_normalised_with_the_config():
    vae, video = tiny_vae(), randn(1, 3, 5, 16, 16)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (TINY.mean, TINY.std))
    assert rel(vae.encode(video) * std + mean, vae.moments(video)[0]) < 1e-6


@torch.no_grad()
def test_bf16_weights_give_bf16_results_near_fp32():
    vae, video, latents = tiny_vae(), randn(1, 3, 9, 16, 16), randn(1, 3, 3, 2, 2)
    mu, pixels = vae.encode(video), vae.decode(latents)
    vae.bfloat16()
    for got, want in ((vae.encode(video), mu), (vae.decode(latents), pixels)):
        assert got.dtype == torch.bfloat16
        error = (got.float() - want).square().mean() / want.square().mean()
        assert error < 0.08**2  # 8 bits, 2^-9 per rounding, through some 40 layers (measured 0.04)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)])
def test_taps_as_channels_equals_the_3d_convolution(kernel):
    conv, x = CausalConv(3, 5, kernel), randn(2, 3, 6, 4, 5)
    assert rel(conv.taps_as_channels(x), F.conv3d(x, conv.weight, conv.bias, padding=conv.padding)) < 1e-5
    padded = F.pad(x, (0, 0, 0, 0, 2, 0))  # a fresh state means zeros before the video
    assert rel(conv(x, {}), F.conv3d(padded, conv.weight, conv.bias, padding=conv.padding)) < 1e-5


def test_channel_norm_is_normalize_and_keeps_zeros():
    norm, x = ChannelNorm(6), randn(2, 6, 2, 3, 3)
    norm.weight.data = randn(6, seed=2)
    normalize = lambda x: F.normalize(x, dim=1) * 6**0.5 * norm.weight.view(-1, 1, 1, 1)
    x.requires_grad_()
    grads = [torch.autograd.grad(fn(x).pow(3).sum(), x)[0] for fn in (norm, normalize)]
    assert rel(norm(x), normalize(x)) < 1e-6
    assert rel(*grads) < 1e-5
    assert norm(torch.zeros_like(x)).abs().max() == 0


def test_strides_follow_the_config():
    vae = WanVAE(WanVAEConfig(4, 1, (0.0,), (1.0,), multipliers=(1, 2), res_blocks=1, temporal_down=(True,)))
    assert (vae.time_stride, vae.space_stride) == (2, 2)
    assert vae.encode(randn(1, 3, 5, 6, 4)).shape == (1, 1, 3, 3, 2)
    assert vae.decode(randn(1, 1, 3, 3, 2)).shape == (1, 3, 5, 6, 4)
    assert (tiny_vae().time_stride, tiny_vae().space_stride) == (4, 8)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 50, 16, 16), r"frames=50 is not 4n\+1; nearest are 49 and 53"),
        ((1, 3, 2, 16, 16), r"frames=2 is not 4n\+1; nearest are 1 and 5"),
        ((1, 3, 5, 20, 16), "height=20 is not 8n; nearest are 16 and 24"),
        ((1, 3, 5, 16, 5), "width=5 is not 8n; nearest is 8"),
        ((1, 4, 5, 16, 16), r"video is \(1, 4, 5, 16, 16\), want \(B, 3, T, H, W\)"),
        ((3, 5, 16, 16), r"want \(B, 3, T, H, W\)"),
        ((1, 3, 0, 16, 16), r"want \(B, 3, T, H, W\)"),
    ],
)
def test_bad_video_sizes_are_refused_with_the_nearest(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_vae().encode(torch.zeros(shape))


def test_bad_latents_and_chunks_are_refused_before_decoding():
    vae = tiny_vae()
    with pytest.raises(ValueError, match=r"want \(B, 3, T, H, W\)"):
        vae.decode_stream(torch.zeros(1, 16, 2, 2, 2))
    with pytest.raises(ValueError, match="chunk=0 is not a count"):
        vae.decode_stream(torch.zeros(1, 3, 2, 2, 2), chunk=0)
    with pytest.raises(ValueError, match="chunk=0 is not a count"):
        vae.encode(torch.zeros(1, 3, 5, 16, 16), chunk=0)
