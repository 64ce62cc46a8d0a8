"""The one door to attention: softmax(q k^T * scale) v through the backend that was asked for."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
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


@dataclass(frozen=True)
class Folded:
    """As Sliced, for a module with nothing between projection and scores: the bases lie in the projection."""

    weight: Tensor  # (2 * N * R, D), of queries, then of keys
    bias: Tensor  # (2 * N * R,)


@dataclass(frozen=True)
class FoldedText:
    """As Folded, of attention to text: the queries' projection, and the basis that narrows the few keys."""

    weight: Tensor  # (N * R, D)
    bias: Tensor  # (N * R,)
    basis_k: Tensor  # (N, K, R)


@dataclass(frozen=True)
class Frozen:
    """Attention as an earlier step's: what decided its map is stored, and values alone are computed."""

    pattern: Tensor  # (B, ...), as the module kept it


@dataclass
class Keeping:
    """Attention as `how` says, whose module leaves what decides its map in `pattern`."""

    how: "Full | Sliced | Folded"
    pattern: Tensor | None = None


AttnOp = Full | Sliced | Folded | FoldedText | Frozen | Keeping
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
    try:
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    except RuntimeError as error:
        if "kernel" not in str(error).lower():
            raise
        what = f"{q.dtype} of width {q.shape[-1]} on {q.device}"
        raise RuntimeError(f"attention {backend!r} cannot run {what}; try --attention auto") from error


def split_heads(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b l (n k) -> b n l k", n=heads)


def merge_heads(x: Tensor) -> Tensor:
    return rearrange(x, "b n l k -> b l (n k)")


class AxisAttention(nn.Module):
    """Self-attention of a video within each frame ("space"), or of each place over the frames ("time").

    A model's own class says what q, k and v are. `cond` has the frames T and the backend's name, `attention`.
    """

    def __init__(self, width: int, heads: int, axis: str):
        super().__init__()
        self.heads, self.axis = heads, axis
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def groups(self, x: Tensor, frames: int) -> Tensor:
        """Tokens by whom they attend to. x (B, T*S, D) -> (B*T, S, D) or (B*S, T, D)"""
        pattern = "b (t s) d -> (b t) s d" if self.axis == "space" else "b (t s) d -> (b s) t d"
        return rearrange(x, pattern, t=frames)

    def ungroup(self, x: Tensor, batch: int) -> Tensor:
        """The way back. x (B*T, S, D) or (B*S, T, D) -> (B, T*S, D)"""
        pattern = "(b t) s d -> b (t s) d" if self.axis == "space" else "(b s) t d -> b (t s) d"
        return rearrange(x, pattern, b=batch)

    def queries_keys_values(self, x: Tensor, cond: Any) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T*S, D) -> q, k, v, as they enter the scores: (B*T, N, S, K) or (B*S, N, T, K)"""
        raise NotImplementedError

    def values(self, x: Tensor, cond: Any) -> Tensor:
        """x (B, T*S, D) -> v alone"""
        weight, bias = self.qkv.weight.chunk(3)[2], self.qkv.bias.chunk(3)[2]
        return split_heads(F.linear(self.groups(x, cond.frames), weight, bias), self.heads)

    def narrowed(self, x: Tensor, cond: Any, how: Full | Sliced | Folded) -> tuple[Tensor, ...]:
        """q and k of the widths that `how` wants, and v"""
        if not isinstance(how, Folded):
            q, k, v = self.queries_keys_values(x, cond)
            return *how.prepare(q, k), v
        q, k = F.linear(self.groups(x, cond.frames), how.weight, how.bias).chunk(2, dim=-1)
        return split_heads(q, self.heads), split_heads(k, self.heads), self.values(x, cond)

    def forward(self, x: Tensor, cond: Any, *, how: AttnOp = FULL) -> Tensor:
        if isinstance(how, Frozen):
            out = self.with_pattern(how.pattern, self.values(x, cond), cond)
        elif isinstance(how, Keeping):
            q, k, v = self.narrowed(x, cond, how.how)
            how.pattern = self.pattern(q, k, len(x), self.scale)
            out = self.with_pattern(how.pattern, v, cond)
        else:
            q, k, v = self.narrowed(x, cond, how)
            out = attention(q, k, v, scale=self.scale, backend=cond.attention)
        return self.ungroup(self.out(merge_heads(out)), len(x))

    @property
    def scale(self) -> float:
        return (self.out.in_features // self.heads) ** -0.5

    def pattern(self, q: Tensor, k: Tensor, batch: int, scale: float) -> Tensor:
        """What decides the map: over time the map itself (B, S, N, T, T), else q and k (B, 2, T, N, S, R)"""
        if self.axis == "space":
            return torch.stack([x.unflatten(0, (batch, -1)) for x in (q, k)], dim=1)
        scores = q.float() @ k.float().mT * scale
        return scores.softmax(-1).to(q.dtype).unflatten(0, (batch, -1))

    def with_pattern(self, pattern: Tensor, v: Tensor, cond: Any) -> Tensor:
        """The attention of these values under a kept map. v as from queries_keys_values, like the result"""
        if self.axis == "time":
            return pattern.flatten(0, 1) @ v
        q, k = (part.flatten(0, 1) for part in pattern.unbind(1))
        return attention(q, k, v, scale=self.scale, backend=cond.attention)

    def pattern_shape(self, frames: int, places: int) -> tuple[int, ...]:
        """Shape of one branch's pattern, with all channels."""
        if self.axis == "time":
            return 1, places, self.heads, frames, frames
        return 1, 2, frames, self.heads, places, self.out.in_features // self.heads


