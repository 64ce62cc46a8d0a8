"""The one door to attention: softmax(q k^T * scale) v through the backend that was asked for."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidit.attention_table import Case, choose, pads, refusal
from minidit.exchange import Exchange
from minidit.layers import take_rows
from minidit_kernels.pca_attention import pca_attention

TORCHS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PACKAGES = {  # optional: module, and what pip calls it
    "flash_attn": ("flash_attn", "flash-attn"),
    "sage": ("sageattention", "sageattention"),
}
BACKENDS = ("auto", *TORCHS, "triton", *PACKAGES)  # auto: by attention_table.py
SHORT = 256  # keys; from 1024 on bf16 is the faster one
CARDS = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100"}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def constant(function: Callable) -> Callable:
    """As torch.compiler.assume_constant_result, which would import the compiler, two seconds, to say so."""
    function._dynamo_marked_constant = True
    return function


@dataclass(frozen=True)
class Full:
    """Attention as it is."""

    @property
    def bases(self) -> tuple[None, None]:
        """Of queries and keys, for modules that narrow them in the pass that norms and rotates."""
        return None, None

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


@dataclass(frozen=True)
class Sliced:
    """Attention with queries and keys projected onto R directions per head (UniCP's PCAS)."""

    q: Tensor  # (N, K, R)
    k: Tensor  # (N, K, R)

    @property
    def bases(self) -> tuple[Tensor, Tensor]:
        """Of queries and keys, as Full's."""
        return self.q, self.k

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
Backend = str | Exchange  # a name of BACKENDS; under several ranks the trade around attention, which has one
# what a cross-attention looks at: keys and values (B, N, M, K), made once per generation, or the text's
# states (B, M, D), of which it makes its own at every call
Text = tuple[Tensor, Tensor] | Tensor


def take_text(text: Text, rows: list[int]) -> Text:
    """Some rows of a batch of texts."""
    return take_rows(text, rows) if isinstance(text, Tensor) else tuple(take_rows(x, rows) for x in text)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: Backend = "auto"
) -> Tensor:
    """Attention over all tokens, no mask. q (B, N, L, R) · k (B, N, M, R) · v (B, N, M, K) -> (B, N, L, K)

    q and k may be narrower than v; then `scale` must be given (1/sqrt of the original head width). A backend
    other than auto that cannot run these tensors raises: there is no silent fallback. Of several ranks each
    attends to the tokens that it is given; attend() trades them first.
    """
    if scale is None and q.shape[-1] != v.shape[-1]:
        raise ValueError(f"attention: q and k of width {q.shape[-1]} against v of {v.shape[-1]} need a scale")
    chosen, padded = chosen_backend(q, k, v, local(backend))
    if padded:
        q, k = (F.pad(x, (0, v.shape[-1] - x.shape[-1])) for x in (q, k))  # (B, N, L, K), (B, N, M, K)
    if chosen == "torch":
        return torchs_own(q, k, v, scale)
    if chosen == "triton":
        return pca_attention(q, k, v, scale=scale or q.shape[-1] ** -0.5, impl="triton")
    if chosen in PACKAGES:
        return PACKAGE_CALLS[chosen](q, k, v, scale)
    try:
        with sdpa_kernel(TORCHS[chosen]):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    except RuntimeError as error:
        if "kernel" not in str(error).lower():
            raise
        what = f"{q.dtype} of widths {q.shape[-1]} and {v.shape[-1]} on {q.device}"
        raise RuntimeError(f"torch refuses attention {chosen!r} for {what}; name another backend") from error


