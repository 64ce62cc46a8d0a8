"""Wan 2.1 text-to-video transformer (Wan Team, 2025). Follows Wan-Video/Wan2.1 wan/modules/model.py."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.attention import (
    FULL,
    Backend,
    Full,
    Sliced,
    Text,
    attend,
    attention,
    merge_heads,
    split_heads,
    take_text,
)
from minidit.cache.loop import Lane, run_blocks
from minidit.cache.seam import BlockCache
from minidit.layers import (
    LayerNorm,
    Linear,
    Mlp,
    RMSNorm,
    TimeMlp,
    block_bytes,
    modulation_table,
    rope_axis,
    timestep_sinusoid,
)
from minidit.presets import WanConfig
from minidit_kernels.modulate import gated_residual, modulate


@dataclass(frozen=True)
class BlockCond:
    """What one block sees beside h."""

    mod: Tensor  # (B, 6, D) fp32
    rope: tuple[Tensor, Tensor]  # cos, sin (L, K/2) fp32
    text: Text
    attention: Backend
    dtype: torch.dtype  # of the matrix products


@dataclass(frozen=True)
class Context:
    """What does not change during a generation, for the guidance branches that run as one batch."""

    branches: tuple[str, ...]  # one name per batch row
    grid: tuple[int, int, int]  # tokens along (T, H, W)
    rope: tuple[Tensor, Tensor]
    text: tuple[Text, ...]  # per block; it does not change over steps, so that keys and values may be kept
    attention: Backend
    residual: torch.dtype  # of h; float32 reproduces the original, the run dtype halves its traffic

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
        context = self.context
        return BlockCond(self.mod, context.rope, context.text[block], context.attention, self.dtype)


def rope_table(grid: tuple[int, int, int], width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, its channel pairs shared out over time, height and width.

    grid: tokens along (T, H, W) · width: head width K -> two (T*H*W, K/2) fp32, from fp64 angles
    """
    side = 2 * (width // 6)  # channels of the height axis, and of the width axis; time takes the rest
    axes = [rope_axis(n, w) for n, w in zip(grid, (width - 2 * side, side, side), strict=True)]
    t, h, w = grid
    angle = torch.cat(
        (
            axes[0][:, None, None].expand(t, h, w, -1),
            axes[1][None, :, None].expand(t, h, w, -1),
            axes[2][None, None, :].expand(t, h, w, -1),
        ),
        dim=-1,
    ).flatten(0, 2)
    return angle.cos().float(), angle.sin().float()


class SelfAttention(nn.Module):
    """Attention among all video tokens. q and k are normed over the full width, before the heads part."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.q_norm = RMSNorm(config.width, config.eps)
        self.k_norm = RMSNorm(config.width, config.eps)
        self.out = Linear(config.width, config.width)

    def queries_keys_values(
        self, x: Tensor, cond: BlockCond, how: Full | Sliced = FULL
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) -> q, k (B, N, L, K or R) and v (B, N, L, K), as they enter the scores"""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, L, D)
        basis_q, basis_k = how.bases
        q = self.q_norm.into_heads(q, self.heads, cond.rope, basis_q)
        k = self.k_norm.into_heads(k, self.heads, cond.rope, basis_k)
        return q, k, split_heads(v, self.heads)

    def forward(self, x: Tensor, cond: BlockCond, *, how: Full | Sliced = FULL) -> Tensor:
        q, k, v = self.queries_keys_values(x, cond, how)
        x = attend(q, k, v, how, scale=v.shape[-1] ** -0.5, backend=cond.attention)
        return self.out(merge_heads(x))


