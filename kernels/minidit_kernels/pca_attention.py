"""Attention whose queries and keys may be narrower than its values, as PCA slicing leaves them.

    out = softmax(Zq Zk^T * scale) V,   Zq (L, R), Zk (M, R), V (M, K),   R <= K

A score costs R multiply-adds in place of K, and the smaller tiles of queries and keys leave shared memory and
registers for larger or more blocks. Widths that are not powers of two are split into chunks that are
(80 = 64 + 16), since a matrix unit takes nothing else; the products of the chunks are summed in fp32.

Slicing: UniCP (https://arxiv.org/abs/2502.04393); one pass over the keys, keeping a maximum and a sum:
Milakov & Gimelshein (2018), FlashAttention (Dao et al., 2022).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidit_kernels.tuning import ARCHES, Case, Config, jit, runs_kernel, tl, triton

MAX_WIDTH = 128  # of queries, keys and values: a wider accumulator spills
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # fp32 under the interpreter alone


@dataclass(frozen=True)
class Tile:
    """What one program works on."""

    queries: int
    keys: int  # per step of the loop
    warps: int
    stages: int  # of the loop's pipeline


def tile(capability: tuple[int, int] | None, width: int) -> Tile:
    """The tile for a card and the width of queries and keys; None is the interpreter.

    By what compiles without spills (resources.py); speed is unmeasured.
    """
    if capability is None:
        return Tile(64, 32, 4, 1)
    if capability[0] == 9:
        return Tile(128, 128, 8, 3)
    if capability[0] == 10:  # three chunks and 128 keys want more tensor memory than there is
        return Tile(128, 64 if len(chunks(width)) > 2 else 128, 8, 3)
    return Tile(128, 64, 8, 2 if width == 128 or width % 16 else 3)  # at most 88 KiB; some cards have 99


def chunks(width: int) -> tuple[int, ...]:
    """The powers of two that a width is read in, at least 16 each: 80 -> (64, 16), 72 -> (64, 16)"""
    whole = -(-width // 16) * 16
    return tuple(power for power in (128, 64, 32, 16) if whole & power)


def value_chunks(width: int) -> tuple[int, ...]:
    """As chunks, two at most: 112 -> (128,)"""
    parts = chunks(width)
    return parts if len(parts) <= 2 else (128,)


def pca_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, key_lengths: Tensor | None = None
) -> Tensor:
    """The definition, in fp32. Shapes as in pca_attention; a sample without keys gives zeros."""
    scores = q.float() @ k.float().mT * scale  # (B, N, L, M)
    if key_lengths is not None:
        beyond = torch.arange(k.shape[2], device=k.device) >= key_lengths[:, None]  # (B, M)
        scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0) if key_lengths is not None else scores.softmax(-1)
    return (weights @ v.float()).to(v.dtype)


@jit
def _load(
    ptr, rows, stride, below, first: tl.constexpr, size: tl.constexpr, width: tl.constexpr, TAIL: tl.constexpr
):
    """Columns first to first + size of some rows; zeros beyond the width and, in a tail, from `below` on."""
    cols = first + tl.arange(0, size)
    at = ptr + rows[:, None] * stride * 8 + cols[None, :]
    if TAIL:
        return tl.load(at, mask=(rows < below)[:, None] & (cols < width)[None, :], other=0.0)
    elif first + size > width:
        return tl.load(at, mask=(cols < width)[None, :], other=0.0)
    else:
        return tl.load(at)


@jit
def _attend(
    q0, q1, q2, top, total, acc0, acc1, k_ptr, v_ptr, k_stride, v_stride, start, length, scale_log2,
    R: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block of keys and values: the running maximum, sum and output after it."""
    rows = start + tl.arange(0, BLOCK_M)
    rows64 = rows.to(tl.int64)
    k0 = _load(k_ptr, rows64, k_stride, length, 0, R0, R, TAIL)
    scores = tl.dot(q0, k0.T, input_precision="ieee")  # (BLOCK_L, BLOCK_M) fp32
    if R1:
        k1 = _load(k_ptr, rows64, k_stride, length, R0, R1, R, TAIL)
        scores = tl.dot(q1, k1.T, scores, input_precision="ieee")
    if R2:
        k2 = _load(k_ptr, rows64, k_stride, length, R0 + R1, R2, R, TAIL)
        scores = tl.dot(q2, k2.T, scores, input_precision="ieee")
    if TAIL:
        scores = tl.where((rows < length)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_top[:, None])  # e^(scale x) = 2^(scale log2(e) x)
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    v0 = _load(v_ptr, rows64, v_stride, length, 0, K0, K, TAIL)
    weights = weights.to(v0.dtype)
    acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision="ieee")
    if K1:
        v1 = _load(v_ptr, rows64, v_stride, length, K0, K1, K, TAIL)
        acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision="ieee")
    return new_top, total, acc0, acc1