def torchs_own(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Torch's own choice; on a CPU of few keys in fp32, which takes 0.8 of the time there (80 keys)."""
    if q.is_cuda or q.dtype == torch.float32 or k.shape[2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).to(q.dtype)


def chosen_backend(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> tuple[str, bool]:
    """The backend that these tensors go to ("torch": its own choice), and whether q and k are padded for it.

    One that was asked for by name and cannot take them raises ValueError with the reason.
    """
    if backend == "auto" and not q.is_cuda:
        return "torch", False  # as the table says, without the cost of asking it
    case = Case(
        card(q.device), DTYPES.get(q.dtype, str(q.dtype)), q.shape[0], q.shape[2], k.shape[2], q.shape[3],
        v.shape[3], torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )  # fmt: skip
    if backend == "auto":
        backend = choose(case)
        return backend, pads(backend, case)
    check_backend(backend)
    reason = refusal(backend, case)
    if reason is not None:
        raise ValueError(f"attention {backend!r} cannot run here: {reason}; try --attention auto")
    return backend, pads(backend, case)


@constant
def check_backend(backend: str) -> None:
    """Refuse a name that is unknown, or whose package is not installed."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend in PACKAGES:
        module, package = PACKAGES[backend]
        if find_spec(module) is None:
            raise ValueError(f"attention {backend!r} needs a package that is not here; pip install {package}")


@constant
def card(device: torch.device) -> str:
    """The table's class of a device: an architecture that it has rows for, "cpu", or "other"."""
    if device.type == "cuda":
        return CARDS.get(torch.cuda.get_device_capability(device), "other")
    return "cpu" if device.type == "cpu" else "other"


def flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """The package of FlashAttention's authors, which wants (B, L, N, K)."""
    run = importlib.import_module("flash_attn").flash_attn_func
    return run(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale).transpose(1, 2)


def sage(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """SageAttention: scores in int8, so another result; never chosen by auto."""
    run = importlib.import_module("sageattention").sageattn
    return run(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale)


PACKAGE_CALLS = {"flash_attn": flash_attn, "sage": sage}


@dataclass(frozen=True)
class Windowed(Full):
    """Attention of every token to those at most `width` places away, and what full attention gave beyond."""

    width: int
    rest: Tensor  # (B, L, D) in all, as Watched left it


@dataclass
class Watched:
    """Full attention, which leaves what it gives beyond a window in `rest`."""

    width: int
    rest: Tensor | None = None
    bases = (None, None)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    how: "AttnOp | Watched",
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """attention() of q and k that `how` has prepared, or of a window. Shapes as there

    Under several ranks of all tokens, wherever they lie: each rank attends for some of the heads.
    """
    to_tokens = lambda x: x
    if isinstance(backend, Exchange):
        q, k, v = backend.to_heads(q, k, v)
        to_tokens = backend.to_tokens
    if isinstance(how, Windowed):
        near = to_tokens(windowed(q, k, v, how.width, scale=scale))
        return near + how.rest.reshape(near.shape)
    out = attention(q, k, v, scale=scale, backend=backend)
    if isinstance(how, Watched):
        how.rest = to_tokens(out - windowed(q, k, v, how.width, scale=scale))
    return to_tokens(out)


def local(backend: Backend) -> str:
    """A backend's name, for attention whose keys all lie on this rank."""
    return backend.backend if isinstance(backend, Exchange) else backend


def windowed(q: Tensor, k: Tensor, v: Tensor, width: int, *, scale: float | None = None) -> Tensor:
    """Attention of every token to those at most `width` places away. q, k, v (B, N, L, K) -> (B, N, L, K)

    In chunks of `width` queries against the three chunks of keys around them; always torch's own choice of
    kernel, as the others take no mask.
    """
    batch, heads, length, _ = q.shape
    chunks = -(-length // width)
    tail = chunks * width - length
    around = lambda x: F.pad(x, (0, 0, width, width + tail)).unfold(2, 3 * width, width).mT
    q = F.pad(q, (0, 0, 0, tail)).unflatten(2, (chunks, width))  # (B, N, chunks, width, K)
    q, k, v = (x.flatten(0, 1) for x in (q, around(k), around(v)))  # chunks in the place of heads
    at = torch.arange(3 * width, device=q.device)
    is_near = (at - width - at[:width, None]).abs() <= width  # (width, 3 width)
    place = at + width * (torch.arange(chunks, device=q.device)[:, None, None] - 1)  # (chunks, 1, 3 width)
    mask = is_near & (place >= 0) & (place < length)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.flatten(1, 2)[:, :length].unflatten(0, (batch, heads))


def split_heads(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b l (n k) -> b n l k", n=heads)


def merge_heads(x: Tensor) -> Tensor:
    return rearrange(x, "b n l k -> b l (n k)")


class AxisAttention(nn.Module):
    """Self-attention of a video within each frame ("space"), or of each place over the frames ("time").

    A model's own class says what q, k and v are. `cond` has the frames T and the backend, `attention`. Of
    several ranks each has some places of all frames, so attention over time stays within the rank.
    """

    def __init__(self, width: int, heads: int, axis: str):
        super().__init__()
        self.heads, self.axis = heads, axis
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def groups(self, x: Tensor, frames: int) -> Tensor:
        """Tokens by whom they attend to. x (B, T*S, D) -> (B*T, S, D) or (B*S, T, D)"""
        pattern = "b (t s) d -> (b t) s d" if self.axis == "space" else "b (t s) d -> (b s) t d"
        return rearrange(x, pattern, t=frames).contiguous()  # of a view, a Linear adds its bias separately

    def ungroup(self, x: Tensor, batch: int) -> Tensor:
        """The way back. x (B*T, S, D) or (B*S, T, D) -> (B, T*S, D)"""
        pattern = "(b t) s d -> b (t s) d" if self.axis == "space" else "(b s) t d -> b (t s) d"
        return rearrange(x, pattern, b=batch)

    def queries_keys_values(
        self, x: Tensor, cond: Any, how: Full | Sliced = FULL
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T*S, D) -> q, k, v, as they enter the scores: (B*T, N, S, K or R) or (B*S, N, T, K or R)"""
        raise NotImplementedError

    def values(self, x: Tensor, cond: Any) -> Tensor:
        """x (B, T*S, D) -> v alone"""
        weight, bias = self.qkv.weight.chunk(3)[2], self.qkv.bias.chunk(3)[2]
        return split_heads(F.linear(self.groups(x, cond.frames), weight, bias), self.heads)

    def narrowed(self, x: Tensor, cond: Any, how: Full | Sliced | Folded) -> tuple[Tensor, ...]:
        """q and k of the widths that `how` wants, and v"""
        if not isinstance(how, Folded):
            return self.queries_keys_values(x, cond, how)
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
            backend = cond.attention if self.axis == "space" else local(cond.attention)
            out = attend(q, k, v, how, scale=self.scale, backend=backend)
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
        return attend(q, k, v, FULL, scale=self.scale, backend=cond.attention)

    def pattern_shape(self, frames: int, places: int) -> tuple[int, ...]:
        """Shape of one branch's pattern, with all channels."""
        if self.axis == "time":
            return 1, places, self.heads, frames, frames
        return 1, 2, frames, self.heads, places, self.out.in_features // self.heads


class FoldableAttention(AxisAttention):
    """One with nothing between projection and scores: slicing bases go into the projection exactly."""

    def queries_keys_values(
        self, x: Tensor, cond: Any, how: Full | Sliced = FULL
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.qkv(self.groups(x, cond.frames)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        return *how.prepare(q, k), v

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

    def keys_values(self, text: Text) -> tuple[Tensor, Tensor]:
        """Keys and values (B, N, M, K) of states (B, M, D); those that were made before, as they are"""
        if isinstance(text, tuple):
            return text
        k, v = self.kv(text).chunk(2, dim=-1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def queries_keys_values(self, x: Tensor, text: Text, cond: Any) -> tuple[Tensor, ...]:
        """x (B, L, D) -> q (B, N, L, K), and the text's k and v"""
        return split_heads(self.q(x), self.heads), *self.keys_values(text)

    def forward(self, x: Tensor, text: Text, cond: Any, *, how: Full | Sliced | FoldedText = FULL) -> Tensor:
        if isinstance(how, FoldedText):
            q, (k, v) = split_heads(F.linear(x, how.weight, how.bias), self.heads), self.keys_values(text)
            k = k @ how.basis_k
        else:
            q, k, v = self.queries_keys_values(x, text, cond)
            q, k = how.prepare(q, k)
        return self.out(merge_heads(attention(q, k, v, scale=v.shape[-1] ** -0.5, backend=cond.attention)))

    def fold(self, basis_q: Tensor, basis_k: Tensor) -> FoldedText:
        """The projection of queries with their basis (N, K, R) in it."""
        return FoldedText(*fold_basis(self.q.weight, self.q.bias, basis_q), basis_k.to(self.q.weight.dtype))


FOLDABLE = (FoldableAttention, TextAttention)
