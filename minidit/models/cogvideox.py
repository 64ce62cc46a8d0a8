"""CogVideoX text-to-video transformer (Yang et al., 2024), releases 2B, 5B and 1.5-5B.

Follows diffusers 0.42 CogVideoXTransformer3DModel and zai-org/CogVideo sat/dit_video_concat.py. Video and
text tokens share one sequence, h = [video | text], and all weights; only their modulation is not the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.attention import FULL, Backend, Full, Sliced, attend, merge_heads, split_heads
from minidit.cache.loop import Lane, run_blocks
from minidit.cache.seam import BlockCache
from minidit.layers import LayerNorm, Linear, Mlp, TimeMlp, block_bytes, timestep_sinusoid
from minidit.presets import CogVideoXConfig
from minidit_kernels.modulate import gated_residual, layer_norm

QK_EPS = 1e-6
SINCOS_SPACING = 1.875  # tokens per unit of the spatial axes of the 2B position table


@dataclass(frozen=True)
class Context:
    """What does not change during a generation, for the guidance branches that run as one batch."""

    branches: tuple[str, ...]  # one name per batch row
    grid: tuple[int, int, int]  # tokens along (T, H, W)
    rope: tuple[Tensor, Tensor] | None  # cos, sin (L + M, K/2) fp32; text rows are not rotated
    positions: Tensor | None  # (L, D), added to the video tokens
    text: Tensor  # (B, M, D)
    attention: Backend
    residual: torch.dtype  # of h

    @property
    def video_tokens(self) -> int:
        """L: the rows of h that are video, from the first on."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def select(self, branches: Sequence[str]) -> "Context":
        """The context of some of its branches."""
        if tuple(branches) == self.branches:
            return self
        rows = [self.branches.index(branch) for branch in branches]
        return replace(self, branches=tuple(branches), text=self.text[rows])


@dataclass(frozen=True)
class Cond:
    """A step's conditioning, the same for every block: the context and what depends on t."""

    context: Context
    time: Tensor  # (B, F)
    vec: Tensor  # (B, F), SiLU of it
    dtype: torch.dtype  # of the matrix products

    @property
    def streams(self) -> tuple[int, int]:
        """Rows of video and of text in h."""
        return self.context.video_tokens, self.context.text.shape[1]

    def at(self, block: int) -> "Cond":
        return self