@jit
def _pca_attention_kernel(
    q_ptr,  # (B, N, L, R), last axis contiguous
    k_ptr,  # (B, N, M, R), last axis contiguous
    v_ptr,  # (B, N, M, K), last axis contiguous
    out_ptr,  # (B, N, L, K), last axis contiguous
    lengths_ptr,  # (B,) int32, or None
    q_batch, q_head, q_row,  # strides in eights: so the compiler sees that rows are aligned to 16 bytes
    k_batch, k_head, k_row,
    v_batch, v_head, v_row,
    out_batch, out_head, out_row,
    N, L, M,
    scale_log2,  # scale * log2(e)
    R: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK_L)
    block = tl.program_id(0) % blocks  # neighbours share a head, and so its keys and values in L2
    n = ((tl.program_id(0) // blocks) % N).to(tl.int64)  # int64 before multiplying: no offset can overflow
    b = (tl.program_id(0) // blocks // N).to(tl.int64)
    rows = block.to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    q_ptr += (b * q_batch + n * q_head) * 8
    k_ptr += (b * k_batch + n * k_head) * 8
    v_ptr += (b * v_batch + n * v_head) * 8
    out_ptr += (b * out_batch + n * out_head) * 8
    length = M if lengths_ptr is None else tl.minimum(tl.load(lengths_ptr + b), M)

    q0 = _load(q_ptr, rows, q_row, L, 0, R0, R, True)
    q1 = _load(q_ptr, rows, q_row, L, R0, R1, R, True) if R1 else q0
    q2 = _load(q_ptr, rows, q_row, L, R0 + R1, R2, R, True) if R2 else q0
    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    acc0 = tl.zeros((BLOCK_L, K0), tl.float32)
    acc1 = tl.zeros((BLOCK_L, K1), tl.float32) if K1 else top
    whole = length // BLOCK_M * BLOCK_M
    for start in range(0, whole, BLOCK_M):
        top, total, acc0, acc1 = _attend(
            q0, q1, q2, top, total, acc0, acc1, k_ptr, v_ptr, k_row, v_row, start, length, scale_log2,
            R, R0, R1, R2, K, K0, K1, BLOCK_M, False,
        )  # fmt: skip
    if whole < length:
        top, total, acc0, acc1 = _attend(
            q0, q1, q2, top, total, acc0, acc1, k_ptr, v_ptr, k_row, v_row, whole, length, scale_log2,
            R, R0, R1, R2, K, K0, K1, BLOCK_M, True,
        )  # fmt: skip
    total = tl.where(total == 0, 1, total)[:, None]  # no keys at all: zeros
    out = out_ptr + rows[:, None] * out_row * 8
    cols = tl.arange(0, K0)
    tl.store(out + cols[None, :], acc0 / total, mask=(rows < L)[:, None] & (cols < K)[None, :])
    if K1:
        cols = K0 + tl.arange(0, K1)
        tl.store(out + cols[None, :], acc1 / total, mask=(rows < L)[:, None] & (cols < K)[None, :])


@torch.library.custom_op("minidit::pca_attention", mutates_args=())
def _launch(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float) -> Tensor:
    """The kernel as an operation that torch.compile leaves whole. Checked tensors in -> (B, N, L, K)"""
    if q.dtype == torch.bfloat16 and not q.is_cuda:  # Triton's interpreter multiplies the bits of bf16
        return _launch(q.float(), k.float(), v.float(), key_lengths, scale).to(q.dtype)
    B, N, L, R = q.shape
    M, K = v.shape[2:]
    out = _empty_output(q, k, v, key_lengths, scale)
    with torch.cuda.device_of(q):
        shape = tile(torch.cuda.get_device_capability() if q.is_cuda else None, R)
        r0, r1, r2 = (*chunks(R), 0, 0)[:3]
        k0, k1 = (*value_chunks(K), 0)[:2]
        _pca_attention_kernel[(triton.cdiv(L, shape.queries) * N * B,)](
            q, k, v, out, key_lengths, *_strides(q), *_strides(k), *_strides(v), *_strides(out),
            N, L, M, scale * math.log2(math.e), R=R, R0=r0, R1=r1, R2=r2, K=K, K0=k0, K1=k1,
            BLOCK_L=shape.queries, BLOCK_M=shape.keys, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return out


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of all axes but the last, in eights"""
    return tuple(stride // 8 for stride in x.stride()[:3])


@_launch.register_fake
def _empty_output(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float) -> Tensor:
    """Laid out as (B, L, N, K), so that merging the heads is a view."""
    B, N, L, _ = q.shape
    return q.new_empty(B, L, N, v.shape[-1]).transpose(1, 2)


def pca_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, key_lengths: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Attention over all keys, or each sample's first ones. No gradients.

    q (B, N, L, R) · k (B, N, M, R) · v (B, N, M, K) · key_lengths (B,) int32 -> (B, N, L, K), v's dtype

    R and K are multiples of 8 up to 128, so are strides (without a limit; the last axis is contiguous), and
    scale is above 0. A sample without keys gives zeros. The kernel takes bf16 and fp16, and fp32 under the
    interpreter alone: on a card, fp32 products of this size spill. impl="auto" runs it on a GPU, the
    reference elsewhere; a forced choice that cannot run raises RuntimeError.
    """
    if not runs_kernel(q, impl):
        return pca_attention_reference(q, k, v, scale=scale, key_lengths=key_lengths)
    check(q, k, v, scale, key_lengths)
    return _launch(q, k, v, key_lengths, scale)


def check(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> None:
    """Refuse what the kernel does not take."""
    B, N, L, R = q.shape
    M, K = v.shape[2:]
    if k.shape != (B, N, M, R) or v.shape[:2] != (B, N) or not (L and M):
        got = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"pca_attention: wanted (B, N, L, R), (B, N, M, R), (B, N, M, K), none empty; got {got}"
        )
    if max(R, K) > MAX_WIDTH or R % 8 or K % 8:
        raise ValueError(
            f"pca_attention: widths {R} and {K}; wanted multiples of 8 up to {MAX_WIDTH}; pad them"
        )
    if any(x.dtype != q.dtype or x.device != q.device for x in (k, v)) or q.dtype not in DTYPES:
        got = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"pca_attention: wanted one device and one dtype, bf16 or fp16; got {got}")
    if q.is_cuda and q.dtype == torch.float32:
        raise ValueError(
            "pca_attention: fp32 on a GPU spills; cast to bf16 or fp16, or take impl='reference'"
        )
    if not all(_is_laid_out(x) for x in (q, k, v)):
        got = ", ".join(str(x.stride()) for x in (q, k, v))
        raise ValueError(
            f"pca_attention: the last axis must be contiguous, other strides multiples of 8; got {got}; call "
            f".contiguous()"
        )
    if key_lengths is not None and (
        key_lengths.shape != (B,) or key_lengths.dtype != torch.int32 or key_lengths.device != q.device
    ):
        got = f"{tuple(key_lengths.shape)} {key_lengths.dtype} on {key_lengths.device}"
        raise ValueError(f"pca_attention: key_lengths must be ({B},) int32 on {q.device}; got {got}")
    if not scale > 0:
        raise ValueError(f"pca_attention: scale={scale} must be above 0")


def _is_laid_out(x: Tensor) -> bool:
    """Whether rows are contiguous and begin at multiples of 8; an axis of one has no stride to speak of."""
    strides = zip(x.shape[:3], x.stride()[:3], strict=True)
    return x.stride(-1) == 1 and not any(size > 1 and stride % 8 for size, stride in strides)


def cases(widths: Sequence[tuple[int, int]] = ((128, 128), (112, 128), (80, 128), (72, 72))) -> list[Case]:
    """The shipped launches at some widths (R, K), for every architecture."""
    return [_case(R, K, arch) for R, K in widths for arch in ARCHES]


def _case(R: int, K: int, arch: int) -> Case:
    tensors = ("q", "k", "v", "out")
    types = {f"{name}_ptr": "*bf16" for name in tensors}
    types |= {f"{name}_{axis}": "i32" for name in tensors for axis in ("batch", "head", "row")}
    types |= {"N": "i32", "L": "i32", "M": "i32", "scale_log2": "fp32"}
    r0, r1, r2 = (*chunks(R), 0, 0)[:3]
    k0, k1 = (*value_chunks(K), 0)[:2]
    constants = {"lengths_ptr": None, "R": R, "R0": r0, "R1": r1, "R2": r2, "K": K, "K0": k0, "K1": k1}
    shape = tile((arch // 10, arch % 10), R)
    sizes = {"BLOCK_L": shape.queries, "BLOCK_M": shape.keys}
    config = Config(sizes, num_warps=shape.warps, num_stages=shape.stages)
    return Case(f"pca_attention bf16 R{R} K{K}", _pca_attention_kernel, types, constants, (config,), (arch,))
