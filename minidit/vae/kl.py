"""Image autoencoder of latent diffusion (Rombach et al., 2022), frame by frame, and its temporal decoder.

Follows diffusers' AutoencoderKL and, if config.is_temporal, AutoencoderKLTemporalDecoder (Blattmann et al.,
2023): the same networks, but every residual block of the decoder goes on with one over time.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.attention import attention
from minidit.presets import KLConfig
from minidit.vae.tiles import Tiles, Watch, pixels_in_hand

TIME_EPS = 1e-5  # of the norms over time; those of single frames have config.eps
TILE = 256  # pixels along each side, as in the release's config of diffusers' AutoencoderKL


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, beside a shortcut. x (B, C, H, W)"""

    def __init__(self, c_in: int, c_out: int, config: KLConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, c_in, config.eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.groups, c_out, config.eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class TimeBlock(nn.Module):
    """As ResBlock, with convolutions over time alone. x (1, C, T, H, W)"""

    def __init__(self, channels: int, config: KLConfig):
        super().__init__()
        conv = lambda: nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.norm1, self.conv1 = nn.GroupNorm(config.groups, channels, TIME_EPS), conv()
        self.norm2, self.conv2 = nn.GroupNorm(config.groups, channels, TIME_EPS), conv()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class SpaceTimeBlock(nn.Module):
    """A ResBlock and a TimeBlock upon it, blended by one learned weight. x (T, C, H, W): one chunk"""

    def __init__(self, c_in: int, c_out: int, config: KLConfig):
        super().__init__()
        self.space, self.time = ResBlock(c_in, c_out, config), TimeBlock(c_out, config)
        self.mix = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        space = self.space(x)
        time = self.time(space.transpose(0, 1)[None])[0].transpose(0, 1)
        return torch.lerp(space, time, self.mix.sigmoid().to(space.dtype))


class FrameAttention(nn.Module):
    """Self-attention within each frame: one head as wide as the channels. x (B, C, H, W)"""

    def __init__(self, channels: int, config: KLConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, config.eps)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        out = self.out(attention(*self.qkv(tokens).chunk(3, dim=-1)))
        return x + rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2])


class Middle(nn.Module):
    """The coarsest level: block, attention, block."""

    def __init__(self, channels: int, config: KLConfig, kind: type[nn.Module]):
        super().__init__()
        self.block1, self.block2 = kind(channels, channels, config), kind(channels, channels, config)
        self.attn = FrameAttention(channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attn(self.block1(x)))


class EncoderLevel(nn.Module):
    """Blocks and, but for the last level, a halving of both sides."""

    def __init__(self, c_in: int, c_out: int, config: KLConfig, *, halves: bool):
        super().__init__()
        count = config.res_blocks
        self.blocks = nn.ModuleList(ResBlock(c_out if j else c_in, c_out, config) for j in range(count))
        self.down = nn.Conv2d(c_out, c_out, 3, stride=2) if halves else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.down is None else self.down(F.pad(x, (0, 1, 0, 1)))


class DecoderLevel(nn.Module):
    """Blocks and, but for the last level, a doubling of both sides."""

    def __init__(self, c_in: int, c_out: int, config: KLConfig, kind: type[nn.Module], *, doubles: bool):
        super().__init__()
        count = config.res_blocks + 1
        self.blocks = nn.ModuleList(kind(c_out if j else c_in, c_out, config) for j in range(count))
        self.up = nn.Conv2d(c_out, c_out, 3, padding=1) if doubles else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.up is None else self.up(F.interpolate(x, scale_factor=2.0))


