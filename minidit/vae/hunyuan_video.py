"""HunyuanVideo causal video autoencoder (Kong et al., 2024).

Follows Tencent-Hunyuan/HunyuanVideo hyvideo/vae. Time is causal, but a video is not streamed: long ones are
coded in tiles of time, wide ones in tiles of space within these, which overlap and are blended. The blending
is the original's, so the size of a tile is a part of the model.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.attention import attention
from minidit.presets import HunyuanVAEConfig
from minidit.vae.tiles import Tiles, blend

OVERLAP = 0.25  # of neighbouring tiles of time


class CausalConv(nn.Conv3d):
    """A convolution that sees no future; the first frame and all borders are repeated outward."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)):
        super().__init__(c_in, c_out, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        side, past = self.kernel_size[0] // 2, self.kernel_size[0] - 1
        return super().forward(F.pad(x, (side, side, side, side, past, 0), mode="replicate"))


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, beside a shortcut. x (B, C, T, H, W)"""

    def __init__(self, c_in: int, c_out: int, config: HunyuanVAEConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, c_in, config.eps)
        self.conv1 = CausalConv(c_in, c_out)
        self.norm2 = nn.GroupNorm(config.groups, c_out, config.eps)
        self.conv2 = CausalConv(c_out, c_out)
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class CausalAttention(nn.Module):
    """Self-attention of one head over all cells of a frame and of those before it. x (B, C, T, H, W)"""

    def __init__(self, channels: int, config: HunyuanVAEConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, config.eps)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        _, _, frames, height, width = x.shape
        cells = height * width
        tokens = rearrange(self.norm(x), "b c t h w -> b 1 (t h w) c")
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)  # (B, 1, T*H*W, C)
        # frame by frame, which needs no mask: half the work, and no square of all cells in memory
        seen = [(q[:, :, i * cells : (i + 1) * cells], (i + 1) * cells) for i in range(frames)]
        y = torch.cat([attention(one, k[:, :, :past], v[:, :, :past]) for one, past in seen], dim=2)
        return x + rearrange(self.out(y), "b 1 (t h w) c -> b c t h w", t=frames, h=height)


class Middle(nn.Module):
    """The coarsest level: block, attention, block."""

    def __init__(self, channels: int, config: HunyuanVAEConfig):
        super().__init__()
        self.block1 = ResBlock(channels, channels, config)
        self.attn = CausalAttention(channels, config)
        self.block2 = ResBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attn(self.block1(x)))


class Up(CausalConv):
    """Double the sides and, with `time`, the frames after the first, by repetition; then a convolution."""

    def __init__(self, channels: int, time: bool):
        super().__init__(channels, channels)
        self.time = time

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        if self.time:
            x = torch.cat((x[:, :, :1], x[:, :, 1:].repeat_interleave(2, dim=2)), dim=2)
        return super().forward(x)


class Level(nn.Module):
    """Residual blocks of one width, and a change of resolution behind all levels but the last."""

    def __init__(self, c_in: int, c_out: int, depth: int, config: HunyuanVAEConfig):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_out if j else c_in, c_out, config) for j in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class EncoderLevel(Level):
    def __init__(self, c_in: int, c_out: int, time: bool | None, config: HunyuanVAEConfig):
        super().__init__(c_in, c_out, config.res_blocks, config)
        stride = (2 if time else 1, 2, 2)
        self.down = None if time is None else CausalConv(c_out, c_out, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.down is None else self.down(x)


class DecoderLevel(Level):
    def __init__(self, c_in: int, c_out: int, time: bool | None, config: HunyuanVAEConfig):
        super().__init__(c_in, c_out, config.res_blocks + 1, config)
        self.up = None if time is None else Up(c_out, time)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.up is None else self.up(x)


class Encoder(nn.Module):
    """A tile of pixels to twice the latent channels: (B, 3, T, H, W) -> (B, 2C, t, h, w)"""

    def __init__(self, config: HunyuanVAEConfig):
        super().__init__()
        widths, times = config.widths, (*config.temporal_down, None)  # the last level keeps its size
        self.conv_in = CausalConv(3, widths[0])
        self.levels = nn.ModuleList(
            EncoderLevel(c_in, c_out, time, config)
            for (c_in, c_out), time in zip(pairwise([widths[0], *widths]), times, strict=True)
        )
        self.mid = Middle(widths[-1], config)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], config.eps)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """A tile of latents to pixels: (B, C, t, h, w) -> (B, 3, T, H, W)"""

    def __init__(self, config: HunyuanVAEConfig):
        super().__init__()
        widths = config.widths[::-1]
        times = (*config.temporal_down, None)  # in the encoder's order: space alone comes first here too
        self.conv_in = CausalConv(config.latent, widths[0])
        self.mid = Middle(widths[0], config)
        self.levels = nn.ModuleList(
            DecoderLevel(c_in, c_out, time, config)
            for (c_in, c_out), time in zip(pairwise([widths[0], *widths]), times, strict=True)
        )
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], config.eps)
        self.conv_out = CausalConv(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def in_time(code: Callable[[Tensor], Tensor], x: Tensor, length: int, out_length: int) -> Iterator[Tensor]:
    """Code in tiles of `length` frames and one before them, which become `out_length` and one.

    Yields piece by piece. Behind the first tile, what the frame before becomes is dropped: it is past alone.
    """
    if x.shape[2] <= length:
        yield code(x)
        return
    stride, extent = int(length * (1 - OVERLAP)), int(out_length * OVERLAP)
    before = None
    for i in range(0, x.shape[2] - 1, stride):
        tile = code(x[:, :, i : i + length + 1])
        tile = tile if before is None else blend(before, tile[:, :, 1:], extent, dim=2)
        yield tile[:, :, : out_length - extent + (before is None)]
        before = tile


class HunyuanVAE(nn.Module):
    """Video (B, 3, T, H, W) in [-1, 1] to latents (B, C, 1 + (T - 1) / 4, H / 8, W / 8) and back.

    Runs, and answers, in the dtype of its weights.
    """

    keep_fp32 = ()

    def __init__(self, config: HunyuanVAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant = nn.Conv3d(2 * config.latent, 2 * config.latent, 1)
        self.post_quant = nn.Conv3d(config.latent, config.latent, 1)

    @property
    def time_stride(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 2 ** sum(self.config.temporal_down)

    @property
    def space_stride(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** len(self.config.temporal_down)

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, not scaled. (B, 3, T, H, W) -> two (B, C, t, h, w)"""
        self.check_video(video)
        side, cells, length = self.config.tile, self.config.tile // self.space_stride, self.config.tile_frames
        tiles = Tiles((side, side), (cells, cells))
        code = lambda clip: tiles.apply(lambda tile: self.quant(self.encoder(tile)), clip)
        parts = in_time(code, video.to(self.quant.weight.dtype), length, length // self.time_stride)
        return torch.cat(list(parts), dim=2).chunk(2, dim=1)

    def encode(self, video: Tensor) -> Tensor:
        """Scaled latents, without sampling. video (B, 3, T, H, W) -> (B, C, t, h, w)"""
        mean, _ = self.moments(video)
        return mean * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped. latents (B, C, t, h, w), scaled -> (B, 3, T, H, W)"""
        return torch.cat(list(self.decode_stream(latents)), dim=2)

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """`decode` piece by piece: yields the frames of every tile of time."""
        if latents.ndim != 5 or latents.shape[1] != self.config.latent or 0 in latents.shape:
            want = f"(B, {self.config.latent}, T, H, W)"
            raise ValueError(f"latents are {tuple(latents.shape)}, want {want}; pass what encode returns")
        side, cells, length = self.config.tile, self.config.tile // self.space_stride, self.config.tile_frames
        tiles = Tiles((cells, cells), (side, side))
        code = lambda clip: tiles.apply(lambda tile: self.decoder(self.post_quant(tile)), clip)
        z = (latents / self.config.scale).to(self.post_quant.weight.dtype)
        return in_time(code, z, length // self.time_stride, length)

    def activation_bytes(self, width: int, height: int, num_frames: int, item: int) -> int:
        """An estimate for decoding: one tile of space, and two of time that are finished.

        The fullest moment of a tile: three tensors of the last level, of which one has the width of the level
        before it. item: bytes of the dtype
        """
        c = self.config
        frames = min(num_frames, c.tile_frames + 1)
        tile = min(width, c.tile) * min(height, c.tile) * frames
        return item * (tile * (c.widths[1] + 2 * c.widths[0]) + 2 * 3 * width * height * frames)

    def check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape:
            raise ValueError(f"video is {tuple(video.shape)}, want (B, 3, T, H, W); permute or unsqueeze it")
        _, _, frames, height, width = video.shape
        time, space = self.time_stride, self.space_stride
        if (frames - 1) % time or height % space or width % space:
            raise ValueError(
                f"video is {width}x{height}, {frames} frames; cut it to sides of {space}n, {time}n+1 frames"
            )
