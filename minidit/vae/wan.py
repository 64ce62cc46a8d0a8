"""Wan 2.1 causal video autoencoder (Wan Team, 2025). Follows Wan-Video/Wan2.1 wan/modules/vae.py.

Time is causal, so a video streams through in chunks. What a layer must remember of the chunk before lies in a
`State`, a dict made once per call and keyed by the layer; the modules themselves keep nothing.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.attention import attention
from minidit.presets import WanVAEConfig
from minidit.vae.tiles import Tiles, Watch, pixels_in_hand

State = dict[nn.Module, Tensor]  # layer -> the last one or two frames of its input, (B, C, 1 or 2, H, W)
TILE = 256  # pixels along each side, as in diffusers' AutoencoderKLWan; the original has no tiles


def per_frame(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an image function to every frame. x (B, C, T, H, W) -> (B, C', T, H', W')"""
    frames = rearrange(x, "b c t h w -> (b t) c h w")
    return rearrange(fn(frames), "(b t) c h w -> b c t h w", b=x.shape[0])


def split_frames(x: Tensor, size: int | None) -> Iterator[Tensor]:
    """The first frame alone, then `size` frames at a time (None: all the rest). x (B, C, T, H, W)"""
    yield x[:, :, :1]
    rest = x[:, :, 1:]
    if rest.shape[2]:
        yield from rest.split(size or rest.shape[2], dim=2)


class CausalConv(nn.Conv3d):
    """A convolution that sees two frames of the past; before the video there are zeros."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int] = (3, 3, 3)):
        super().__init__(c_in, c_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, state: State) -> Tensor:
        past = state[self] if self in state else torch.zeros_like(x[:, :, :1]).expand(-1, -1, 2, -1, -1)
        x = torch.cat((past, x), dim=2)  # (B, C, 2 + T, H, W)
        state[self] = x[:, :, -2:].clone()  # a view would keep the whole chunk alive
        return self.taps_as_channels(x) if x.is_cpu and len(x) == 1 else super().forward(x)

    def taps_as_channels(self, x: Tensor) -> Tensor:
        """The same convolution as an image convolution over three times the channels.

        On a CPU 2 to 4 times faster for one small video, since torch takes 3D convolutions of batch 1 to a
        fast kernel only when they are large; for larger batches it is 20 to 40 % slower.
        """
        frames = x.shape[2] - 2
        x = torch.cat([x[:, :, i : i + frames] for i in range(3)], dim=1)  # (B, 3C, T, H, W)
        weight = rearrange(self.weight, "o c t h w -> o (t c) h w")
        return per_frame(lambda image: F.conv2d(image, weight, self.bias, padding=self.padding[1:]), x)


class ChannelNorm(nn.Module):
    """Scale each cell's channel vector to length sqrt(C), times a learned gain. x (B, C, T, H, W)"""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        power = x32.square().sum(1, keepdim=True)  # on a CPU vector_norm takes some 30 times as long
        gain = self.weight.float().view(-1, 1, 1, 1) * len(self.weight) ** 0.5
        return (x32 * power.clamp_min(1e-24).rsqrt() * gain).to(x.dtype)


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, beside a shortcut."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(c_in), CausalConv(c_in, c_out)
        self.norm2, self.conv2 = ChannelNorm(c_out), CausalConv(c_out, c_out)
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, state: State) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), state)
        h = self.conv2(F.silu(self.norm2(h)), state)
        return self.shortcut(x) + h


