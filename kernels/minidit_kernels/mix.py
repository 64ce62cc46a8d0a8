"""A weighted sum of stored states: y = sum_j c_j * slot_j, accumulated in fp32 and rounded once.

One verb for reuse (1), linear extrapolation (2, -1) and every Taylor forecast of a cached feature. The kernel
reads each slot once and writes y once, in place of two passes per slot; slots stay where they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minidit_kernels.tuning import Case, Config, jit, runs_kernel, tl, triton

MOST = 6  # slots of one launch: a Taylor forecast of order 5


def mix_reference(slots: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """slots: tensors of one shape and dtype, newest first · a coefficient each -> a new tensor like them"""
    if not 0 < len(coefficients) <= len(slots):
        raise ValueError(f"mix: {len(coefficients)} coefficients for {len(slots)} stored states")
    if tuple(coefficients) == (1.0,):
        return slots[0].clone()
    total = slots[0].float() * coefficients[0]
    for slot, c in zip(slots[1:], coefficients[1:], strict=False):
        total = total + slot.float() * c
    return total.to(slots[0].dtype)


BLOCK, WARPS = 4096, 8


@jit
def _mix_kernel(
    y_ptr,  # (count,)
    slot0_ptr,  # (count,) like the other slots, of which the first SLOTS are read
    slot1_ptr,
    slot2_ptr,
    slot3_ptr,
    slot4_ptr,
    slot5_ptr,
    c0,  # numbers at run time: another forecast compiles nothing
    c1,
    c2,
    c3,
    c4,
    c5,
    count,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.load(slot0_ptr + at, mask=mask).to(tl.float32) * c0
    if SLOTS > 1:
        total += tl.load(slot1_ptr + at, mask=mask).to(tl.float32) * c1
    if SLOTS > 2:
        total += tl.load(slot2_ptr + at, mask=mask).to(tl.float32) * c2
    if SLOTS > 3:
        total += tl.load(slot3_ptr + at, mask=mask).to(tl.float32) * c3
    if SLOTS > 4:
        total += tl.load(slot4_ptr + at, mask=mask).to(tl.float32) * c4
    if SLOTS > 5:
        total += tl.load(slot5_ptr + at, mask=mask).to(tl.float32) * c5
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


def mix(
    slots: Sequence[Tensor], coefficients: Sequence[float], *, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """The mix of the first len(coefficients) slots, newest first, in a new tensor or in `out`.

    slots of one shape and dtype; the kernel takes at most 6 coefficients and a contiguous `out`
    """
    if not 0 < len(coefficients) <= len(slots) or not runs_kernel(slots[0], impl):
        y = mix_reference(slots, coefficients)
        return y if out is None else out.copy_(y)
    used = [slot.contiguous() for slot in slots[: len(coefficients)]]
    y = torch.empty_like(used[0]) if out is None else out
    shapes = {(t.shape, t.dtype) for t in (*used, y)}
    if len(used) > MOST or len(shapes) > 1 or not y.is_contiguous():
        raise ValueError(
            f"mix: the kernel takes up to {MOST} states of one shape and dtype and a contiguous out, got "
            f"{len(used)}, {', '.join(f'{tuple(shape)} {dtype}' for shape, dtype in shapes)}"
        )
    unused = MOST - len(used)
    slots = *used, *(used[0] for _ in range(unused))
    numbers = *map(float, coefficients), *(0.0 for _ in range(unused))
    grid = (triton.cdiv(y.numel(), BLOCK),)
    _mix_kernel[grid](y, *slots, *numbers, y.numel(), len(used), BLOCK, num_warps=WARPS, num_stages=1)
    return y


def cases() -> list[Case]:
    """Reuse, a line and the longest forecast, of a block's state in bf16; a line of latents in fp32."""
    found, config = [], Config({}, num_warps=WARPS, num_stages=1)
    for dtype, count in (("bf16", 1), ("bf16", 2), ("bf16", MOST), ("fp32", 2)):
        types = {f"{name}_ptr": f"*{dtype}" for name in ("y", *(f"slot{n}" for n in range(MOST)))}
        types |= {f"c{n}": "fp32" for n in range(MOST)} | {"count": "i32:16"}
        constants = {"SLOTS": count, "BLOCK": BLOCK}
        found.append(Case(f"mix {dtype} slots {count}", _mix_kernel, types, constants, (config,)))
    return found
