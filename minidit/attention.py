"""The one door to attention: softmax(q k^T * scale) v through the backend that was asked for."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "auto": None,  # torch's own choice
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Full:
    """Attention as it is."""

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


@dataclass(frozen=True)
class Sliced:
    """Attention with queries and keys projected onto R directions per head (UniCP's PCAS)."""

    q: Tensor  # (N, K, R)
    k: Tensor  # (N, K, R)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k (B, N, L, K) -> (B, N, L, R)"""
        return q @ self.q, k @ self.k


AttnOp = Full | Sliced
FULL = Full()


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention over all tokens, no mask. q (B, N, L, R) · k (B, N, M, R) · v (B, N, M, K) -> (B, N, L, K)

    q and k may be narrower than v; then `scale` must be given (1/sqrt of the original head width). A backend
    other than auto that cannot run these tensors raises: there is no silent fallback.
    """
    if scale is None and q.shape[-1] != v.shape[-1]:
        raise ValueError(f"attention: q and k of width {q.shape[-1]} against v of {v.shape[-1]} need a scale")
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