class FrameAttention(nn.Module):
    """Self-attention within each frame: one head as wide as the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def attend(self, frames: Tensor) -> Tensor:
        """frames (B*T, C, H, W), normed -> the same shape"""
        q, k, v = rearrange(self.qkv(frames), "b (n c) h w -> n b 1 (h w) c", n=3)  # (B*T, 1, H*W, C)
        out = attention(q, k, v)
        return self.out(rearrange(out, "b 1 (h w) c -> b c h w", h=frames.shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        return x + per_frame(self.attend, self.norm(x))


class Middle(nn.Module):
    """The coarsest level: block, attention, block."""

    def __init__(self, channels: int):
        super().__init__()
        self.block1, self.block2 = ResBlock(channels, channels), ResBlock(channels, channels)
        self.attn = FrameAttention(channels)

    def forward(self, x: Tensor, state: State) -> Tensor:
        return self.block2(self.attn(self.block1(x, state)), state)


class Down(nn.Module):
    """Halve the sides and, with `time`, the frames after the first.

    x (B, C, T, H, W) -> (B, C, T', H/2, W/2)
    """

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        x = per_frame(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)
        if self.time_conv is None:
            return x
        past, state[self] = state.get(self), x[:, :, -1:].clone()
        return x if past is None else self.time_conv(torch.cat((past, x), dim=2))


class Up(nn.Module):
    """Double the sides and, with `time`, the frames after the first; halve the channels.

    x (B, C, T, H, W) -> (B, C/2, T', 2H, 2W)
    """

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.time_conv = CausalConv(channels, 2 * channels, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, state: State) -> Tensor:
        if self.time_conv is not None:
            x = self.double_time(x, state)
        return per_frame(lambda frames: self.conv(F.interpolate(frames, scale_factor=2.0)), x)

    def double_time(self, x: Tensor, state: State) -> Tensor:
        """The first frame of a video stays one; its time convolution starts, from zeros, at the second."""
        if self in state:
            return rearrange(self.time_conv(x, state), "b (n c) t h w -> b c (t n) h w", n=2)
        state[self] = x.new_empty(0)  # only marks that the first frame has passed
        return x


class EncoderLevel(nn.Module):
    def __init__(self, c_in: int, c_out: int, depth: int, time: bool | None):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_out if j else c_in, c_out) for j in range(depth))
        self.down = None if time is None else Down(c_out, time)

    def forward(self, x: Tensor, state: State) -> Tensor:
        for block in self.blocks:
            x = block(x, state)
        return x if self.down is None else self.down(x, state)


class DecoderLevel(nn.Module):
    def __init__(self, c_in: int, c_out: int, depth: int, time: bool | None):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_out if j else c_in, c_out) for j in range(depth))
        self.up = None if time is None else Up(c_out, time)

    def forward(self, x: Tensor, state: State) -> Tensor:
        for block in self.blocks:
            x = block(x, state)
        return x if self.up is None else self.up(x, state)


class Encoder(nn.Module):
    """A chunk of pixels to twice the latent channels: (B, 3, T, H, W) -> (B, 2C, T/4, H/8, W/8)"""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        widths = [config.base * m for m in config.multipliers]
        times = (*config.temporal_down, None)  # the last level keeps its size
        self.conv_in = CausalConv(3, config.base)
        self.levels = nn.ModuleList(
            EncoderLevel(c_in, c_out, config.res_blocks, time)
            for (c_in, c_out), time in zip(pairwise([config.base, *widths]), times, strict=True)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.latent)

    def forward(self, x: Tensor, state: State) -> Tensor:
        x = self.conv_in(x, state)
        for level in self.levels:
            x = level(x, state)
        return self.conv_out(F.silu(self.norm_out(self.mid(x, state))), state)


class Decoder(nn.Module):
    """A chunk of latents to pixels: (B, C, T, H, W) -> (B, 3, 4T, 8H, 8W)"""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        widths = [config.base * m for m in reversed(config.multipliers)]
        entries = [widths[0], *(width // 2 for width in widths[:-1])]  # every Up halves the channels
        times = (*reversed(config.temporal_down), None)
        self.conv_in = CausalConv(config.latent, widths[0])
        self.mid = Middle(widths[0])
        self.levels = nn.ModuleList(
            DecoderLevel(c_in, c_out, config.res_blocks + 1, time)
            for c_in, c_out, time in zip(entries, widths, times, strict=True)
        )
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 3)

    def forward(self, x: Tensor, state: State) -> Tensor:
        x = self.mid(self.conv_in(x, state), state)
        for level in self.levels:
            x = level(x, state)
        return self.conv_out(F.silu(self.norm_out(x)), state)


class WanVAE(nn.Module):
    """Video (B, 3, T, H, W) in [-1, 1] to latents (B, C, 1 + (T - 1) / 4, H / 8, W / 8) and back.

    `chunk` is the number of latent frames in flight: the first always goes alone, as it did in the original,
    then `chunk` at a time; None takes all the rest at once. It changes memory and speed, not the result.
    tiled: decode a plane larger than TILE in overlapping tiles; less memory, other pixels, since the middle's
    attention and all convolutions see a tile alone. Runs, and answers, in the dtype of its weights.
    """

    keep_fp32 = ()

    def __init__(self, config: WanVAEConfig):
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

    def moments(self, video: Tensor, *, chunk: int | None = 1) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, not normalised. (B, 3, T, H, W) -> two (B, C, t, h, w)"""
        self.check_video(video, chunk)
        state: State = {}
        parts = split_frames(video.to(self.quant.weight.dtype), chunk and chunk * self.time_stride)
        x = torch.cat([self.quant(self.encoder(part, state)) for part in parts], dim=2)  # (B, 2C, t, h, w)
        return x.chunk(2, dim=1)

    def encode(self, video: Tensor, *, chunk: int | None = 1) -> Tensor:
        """Normalised latents, without sampling. video (B, 3, T, H, W) -> (B, C, t, h, w)"""
        mu, _ = self.moments(video, chunk=chunk)
        mean, std = self.statistics(mu.device)
        return ((mu - mean) / std).to(mu.dtype)

    def decode(self, latents: Tensor, *, chunk: int | None = 1, tiled: bool = False) -> Tensor:
        """Pixels, not clamped. latents (B, C, t, h, w), normalised -> (B, 3, T, H, W)"""
        parts = list(self.decode_stream(latents, chunk=chunk, tiled=tiled))
        return torch.cat(parts, dim=2).to(latents.device)

    def decode_stream(
        self, latents: Tensor, *, chunk: int | None = 1, tiled: bool = False, watch: Watch = iter
    ) -> Iterator[Tensor]:
        """`decode` piece by piece: yields the first pixel frame, then 4 * `chunk` frames at a time.

        In CPU memory where tiles were joined. watch: wraps the tiles as they are decoded
        """
        check_chunk(chunk)
        if latents.ndim != 5 or latents.shape[1] != self.config.latent or 0 in latents.shape:
            want = f"(B, {self.config.latent}, T, H, W)"
            raise ValueError(f"latents are {tuple(latents.shape)}, want {want}; pass what encode returns")
        mean, std = self.statistics(latents.device)
        z = (latents * std + mean).to(self.post_quant.weight.dtype)
        code = lambda plane: self.decode_plane(plane, chunk)
        return self.tiles.stream(code, z, watch) if tiled else code(z)

    def decode_plane(self, z: Tensor, chunk: int | None) -> Iterator[Tensor]:
        """z (B, C, t, h, w), not normalised -> pieces (B, 3, n, H, W)"""
        state: State = {}
        for part in split_frames(z, chunk):
            yield self.decoder(self.post_quant(part), state)

    @property
    def tiles(self) -> Tiles:
        """Of latents, to be decoded."""
        cells = TILE // self.space_stride
        return Tiles((cells, cells), (TILE, TILE))

    def activation_bytes(
        self, width: int, height: int, num_frames: int, item: int, *, tiled: bool = False
    ) -> int:
        """An estimate for decoding: fourteen maps of four frames of a plane or tile.

        Measured on a CPU, where taps_as_channels takes most of it. At the last level every convolution keeps
        two frames besides. item: bytes of the dtype
        """
        c = self.config
        per_pixel = item * c.base * (14 * 4 + 2 * (2 * (c.res_blocks + 1) + 1))
        return per_pixel * pixels_in_hand(width, height, self.tiles if tiled else None)

    def statistics(self, device: torch.device) -> Tensor:
        """The latents' mean and std, stacked: (2, C, 1, 1, 1), in fp32 whatever the weights are."""
        return torch.tensor((self.config.mean, self.config.std), device=device)[..., None, None, None]

    def check_video(self, video: Tensor, chunk: int | None) -> None:
        check_chunk(chunk)
        if video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape:
            raise ValueError(f"video is {tuple(video.shape)}, want (B, 3, T, H, W); permute or unsqueeze it")
        _, _, frames, height, width = video.shape
        check_size("frames", frames, self.time_stride, 1)
        check_size("height", height, self.space_stride, 0)
        check_size("width", width, self.space_stride, 0)


def check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} is not a count of latent frames; pass 1 or more, or None for all")


def check_size(name: str, value: int, stride: int, extra: int) -> None:
    """Refuse a size that is not stride * n + extra."""
    below = value - (value - extra) % stride
    if value == below:
        return
    nearest = f"nearest are {below} and {below + stride}" if below > 0 else f"nearest is {below + stride}"
    raise ValueError(f"{name}={value} is not {stride}n{'+1' if extra else ''}; {nearest}")
