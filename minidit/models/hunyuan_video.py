"""HunyuanVideo text-to-video transformer (Kong et al., 2024).

Follows Tencent-Hunyuan/HunyuanVideo hyvideo/modules/models.py. Video and text tokens are one sequence, video
first: the double blocks have weights of their own for each, the single blocks one set for both. The guidance
scale is an input of the model, so one forward per step is enough. Text rows are those of the prompt alone:
the original carries 256 and masks the padding, which never reaches the video.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.attention import FULL, AttnOp, Backend, Full, Sliced, attend, attention, merge_heads, split_heads
from minidit.cache.loop import Lane, run_blocks
from minidit.cache.seam import BlockCache
from minidit.layers import LayerNorm, Linear, Mlp, RMSNorm, TimeMlp, block_bytes, rope_axis
from minidit.presets import HunyuanVideoConfig
from minidit_kernels.modulate import gated_residual, modulate
from minidit_kernels.qk_norm_rope import Rope, like_heads

Text = tuple[Tensor, Tensor]  # language model states (M, text_width), CLIP's pooled vector (pooled_width,)


@dataclass(frozen=True)
class BlockCond:
    """What one block sees beside h."""

    vec: Tensor  # (B, D), SiLU of the conditioning vector
    rope: Rope  # cos, sin (L, K/2) fp32, of the video tokens
    text_tokens: int  # M
    attention: Backend
    dtype: torch.dtype  # of the matrix products

    @property
    def video_tokens(self) -> int:
        """L: the first rows of h, text follows."""
        return len(self.rope[0])


@dataclass(frozen=True)
class Context:
    """What does not change during a generation, for the guidance branches."""

    branches: tuple[str, ...]  # one name per batch row
    grid: tuple[int, int, int]  # tokens along (T, H, W)
    rope: Rope
    text: tuple[Tensor, ...]  # (M, D) per branch, M its own: rows on their way into the refiner
    text_vec: Tensor  # (B, D), what the refiner knows of all rows together
    vec: Tensor  # (B, D), of pooled text and guidance
    attention: Backend
    residual: torch.dtype  # of h

    def select(self, branches: Sequence[str]) -> "Context":
        """The context of some of its branches."""
        if tuple(branches) == self.branches:
            return self
        rows = [self.branches.index(branch) for branch in branches]
        return replace(
            self,
            branches=tuple(branches),
            text=tuple(self.text[row] for row in rows),
            text_vec=self.text_vec[rows],
            vec=self.vec[rows],
        )


@dataclass(frozen=True)
class Cond:
    """A step's conditioning: the context and what depends on t."""

    context: Context
    vec: Tensor  # (B, D), SiLU of the conditioning vector
    dtype: torch.dtype

    @property
    def time(self) -> Tensor:
        """What plans call TIME: the timestep, with pooled text and guidance."""
        return self.vec

    def at(self, block: int) -> BlockCond:
        context = self.context
        return BlockCond(self.vec, context.rope, len(context.text[0]), context.attention, self.dtype)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """[cos(t f) | sin(t f)], f_i = 10000^(-2i/width). t (B,), up to some 6000 -> (B, width) fp32

    In fp32 throughout, as in the original: at thousands of radians the rounding shows.
    """
    half = width // 2
    f = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
    angle = t.float()[:, None] * f
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def rope_table(
    grid: tuple[int, int, int], widths: tuple[int, int, int], theta: float
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles. grid: tokens along (T, H, W) -> two (T*H*W, K/2) fp32"""
    time, rows, columns = (rope_axis(n, w, theta) for n, w in zip(grid, widths, strict=True))
    t, h, w = grid
    angle = torch.cat(
        (
            time[:, None, None].expand(t, h, w, -1),
            rows[None, :, None].expand(t, h, w, -1),
            columns[None, None, :].expand(t, h, w, -1),
        ),
        dim=-1,
    ).flatten(0, 2)
    return angle.cos().float(), angle.sin().float()


class Modulation(nn.Linear):
    """A linear layer to `count` modulation vectors. vec (B, D), after SiLU -> (B, 1, count, D) fp32"""

    def __init__(self, width: int, count: int):
        super().__init__(width, count * width)
        self.count = count

    def forward(self, vec: Tensor) -> Tensor:
        return super().forward(vec).float().unflatten(-1, (1, self.count, -1))


class Projections(nn.Module):
    """Into the heads and out of them, for one set of tokens. q and k are normed per head."""

    def __init__(self, config: HunyuanVideoConfig):
        super().__init__()
        head_width = config.width // config.heads
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.q_norm = RMSNorm(head_width, config.eps)
        self.k_norm = RMSNorm(head_width, config.eps)
        self.out = Linear(config.width, config.width)

    def split(
        self,
        x: Tensor,
        rope: Rope | None,
        how: Full | Sliced,
        out: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) -> q, k (B, N, L, K or R) and v (B, N, L, K), as they enter the scores

        out: where q and k go
        """
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, L, D)
        basis_q, basis_k = how.bases
        q = self.q_norm.into_heads(q, self.heads, rope, basis_q, out[0])
        k = self.k_norm.into_heads(k, self.heads, rope, basis_k, out[1])
        return q, k, split_heads(v, self.heads)