def cropped_axes(grid: tuple[int, int], base: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column positions of a grid that is fitted into the grid of the training size and centred there.

    At the training size these are 0, 1, 2, ... Follows get_resize_crop_region_for_grid of diffusers.
    """
    (rows, cols), (base_rows, base_cols) = grid, base
    if rows / cols > base_rows / base_cols:
        fitted = base_rows, round(base_rows / rows * cols)
    else:
        fitted = round(base_cols / cols * rows), base_cols
    starts = [round((whole - part) / 2) for whole, part in zip(base, fitted, strict=True)]
    ends = [(start + part) * (n - 1) / n for start, part, n in zip(starts, fitted, grid, strict=True)]
    h, w = (
        torch.linspace(start, end, n, dtype=torch.float64)
        for start, end, n in zip(starts, ends, grid, strict=True)
    )
    return h, w


def inverse_powers(count: int) -> Tensor:
    """10000^(-i / count) for i < count, fp64."""
    return 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)


def rope_table(config: CogVideoXConfig, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles: a quarter for time, the rest for row and column.

    grid: tokens along (T, H, W) -> two (L, K/2) fp32, from fp64 angles
    """
    half = config.width // config.heads // 2
    side = half * 3 // 8
    t, h, w = (torch.arange(n, dtype=torch.float64) for n in grid)
    if config.positions == "rope-cropped":
        h, w = cropped_axes(grid[1:], config.base_grid)
    axes = [
        position[:, None] * inverse_powers(pairs)
        for position, pairs in zip((t, h, w), (half - 2 * side, side, side), strict=True)
    ]
    angle = on_grid(axes)
    return angle.cos().float(), angle.sin().float()


def sincos_table(grid: tuple[int, int, int], width: int) -> Tensor:
    """The 2B position table: a quarter of the channels for time, then the column, then the row. -> (L, D)"""
    spatial = width * 3 // 8
    t, h, w = (torch.arange(n, dtype=torch.float64) for n in grid)
    waves = []
    for position, channels in (
        (t, width - 2 * spatial),
        (h / SINCOS_SPACING, spatial),
        (w / SINCOS_SPACING, spatial),
    ):
        angle = position[:, None] * inverse_powers(channels // 2)
        waves.append(torch.cat((angle.sin(), angle.cos()), dim=1))
    table = on_grid(waves)
    time, row, column = table.split((width - 2 * spatial, spatial, spatial), dim=1)
    return torch.cat((time, column, row), dim=1).float()


def on_grid(axes: Sequence[Tensor]) -> Tensor:
    """Values along (T, H, W), each (n, C_i), side by side for every token -> (T*H*W, sum of C_i)"""
    t, h, w = (len(axis) for axis in axes)
    return torch.cat(
        (
            axes[0][:, None, None].expand(t, h, w, -1),
            axes[1][None, :, None].expand(t, h, w, -1),
            axes[2][None, None, :].expand(t, h, w, -1),
        ),
        dim=-1,
    ).flatten(0, 2)


class AdaptiveNorm(nn.Module):
    """Affine layer norm, then modulation: (n * weight + bias) * (1 + scale) + shift, n the normed x."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(
        self, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, split: int | None = None
    ) -> Tensor:
        """x (B, L, D) · shift, scale (B, 1, D) fp32, or (B, 2, D) of tokens before and from `split` on"""
        weight = self.weight.float() * (1 + scale)  # the affine and the modulation are one
        bias = self.bias.float() * (1 + scale) + shift
        return layer_norm(x, weight, bias, eps=self.eps, dtype=dtype, split=split)


class Attention(nn.Module):
    """Attention among all tokens, video and text. q and k are normed within their heads."""

    def __init__(self, config: CogVideoXConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.q_norm = LayerNorm(config.width // config.heads, QK_EPS)
        self.k_norm = LayerNorm(config.width // config.heads, QK_EPS)
        self.out = Linear(config.width, config.width)

    def queries_keys_values(
        self, x: Tensor, cond: Cond, how: Full | Sliced = FULL
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L + M, D) -> q, k (B, N, L + M, K or R) and v (B, N, L + M, K), as they enter the scores"""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, L + M, D)
        basis_q, basis_k = how.bases
        q = self.q_norm.into_heads(q, self.heads, cond.context.rope, basis_q)
        k = self.k_norm.into_heads(k, self.heads, cond.context.rope, basis_k)
        return q, k, split_heads(v, self.heads)

    def forward(self, x: Tensor, cond: Cond, *, how: Full | Sliced = FULL) -> Tensor:
        q, k, v = self.queries_keys_values(x, cond, how)
        x = attend(q, k, v, how, scale=v.shape[-1] ** -0.5, backend=cond.context.attention)
        return self.out(merge_heads(x))


class CogVideoXBlock(nn.Module):
    """Attention and MLP over video and text alike; the timestep modulates the two streams differently."""

    def __init__(self, config: CogVideoXConfig):
        super().__init__()
        self.mod = nn.Linear(config.time_width, 12 * config.width)
        self.norm1 = AdaptiveNorm(config.width, config.eps)
        self.attn = Attention(config)
        self.norm2 = AdaptiveNorm(config.width, config.eps)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, h: Tensor, cond: Cond, cache: BlockCache) -> Tensor:
        mod = self.mod(cond.vec).float().unflatten(1, (2, 6, -1))  # of video and of text, six (D) each
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(2)  # six (B, 2, D), fp32
        split, _ = cond.streams
        x = self.norm1(h, shift1, scale1, cond.dtype, split)  # (B, L + M, D)
        h = gated_residual(h, gate1, cache.run("attn", self.attn, x, cond), split=split)
        x = self.norm2(h, shift2, scale2, cond.dtype, split)
        return gated_residual(h, gate2, cache.run("mlp", self.mlp, x), split=split)