class Encoder(nn.Module):
    """Frames to twice the latent channels: (B, 3, H, W) -> (B, 2C, H/8, W/8)"""

    def __init__(self, config: KLConfig):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            EncoderLevel(c_in, c_out, config, halves=i < last)
            for i, (c_in, c_out) in enumerate(pairwise([widths[0], *widths]))
        )
        self.mid = Middle(widths[-1], config, ResBlock)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], config.eps)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Frames of latents to pixels: (B, C, H, W) -> (B, 3, 8H, 8W). A temporal one takes a chunk as B."""

    def __init__(self, config: KLConfig):
        super().__init__()
        widths, last = config.widths[::-1], len(config.widths) - 1
        kind = SpaceTimeBlock if config.is_temporal else ResBlock
        self.conv_in = nn.Conv2d(config.latent, widths[0], 3, padding=1)
        self.mid = Middle(widths[0], config, kind)
        self.levels = nn.ModuleList(
            DecoderLevel(c_in, c_out, config, kind, doubles=i < last)
            for i, (c_in, c_out) in enumerate(pairwise([widths[0], *widths]))
        )
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], config.eps)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.time_out = nn.Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0)) if config.is_temporal else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        if self.time_out is None:
            return x
        return self.time_out(x.transpose(0, 1)[None])[0].transpose(0, 1)


class KLVAE(nn.Module):
    """Video (B, 3, T, H, W) in [-1, 1] to latents (B, C, T, H / 8, W / 8) and back.

    The plain decoder takes frame by frame. The temporal one takes chunks of config.chunk frames that know
    nothing of each other, as the original does. tiled: decode a plane larger than TILE in overlapping tiles;
    less memory, other pixels, since norms, attention and convolutions see a tile alone. Runs, and answers, in
    the dtype of its weights.
    """

    keep_fp32 = ()

    def __init__(self, config: KLConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant = nn.Conv2d(2 * config.latent, 2 * config.latent, 1)
        self.post_quant = nn.Identity() if config.is_temporal else nn.Conv2d(config.latent, config.latent, 1)

    @property
    def space_stride(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** (len(self.config.widths) - 1)

    @property
    def chunk(self) -> int:
        """Frames that are decoded together."""
        return self.config.chunk if self.config.is_temporal else 1

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, not scaled. (B, 3, T, H, W) -> two (B, C, T, h, w)"""
        if video.ndim != 5 or video.shape[1] != 3 or min(video.shape[3:]) < self.space_stride:
            want = f"(B, 3, T, H, W) with sides of at least {self.space_stride}"
            raise ValueError(f"video is {tuple(video.shape)}, want {want}; permute or unsqueeze it")
        frames = rearrange(video, "b c t h w -> (b t) c h w").to(self.quant.weight.dtype).split(1)
        x = torch.cat([self.quant(self.encoder(frame)) for frame in frames])
        mean, logvar = rearrange(x, "(b t) c h w -> b c t h w", b=len(video)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, video: Tensor) -> Tensor:
        """Scaled latents, without sampling. video (B, 3, T, H, W) -> (B, C, T, h, w)"""
        return self.moments(video)[0] * self.config.scale

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Pixels, not clamped. latents (B, C, T, h, w), scaled -> (B, 3, T, H, W)"""
        return torch.cat(list(self.decode_stream(latents, tiled=tiled)), dim=2).to(latents.device)

    def decode_stream(self, latents: Tensor, *, tiled: bool = False, watch: Watch = iter) -> Iterator[Tensor]:
        """`decode` piece by piece: yields a frame, or config.chunk of them, at a time.

        In CPU memory where tiles were joined. watch: wraps the tiles as they are decoded
        """
        if latents.ndim != 5 or latents.shape[1] != self.config.latent or 0 in latents.shape:
            want = f"(B, {self.config.latent}, T, H, W)"
            raise ValueError(f"latents are {tuple(latents.shape)}, want {want}; pass what encode returns")
        z = (latents / self.config.scale).to(self.quant.weight.dtype)
        code = lambda plane: (self.decode_chunk(part) for part in plane.split(self.chunk, dim=2))
        return self.tiles.stream(code, z, watch) if tiled else code(z)

    @property
    def tiles(self) -> Tiles:
        """Of latents, to be decoded."""
        cells = TILE // self.space_stride
        return Tiles((cells, cells), (TILE, TILE))

    def decode_chunk(self, z: Tensor) -> Tensor:
        """z (B, C, T, h, w), not scaled -> (B, 3, T, H, W)"""
        videos = [self.decoder(self.post_quant(video.transpose(0, 1))) for video in z]  # (T, 3, H, W) each
        return torch.stack([video.transpose(0, 1) for video in videos])

    def activation_bytes(
        self, width: int, height: int, num_frames: int, item: int, *, tiled: bool = False
    ) -> int:
        """An estimate for decoding: maps of a chunk of a plane or tile. item: bytes of the dtype"""
        maps = 8 if self.config.is_temporal else 6  # measured on a CPU
        per_pixel = item * min(self.chunk, num_frames) * maps * self.config.widths[0]
        return per_pixel * pixels_in_hand(width, height, self.tiles if tiled else None)
