"""UMT5 and T5 v1.1 text encoders (Chung et al., 2023; Raffel et al., 2020).

Follows Wan-Video/Wan2.1 wan/modules/t5.py: a pre-norm transformer with no biases and no attention scaling.
All it knows of order is a learned bias on the attention scores: a table per layer in UMT5, one in all in T5.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.layers import RMSNorm
from minidit.presets import T5Config


def position_buckets(length: int, buckets: int, max_distance: int) -> Tensor:
    """The bucket of every pair of positions, by key - query -> (M, M) int64 on the CPU, rows are queries.

    Half of the buckets serve keys after the query, half the others. Of each half, the first half hold one
    distance each, the rest widen logarithmically up to max_distance; the last takes whatever lies beyond.
    """
    # On the CPU: distances 16, 32 and 64 lie on a border, which the logarithm of another device may miss.
    position = torch.arange(length, device="cpu")
    offset = position[None, :] - position[:, None]  # (M, M)
    distance, half, exact = offset.abs(), buckets // 2, buckets // 4
    fraction = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (fraction * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


def table(rows: int, width: int) -> nn.Embedding:
    """An embedding of unit variance; uniform, as torch's own draw takes a second on the meta device."""
    weight = torch.empty(rows, width).uniform_(-(3**0.5), 3**0.5)
    return nn.Embedding(rows, width, _weight=weight)


class T5Attention(nn.Module):
    """Unscaled self-attention with a position bias. Scores are large, so they and the softmax are in fp32."""

    def __init__(self, config: T5Config, *, has_positions: bool):
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)
        self.positions = table(config.buckets, config.heads) if has_positions else None

    def position_bias(self, buckets: Tensor) -> Tensor:
        """buckets (M, M) -> (N, M, M) fp32."""
        return self.positions.weight.float().t()[:, buckets]

    def forward(self, x: Tensor, bias: Tensor, is_padding: Tensor) -> Tensor:
        """x (B, M, D) · bias (N, M, M) · is_padding (B, 1, 1, M) -> (B, M, D)."""
        q, k, v = rearrange(self.qkv(x), "b m (three n k) -> three b n m k", three=3, n=self.heads)
        scores = q.float() @ k.float().transpose(-1, -2) + bias  # (B, N, M, M)
        lowest = torch.finfo(torch.float32).min  # not -inf: a row of padding alone would give NaN
        scores = scores.masked_fill(is_padding, lowest)
        return self.out(rearrange(scores.softmax(-1).to(v.dtype) @ v, "b n m k -> b m (n k)"))


class T5MLP(nn.Module):
    """Gated GELU, in the tanh approximation."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, M, D) -> (B, M, D)."""
        return self.down(self.up(x) * F.gelu(self.gate(x), approximate="tanh"))


class T5Block(nn.Module):
    """Self-attention and MLP, each behind an RMS norm."""

    def __init__(self, config: T5Config, *, has_positions: bool):
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.eps)
        self.attn = T5Attention(config, has_positions=has_positions)
        self.norm2 = RMSNorm(config.width, config.eps)
        self.mlp = T5MLP(config)

    def forward(self, h: Tensor, bias: Tensor, is_padding: Tensor) -> Tensor:
        """h (B, M, D) · bias (N, M, M) · is_padding (B, 1, 1, M) -> (B, M, D)."""
        h = h + self.attn(self.norm1(h), bias, is_padding)
        return h + self.mlp(self.norm2(h))


class T5Encoder(nn.Module):
    """Token ids to text states."""

    keep_fp32 = ()

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        owns_positions = [i == 0 or not config.shared_positions for i in range(config.depth)]
        self.embed = table(config.vocab, config.width)
        self.blocks = nn.ModuleList(T5Block(config, has_positions=owns) for owns in owns_positions)
        self.norm_out = RMSNorm(config.width, config.eps)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode padded prompts; rows of padding come out too, and mean nothing.

        ids (B, M) int64 · mask (B, M), 0 on padding -> (B, M, D)
        """
        if ids.ndim != 2 or mask.shape != ids.shape:
            got = tuple(ids.shape), tuple(mask.shape)
            raise ValueError(
                f"T5Encoder: ids and mask must share one shape (B, M), got {got[0]} and {got[1]}"
            )
        buckets = position_buckets(ids.shape[1], self.config.buckets, self.config.max_distance).to(ids.device)
        is_padding = mask[:, None, None, :] == 0  # (B, 1, 1, M)
        h = self.embed(ids)  # (B, M, D)
        for block in self.blocks:
            if block.attn.positions is not None:  # else the bias of layer 0 stands
                bias = block.attn.position_bias(buckets)  # (N, M, M)
            h = block(h, bias, is_padding)
        return self.norm_out(h)