class CrossAttention(nn.Module):
    """Attention from video tokens to the text rows, padding rows included."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.heads
        self.q = Linear(config.width, config.width)
        self.kv = Linear(config.width, 2 * config.width)
        self.q_norm = RMSNorm(config.width, config.eps)
        self.k_norm = RMSNorm(config.width, config.eps)
        self.out = Linear(config.width, config.width)

    def keys_values(self, text: Text) -> tuple[Tensor, Tensor]:
        """Keys and values (B, N, M, K) of states (B, M, D); those that were made before, as they are"""
        if isinstance(text, tuple):
            return text
        k, v = self.kv(text).chunk(2, dim=-1)
        v = v.contiguous()  # a view would keep the keys before their norm alive
        return self.k_norm.into_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, cond: BlockCond) -> Tensor:
        q = self.q_norm.into_heads(self.q(x), self.heads)  # (B, N, L, K)
        return self.out(merge_heads(attention(q, *self.keys_values(cond.text), backend=cond.attention)))


class WanBlock(nn.Module):
    """Self-attention, text cross-attention, MLP; the timestep modulates the first and the last."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.mod = nn.Parameter(modulation_table(6, config.width))
        self.attn = SelfAttention(config)
        self.norm3 = LayerNorm(config.width, config.eps)
        self.cross = CrossAttention(config)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, h: Tensor, cond: BlockCond, cache: BlockCache) -> Tensor:
        mod = (self.mod.float() + cond.mod).unsqueeze(2)  # (B, 6, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(1)  # six (B, 1, D), fp32
        x = modulate(h, scale1, shift1, eps=self.eps, dtype=cond.dtype)  # (B, L, D)
        h = gated_residual(h, gate1, cache.run("attn", self.attn, x, cond))
        h = h + cache.run("cross", self.cross, self.norm3(h, cond.dtype), cond)
        x = modulate(h, scale2, shift2, eps=self.eps, dtype=cond.dtype)
        return gated_residual(h, gate2, cache.run("mlp", self.mlp, x))


