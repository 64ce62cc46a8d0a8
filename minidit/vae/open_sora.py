"""Open-Sora 1.2 video autoencoder (Zheng et al., 2024): one over time upon an image autoencoder.

Follows hpcaitech/Open-Sora v1.2.0 vae.py and vae_temporal.py. The image part halves the sides three times,
frame by frame; the part over time keeps the sides and codes 17 frames as 5, each chunk of them alone.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.presets import KLConfig, OpenSoraVAEConfig
from minidit.vae.kl import KLVAE
from minidit.vae.tiles import Tiles, Watch

TIME_EPS = 1e-5  # of the norms over time; those of the image part have config.eps


class CausalConv(nn.Conv3d):
    """A convolution with zeros around each frame and before the first. x (B, C, T, H, W)"""

    def __init__(self, c_in: int, c_out: int, *, size: int = 3, stride: int = 1, bias: bool = True):
        pad = size // 2
        super().__init__(c_in, c_out, size, stride=(stride, 1, 1), padding=(0, pad, pad), bias=bias)
        self.before = size - stride if size > 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.before, 0)))


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, beside a shortcut. The norms see all frames of a chunk."""

    def __init__(self, c_in: int, c_out: int, config: OpenSoraVAEConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.time_groups, c_in, TIME_EPS)
        self.conv1 = CausalConv(c_in, c_out, bias=False)
        self.norm2 = nn.GroupNorm(config.time_groups, c_out, TIME_EPS)
        self.conv2 = CausalConv(c_out, c_out, bias=False)
        self.shortcut = CausalConv(c_in, c_out, size=1, bias=False) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def blocks(c_in: int, c_out: int, config: OpenSoraVAEConfig) -> nn.Sequential:
    count = config.time_blocks
    return nn.Sequential(*(ResBlock(c_out if j else c_in, c_out, config) for j in range(count)))


class EncoderLevel(nn.Module):
    """Blocks and, where time is halved, a strided convolution."""

    def __init__(self, c_in: int, c_out: int, config: OpenSoraVAEConfig, *, halves: bool):
        super().__init__()
        self.blocks = blocks(c_in, c_out, config)
        self.down = CausalConv(c_out, c_out, stride=2) if halves else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.down is None else self.down(x)


class DecoderLevel(nn.Module):
    """Blocks and, where time is doubled, a convolution to two frames each."""

    def __init__(self, c_in: int, c_out: int, config: OpenSoraVAEConfig, *, doubles: bool):
        super().__init__()
        self.blocks = blocks(c_in, c_out, config)
        self.up = CausalConv(c_out, 2 * c_out) if doubles else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.up is None else rearrange(self.up(x), "b (c n) t h w -> b c (t n) h w", n=2)


