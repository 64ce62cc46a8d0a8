"""Query and key preparation: RMSNorm, then rotary position embedding (Su et al., 2021).

    norm:  y = x / sqrt(mean(x^2) + eps) * weight
    rope:  (y[2i], y[2i+1]) <- (y[2i] cos_i - y[2i+1] sin_i, y[2i] sin_i + y[2i+1] cos_i)

Channels are paired with their neighbour, as Wan, HunyuanVideo and CogVideoX do. All arithmetic is fp32.
"""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm over the last axis, in fp32. x (..., D) · weight (D,) -> (..., D) fp32"""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs. x (B, N, L, K) · cos, sin (L, K/2) fp32 -> (B, N, L, K) fp32"""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, L, K/2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


rms_norm = rms_norm_reference
rope = rope_reference
