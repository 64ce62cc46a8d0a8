"""Norms of tokens, their modulation, and the gated residual of a DiT block (Peebles & Xie, 2023).

    layer_norm:      y = norm(x) * weight + bias,         norm(x) = (x - mean(x)) / sqrt(var(x) + eps) over D
    modulate:        y = norm(x) * (1 + scale) + shift
    gated_residual:  h = h + gate * x

Each is one read of its tokens and one write in place of three to eight, computed in fp32 and rounded once: in
bf16, 1 + scale is 1 for any scale below 0.0039.

The vectors beside the tokens are rows (B, S, D): S is 1 where a sample has one row, L where every token has
its own, and 2 with `split`: one row for the tokens before `split`, one for those behind (video, then text).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minidit_kernels.tuning import Case, Config, jit, runs_kernel, tl


def per_token(rows: Tensor, length: int, split: int | None) -> Tensor:
    """The row of every token, as something that broadcasts. rows (B, S, D), or (D,) for all"""
    if split is None:
        return rows.float()
    first, second = rows.float().split(1, dim=1)
    return torch.cat((first.expand(-1, split, -1), second.expand(-1, length - split, -1)), dim=1)  # (B, L, D)


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dtype=None, split: int | None = None
) -> Tensor:
    """The definition, in fp32. Shapes as in layer_norm."""
    if weight.ndim == 1:
        y = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    else:
        weight, bias = (per_token(rows, x.shape[1], split) for rows in (weight, bias))
        y = torch.addcmul(bias, F.layer_norm(x.float(), x.shape[-1:], eps=eps), weight)
    return y.to(dtype or x.dtype)


def modulate_reference(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, dtype=None, split: int | None = None
) -> Tensor:
    """The definition, in fp32. Shapes as in modulate."""
    return layer_norm_reference(x, 1 + scale.float(), shift, eps=eps, dtype=dtype, split=split)


def gated_residual_reference(h: Tensor, gate: Tensor, x: Tensor, *, split: int | None = None) -> Tensor:
    """The definition, in fp32. Shapes as in gated_residual."""
    return torch.addcmul(h.float(), per_token(gate, h.shape[1], split), x.float()).to(h.dtype)


@jit
def _norm_kernel(
    x_ptr,  # (B, L, D), last axis contiguous
    scale_ptr,  # rows (D) per sample, token or stream
    shift_ptr,
    y_ptr,  # (B, L, D) contiguous
    x_batch, x_row, scale_batch, scale_row, shift_batch, shift_row,
    L, split, eps,
    D: tl.constexpr,
    ADD_ONE: tl.constexpr,  # modulate's scale, not layer_norm's weight
    HAS_SPLIT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)  # int64 before multiplying, so no offset can overflow
    rows = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)[:, None]
    which = (rows >= split).to(tl.int64) if HAS_SPLIT else rows
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < L) & (cols < D)
    x = tl.load(x_ptr + b * x_batch + rows * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(cols < D, x - (tl.sum(x, 1) / D)[:, None], 0.0)  # (BLOCK_L, BLOCK_D)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
    scale = tl.load(scale_ptr + b * scale_batch + which * scale_row + cols, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + b * shift_batch + which * shift_row + cols, mask=inside, other=0.0)
    gain = scale.to(tl.float32) + 1 if ADD_ONE else scale.to(tl.float32)
    y = normed * gain + shift.to(tl.float32)
    tl.store(y_ptr + (b * L + rows) * D + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _gated_residual_kernel(
    h_ptr,  # (B, L, D), last axis contiguous
    gate_ptr,  # rows (D) per sample, token or stream
    x_ptr,  # (B, L, D), last axis contiguous
    y_ptr,  # (B, L, D) contiguous
    h_batch, h_row, gate_batch, gate_row, x_batch, x_row,
    L, split,
    D: tl.constexpr,
    HAS_SPLIT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)[:, None]
    which = (rows >= split).to(tl.int64) if HAS_SPLIT else rows
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < L) & (cols < D)
    h = tl.load(h_ptr + b * h_batch + rows * h_row + cols, mask=inside).to(tl.float32)
    x = tl.load(x_ptr + b * x_batch + rows * x_row + cols, mask=inside).to(tl.float32)
    gate = tl.load(gate_ptr + b * gate_batch + which * gate_row + cols, mask=inside).to(tl.float32)
    y = h + gate * x
    tl.store(y_ptr + (b * L + rows) * D + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


TILE = 8192  # values of a program; 32 a thread


OPTIONS = {"num_warps": 8, "num_stages": 1}


def blocks_of(width: int) -> dict[str, int]:
    """As many rows as fill a program, at least one."""
    block = 1 << (width - 1).bit_length()
    return {"BLOCK_L": max(1, TILE // block), "BLOCK_D": block}


def row_strides(what: str, rows: Tensor, tokens: Tensor, split: int | None) -> tuple[int, int]:
    """Elements from sample to sample and from row to row; 0 where one row serves all."""
    B, L, D = tokens.shape
    if rows.ndim == 1 and len(rows) == D and split is None:
        return 0, 0
    counts = (1, L) if split is None else (2,)
    if rows.ndim != 3 or rows.shape[0] != B or rows.shape[1] not in counts or rows.shape[2] != D:
        wanted = " or ".join(str((B, s, D)) for s in counts)
        raise ValueError(
            f"{what}: tokens {tuple(tokens.shape)} with rows {tuple(rows.shape)}; wanted {wanted}"
        )
    if rows.stride(2) != 1:
        raise ValueError(f"{what}: rows of strides {rows.stride()}; the last axis has to be contiguous")
    return rows.stride(0), rows.stride(1) if rows.shape[1] > 1 else 0


def launch_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype, split: int | None, add_one: bool):
    """The kernel of layer_norm and modulate."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    B, L, D = x.shape
    y = torch.empty(B, L, D, dtype=dtype or x.dtype, device=x.device)
    strides = *x.stride()[:2], *row_strides("norm", scale, x, split), *row_strides("norm", shift, x, split)
    blocks = blocks_of(D)
    _norm_kernel[-(-L // blocks["BLOCK_L"]), B](
        x, scale, shift, y, *strides, L, split or 0, eps, D, add_one, split is not None, **blocks, **OPTIONS,
    )  # fmt: skip
    return y


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    split: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Affine layer norm of the tokens. x (B, L, D) · weight, bias (D,), or rows (B, S, D) -> (B, L, D)

    dtype: of the result, x's if None. Runs the kernel on CUDA tensors, layer_norm_reference elsewhere.
    """
    if not runs_kernel(x, impl):
        return layer_norm_reference(x, weight, bias, eps=eps, dtype=dtype, split=split)
    return launch_norm(x, weight, bias, eps, dtype, split, add_one=False)


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
    split: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Normalise the tokens without affine, then scale and shift them. x (B, L, D) · scale, shift (B, S, D)

    -> (B, L, D) of `dtype`, x's if None. Runs the kernel on CUDA tensors, modulate_reference elsewhere.
    """
    if not runs_kernel(x, impl):
        return modulate_reference(x, scale, shift, eps=eps, dtype=dtype, split=split)
    return launch_norm(x, scale, shift, eps, dtype, split, add_one=True)


def gated_residual(
    h: Tensor, gate: Tensor, x: Tensor, *, split: int | None = None, impl: str = "auto"
) -> Tensor:
    """h + gate * x. h, x (B, L, D) · gate (B, S, D) -> (B, L, D), h's dtype

    Runs the kernel on CUDA tensors, gated_residual_reference elsewhere.
    """
    if h.shape != x.shape:
        raise ValueError(f"gated_residual: h {tuple(h.shape)} and x {tuple(x.shape)}; wanted one shape")
    if not runs_kernel(h, impl):
        return gated_residual_reference(h, gate, x, split=split)
    h, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (h, x))
    (B, L, D), y = h.shape, torch.empty(h.shape, dtype=h.dtype, device=h.device)
    strides = *h.stride()[:2], *row_strides("gated_residual", gate, h, split), *x.stride()[:2]
    blocks = blocks_of(D)
    _gated_residual_kernel[-(-L // blocks["BLOCK_L"]), B](
        h, gate, x, y, *strides, L, split or 0, D, split is not None, **blocks, **OPTIONS,
    )  # fmt: skip
    return y


def cases() -> list[Case]:
    """What ships, for the compile check: the releases' widths, tokens in bf16, rows in fp32."""
    found = []
    strides = lambda *names: {f"{name}_{axis}": "i32:16" for name in names for axis in ("batch", "row")}
    numbers = {"L": "i32", "split": "i32"}
    norm = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "shift_ptr": "*fp32", "y_ptr": "*bf16", "eps": "fp32"}
    norm |= numbers | strides("x", "scale", "shift")
    gated = {"h_ptr": "*bf16", "gate_ptr": "*fp32", "x_ptr": "*bf16", "y_ptr": "*bf16"}
    gated |= numbers | strides("h", "gate", "x")
    for width, is_split in ((1920, True), (5120, False)):
        constants, config = {"D": width, "HAS_SPLIT": is_split}, (Config(blocks_of(width), **OPTIONS),)
        name = f"bf16 D{width}{' split' if is_split else ''}"
        found += [
            Case(f"modulate {name}", _norm_kernel, norm, constants | {"ADD_ONE": True}, config),
            Case(f"gated_residual {name}", _gated_residual_kernel, gated, constants, config),
        ]
    return found
