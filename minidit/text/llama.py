"""Llama 3 as a text encoder (Dubey et al., 2024): the states of a layer before the last.

Follows the transformers model that Tencent-Hunyuan/HunyuanVideo hyvideo/text_encoder runs: states are taken
UNUSED_LAYERS before the end, without the final norm, so nothing behind them is kept or run.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.layers import RMSNorm, rope_axis
from minidit.presets import LlamaConfig

UNUSED_LAYERS = 2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, channel i paired with i + K/2. x (B, N, M, K) · cos, sin (M, K/2) fp32"""
    first, second = x.float().chunk(2, dim=-1)  # (B, N, M, K/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class LlamaAttention(nn.Module):
    """Causal attention; `kv_heads` heads of keys and values serve all heads of queries, in groups."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        kv_width = config.width // config.heads * config.kv_heads
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.kv = nn.Linear(config.width, 2 * kv_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, M, D) -> (B, M, D)"""
        q = rearrange(self.q(x), "b m (n k) -> b n m k", n=self.heads)
        k, v = rearrange(self.kv(x), "b m (two n k) -> two b n m k", two=2, n=self.kv_heads)
        q, k = rotate(q, *rope), rotate(k, *rope)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(rearrange(x, "b n m k -> b m (n k)"))


class LlamaMlp(nn.Module):
    """Gated SiLU. x (B, M, D)"""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * F.silu(self.gate(x)))


class LlamaBlock(nn.Module):
    """Attention and MLP, each behind an RMS norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.eps)
        self.attn = LlamaAttention(config)
        self.norm2 = RMSNorm(config.width, config.eps)
        self.mlp = LlamaMlp(config)

    def forward(self, h: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        h = h + self.attn(self.norm1(h), rope)
        return h + self.mlp(self.norm2(h))


class LlamaEncoder(nn.Module):
    """Token ids to text states."""

    keep_fp32 = ()

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # uniform, as a normal draw is slow on the meta device
        self.embed = nn.Embedding(
            config.vocab, config.width, _weight=torch.empty(config.vocab, config.width).uniform_(-1, 1)
        )
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.depth))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, M) int64, without padding -> (B, M, D), not normed

        Attention is causal, so what follows a token does not change its state: padding on the right, which
        the original adds, would change nothing.
        """
        if ids.ndim != 2:
            raise ValueError(f"LlamaEncoder: ids are {tuple(ids.shape)}, wanted (B, M); unsqueeze one prompt")
        head_width = self.config.width // self.config.heads
        angle = rope_axis(ids.shape[1], head_width, self.config.theta).to(ids.device)  # (M, K/2)
        rope = angle.cos().float(), angle.sin().float()
        h = self.embed(ids)  # (B, M, D)
        for block in self.blocks:
            h = block(h, rope)
        return h
