"""Adaptive-norm modulation and the gated residual of a DiT block (Peebles & Xie, 2023).

    modulate:        y = norm(x) * (1 + scale) + shift,   norm(x) = (x - mean(x)) / sqrt(var(x) + eps) over D
    gated_residual:  h = h + gate * x

Both are computed in fp32 and rounded once: in bf16, 1 + scale is 1 for any scale below 0.0039.
"""

import torch.nn.functional as F
from torch import Tensor


def modulate_reference(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, dtype=None) -> Tensor:
    """Normalise the tokens without affine, then scale and shift them per sample, in fp32.

    x (B, L, D) · scale, shift (B, 1, D), or (B, L, D) per token -> (B, L, D) in `dtype` (x's if None)
    """
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (y * (1 + scale.float()) + shift.float()).to(dtype or x.dtype)


def gated_residual_reference(h: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """h + gate * x in fp32, rounded once to h's dtype. h, x (B, L, D) · gate (B, 1, D) or (B, L, D)"""
    return (h.float() + gate.float() * x.float()).to(h.dtype)


modulate = modulate_reference
gated_residual = gated_residual_reference
