"""Latte text-to-video transformer (Ma et al., 2024). Follows Vchitect/Latte models/latte_t2v.py.

A block is a spatial half, where the tokens of each frame attend to each other and to the text, and a temporal
half, where each place attends to itself over the frames. Between them h stays (B, T*S, D).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.attention import Backend, FoldableAttention, Text, TextAttention, take_text
from minidit.cache.loop import Lane, run_blocks
from minidit.cache.seam import BlockCache
from minidit.layers import Linear, Mlp, TimeMlp, block_bytes, modulation_table, timestep_sinusoid
from minidit.presets import LatteConfig
from minidit_kernels.modulate import gated_residual, modulate


@dataclass(frozen=True)
class BlockCond:
    """What one block sees beside h."""

    mod: Tensor  # (B, 6, D) fp32
    text: Text
    frames: int  # T
    frame_positions: Tensor | None  # (T, D) fp32, added between the halves of block 0
    has_time: bool  # the temporal half runs
    attention: Backend
    dtype: torch.dtype  # of the matrix products


@dataclass(frozen=True)
class Context:
    """What does not change during a generation, for the guidance branches that run as one batch."""

    branches: tuple[str, ...]  # one name per batch row
    grid: tuple[int, int, int]  # tokens along (T, H, W)
    positions: Tensor  # (S, D) fp32
    frame_positions: Tensor | None  # (T, D) fp32; an image has none
    has_time: bool
    text: tuple[Text, ...]  # per block; it does not change over steps, so that keys and values may be kept
    attention: Backend
    residual: torch.dtype  # of h

    def select(self, branches: Sequence[str]) -> "Context":
        """The context of some of its branches; nothing is copied for one branch."""
        if tuple(branches) == self.branches:
            return self
        rows = [self.branches.index(branch) for branch in branches]
        text = tuple(take_text(each, rows) for each in self.text)
        return replace(self, branches=tuple(branches), text=text)


@dataclass(frozen=True)
class Cond:
    """A step's conditioning: the context and what depends on t."""

    context: Context
    mod: Tensor  # (B, 6, D) fp32
    time: Tensor  # (B, D) fp32
    dtype: torch.dtype

    def at(self, block: int) -> BlockCond:
        c = self.context
        positions = c.frame_positions if block == 0 else None
        return BlockCond(self.mod, c.text[block], c.grid[0], positions, c.has_time, c.attention, self.dtype)


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """[sin(p f) | cos(p f)] with f_k = 10000^(-2k/width). positions (n,) fp64 -> (n, width) fp64"""
    f = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    angle = positions[:, None] * f
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def grid_positions(rows: int, columns: int, config: LatteConfig) -> Tensor:
    """A table over the places of a frame: half of the channels for the column, half for the row.

    Whatever the grid, its coordinates are stretched to span the one of training. -> (rows * columns, D) fp32
    """
    span, half = config.sample_size // config.patch, config.width // 2
    scale = max(config.sample_size // 64, 1)
    axis = lambda n: sinusoid(torch.arange(n, dtype=torch.float64) * span / n / scale, half)
    column = axis(columns)[None].expand(rows, -1, -1)
    row = axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat((column, row), dim=2).flatten(0, 1).float()


class LatteBlock(nn.Module):
    """A spatial half with text and a temporal half without; the timestep modulates all but the text."""

    def __init__(self, config: LatteConfig):
        super().__init__()
        self.eps = config.eps
        self.mod = nn.Parameter(modulation_table(6, config.width))
        self.attn = FoldableAttention(config.width, config.heads, "space")
        self.cross = TextAttention(config.width, config.heads)
        self.mlp = Mlp(config.width, config.mlp_width)
        self.t_mod = nn.Parameter(modulation_table(6, config.width))
        self.t_attn = FoldableAttention(config.width, config.heads, "time")
        self.t_mlp = Mlp(config.width, config.mlp_width)

    def forward(self, h: Tensor, cond: BlockCond, cache: BlockCache) -> Tensor:
        h = self.space(h, cond, cache)  # (B, T*S, D)
        if cond.frame_positions is not None:
            frames = h.unflatten(1, (cond.frames, -1))  # (B, T, S, D)
            h = (frames + cond.frame_positions[:, None]).to(h.dtype).flatten(1, 2)
        return self.time(h, cond, cache) if cond.has_time else h

    def space(self, h: Tensor, cond: BlockCond, cache: BlockCache) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.rows(self.mod, cond)
        x = modulate(h, scale1, shift1, eps=self.eps, dtype=cond.dtype)  # (B, T*S, D)
        h = gated_residual(h, gate1, cache.run("attn", self.attn, x, cond))
        h = h + cache.run("cross", self.cross, h.to(cond.dtype), cond.text, cond)
        x = modulate(h, scale2, shift2, eps=self.eps, dtype=cond.dtype)
        return gated_residual(h, gate2, cache.run("mlp", self.mlp, x))

    def time(self, h: Tensor, cond: BlockCond, cache: BlockCache) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.rows(self.t_mod, cond)
        x = modulate(h, scale1, shift1, eps=self.eps, dtype=cond.dtype)
        h = gated_residual(h, gate1, cache.run("t_attn", self.t_attn, x, cond))
        x = modulate(h, scale2, shift2, eps=self.eps, dtype=cond.dtype)
        return gated_residual(h, gate2, cache.run("t_mlp", self.t_mlp, x))

    def rows(self, table: Tensor, cond: BlockCond) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the MLP: six (B, 1, D), fp32"""
        return (table.float() + cond.mod).unsqueeze(2).unbind(1)


class Head(nn.Module):
    """Last norm, modulated by the time embedding itself, and the way back from tokens to latents."""

    def __init__(self, config: LatteConfig):
        super().__init__()
        self.patch, self.eps, self.channels = config.patch, config.eps, config.channels
        self.mod = nn.Parameter(modulation_table(2, config.width))
        self.out = Linear(config.width, config.patch**2 * config.out_channels)

    def everything(self, h: Tensor, cond: Cond) -> Tensor:
        """h (B, L, D) -> predicted noise, then the learned variance (B, C_out, T, H, W) fp32"""
        shift, scale = (self.mod.float() + cond.time[:, None]).unsqueeze(2).unbind(1)  # (B, 1, D) each
        y = self.out(modulate(h, scale, shift, eps=self.eps, dtype=self.out.weight.dtype)).float()
        (t, rows, columns), p = cond.context.grid, self.patch
        sizes = dict(t=t, h=rows, w=columns, p=p, q=p)
        return rearrange(y, "b (t h w) (p q c) -> b c t (h p) (w q)", **sizes)

    def forward(self, h: Tensor, cond: Cond) -> Tensor:
        """h (B, L, D) -> predicted noise (B, C, T, H, W) fp32"""
        return self.everything(h, cond)[:, : self.channels]


class Latte(nn.Module):
    """Predicts the noise in latents at a timestep, given text states."""

    subs = ("attn", "cross", "mlp", "t_attn", "t_mlp")  # of a block, in order, as plans name them
    keep_fp32 = ("time_mlp", "time_mod", "mod", "t_mod")

    def __init__(self, config: LatteConfig):
        super().__init__()
        self.config = config
        self.patch_in = Linear(config.channels * config.patch**2, config.width)
        self.text_mlp = Mlp(config.text_width, config.width, config.width)
        self.time_mlp = TimeMlp(config.freq_width, config.width)
        self.time_mod = nn.Linear(config.width, 6 * config.width)
        self.blocks = nn.ModuleList(LatteBlock(config) for _ in range(config.depth))
        self.head = Head(config)

    def prepare(
        self,
        text: Sequence[Tensor],
        size: tuple[int, int, int],
        *,
        branches: Sequence[str] = ("cond",),
        attention: str = "auto",
        residual: torch.dtype | None = None,
        has_time: bool = True,
        keep_text: bool = True,
    ) -> Context:
        """Everything a generation needs that no step changes.

        text: one (M, text_width) per batch row, of one length: the text encoder cuts the negative prompt to
        the prompt · size: latent (T, H, W) · branches: a name per row · has_time: off for Latte-0's images ·
        keep_text: the text's keys and values are made now, for all steps; else every block makes its own
        """
        self.check_input(text, size[0])
        weight, c = self.patch_in.weight, self.config
        grid = size[0], size[1] // c.patch, size[2] // c.patch
        states = self.text_mlp(torch.stack(list(text)).to(weight))  # (B, M, D)
        text_of_blocks = (states,) * c.depth
        if keep_text:
            text_of_blocks = tuple(block.cross.keys_values(states) for block in self.blocks)
        frame_positions = None
        if size[0] > 1 and has_time:
            frame_positions = sinusoid(torch.arange(size[0], dtype=torch.float64), c.width).float()
            frame_positions = frame_positions.to(weight.device)
        return Context(
            branches=tuple(branches),
            grid=grid,
            positions=grid_positions(*grid[1:], c).to(weight.device),
            frame_positions=frame_positions,
            has_time=has_time,
            text=text_of_blocks,
            attention=attention,
            residual=residual or weight.dtype,
        )

    def check_input(self, text: Sequence[Tensor], frames: int) -> None:
        """ValueError for text or frames that the model was not made for."""
        lengths, c = sorted({len(states) for states in text}), self.config
        if len(lengths) > 1 or lengths[-1] > c.text_len:
            raise ValueError(
                f"text of {', '.join(map(str, lengths))} rows; give all branches one count up to {c.text_len}"
            )
        if frames not in (1, c.frames):
            raise ValueError(
                f"{frames} latent frames; this model makes videos of {c.frames}, or 1 for an image"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return self.patch_in.weight.dtype

    def embed(self, x: Tensor, t: Tensor, context: Context) -> tuple[Tensor, Cond]:
        """Tokens and the step's conditioning. x (B, C, T, H, W) · t (B,) in 0 .. 999 -> h (B, L, D), cond"""
        p = self.config.patch
        x = rearrange(x, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)
        time = self.time_mlp(timestep_sinusoid(t, self.config.freq_width))  # (B, D)
        mod = self.time_mod(F.silu(time)).unflatten(1, (6, -1))  # (B, 6, D)
        h = (self.patch_in(x.to(self.dtype)) + context.positions).flatten(1, 2).to(context.residual)
        return h, Cond(context, mod.float(), time.float(), self.dtype)

    def forward(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """Predict the noise and, in further channels, its learned variance.

        x (B, C, T, H, W) · t (B,) in 0 .. 999 · context from prepare() -> (B, C_out, T, H, W) fp32
        """
        h, cond = self.embed(x, t, context)  # (B, T*S, D)
        (h,) = run_blocks(self.blocks, [Lane(context.branches, h, cond)])  # caching is woven in there
        return self.head.everything(h, cond)

    def state_shape(self, context: Context) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one branch's h, and of every sub-module's output but for the dtype."""
        t, h, w = context.grid
        return (1, t * h * w, self.config.width), context.residual

    def map_shape(self, context: Context, sub: str) -> tuple[int, ...]:
        """Shape of what decides one branch's attention map."""
        t, h, w = context.grid
        return getattr(self.blocks[0], sub).pattern_shape(t, h * w)

    def activation_bytes(self, tokens: int, item: int, hidden: int = 2) -> int:
        """An estimate of the fullest moment of a block.

        In attention: h, its normed copy, qkv and the output; in the MLP: h, the normed copy and the hidden
        layer. item, hidden: see layers.block_bytes
        """
        c = self.config
        return tokens * block_bytes(c.width, c.mlp_width, item, hidden, attention=6, mlp=2, forms=0)

    def macs(
        self, size: tuple[int, int, int], text_len: int, slice_width: int | None = None
    ) -> dict[tuple[int, str], int]:
        """Multiply-adds of one forward of one branch, by (block, sub-module).

        size: latent (T, H, W). Linears and both attention products inside the blocks; text keys and values
        are made once per generation and not counted (macs.with_text). slice_width: of queries and keys, which
        comes folded into their projections; 0: a kept map's, which over time is there and within frames is
        made anew from kept queries and keys.
        """
        c = self.config
        frames, places = size[0], size[1] * size[2] // c.patch**2
        tokens, narrow = frames * places, c.width if slice_width is None else c.heads * slice_width
        linears = 2 * tokens * c.width * (c.width + narrow)  # value and output, query and key
        rotation = text_len * c.width * (slice_width or 0)  # of the text's keys
        mlp = 2 * tokens * c.width * c.mlp_width
        per_block = {
            "attn": linears + tokens * places * (c.width + (narrow or c.width)),
            "cross": tokens * (c.width + text_len) * (c.width + narrow) + rotation,
            "mlp": mlp,
            "t_attn": linears + tokens * frames * (c.width + narrow),
            "t_mlp": mlp,
        }
        return {(k, sub): n for k in range(c.depth) for sub, n in per_block.items()}
