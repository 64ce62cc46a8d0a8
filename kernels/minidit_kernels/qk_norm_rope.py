"""Queries or keys on their way from the projection into the scores: norm, rotary positions, a narrower basis.

    RMSNorm:    y = x / sqrt(mean(x^2) + eps) * weight                       (Zhang & Sennrich, 2019)
    LayerNorm:  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    rope:       (y[2i], y[2i+1]) <- (y[2i] cos_i - y[2i+1] sin_i, y[2i] sin_i + y[2i+1] cos_i)
                                                                             (Su et al., 2021)
    basis:      z = y T,  T (K, R) per head                                  (slicing, UniCP)

Statistics are those of the full width (Wan) or of each head (HunyuanVideo, CogVideoX, Open-Sora). All of them
pair a channel with its neighbour; rows after the table's last (text) are not turned. One read of the
projection and one write, in place of some ten passes; fp32, rounded once, and once more by the basis.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minidit_kernels.tuning import INTERPRET, Case, Config, jit, runs_kernel, tl

Rope = tuple[Tensor, Tensor]  # cos, sin (rows, K/2) fp32


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm over the last axis, in fp32. x (..., D) · weight (D,) -> (..., D) fp32"""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs. x (B, N, L, K) · cos, sin (L, K/2) fp32 -> (B, N, L, K) fp32"""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, N, L, K/2)
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def for_all_rows(rope: Rope, length: int) -> Rope:
    """The table with rows of no rotation behind it, up to that length."""
    rest = 0, 0, 0, length - len(rope[0])
    return rope if len(rope[0]) == length else (F.pad(rope[0], rest, value=1.0), F.pad(rope[1], rest))


def norm_rope_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    heads: int,
    eps: float,
    rope: Rope | None = None,
    basis: Tensor | None = None,
) -> Tensor:
    """The definition. Shapes as in norm_rope."""
    y = x.unflatten(-1, (-1, len(weight)))  # the full width is one part, or a head is
    if bias is None:
        y = rms_norm_reference(y, weight, eps=eps)
    else:
        y = F.layer_norm(y.float(), weight.shape, weight.float(), bias.float(), eps)
    y = y.view(*x.shape[:2], heads, -1).transpose(1, 2)  # (B, N, L, K) fp32
    if rope is not None:
        y = rope_reference(y, *for_all_rows(rope, x.shape[1]))
    y = y.to(x.dtype)
    return y if basis is None else y @ basis.to(x.dtype)


rms_norm = rms_norm_reference
rope = rope_reference


@jit
def _norm_rope_kernel(
    x_ptr,  # (B, L, N * K), last axis contiguous
    weight_ptr,  # (N * K,) if FULL, else (K,)
    bias_ptr,  # like weight, or None
    cos_ptr,  # (turned, K/2) contiguous fp32, or None
    sin_ptr,
    basis_ptr,  # (N, K, R) contiguous, or None
    y_ptr,  # (B, N, L, R), last axis contiguous
    x_batch, x_row, y_batch, y_head, y_row,
    L, turned, eps,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    FULL: tl.constexpr,  # statistics over all heads, which one program then takes, else a program a head
    PRECISION: tl.constexpr,  # of the product with the basis
    WIDEN: tl.constexpr,  # multiply in fp32, as Triton's interpreter would take the bits of bf16 for integers
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)  # int64 before multiplying, so no offset can overflow
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    first = 0 if FULL else tl.program_id(1)
    cols, out_cols = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    in_rows = (rows < L)[:, None]
    inside = in_rows & (cols < K)[None, :]
    x_ptr += b * x_batch + rows[:, None] * x_row + cols[None, :]
    y_ptr += b * y_batch + rows[:, None] * y_row + out_cols[None, :]
    if FULL:
        squares = tl.zeros((BLOCK_L, BLOCK_K), tl.float32)
        for n in range(N):
            x = tl.load(x_ptr + n * K, mask=inside, other=0.0).to(tl.float32)
            squares += x * x
        full_scale = tl.rsqrt(tl.sum(squares, 1) / (N * K) + eps)
    if cos_ptr is not None:
        pairs = tl.arange(0, BLOCK_K // 2)
        at = rows[:, None] * (K // 2) + pairs[None, :]
        in_table = (rows < turned)[:, None] & (pairs < K // 2)[None, :]
        cos = tl.load(cos_ptr + at, mask=in_table, other=1.0)
        sin = tl.load(sin_ptr + at, mask=in_table, other=0.0)
    for n in range(first, N if FULL else first + 1):
        weight_at = n * K + cols if FULL else cols
        weight = tl.load(weight_ptr + weight_at, mask=cols < K, other=0.0).to(tl.float32)
        y = tl.load(x_ptr + n * K, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y = tl.where(inside, y - (tl.sum(y, 1) / K)[:, None], 0.0)
        scale = full_scale if FULL else tl.rsqrt(tl.sum(y * y, 1) / K + eps)
        y = y * scale[:, None] * weight[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + weight_at, mask=cols < K, other=0.0).to(tl.float32)[None, :]
        if cos_ptr is not None:
            even, odd = tl.split(tl.reshape(y, (BLOCK_L, BLOCK_K // 2, 2)))
            y = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK_L, BLOCK_K))
        y = y.to(y_ptr.dtype.element_ty)
        if basis_ptr is not None:
            in_basis = (cols < K)[:, None] & (out_cols < R)[None, :]
            basis_at = n * K * R + cols[:, None] * R + out_cols[None, :]
            basis = tl.load(basis_ptr + basis_at, mask=in_basis, other=0.0).to(y.dtype)
            if WIDEN:
                y, basis = y.to(tl.float32), basis.to(tl.float32)
            y = tl.dot(y, basis, input_precision=PRECISION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + n * y_head, y, mask=in_rows & (out_cols < R)[None, :])


def launch_of(full: bool, has_basis: bool) -> tuple[int, dict[str, int]]:
    """Rows a program takes, and its warps and stages. Chosen by arithmetic, not tuned on a card yet.

    Few rows where a program reads those of all heads twice: they stay in cache. More for a matrix unit.
    """
    if has_basis:  # one stage: a loop over heads that is pipelined takes 153 KiB of shared memory
        return 32 if full else 64, {"num_warps": 8, "num_stages": 1}
    return 8 if full else 32, {"num_warps": 4, "num_stages": 1}


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, rope: Rope | None, basis: Tensor | None
):
    """ValueError for what norm_rope cannot take."""
    width = x.shape[-1]
    if x.ndim != 3 or width % heads or (width // heads) % 2:
        raise ValueError(
            f"norm_rope: x {tuple(x.shape)} for {heads} heads; wanted (B, L, heads * an even width)"
        )
    head_width = width // heads
    if len(weight) not in ((width, head_width) if bias is None else (head_width,)):
        wanted = (
            f"{width} or {head_width}"
            if bias is None
            else f"{head_width}, as a bias means a LayerNorm per head"
        )
        raise ValueError(f"norm_rope: a weight of {len(weight)} for x {tuple(x.shape)}; wanted {wanted}")
    if rope is not None and (rope[0].shape[1:] != (head_width // 2,) or len(rope[0]) > x.shape[1]):
        got = tuple(rope[0].shape)
        raise ValueError(f"norm_rope: a table of {got} for {x.shape[1]} rows of heads {head_width} wide")
    if basis is not None and basis.shape[:2] != (heads, head_width):
        raise ValueError(f"norm_rope: a basis of {tuple(basis.shape)}; wanted ({heads}, {head_width}, R)")


def norm_rope(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    heads: int,
    eps: float,
    rope: Rope | None = None,
    basis: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Queries or keys as attention wants them. x (B, L, N * K) -> (B, N, L, K), or R with a basis; x's dtype

    weight: (N * K,) of a norm over the full width, or (K,) of one in each head; with a bias, in heads alone,
    a LayerNorm, else an RMSNorm · rope: cos, sin (rows, K/2) fp32, of the first rows; the others stay · basis
    (N, K, R) · out: where the result goes, such as some rows of a longer tensor. Runs the kernel on CUDA
    tensors, norm_rope_reference elsewhere.
    """
    check(x, weight, bias, heads, rope, basis)
    if not runs_kernel(x, impl):
        y = norm_rope_reference(x, weight, bias, heads=heads, eps=eps, rope=rope, basis=basis)
        return y if out is None else out.copy_(y)
    x = x if x.stride(-1) == 1 else x.contiguous()
    (B, L, width), K = x.shape, x.shape[-1] // heads
    R = K if basis is None else basis.shape[2]
    y = like_heads(x, heads, R) if out is None else out
    if y.shape != (B, heads, L, R) or y.stride(-1) != 1:
        raise ValueError(f"norm_rope: out {tuple(y.shape)}; wanted {(B, heads, L, R)}, last axis contiguous")
    cos, sin = (None, None) if rope is None else (table.contiguous() for table in rope)
    basis = None if basis is None else basis.contiguous()
    is_full, has_basis = len(weight) == width, basis is not None
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    block, options = launch_of(is_full, has_basis)
    _norm_rope_kernel[-(-L // block), 1 if is_full else heads, B](
        x, weight.contiguous(), bias, cos, sin, basis, y, *x.stride()[:2], *y.stride()[:3],
        L, 0 if rope is None else len(cos), eps, heads, K, R, is_full, precision, INTERPRET,
        **block_widths(K, R, has_basis), BLOCK_L=block, **options,
    )  # fmt: skip
    return y


def like_heads(x: Tensor, heads: int, width: int) -> Tensor:
    """An empty (B, N, L, width) for what norm_rope makes of x (B, L, D), in memory (B, L, N, width).

    Attention kernels give their output the layout of the queries: in this one, joining the heads is no copy.
    """
    return torch.empty(*x.shape[:2], heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)


def block_widths(K: int, R: int, has_basis: bool) -> dict[str, int]:
    """Powers of two, of at least the 16 that a matrix unit takes."""
    power = lambda n: 1 << (max(n, 16 if has_basis else 2) - 1).bit_length()
    return {"BLOCK_K": power(K), "BLOCK_R": power(R)}


def cases() -> list[Case]:
    """What ships, for the compile check: Wan 14B (with and without a basis), CogVideoX, HunyuanVideo."""
    found = []
    launches = (  # name, heads, K, R, full width, LayerNorm
        ("Wan 14B", 40, 128, 128, True, False),
        ("Wan 14B R80", 40, 128, 80, True, False),
        ("HunyuanVideo R96", 24, 128, 96, False, False),
        ("CogVideoX 5B", 48, 64, 64, False, True),
    )
    for name, heads, K, R, full, is_layer_norm in launches:
        has_basis = R < K
        types = {
            "x_ptr": "*bf16",
            "weight_ptr": "*fp32",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "y_ptr": "*bf16",
        }
        types |= dict.fromkeys(("x_batch", "x_row", "y_batch", "y_head"), "i32:16")
        types |= {"y_row": "i32:16" if R % 16 == 0 else "i32", "L": "i32", "turned": "i32", "eps": "fp32"}
        constants = {"N": heads, "K": K, "R": R, "FULL": full, "PRECISION": "tf32", "WIDEN": False}
        constants |= block_widths(K, R, has_basis)
        for pointer, given in (("bias_ptr", is_layer_norm), ("basis_ptr", has_basis)):
            (types if given else constants)[pointer] = "*fp32" if given else None
        block, options = launch_of(full, has_basis)
        config = (Config({"BLOCK_L": block}, **options),)
        found.append(Case(f"qk_norm_rope {name} bf16", _norm_rope_kernel, types, constants, config))
    return found