def attend_all(q: Tensor, k: Tensor, v: Tensor, how: AttnOp, backend: str) -> Tensor:
    """-> (B, L + M, D)"""
    return merge_heads(attend(q, k, v, how, scale=v.shape[-1] ** -0.5, backend=backend))


class SingleAttention(Projections):
    """Attention among all tokens, projected by one set of weights."""

    def queries_keys_values(
        self, x: Tensor, cond: BlockCond, how: Full | Sliced = FULL
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L + M, D) -> q, k (B, N, L + M, K or R) and v, as they enter the scores"""
        return self.split(x, cond.rope, how)

    def forward(self, x: Tensor, cond: BlockCond, *, how: Full | Sliced = FULL) -> Tensor:
        return self.out(attend_all(*self.queries_keys_values(x, cond, how), how, cond.attention))


class DoubleAttention(nn.Module):
    """Attention among all tokens; video and text have projections of their own."""

    def __init__(self, config: HunyuanVideoConfig):
        super().__init__()
        self.video, self.text = Projections(config), Projections(config)

    def queries_keys_values(
        self, x: Tensor, cond: BlockCond, how: Full | Sliced = FULL
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L + M, D) -> q, k (B, N, L + M, K or R) and v, as they enter the scores"""
        n, heads = cond.video_tokens, self.video.heads
        widths = [x.shape[2] // heads if basis is None else basis.shape[2] for basis in how.bases]
        q, k = (like_heads(x, heads, width) for width in widths)  # both streams write there
        parts = (self.video, slice(0, n), cond.rope), (self.text, slice(n, None), None)
        split = lambda part, rows, rope: part.split(x[:, rows], rope, how, (q[:, :, rows], k[:, :, rows]))
        return q, k, torch.cat([split(*part)[2] for part in parts], dim=2)

    def forward(self, x: Tensor, cond: BlockCond, *, how: Full | Sliced = FULL) -> Tensor:
        n = cond.video_tokens
        y = attend_all(*self.queries_keys_values(x, cond, how), how, cond.attention)
        return torch.cat((self.video.out(y[:, :n]), self.text.out(y[:, n:])), dim=1)


class DoubleMlp(nn.Module):
    """An MLP for the video rows, or some of them, and one for the text rows. x (B, L + M, D)"""

    def __init__(self, config: HunyuanVideoConfig):
        super().__init__()
        self.video = Mlp(config.width, config.mlp_width)
        self.text = Mlp(config.width, config.mlp_width)

    def forward(self, x: Tensor, cond: BlockCond) -> Tensor:
        n = x.shape[1] - cond.text_tokens
        return torch.cat((self.video(x[:, :n]), self.text(x[:, n:])), dim=1)


class SingleMlp(nn.Module):
    """Linear, GELU (tanh form), linear; the way out shares its bias with that of the attention beside it."""

    def __init__(self, config: HunyuanVideoConfig):
        super().__init__()
        self.up = Linear(config.width, config.mlp_width)
        self.down = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x, gelu=True))


class DoubleBlock(nn.Module):
    """Attention over both streams together, then an MLP for each."""

    def __init__(self, config: HunyuanVideoConfig):
        super().__init__()
        self.eps = config.eps
        self.mod = nn.ModuleDict({name: Modulation(config.width, 6) for name in ("video", "text")})
        self.attn = DoubleAttention(config)
        self.mlp = DoubleMlp(config)

    def forward(self, h: Tensor, cond: BlockCond, cache: BlockCache) -> Tensor:
        mod = torch.cat([self.mod[name](cond.vec) for name in ("video", "text")], dim=1)  # (B, 2, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(2)  # six (B, 2, D)
        split = cond.video_tokens
        x = modulate(h, scale1, shift1, eps=self.eps, dtype=cond.dtype, split=split)  # (B, L + M, D)
        h = gated_residual(h, gate1, cache.run("attn", self.attn, x, cond), split=split)
        x = modulate(h, scale2, shift2, eps=self.eps, dtype=cond.dtype, split=split)
        return gated_residual(h, gate2, cache.run("mlp", self.mlp, x, cond), split=split)


