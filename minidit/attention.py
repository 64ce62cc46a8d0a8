"""The one door to attention: softmax(q k^T * scale) v through the backend that was asked for."""

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