class FoldableAttention(AxisAttention):
    """One with nothing between projection and scores: slicing bases go into the projection exactly."""

    def queries_keys_values(self, x: Tensor, cond: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(self.groups(x, cond.frames)).chunk(3, dim=-1)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def fold(self, basis_q: Tensor, basis_k: Tensor) -> Folded:
        """The projection of queries and keys with their bases (N, K, R) in it."""
        parts = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), (basis_q, basis_k), strict=False)
        weights, biases = zip(*(fold_basis(*part) for part in parts), strict=True)
        return Folded(torch.cat(weights), torch.cat(biases))


def fold_basis(weight: Tensor, bias: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The projection x W^T + b of N heads, then their bases. weight (N * K, D) · basis (N, K, R)"""
    rows = torch.cat((weight, bias[:, None]), dim=1).float()  # the bias as one more column
    rows = basis.mT.float() @ rows.unflatten(0, (len(basis), -1))  # (N, R, D + 1)
    return rows[..., :-1].flatten(0, 1).to(weight.dtype), rows[..., -1].flatten().to(weight.dtype)


class TextAttention(nn.Module):
    """Attention from video tokens to the text rows, as many as the prompt has; no norms."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text (B, M, D) -> keys and values (B, N, M, K)"""
        k, v = self.kv(text).chunk(2, dim=-1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def queries_keys_values(self, x: Tensor, text_kv: tuple[Tensor, Tensor], cond: Any) -> tuple[Tensor, ...]:
        """x (B, L, D) -> q (B, N, L, K), and the text's k and v"""
        return split_heads(self.q(x), self.heads), *text_kv

    def forward(
        self, x: Tensor, text_kv: tuple[Tensor, Tensor], cond: Any, *, how: Full | Sliced | FoldedText = FULL
    ) -> Tensor:
        if isinstance(how, FoldedText):
            q, v = split_heads(F.linear(x, how.weight, how.bias), self.heads), text_kv[1]
            k = text_kv[0] @ how.basis_k
        else:
            q, k, v = self.queries_keys_values(x, text_kv, cond)
            q, k = how.prepare(q, k)
        return self.out(merge_heads(attention(q, k, v, scale=v.shape[-1] ** -0.5, backend=cond.attention)))

    def fold(self, basis_q: Tensor, basis_k: Tensor) -> FoldedText:
        """The projection of queries with their basis (N, K, R) in it."""
        return FoldedText(*fold_basis(self.q.weight, self.q.bias, basis_q), basis_k.to(self.q.weight.dtype))


FOLDABLE = (FoldableAttention, TextAttention)