class SingleBlock(nn.Module):
    """Attention and MLP side by side, over all tokens alike."""

    def __init__(self, config: HunyuanVideoConfig):
        super().__init__()
        self.eps = config.eps
        self.mod = Modulation(config.width, 3)
        self.attn = SingleAttention(config)
        self.mlp = SingleMlp(config)

    def forward(self, h: Tensor, cond: BlockCond, cache: BlockCache) -> Tensor:
        shift, scale, gate = self.mod(cond.vec).unbind(2)  # three (B, 1, D)
        x = modulate(h, scale, shift, eps=self.eps, dtype=cond.dtype)  # (B, L + M, D)
        out = cache.run("attn", self.attn, x, cond) + cache.run("mlp", self.mlp, x)
        return gated_residual(h, gate, out)


class RefinerMlp(nn.Module):
    """Linear, SiLU, linear. x (B, M, D)"""

    def __init__(self, config: HunyuanVideoConfig):
        super().__init__()
        self.up = Linear(config.width, config.mlp_width)
        self.down = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class RefinerBlock(nn.Module):
    """A transformer block over the text rows alone; the conditioning scales what it adds."""

    def __init__(self, config: HunyuanVideoConfig):
        super().__init__()
        self.heads = config.heads
        self.norm1 = LayerNorm(config.width, config.eps)
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.norm2 = LayerNorm(config.width, config.eps)
        self.mlp = RefinerMlp(config)
        self.mod = Modulation(config.width, 2)

    def forward(self, text: Tensor, vec: Tensor) -> Tensor:
        """text (B, M, D) · vec (B, D), after SiLU -> (B, M, D)"""
        gate1, gate2 = self.mod(vec).unbind(2)
        qkv = self.qkv(self.norm1(text, text.dtype))
        q, k, v = rearrange(qkv, "b m (three n k) -> three b n m k", three=3, n=self.heads)
        x = rearrange(attention(q, k, v), "b n m k -> b m (n k)")
        text = gated_residual(text, gate1, self.out(x))
        return gated_residual(text, gate2, self.mlp(self.norm2(text, text.dtype)))


class Refiner(nn.Module):
    """Language model states to text tokens. They depend on t, so this runs at every step."""

    def __init__(self, config: HunyuanVideoConfig):
        super().__init__()
        self.text_in = Linear(config.text_width, config.width)
        self.text_mlp = TimeMlp(config.text_width, config.width)
        self.time_mlp = TimeMlp(config.freq_width, config.width)
        self.blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.refiner_depth))

    def forward(self, text: Tensor, text_vec: Tensor, waves: Tensor) -> Tensor:
        """text (B, M, D), after text_in · text_vec (B, D) · waves (B, F), the sinusoid of t -> (B, M, D)"""
        vec = F.silu(self.time_mlp(waves) + text_vec)
        for block in self.blocks:
            text = block(text, vec)
        return text