class Head(nn.Module):
    """Two norms, the second modulated by the timestep, and the way back from video tokens to latents."""

    def __init__(self, config: CogVideoXConfig, cells: int):
        super().__init__()
        self.patch = config.patch
        self.norm1 = LayerNorm(config.width, config.eps)
        self.mod = nn.Linear(config.time_width, 2 * config.width)
        self.norm2 = AdaptiveNorm(config.width, config.eps)
        self.out = Linear(config.width, cells)

    def forward(self, h: Tensor, cond: Cond) -> Tensor:
        """h (B, L + M, D) -> v-prediction (B, C, T, H, W) fp32"""
        video = self.norm1(h[:, : cond.context.video_tokens], cond.dtype)  # (B, L, D)
        shift, scale = self.mod(cond.vec).float()[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        y = self.out(self.norm2(video, shift, scale, cond.dtype)).float()
        (t, th, tw), (pt, ph, pw) = cond.context.grid, self.patch
        y = y.reshape(-1, t, th, tw, y.shape[-1] // (pt * ph * pw), pt, ph, pw)
        return rearrange(y, "b t h w c pt ph pw -> b c (t pt) (h ph) (w pw)")


class CogVideoX(nn.Module):
    """Predicts v = sqrt(a) noise - sqrt(1 - a) x0 of noisy latents at a timestep, given text states."""

    subs = ("attn", "mlp")  # of a block, in order, as plans name them
    keep_fp32 = ()  # the releases run all of it in one dtype

    def __init__(self, config: CogVideoXConfig):
        super().__init__()
        self.config = config
        cells = config.channels * config.patch[0] * config.patch[1] * config.patch[2]  # values per token
        self.patch_in = Linear(cells, config.width)
        self.text_in = Linear(config.text_width, config.width)
        self.time_mlp = TimeMlp(config.width, config.time_width)
        self.blocks = nn.ModuleList(CogVideoXBlock(config) for _ in range(config.depth))
        self.head = Head(config, cells)

    def prepare(
        self,
        text: Sequence[Tensor],
        size: tuple[int, int, int],
        *,
        branches: Sequence[str] = ("cond",),
        attention: str = "auto",
        residual: torch.dtype | None = None,
    ) -> Context:
        """Everything a generation needs that no step changes.

        text: one (M, text_width) per batch row, padding rows included · size: latent (T, H, W) · branches: a
        name per row
        """
        if odd := [len(states) for states in text if len(states) != self.config.text_len]:
            raise ValueError(
                f"text of {odd[0]} rows; every row counts here: pad the token ids to {self.config.text_len}"
            )
        weight = self.patch_in.weight
        grid = tuple(n // p for n, p in zip(size, self.config.patch, strict=True))
        states = self.text_in(torch.stack(list(text)).to(weight))  # (B, M, D)
        return Context(
            branches=tuple(branches),
            grid=grid,
            rope=self.joint_rope(grid),
            positions=sincos_table(grid, self.config.width).to(weight)
            if self.config.positions == "sincos"
            else None,
            text=states.to(residual or weight.dtype),
            attention=attention,
            residual=residual or weight.dtype,
        )

    def joint_rope(self, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor] | None:
        """The rotation of video and text rows, text by nothing; None where positions are added to h."""
        if self.config.positions == "sincos":
            return None
        cos, sin = rope_table(self.config, grid)
        rows, device = (0, 0, 0, self.config.text_len), self.patch_in.weight.device
        return F.pad(cos, rows, value=1.0).to(device), F.pad(sin, rows).to(device)  # (L + M, K/2)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return self.patch_in.weight.dtype

    def embed(self, x: Tensor, t: Tensor, context: Context) -> tuple[Tensor, Cond]:
        """Tokens and the step's conditioning. x (B, C, T, H, W) · t (B,) in 0 .. 999 -> h, cond"""
        pt, ph, pw = self.config.patch
        x = rearrange(x, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        video = self.patch_in(x.to(self.dtype))  # (B, L, D)
        if context.positions is not None:
            video = video + context.positions
        h = torch.cat((video.to(context.residual), context.text), dim=1)
        time = self.time_mlp(timestep_sinusoid(t, self.config.width))  # (B, F)
        return h, Cond(context, time, F.silu(time), self.dtype)

    def forward(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """Predict v.

        x (B, C, T, H, W) · t (B,) in 0 .. 999 · context from prepare() -> like x, fp32
        """
        h, cond = self.embed(x, t, context)  # (B, L + M, D)
        (h,) = run_blocks(self.blocks, [Lane(context.branches, h, cond)])  # caching is woven in there
        return self.head(h, cond)

    def state_shape(self, context: Context) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one branch's h, and of every sub-module's output but for the dtype."""
        return (1, context.video_tokens + context.text.shape[1], self.config.width), context.residual

    def activation_bytes(self, tokens: int, item: int, hidden: int = 2) -> int:
        """An estimate of the fullest moment of a block.

        In attention: h, its normed copy, qkv and the rotated q and k; in the MLP: h, the normed copy and the
        hidden layer. item, hidden: see layers.block_bytes
        """
        c = self.config
        rows = tokens + c.text_len
        return rows * block_bytes(c.width, c.mlp_width, item, hidden, attention=7, mlp=2)

    def macs(
        self, size: tuple[int, int, int], text_len: int, slice_width: int | None = None
    ) -> dict[tuple[int, str], int]:
        """Multiply-adds of one forward of one branch, by (block, sub-module).

        size: latent (T, H, W). Linears and both attention products inside the blocks, over video and text;
        the modulation's linear is one row per step and not counted. slice_width: of queries and keys, the
        projection onto it included.
        """
        c = self.config
        tokens = size[0] * size[1] * size[2] // (c.patch[0] * c.patch[1] * c.patch[2]) + text_len
        attn = 4 * tokens * c.width**2 + 2 * tokens**2 * c.width
        if slice_width is not None:
            scores, rotation = tokens**2 * c.heads * slice_width, 2 * tokens * c.width * slice_width
            attn += rotation + scores - tokens**2 * c.width
        mlp = 2 * tokens * c.width * c.mlp_width
        return {(k, sub): n for k in range(c.depth) for sub, n in (("attn", attn), ("mlp", mlp))}
