"""The text tower of CLIP (Radford et al., 2021), for its pooled vector. Follows openai/CLIP clip/model.py."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidit.layers import LayerNorm
from minidit.presets import CLIPTextConfig


class CLIPAttention(nn.Module):
    """Causal self-attention. x (B, M, D)"""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b m (three n k) -> three b n m k", three=3, n=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(x, "b n m k -> b m (n k)"))


class CLIPMlp(nn.Module):
    """Linear, x * sigmoid(1.702 x), linear: GELU as CLIP approximates it. x (B, M, D)"""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(x * torch.sigmoid(1.702 * x))


class CLIPBlock(nn.Module):
    """Attention and MLP, each behind a layer norm."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.width, config.eps)
        self.attn = CLIPAttention(config)
        self.norm2 = LayerNorm(config.width, config.eps)
        self.mlp = CLIPMlp(config)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attn(self.norm1(h, h.dtype))
        return h + self.mlp(self.norm2(h, h.dtype))


class CLIPText(nn.Module):
    """Token ids to one vector per prompt, before its projection into the space shared with images."""

    keep_fp32 = ()

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.embed = table(config.vocab, config.width)
        self.positions = table(config.positions, config.width)
        self.blocks = nn.ModuleList(CLIPBlock(config) for _ in range(config.depth))
        self.norm_out = LayerNorm(config.width, config.eps)

    def states(self, ids: Tensor) -> Tensor:
        """ids (B, M) int64 -> (B, M, D)"""
        if ids.ndim != 2 or ids.shape[1] > self.config.positions:
            want = f"(B, M) with M up to {self.config.positions}"
            raise ValueError(f"CLIPText: ids are {tuple(ids.shape)}, wanted {want}; cut the prompt")
        h = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.norm_out(h, h.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, M) int64 -> (B, D), the state of the first end token, which is the largest id

        Attention is causal, so padding behind it changes nothing.
        """
        return self.states(ids)[torch.arange(len(ids), device=ids.device), ids.argmax(1)]


def table(rows: int, width: int) -> nn.Embedding:
    """Uniform start values, as a normal draw is slow on the meta device."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width).uniform_(-1, 1))