class Head(nn.Module):
    """Last norm and the way back from video tokens to latents."""

    def __init__(self, config: HunyuanVideoConfig, cells: int):
        super().__init__()
        self.patch, self.eps = config.patch, config.eps
        self.mod = Modulation(config.width, 2)
        self.out = Linear(config.width, cells)

    def forward(self, h: Tensor, cond: Cond) -> Tensor:
        """h (B, L + M, D) -> velocity (B, C, T, H, W) fp32"""
        (t, th, tw), (pt, ph, pw) = cond.context.grid, self.patch
        shift, scale = self.mod(cond.vec).unbind(2)
        y = self.out(modulate(h[:, : t * th * tw], scale, shift, eps=self.eps, dtype=cond.dtype)).float()
        y = y.reshape(-1, t, th, tw, y.shape[-1] // (pt * ph * pw), pt, ph, pw)
        return rearrange(y, "b t h w c pt ph pw -> b c (t pt) (h ph) (w pw)")


class HunyuanVideo(nn.Module):
    """Predicts the flow velocity noise - x0 of noisy latents at a timestep, given text and guidance."""

    subs = ("attn", "mlp")  # of a block, in order, as plans name them
    keep_fp32 = ()

    def __init__(self, config: HunyuanVideoConfig):
        super().__init__()
        self.config = config
        cells = config.channels * config.patch[0] * config.patch[1] * config.patch[2]
        self.patch_in = Linear(cells, config.width)
        self.time_mlp = TimeMlp(config.freq_width, config.width)
        self.pooled_mlp = TimeMlp(config.pooled_width, config.width)
        self.guidance_mlp = TimeMlp(config.freq_width, config.width)
        self.refiner = Refiner(config)
        self.blocks = nn.ModuleList(
            (DoubleBlock if k < config.double else SingleBlock)(config) for k in range(config.depth)
        )
        self.head = Head(config, cells)

    def prepare(
        self,
        text: Sequence[Text],
        size: tuple[int, int, int],
        *,
        guidance: float = 6.0,
        branches: Sequence[str] = ("cond",),
        attention: str = "auto",
        residual: torch.dtype | None = None,
    ) -> Context:
        """Everything a generation needs that no step changes.

        text: states and pooled vector per batch row, without padding · size: latent (T, H, W) · guidance: the
        embedded scale · branches: a name per row
        """
        longest = max(len(states) for states, _ in text)
        if longest > self.config.text_len:
            raise ValueError(
                f"text of {longest} rows does not fit this model's text_len={self.config.text_len}"
            )
        weight = self.patch_in.weight
        pooled = torch.stack([pooled for _, pooled in text]).to(weight)
        means = torch.stack([states.float().mean(0) for states, _ in text]).to(weight)
        # the product is rounded as in the original: in bf16 it is 6016 for a scale of 6
        told = (torch.full((len(text),), guidance, dtype=weight.dtype, device=weight.device) * 1000).float()
        told = self.guidance_mlp(sinusoid(told, self.config.freq_width))
        grid = tuple(n // p for n, p in zip(size, self.config.patch, strict=True))
        cos, sin = rope_table(grid, self.config.rope_widths, self.config.rope_theta)
        return Context(
            tuple(branches),
            grid,
            (cos.to(weight.device), sin.to(weight.device)),
            tuple(self.refiner.text_in(states.to(weight)) for states, _ in text),
            self.refiner.text_mlp(means),
            self.pooled_mlp(pooled) + told,
            attention,
            residual or weight.dtype,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return self.patch_in.weight.dtype

    def embed(self, x: Tensor, t: Tensor, context: Context) -> tuple[Tensor, Cond]:
        """Tokens and the step's conditioning, for branches of equally many text rows.

        x (B, C, T, H, W) · t (B,) in [0, 1000] -> h (B, L + M, D), cond
        """
        pt, ph, pw = self.config.patch
        x = rearrange(x, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        waves = sinusoid(t, self.config.freq_width)  # (B, F)
        vec = F.silu(self.time_mlp(waves) + context.vec)  # (B, D)
        text = self.refiner(torch.stack(context.text), context.text_vec, waves)  # (B, M, D)
        h = torch.cat((self.patch_in(x.to(self.dtype)), text), dim=1).to(context.residual)
        return h, Cond(context, vec, self.dtype)

    def forward(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """Predict the flow velocity.

        x (B, C, T, H, W) · t (B,) in [0, 1000] · context from prepare() -> like x, fp32
        """
        h, cond = self.embed(x, t, context)  # (B, L + M, D)
        (h,) = run_blocks(self.blocks, [Lane(context.branches, h, cond)])  # caching is woven in there
        return self.head(h, cond)

    def state_shape(self, context: Context) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the first branch's h, and of every sub-module's output but for the dtype."""
        rows = len(context.rope[0]) + len(context.text[0])
        return (1, rows, self.config.width), context.residual

    def activation_bytes(self, tokens: int, item: int, hidden: int = 2) -> int:
        """An estimate of the fullest moment of a block.

        In attention: h, its normed copy, qkv, the joined and the rotated q and k; in a single block's MLP: h,
        the normed copy, what attention gave, and the hidden layer. item, hidden: see layers.block_bytes
        """
        c = self.config
        rows = tokens + c.text_len
        return rows * block_bytes(c.width, c.mlp_width, item, hidden, attention=10, mlp=3)

    def macs(
        self, size: tuple[int, int, int], text_len: int, slice_width: int | None = None
    ) -> dict[tuple[int, str], int]:
        """Multiply-adds of one forward of one branch, by (block, sub-module).

        size: latent (T, H, W) · text_len: rows of text. Linears and both attention products inside the
        blocks, modulation aside, which is of one row. slice_width: of queries and keys, the projection onto
        it included.
        """
        c = self.config
        rows = size[0] * size[1] * size[2] // (c.patch[0] * c.patch[1] * c.patch[2]) + text_len
        attn = 4 * rows * c.width**2 + 2 * rows**2 * c.width
        if slice_width is not None:
            scores, rotation = rows**2 * c.heads * slice_width, 2 * rows * c.width * slice_width
            attn += rotation + scores - rows**2 * c.width
        per_block = {"attn": attn, "mlp": 2 * rows * c.width * c.mlp_width}
        return {(k, sub): n for k in range(c.depth) for sub, n in per_block.items()}