class Head(nn.Module):
    """Last norm, modulated by the time embedding itself, and the way back from tokens to latents."""

    def __init__(self, config: WanConfig, cells: int):
        super().__init__()
        self.patch, self.eps = config.patch, config.eps
        self.mod = nn.Parameter(modulation_table(2, config.width))
        self.out = Linear(config.width, cells)

    def forward(self, h: Tensor, cond: Cond) -> Tensor:
        """h (B, L, D) -> velocity (B, C, T, H, W) fp32"""
        shift, scale = (self.mod.float() + cond.time[:, None]).unsqueeze(2).unbind(1)  # (B, 1, D) each
        y = self.out(modulate(h, scale, shift, eps=self.eps, dtype=self.out.weight.dtype))
        (t, th, tw), (pt, ph, pw) = cond.context.grid, self.patch
        y = y.float().reshape(-1, t, th, tw, pt, ph, pw, y.shape[-1] // (pt * ph * pw))
        return rearrange(y, "b t h w pt ph pw c -> b c (t pt) (h ph) (w pw)")


class Wan(nn.Module):
    """Predicts the flow velocity noise - x0 of noisy latents at a timestep, given text states."""

    subs = ("attn", "cross", "mlp")  # of a block, in order, as plans name them
    # the original keeps these in float32 under autocast: the timestep path, modulation tables, norms and head
    keep_fp32 = ("time_mlp", "time_mod", "mod", "q_norm", "k_norm", "norm3", "head")

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        cells = (
            config.channels * config.patch[0] * config.patch[1] * config.patch[2]
        )  # latent values per token
        self.patch_in = Linear(cells, config.width)
        self.text_mlp = Mlp(config.text_width, config.width, config.width)
        self.time_mlp = TimeMlp(config.freq_width, config.width)
        self.time_mod = nn.Linear(config.width, 6 * config.width)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.depth))
        self.head = Head(config, cells)

    def prepare(
        self,
        text: Sequence[Tensor],
        size: tuple[int, int, int],
        *,
        branches: Sequence[str] = ("cond",),
        attention: str = "auto",
        residual: torch.dtype | None = None,
        keep_text: bool = True,
    ) -> Context:
        """Everything a generation needs that no step changes.

        text: one (M_i, text_width) per batch row · size: latent (T, H, W) · branches: a name per row ·
        keep_text: the text's keys and values are made now, for all steps; else every block makes its own
        """
        longest = max(len(states) for states in text)
        if longest > self.config.text_len:
            raise ValueError(
                f"text of {longest} rows does not fit this model's text_len={self.config.text_len}"
            )
        weight = self.patch_in.weight
        grid = tuple(n // p for n, p in zip(size, self.config.patch, strict=True))
        rows = torch.stack(
            [F.pad(t, (0, 0, 0, self.config.text_len - len(t))) for t in text]
        )  # zero rows count too
        states = self.text_mlp(rows.to(weight))  # (B, M, D)
        text_of_blocks = (states,) * self.config.depth
        if keep_text:
            text_of_blocks = tuple(block.cross.keys_values(states) for block in self.blocks)
        cos, sin = rope_table(grid, self.config.width // self.config.heads)
        angles = cos.to(weight.device), sin.to(weight.device)
        return Context(tuple(branches), grid, angles, text_of_blocks, attention, residual or weight.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return self.patch_in.weight.dtype

    def embed(self, x: Tensor, t: Tensor, context: Context) -> tuple[Tensor, Cond]:
        """Tokens and the step's conditioning. x (B, C, T, H, W) · t (B,) in [0, 1000] -> h (B, L, D), cond"""
        dtype = self.patch_in.weight.dtype
        pt, ph, pw = self.config.patch
        x = rearrange(x, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        time = self.time_mlp(timestep_sinusoid(t, self.config.freq_width))  # (B, D)
        mod = self.time_mod(F.silu(time)).unflatten(1, (6, -1))  # (B, 6, D)
        return self.patch_in(x.to(dtype)).to(context.residual), Cond(
            context, mod.float(), time.float(), dtype
        )

    def forward(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """Predict the flow velocity.

        x (B, C, T, H, W) · t (B,) in [0, 1000] · context from prepare() -> like x, fp32
        """
        h, cond = self.embed(x, t, context)  # (B, L, D)
        (h,) = run_blocks(self.blocks, [Lane(context.branches, h, cond)])  # caching is woven in there
        return self.head(h, cond)

    def state_shape(self, context: Context) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one branch's h, and of every sub-module's output but for the dtype."""
        tokens = context.grid[0] * context.grid[1] * context.grid[2]
        return (1, tokens, self.config.width), context.residual

    def activation_bytes(self, tokens: int, item: int, hidden: int = 2) -> int:
        """An estimate of the fullest moment of a block.

        In attention: h, its normed copy, qkv and the rotated q and k; in the MLP: h, the normed copy and the
        hidden layer. item, hidden: see layers.block_bytes
        """
        c = self.config
        return tokens * block_bytes(c.width, c.mlp_width, item, hidden, attention=7, mlp=2)

    def macs(
        self, size: tuple[int, int, int], text_len: int, slice_width: int | None = None
    ) -> dict[tuple[int, str], int]:
        """Multiply-adds of one forward of one branch, by (block, sub-module).

        size: latent (T, H, W). Linears and both attention products inside the blocks; text keys and values
        are made once per generation and not counted (macs.with_text). slice_width: of queries and keys in
        self-attention, the projection onto it included.
        """
        c = self.config
        tokens = size[0] * size[1] * size[2] // (c.patch[0] * c.patch[1] * c.patch[2])
        attn = 4 * tokens * c.width**2 + 2 * tokens**2 * c.width
        if slice_width is not None:
            scores, rotation = tokens**2 * c.heads * slice_width, 2 * tokens * c.width * slice_width
            attn += rotation + scores - tokens**2 * c.width
        cross = 2 * tokens * c.width**2 + 2 * tokens * text_len * c.width
        mlp = 2 * tokens * c.width * c.mlp_width
        per_block = {"attn": attn, "cross": cross, "mlp": mlp}
        return {(k, sub): n for k in range(c.depth) for sub, n in per_block.items()}