class TimeEncoder(nn.Module):
    """A chunk of image latents to twice the latent channels: (B, C, 4T, H, W) -> (B, 2C, T, H, W)"""

    def __init__(self, config: OpenSoraVAEConfig):
        super().__init__()
        widths = [config.time_base * m for m in config.time_multipliers]
        self.conv_in = CausalConv(config.latent, config.time_base, bias=False)
        self.levels = nn.Sequential(
            *(
                EncoderLevel(c_in, c_out, config, halves=halves)
                for (c_in, c_out), halves in zip(
                    pairwise([config.time_base, *widths]), (*config.temporal_down, False), strict=True
                )
            )
        )
        self.mid = blocks(widths[-1], widths[-1], config)
        self.norm_out = nn.GroupNorm(config.time_groups, widths[-1], TIME_EPS)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent, size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.levels(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class TimeDecoder(nn.Module):
    """A chunk of latents to image latents: (B, C, T, H, W) -> (B, C, 4T, H, W)"""

    def __init__(self, config: OpenSoraVAEConfig):
        super().__init__()
        widths = [config.time_base * m for m in reversed(config.time_multipliers)]
        doubles = (*reversed(config.temporal_down), False)  # a level's own halving, undone after it
        self.conv_in = CausalConv(config.latent, widths[0])
        self.mid = blocks(widths[0], widths[0], config)
        self.levels = nn.Sequential(
            *(
                DecoderLevel(c_in, c_out, config, doubles=d)
                for (c_in, c_out), d in zip(pairwise([widths[0], *widths]), doubles, strict=True)
            )
        )
        self.norm_out = nn.GroupNorm(config.time_groups, widths[-1], TIME_EPS)
        self.conv_out = CausalConv(widths[-1], config.latent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.levels(self.mid(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class OpenSoraVAE(nn.Module):
    """Video (B, 3, T, H, W) in [-1, 1] to normalised latents (B, C, t, H / 8, W / 8) and back.

    17 frames have 5 latents; a last chunk of n frames has n / 4, rounded up: zeros stand before its frames to
    make them a multiple of 4, and go again. tiled: the image part decodes in tiles (see KLVAE); less memory,
    other pixels. Runs, and answers, in the dtype of its weights.
    """

    keep_fp32 = ()

    def __init__(self, config: OpenSoraVAEConfig):
        super().__init__()
        self.config = config
        self.image = KLVAE(
            KLConfig(
                config.widths, config.res_blocks, config.latent, config.groups, config.scale, eps=config.eps
            )
        )
        self.time_encoder, self.time_decoder = TimeEncoder(config), TimeDecoder(config)
        self.quant = CausalConv(2 * config.latent, 2 * config.latent, size=1)
        self.post_quant = CausalConv(config.latent, config.latent, size=1)

    @property
    def time_stride(self) -> int:
        """Frames per latent frame, leaving aside the zeros."""
        return 2 ** sum(self.config.temporal_down)

    @property
    def chunk(self) -> int:
        """Latent frames of a whole chunk."""
        return -(-self.config.chunk // self.time_stride)

    def latent_frames(self, num_frames: int) -> int:
        whole, rest = divmod(num_frames, self.config.chunk)
        return whole * self.chunk + -(-rest // self.time_stride)

    def encode(self, video: Tensor, *, noise: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Normalised latents: the means or, with noise, samples of both parts' distributions.

        video (B, 3, T, H, W) · noise: two of N(0, 1), (B, C, T, h, w) and (B, C, t, h, w) -> (B, C, t, h, w)
        """
        frames = sampled(*self.image.moments(video), noise and noise[0]) * self.config.scale
        moments = [self.encode_chunk(part) for part in frames.split(self.config.chunk, dim=2)]
        z = sampled(*torch.cat(moments, dim=2).chunk(2, dim=1), noise and noise[1])
        mean, std = self.statistics(z.device)
        return ((z - mean) / std).to(z.dtype)

    def encode_chunk(self, frames: Tensor) -> Tensor:
        """frames (B, C, T, h, w), of the image part -> mean and log-variance (B, 2C, t, h, w)"""
        padded = F.pad(frames, (0, 0, 0, 0, -frames.shape[2] % self.time_stride, 0))
        return self.quant(self.time_encoder(padded))

    def decode(self, latents: Tensor, *, num_frames: int | None = None, tiled: bool = False) -> Tensor:
        """Pixels, not clamped. latents (B, C, t, h, w), normalised -> (B, 3, T, H, W)"""
        frames = list(self.decode_stream(latents, num_frames=num_frames, tiled=tiled))
        return torch.cat(frames, dim=2).to(latents.device)

    def decode_stream(
        self, latents: Tensor, *, num_frames: int | None = None, tiled: bool = False, watch: Watch = iter
    ) -> Iterator[Tensor]:
        """`decode` frame by frame, in CPU memory where tiles were joined.

        num_frames: as many as the latents can hold, if not given · watch: wraps the tiles as they are decoded
        """
        if latents.ndim != 5 or latents.shape[1] != self.config.latent or 0 in latents.shape:
            want = f"(B, {self.config.latent}, T, H, W)"
            raise ValueError(f"latents are {tuple(latents.shape)}, want {want}; pass what encode returns")
        mean, std = self.statistics(latents.device)
        z = (latents * std + mean).to(self.quant.weight.dtype)
        frames = num_frames or self.frames_of(latents.shape[2])
        if self.latent_frames(frames) != latents.shape[2]:
            raise ValueError(
                f"{frames} frames have {self.latent_frames(frames)} latents, not {latents.shape[2]}"
            )
        return self.decode_images(self.decode_chunks(z, frames), tiled, watch)

    def decode_chunks(self, z: Tensor, frames: int) -> Iterator[Tensor]:
        """z (B, C, t, h, w), not normalised -> image latents of every chunk, (B, C, n, h, w)"""
        for part in z.split(self.chunk, dim=2):
            count = min(frames, self.config.chunk)
            frames -= count
            yield self.time_decoder(self.post_quant(part))[:, :, -count:]  # what stands before are zeros

    def decode_images(self, chunks: Iterator[Tensor], tiled: bool, watch: Watch) -> Iterator[Tensor]:
        """Image latents to pixels, frame by frame.

        Only this part has tiles. That over time works on latents, and its norms would see a tile for a plane.
        A tile takes the frames of all chunks, which are no more than latents, before the next one starts.
        """
        for part in [torch.cat(list(chunks), dim=2)] if tiled else chunks:
            yield from self.image.decode_stream(part, tiled=tiled, watch=watch)

    @property
    def tiles(self) -> Tiles:
        """Of image latents."""
        return self.image.tiles

    def frames_of(self, latent_frames: int) -> int:
        """The frames of so many latents: all that fit, but one latent alone is an image."""
        whole, rest = divmod(latent_frames, self.chunk)
        return 1 if latent_frames == 1 else whole * self.config.chunk + rest * self.time_stride

    def statistics(self, device: torch.device) -> Tensor:
        """The latents' mean and std, stacked: (2, C, 1, 1, 1), in fp32 whatever the weights are."""
        return torch.tensor((self.config.mean, self.config.std), device=device)[..., None, None, None]

    def activation_bytes(
        self, width: int, height: int, num_frames: int, item: int, *, tiled: bool = False
    ) -> int:
        """An estimate for decoding: the larger of both parts. item: bytes of the dtype

        The part over time: twelve maps of a whole chunk, measured on a CPU.
        """
        image, c = self.image.activation_bytes(width, height, num_frames, item, tiled=tiled), self.config
        return max(image, width // 8 * (height // 8) * 20 * c.time_base * item * 12)


def sampled(mean: Tensor, logvar: Tensor, noise: Tensor | None) -> Tensor:
    """A sample of a diagonal Gaussian, or its mean."""
    return mean if noise is None else mean + (logvar.clamp(-30, 20) / 2).exp() * noise.to(mean)
