"""Open-Sora 1.2 transformer, STDiT3 (Zheng et al., 2024). Follows hpcaitech/Open-Sora v1.2.0 stdit3.py.

A block is a spatial half, where the tokens of each frame attend to each other, and a temporal half, where
each place attends to itself over the frames; both look at the text. Between them h stays (B, T*S, D).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.attention import (
    FULL,
    AxisAttention,
    Backend,
    Full,
    Sliced,
    Text,
    TextAttention,
    split_heads,
    take_text,
)
from minidit.cache.loop import Lane, run_blocks
from minidit.cache.seam import BlockCache
from minidit.layers import (
    Linear,
    Mlp,
    RMSNorm,
    TimeMlp,
    block_bytes,
    modulation_table,
    rope_axis,
    timestep_sinusoid,
)
from minidit.presets import OpenSoraConfig
from minidit_kernels.modulate import gated_residual, modulate


@dataclass(frozen=True)
class Video:
    """What the model is told of the video as people see it."""

    height: int  # pixels
    width: int
    fps: float


@dataclass(frozen=True)
class BlockCond:
    """What one block sees beside h."""

    mod: Tensor  # (G, 6, D) fp32, G = B, or B*T where frames differ in their timestep
    text: tuple[Text, Text]  # of the spatial and of the temporal half
    frames: int  # T
    rope: tuple[Tensor, Tensor]  # cos, sin (T, K/2) fp32, over time
    attention: Backend
    dtype: torch.dtype  # of the matrix products


@dataclass(frozen=True)
class Context:
    """What does not change during a generation, for the guidance branches that run as one batch."""

    branches: tuple[str, ...]  # one name per batch row
    size: tuple[int, int, int]  # latent (T, H, W)
    grid: tuple[int, int, int]  # tokens along (T, H, W)
    positions: Tensor  # (S, D) fp32
    fps: Tensor  # (1, D), embedded
    rope: tuple[Tensor, Tensor]
    frame_mask: (
        Tensor | None
    )  # (T,) in [0, 1]: a frame is noisy from t = 1000 * mask on, until then it is given
    # per block and half; it does not change over steps, so that keys and values may be kept
    text: tuple[tuple[Text, Text], ...]
    attention: Backend
    residual: torch.dtype  # of h

    def select(self, branches: Sequence[str]) -> "Context":
        """The context of some of its branches; nothing is copied for one branch."""
        if tuple(branches) == self.branches:
            return self
        rows = [self.branches.index(branch) for branch in branches]
        text = tuple(tuple(take_text(each, rows) for each in halves) for halves in self.text)
        return replace(self, branches=tuple(branches), text=text)


@dataclass(frozen=True)
class Cond:
    """A step's conditioning: the context and what depends on t."""

    context: Context
    mod: Tensor  # (G, 6, D) fp32
    time: Tensor  # (G, D) fp32
    dtype: torch.dtype

    def at(self, block: int) -> BlockCond:
        c = self.context
        return BlockCond(self.mod, c.text[block], c.grid[0], c.rope, c.attention, self.dtype)


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """[sin(p f) | cos(p f)] with f_k = 10000^(-2k/width). positions (n,) fp64 -> (n, width) fp64"""
    f = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    angle = positions[:, None] * f
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def grid_positions(rows: int, columns: int, video: Video, config: OpenSoraConfig) -> Tensor:
    """A table over the places of a frame: half of the channels for the column, half for the row.

    A larger picture has finer coordinates, in units of its own side. -> (rows * columns, D) fp32
    """
    scale = math.sqrt(video.height * video.width) / config.base_size
    side, half = round(math.sqrt(rows * columns)), config.width // 2
    axis = lambda n: sinusoid(torch.arange(n, dtype=torch.float64) / scale * side / n, half)
    column = axis(columns)[None].expand(rows, -1, -1)
    row = axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat((column, row), dim=2).flatten(0, 1).float()


