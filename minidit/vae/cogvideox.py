"""CogVideoX causal video autoencoder (Yang et al., 2024). Follows diffusers 0.42 AutoencoderKLCogVideoX.

A video streams through in chunks of 8 frames (2 latent frames), the first taking what is left over. The
chunks are part of the numbers: group norms take their statistics over one chunk. What a convolution must
remember of the chunk before lies in a `State`, made once per call; the modules themselves keep nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.presets import CogVideoXVAEConfig
from minidit.vae.tiles import Tiles, Watch, pixels_in_hand

State = dict[nn.Module, Tensor]  # layer -> the last two frames of its input, (B, C, 2, H, W)
LATENT_CHUNK = 2  # latent frames that go through the decoder together
OVERLAP = (1 / 6, 1 / 5)  # of neighbouring tiles, along (H, W)


def chunks(x: Tensor, size: int) -> Iterator[Tensor]:
    """Pieces of `size` frames, the first with the remainder on top. x (B, C, T, H, W)"""
    first = min(x.shape[2], size + x.shape[2] % size)
    yield x[:, :, :first]
    if first < x.shape[2]:
        yield from x[:, :, first:].split(size, dim=2)


def per_frame(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an image function to every frame. x (B, C, T, H, W) -> (B, C', T, H', W')"""
    frames = rearrange(x, "b c t h w -> (b t) c h w")
    return rearrange(fn(frames), "(b t) c h w -> b c t h w", b=x.shape[0])


def first_apart(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of time to a chunk; the first frame of an odd chunk stays as it is."""
    if x.shape[2] % 2 == 0:
        return fn(x)
    return x if x.shape[2] == 1 else torch.cat((x[:, :, :1], fn(x[:, :, 1:])), dim=2)


def stretch(z: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat cells to (T, H, W); of an odd T above 1 the first frame is stretched apart. z (B, C, t, h, w)"""
    t, h, w = size
    if t == 1 or t % 2 == 0:
        return F.interpolate(z, size=(t, h, w))
    first, rest = F.interpolate(z[:, :, :1], size=(1, h, w)), F.interpolate(z[:, :, 1:], size=(t - 1, h, w))
    return torch.cat((first, rest), dim=2)


class CausalConv(nn.Conv3d):
    """A convolution that sees two frames of the past; before the video there is its first frame, twice."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, state: State) -> Tensor:
        past = state[self] if self in state else x[:, :, :1].expand(-1, -1, 2, -1, -1)
        x = torch.cat((past, x), dim=2)  # (B, C, 2 + T, H, W)
        state[self] = x[:, :, -2:].clone()  # a view would keep the whole chunk alive
        return super().forward(x)


class PlainNorm(nn.GroupNorm):
    """The encoder's norm; it takes no latents."""

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        return super().forward(x)


class LatentNorm(nn.Module):
    """The decoder's norm: a group norm scaled and shifted, cell by cell, by the latents that are decoded."""

    def __init__(self, groups: int, channels: int, eps: float, latent: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.scale, self.shift = nn.Conv3d(latent, channels, 1), nn.Conv3d(latent, channels, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (B, C, T, H, W) · z (B, latent, t, h, w)"""
        size = x.shape[2:]  # stretching after the convolutions, not before: the same numbers from fewer cells
        return self.norm(x) * stretch(self.scale(z), size) + stretch(self.shift(z), size)


Norm = Callable[[int], nn.Module]  # channels -> a PlainNorm or a LatentNorm


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, beside a shortcut."""

    def __init__(self, c_in: int, c_out: int, norm: Norm):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), CausalConv(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out), CausalConv(c_out, c_out)
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, z: Tensor | None, state: State) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, z)), state)
        h = self.conv2(F.silu(self.norm2(h, z)), state)
        return self.shortcut(x) + h