def modulate_groups(h: Tensor, scale: Tensor, shift: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """modulate() with one row for every G-th part of the tokens. h (B, L, D) · scale, shift (G, 1, D)"""
    return modulate(h.reshape(len(scale), -1, h.shape[2]), scale, shift, eps=eps, dtype=dtype).view_as(h)


def gate_groups(h: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """gated_residual() with one row for every G-th part of the tokens. h, x (B, L, D) · gate (G, 1, D)"""
    parts = lambda y: y.reshape(len(gate), -1, y.shape[2])
    return gated_residual(parts(h), gate, parts(x)).view_as(h)


class SelfAttention(AxisAttention):
    """q and k are normed per head, before rope, which attention over time alone has."""

    def __init__(self, config: OpenSoraConfig, axis: str):
        super().__init__(config.width, config.heads, axis)
        self.q_norm = RMSNorm(config.width // config.heads, config.eps)
        self.k_norm = RMSNorm(config.width // config.heads, config.eps)

    def queries_keys_values(
        self, x: Tensor, cond: BlockCond, how: Full | Sliced = FULL
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T*S, D) -> q, k, v, as they enter the scores: (B*T, N, S, K or R) or (B*S, N, T, K or R)"""
        q, k, v = self.qkv(self.groups(x, cond.frames)).chunk(3, dim=-1)
        rope, (basis_q, basis_k) = cond.rope if self.axis == "time" else None, how.bases
        q = self.q_norm.into_heads(q, self.heads, rope, basis_q)
        k = self.k_norm.into_heads(k, self.heads, rope, basis_k)
        return q, k, split_heads(v, self.heads)


class OpenSoraBlock(nn.Module):
    """A spatial and a temporal half, alike; the timestep modulates all but the text."""

    def __init__(self, config: OpenSoraConfig):
        super().__init__()
        self.eps = config.eps
        self.mod = nn.Parameter(modulation_table(6, config.width))
        self.attn = SelfAttention(config, "space")
        self.cross = TextAttention(config.width, config.heads)
        self.mlp = Mlp(config.width, config.mlp_width)
        self.t_mod = nn.Parameter(modulation_table(6, config.width))
        self.t_attn = SelfAttention(config, "time")
        self.t_cross = TextAttention(config.width, config.heads)
        self.t_mlp = Mlp(config.width, config.mlp_width)

    def forward(self, h: Tensor, cond: BlockCond, cache: BlockCache) -> Tensor:
        h = self.half("", self.mod, h, cond, cond.text[0], cache)  # (B, T*S, D)
        return self.half("t_", self.t_mod, h, cond, cond.text[1], cache)

    def half(
        self, prefix: str, table: Tensor, h: Tensor, cond: BlockCond, text: Text, cache: BlockCache
    ) -> Tensor:
        """prefix: of the half's sub-modules, "" for space and "t_" for time"""
        attn, cross, mlp = (getattr(self, prefix + name) for name in ("attn", "cross", "mlp"))
        mod = (table.float() + cond.mod).unsqueeze(2)  # (G, 6, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(1)  # six (G, 1, D), fp32
        x = modulate_groups(h, scale1, shift1, eps=self.eps, dtype=cond.dtype)  # (B, T*S, D)
        h = gate_groups(h, gate1, cache.run(f"{prefix}attn", attn, x, cond))
        h = h + cache.run(f"{prefix}cross", cross, h.to(cond.dtype), text, cond)
        x = modulate_groups(h, scale2, shift2, eps=self.eps, dtype=cond.dtype)
        return gate_groups(h, gate2, cache.run(f"{prefix}mlp", mlp, x))


class Head(nn.Module):
    """Last norm, modulated by the time embedding itself, and the way back from tokens to latents."""

    def __init__(self, config: OpenSoraConfig):
        super().__init__()
        self.patch, self.eps, self.channels = config.patch, config.eps, config.channels
        self.mod = nn.Parameter(modulation_table(2, config.width))
        self.out = Linear(config.width, config.patch**2 * config.out_channels)

    def everything(self, h: Tensor, cond: Cond) -> Tensor:
        """h (B, L, D) -> x0 - noise, as in the original, and unused channels (B, C_out, T, H, W) fp32

        The original norms given frames a second time here. Nothing reads what it predicts of them.
        """
        shift, scale = (self.mod.float() + cond.time[:, None]).unsqueeze(2).unbind(1)  # (G, 1, D) each
        y = self.out(modulate_groups(h, scale, shift, eps=self.eps, dtype=self.out.weight.dtype)).float()
        (t, rows, columns), p = cond.context.grid, self.patch
        sizes = dict(t=t, h=rows, w=columns, p=p, q=p)
        y = rearrange(y, "b (t h w) (p q c) -> b c t (h p) (w q)", **sizes)
        return y[..., : cond.context.size[1], : cond.context.size[2]]  # without the padding of odd sides

    def forward(self, h: Tensor, cond: Cond) -> Tensor:
        """h (B, L, D) -> velocity noise - x0 (B, C, T, H, W) fp32"""
        return -self.everything(h, cond)[:, : self.channels]


class OpenSora(nn.Module):
    """Predicts the flow velocity of noisy latents at a timestep, given text states, picture size and fps."""

    subs = ("attn", "cross", "mlp", "t_attn", "t_cross", "t_mlp")  # of a block, in order, as plans name them
    keep_fp32 = ("time_mlp", "fps_mlp", "time_mod", "mod", "t_mod", "q_norm", "k_norm")

    def __init__(self, config: OpenSoraConfig):
        super().__init__()
        self.config = config
        self.patch_in = Linear(config.channels * config.patch**2, config.width)
        self.text_mlp = Mlp(config.text_width, config.width, config.width)
        self.null_text = nn.Parameter(torch.zeros(config.text_len, config.text_width))  # of no prompt
        self.time_mlp = TimeMlp(config.freq_width, config.width)
        self.fps_mlp = TimeMlp(config.freq_width, config.width)
        self.time_mod = nn.Linear(config.width, 6 * config.width)
        self.blocks = nn.ModuleList(OpenSoraBlock(config) for _ in range(config.depth))
        self.head = Head(config)

    def prepare(
        self,
        text: Sequence[Tensor | None],
        size: tuple[int, int, int],
        *,
        video: Video,
        branches: Sequence[str] = ("cond",),
        attention: str = "auto",
        residual: torch.dtype | None = None,
        frame_mask: Tensor | None = None,
        keep_text: bool = True,
    ) -> Context:
        """Everything a generation needs that no step changes.

        text: one (M, text_width) per batch row, all of one length; None is no prompt, with as many rows as
        the first · size: latent (T, H, W) · branches: a name per row · frame_mask: see Context · keep_text:
        the text's keys and values are made now, for all steps; else every block makes its own
        """
        weight, c = self.patch_in.weight, self.config
        rows = [self.null_text[: len(text[0])] if states is None else states for states in text]
        lengths = sorted({len(states) for states in rows})
        if len(lengths) > 1 or lengths[-1] > c.text_len:
            raise ValueError(
                f"text of {', '.join(map(str, lengths))} rows; give all branches one count up to {c.text_len}"
            )
        states = self.text_mlp(torch.stack([states.to(weight) for states in rows]))  # (B, M, D)
        grid = size[0], -(-size[1] // c.patch), -(-size[2] // c.patch)
        angles = rope_axis(grid[0], c.width // c.heads)
        text_of_blocks = ((states, states),) * c.depth
        if keep_text:
            halves = lambda block: (block.cross, block.t_cross)
            text_of_blocks = tuple(tuple(half.keys_values(states) for half in halves(b)) for b in self.blocks)
        return Context(
            branches=tuple(branches),
            size=tuple(size),
            grid=grid,
            positions=grid_positions(*grid[1:], video, c).to(weight.device),
            fps=self.fps_mlp(timestep_sinusoid(weight.new_tensor([video.fps]).float(), c.freq_width)),
            rope=(angles.cos().float().to(weight.device), angles.sin().float().to(weight.device)),
            frame_mask=None if frame_mask is None else frame_mask.to(weight.device, torch.float32),
            text=text_of_blocks,
            attention=attention,
            residual=residual or weight.dtype,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return self.patch_in.weight.dtype

    def embed(self, x: Tensor, t: Tensor, context: Context) -> tuple[Tensor, Cond]:
        """Tokens and the step's conditioning. x (B, C, T, H, W) · t (B,) in [0, 1000] -> h (B, L, D), cond"""
        p = self.config.patch
        x = F.pad(x, (0, -x.shape[4] % p, 0, -x.shape[3] % p))
        x = rearrange(x, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)
        time, mod = self.embed_time(t, context)
        if context.frame_mask is not None:  # given frames are at timestep 0
            clean_time, clean_mod = self.embed_time(torch.zeros_like(t), context)
            is_noisy = context.frame_mask * 1000 >= t[:, None]  # (B, T)
            time = torch.where(is_noisy[..., None], time[:, None], clean_time[:, None]).flatten(0, 1)
            mod = torch.where(is_noisy[..., None, None], mod[:, None], clean_mod[:, None]).flatten(0, 1)
        h = (self.patch_in(x.to(self.dtype)) + context.positions).flatten(1, 2).to(context.residual)
        return h, Cond(context, mod, time, self.dtype)

    def embed_time(self, t: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """t (B,) -> time (B, D) and the blocks' modulation (B, 6, D), fp32"""
        time = self.time_mlp(timestep_sinusoid(t, self.config.freq_width)) + context.fps
        return time.float(), self.time_mod(F.silu(time)).unflatten(1, (6, -1)).float()

    def forward(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """Predict what the original does: x0 - noise and, in further channels, what nothing uses.

        x (B, C, T, H, W) · t (B,) in [0, 1000] · context from prepare() -> (B, C_out, T, H, W) fp32
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

        In attention: h, its normed copy, qkv and the normed q and k; in the MLP: h, the normed copy and the
        hidden layer. item, hidden: see layers.block_bytes
        """
        c = self.config
        return tokens * block_bytes(c.width, c.mlp_width, item, hidden, attention=7, mlp=2)

    def macs(
        self, size: tuple[int, int, int], text_len: int, slice_width: int | None = None
    ) -> dict[tuple[int, str], int]:
        """Multiply-adds of one forward of one branch, by (block, sub-module).

        size: latent (T, H, W). Linears and both attention products inside the blocks; text keys and values
        are made once per generation and not counted (macs.with_text). slice_width: of queries and keys:
        folded into the projection of queries towards text, and a rotation in self-attention, where norms
        stand between; 0: a kept map's, which over time is there and within frames is made anew from kept
        queries and keys.
        """
        c = self.config
        frames, places = size[0], -(-size[1] // c.patch) * -(-size[2] // c.patch)
        tokens, narrow = frames * places, c.width if slice_width is None else c.heads * slice_width
        linears = (4 if narrow else 2) * tokens * c.width**2 + 2 * tokens * c.width * (slice_width or 0)
        cross = tokens * (c.width + text_len) * (c.width + narrow) + text_len * c.width * (slice_width or 0)
        mlp = 2 * tokens * c.width * c.mlp_width
        per_block = {
            "attn": linears + tokens * places * (c.width + (narrow or c.width)),
            "t_attn": linears + tokens * frames * (c.width + narrow),
        }
        per_block |= {"cross": cross, "t_cross": cross, "mlp": mlp, "t_mlp": mlp}
        return {(k, sub): per_block[sub] for k in range(c.depth) for sub in self.subs}