class Middle(nn.Module):
    """Two blocks at the coarsest level."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.block1, self.block2 = (ResBlock(channels, channels, norm) for _ in range(2))

    def forward(self, x: Tensor, z: Tensor | None, state: State) -> Tensor:
        return self.block2(self.block1(x, z, state), z, state)


class Down(nn.Module):
    """Halve the sides and, with `time`, the frames: means of pairs, then a convolution of stride 2."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.time:
            x = first_apart(lambda frames: F.avg_pool3d(frames, (2, 1, 1)), x)
        return per_frame(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)


class Up(nn.Module):
    """Double the sides and, with `time`, the frames: cells are repeated, then go through a convolution."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.time:
            x = first_apart(lambda frames: frames.repeat_interleave(2, dim=2), x)
        return per_frame(lambda frames: self.conv(F.interpolate(frames, scale_factor=2.0)), x)


class Level(nn.Module):
    """Blocks at one resolution, and the way to the next."""

    def __init__(self, c_in: int, c_out: int, depth: int, norm: Norm):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_out if j else c_in, c_out, norm) for j in range(depth))

    def forward(self, x: Tensor, z: Tensor | None, state: State) -> Tensor:
        for block in self.blocks:
            x = block(x, z, state)
        return x


class EncoderLevel(Level):
    def __init__(self, c_in: int, c_out: int, depth: int, norm: Norm, time: bool | None):
        super().__init__(c_in, c_out, depth, norm)
        self.down = None if time is None else Down(c_out, time)

    def forward(self, x: Tensor, state: State) -> Tensor:
        x = super().forward(x, None, state)
        return x if self.down is None else self.down(x)


class DecoderLevel(Level):
    def __init__(self, c_in: int, c_out: int, depth: int, norm: Norm, time: bool | None):
        super().__init__(c_in, c_out, depth, norm)
        self.up = None if time is None else Up(c_out, time)

    def forward(self, x: Tensor, z: Tensor, state: State) -> Tensor:
        x = super().forward(x, z, state)
        return x if self.up is None else self.up(x)


def level_times(config: CogVideoXVAEConfig) -> tuple[bool | None, ...]:
    """Per level, whether its resampling changes time too; None for the last, which has none."""
    last = len(config.widths) - 1
    return (*(i < config.time_levels for i in range(last)), None)


class Encoder(nn.Module):
    """A chunk of pixels to means and log-variances: (B, 3, T, H, W) -> (B, 2C, T/4, H/8, W/8)"""

    def __init__(self, config: CogVideoXVAEConfig):
        super().__init__()
        widths = config.widths
        norm = lambda channels: PlainNorm(config.groups, channels, config.eps)
        self.conv_in = CausalConv(3, widths[0])
        self.levels = nn.ModuleList(
            EncoderLevel(c_in, c_out, config.res_blocks, norm, time)
            for (c_in, c_out), time in zip(pairwise((widths[0], *widths)), level_times(config), strict=True)
        )
        self.mid = Middle(widths[-1], norm)
        self.norm_out = norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.latent)

    def forward(self, x: Tensor, state: State) -> Tensor:
        x = self.conv_in(x, state)
        for level in self.levels:
            x = level(x, state)
        x = self.mid(x, None, state)
        return self.conv_out(F.silu(self.norm_out(x, None)), state)


class Decoder(nn.Module):
    """A chunk of latents to pixels: (B, C, T, H, W) -> (B, 3, 4T, 8H, 8W)"""

    def __init__(self, config: CogVideoXVAEConfig):
        super().__init__()
        widths = config.widths[::-1]
        norm = lambda channels: LatentNorm(config.groups, channels, config.eps, config.latent)
        self.conv_in = CausalConv(config.latent, widths[0])
        self.mid = Middle(widths[0], norm)
        self.levels = nn.ModuleList(
            DecoderLevel(c_in, c_out, config.res_blocks + 1, norm, time)
            for (c_in, c_out), time in zip(pairwise((widths[0], *widths)), level_times(config), strict=True)
        )
        self.norm_out = norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 3)

    def forward(self, z: Tensor, state: State) -> Tensor:
        x = self.mid(self.conv_in(z, state), z, state)
        for level in self.levels:
            x = level(x, z, state)
        return self.conv_out(F.silu(self.norm_out(x, z)), state)


class CogVideoXVAE(nn.Module):
    """Video (B, 3, T, H, W) in [-1, 1] to latents (B, C, 1 + (T - 1) / 4, H / 8, W / 8) and back.

    tiled: cut what is larger than config.tile into overlapping tiles; less memory, other pixels, since norms
    and convolutions see a tile alone. Runs, and answers, in the dtype of its weights.
    """

    keep_fp32 = ()

    def __init__(self, config: CogVideoXVAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @property
    def time_stride(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 2**self.config.time_levels

    @property
    def space_stride(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** (len(self.config.widths) - 1)

    def moments(self, video: Tensor, *, tiled: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, not scaled. (B, 3, T, H, W) -> two (B, C, t, h, w)"""
        check_input("video", video, 3, "(B, 3, T, H, W)")
        code = lambda plane: streamed(self.encoder, chunks(plane, LATENT_CHUNK * self.time_stride))
        x = video.to(self.encoder.conv_in.weight.dtype)
        parts = Tiles(self.config.tile, self.latent_tile, OVERLAP).stream(code, x) if tiled else code(x)
        return torch.cat(list(parts), dim=2).to(video.device).chunk(2, dim=1)  # (B, 2C, t, h, w)

    def encode(self, video: Tensor, *, tiled: bool = False) -> Tensor:
        """Scaled latents, without sampling. video (B, 3, T, H, W) -> (B, C, t, h, w)"""
        mean, _ = self.moments(video, tiled=tiled)
        return mean * self.config.scale

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Pixels, not clamped. latents (B, C, t, h, w), scaled -> (B, 3, T, H, W), T = 4t - 3 for an odd t"""
        return torch.cat(list(self.decode_stream(latents, tiled=tiled)), dim=2).to(latents.device)

    def decode_stream(self, latents: Tensor, *, tiled: bool = False, watch: Watch = iter) -> Iterator[Tensor]:
        """`decode` piece by piece: yields some 8 frames at a time, in CPU memory where tiles were joined.

        watch: wraps the tiles as they are decoded
        """
        check_input("latents", latents, self.config.latent, f"(B, {self.config.latent}, T, H, W)")
        code = lambda plane: streamed(self.decoder, chunks(plane, LATENT_CHUNK))
        z = (latents / self.config.scale).to(self.decoder.conv_in.weight.dtype)
        return self.tiles.stream(code, z, watch) if tiled else code(z)

    @property
    def tiles(self) -> Tiles:
        """Of latents, to be decoded."""
        return Tiles(self.latent_tile, self.config.tile, OVERLAP)

    @property
    def latent_tile(self) -> tuple[int, int]:
        """Latent cells (H, W) of a tile."""
        return self.config.tile[0] // self.space_stride, self.config.tile[1] // self.space_stride

    def activation_bytes(
        self, width: int, height: int, num_frames: int, item: int, *, tiled: bool = False
    ) -> int:
        """An estimate for decoding: seven maps of nine frames of a plane or tile.

        Measured on a CPU in fp32. At the last level every convolution keeps two frames besides. item: bytes
        of the dtype
        """
        c = self.config
        per_pixel = item * c.widths[0] * (7 * 9 + 2 * 2 * (c.res_blocks + 1))
        return per_pixel * pixels_in_hand(width, height, self.tiles if tiled else None)


def check_input(name: str, x: Tensor, channels: int, want: str) -> None:
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"{name} of shape {tuple(x.shape)}, want {want}; permute or unsqueeze it")


def streamed(module: nn.Module, parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """The outputs of a video's chunks, one by one."""
    state: State = {}
    for part in parts:
        yield module(part, state)
