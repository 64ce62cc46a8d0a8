"""Sums for relative distances between two states: how far has `new` moved from `old`?

    l1:       (sum |new - old|, sum |old|)
    l2:       (sum (new - old)^2, sum old^2)
    moments:  (sum (new - old), sum (new - old)^2)
    abs:      (sum |new|, sum |old|)
    finite:   the number of elements of `new` that are NaN or infinite

The quotient (l2: its root) is the relative distance; sums, not means, so that shards of a state can be added.

The kernel reads both tensors once for all of these and, where a state is to be kept, writes it in the same
pass: two reads and a write, in place of a pass per sum and two more for the copy. A small table on the device
tells it the pairs of a launch. Blocks have one size and their sums are added in one order, so the bits of a
pair's sums follow from its values, shape and alignment: not from its neighbours in the launch, nor the card.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidit_kernels.tuning import Case, Config, jit, runs_kernel, tl, triton

SUMS = ("abs_difference", "square_difference", "difference", "abs_old", "square_old", "abs_new", "broken")
NORMS = {
    "l1": ("abs_difference", "abs_old"),
    "l2": ("square_difference", "square_old"),
    "moments": ("difference", "square_difference"),
    "abs": ("abs_new", "abs_old"),
    "finite": ("broken",),
}
COLUMNS = {norm: [SUMS.index(name) for name in names] for norm, names in NORMS.items()}


@dataclass(frozen=True)
class Pair:
    """Two tensors of one shape to compare; `new` is also written to `store`, which may be where `old` lies.

    No two pairs of a launch may touch what a third one stores to.
    """

    new: Tensor
    old: Tensor | None = None  # None: there is nothing to compare with, and `finite` is all that can be asked
    store: Tensor | None = None
    norms: tuple[str, ...] = ()  # whose sums are wanted


def distance_sums_reference(new: Tensor, old: Tensor, *, norm: str = "l1") -> Tensor:
    """The two sums in fp64 accumulation of fp32 differences. new, old of one shape -> (2,) fp64"""
    if new.shape != old.shape:
        raise ValueError(f"distance: new is {tuple(new.shape)}, old {tuple(old.shape)}; wanted one shape")
    difference, old = new.float() - old.float(), old.float()
    match norm:
        case "l1":
            pair = difference.abs(), old.abs()
        case "l2":
            pair = difference.square(), old.square()
        case "moments":
            pair = difference, difference.square()
        case "abs":
            pair = new.float().abs(), old.abs()
        case _:
            raise ValueError(f"unknown norm {norm!r}; choose one of l1, l2, moments, abs")
    return torch.stack([x.sum(dtype=torch.float64) for x in pair])


def pair_sums_reference(pairs: Sequence[Pair]) -> Tensor:
    """The sums that each pair's norms want, and 0 for the others; then the stores are written."""
    sums = torch.zeros(len(pairs), len(SUMS), dtype=torch.float64, device=pairs[0].new.device)
    for row, pair in zip(sums, pairs, strict=True):
        for norm in pair.norms:
            if norm == "finite":
                row[COLUMNS[norm]] = (~pair.new.isfinite()).sum(dtype=torch.float64)
            else:
                row[COLUMNS[norm]] = distance_sums_reference(pair.new, pair.old, norm=norm)
    for pair in pairs:
        if pair.store is not None:
            pair.store.copy_(pair.new)
    return sums


# one shape for every card: the order in which a block is summed follows from these
BLOCK, STEP, WARPS = 4096, 1024, 8


@jit
def _blocks_kernel(
    table_ptr,  # (pairs, 9) int64, see table_line
    partials_ptr,  # (pairs, 7, blocks) fp32
    blocks,  # of the largest pair
    NEW: tl.constexpr,
    STORED: tl.constexpr,  # of old and store
    ALIGNED: tl.constexpr,  # all addresses and row strides are multiples of 16 bytes, columns of 16
    BLOCK: tl.constexpr,
):
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = table_ptr + pair * 9
    new, old, store = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    rows, columns = tl.load(entry + 3), tl.load(entry + 4)
    new_stride, old_stride, store_stride = tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)
    new_ptr, old_ptr = new.to(tl.pointer_type(NEW)), old.to(tl.pointer_type(STORED))
    store_ptr = store.to(tl.pointer_type(STORED))
    if ALIGNED:  # said of what is loaded, or memory would be read one element at a time
        new_ptr, old_ptr = tl.multiple_of(new_ptr, 16), tl.multiple_of(old_ptr, 16)
        store_ptr, columns = tl.multiple_of(store_ptr, 16), tl.multiple_of(columns, 16)
        new_stride, old_stride = tl.multiple_of(new_stride, 16), tl.multiple_of(old_stride, 16)
        store_stride = tl.multiple_of(store_stride, 16)
    in_row = tl.cdiv(columns, BLOCK)
    row = block // in_row
    if row < rows:
        at = (block % in_row) * BLOCK + tl.arange(0, BLOCK)  # int64, as the table is
        mask = at < columns
        x = tl.load(new_ptr + row * new_stride + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(old_ptr + row * old_stride + at, mask=mask & (old != 0), other=0.0).to(tl.float32)
        tl.store(store_ptr + row * store_stride + at, x.to(STORED), mask=mask & (store != 0))
        d = x - y
        out = partials_ptr + pair * 7 * blocks + block
        tl.store(out, tl.sum(tl.abs(d)))
        tl.store(out + blocks, tl.sum(d * d))
        tl.store(out + 2 * blocks, tl.sum(d))
        tl.store(out + 3 * blocks, tl.sum(tl.abs(y)))
        tl.store(out + 4 * blocks, tl.sum(y * y))
        tl.store(out + 5 * blocks, tl.sum(tl.abs(x)))
        is_finite = tl.abs(x) <= 3.4028234663852886e38  # the largest fp32; NaN compares false
        tl.store(out + 6 * blocks, tl.sum(tl.where(is_finite, 0.0, 1.0)))


@jit
def _total_kernel(
    table_ptr,  # (pairs, 9) int64
    partials_ptr,  # (pairs, 7, blocks) fp32
    sums_ptr,  # (all pairs, 7) fp64
    blocks,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    which, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, columns = tl.load(table_ptr + pair * 9 + 3), tl.load(table_ptr + pair * 9 + 4)
    own = rows * tl.cdiv(columns, BLOCK)
    line = partials_ptr + (pair * 7 + which) * blocks
    total = tl.zeros((STEP,), tl.float64)
    for start in range(0, own, STEP):
        at = start + tl.arange(0, STEP)
        total += tl.load(line + at, mask=at < own, other=0.0).to(tl.float64)
    tl.store(sums_ptr + tl.load(table_ptr + pair * 9 + 8) * 7 + which, tl.sum(total))


def distance_sums(pairs: Sequence[Pair], *, impl: str = "auto") -> Tensor:
    """The sums of every pair, and the stores written, in one pass. -> (pairs, 7) fp64, columns as in SUMS

    Columns that no norm of a pair wants are left open. One launch for pairs of one kind: their dtypes, and
    whether vector loads fit them.
    """
    for pair in pairs:
        check(pair)
    if not runs_kernel(pairs[0].new, impl):
        return pair_sums_reference(pairs)
    sums = torch.empty(len(pairs), len(SUMS), dtype=torch.float64, device=pairs[0].new.device)
    views = [as_rows(pair) for pair in pairs]  # alive until the launch: some are copies
    kinds: dict[tuple, list[tuple[int, ...]]] = {}
    for number, (pair, view) in enumerate(zip(pairs, views, strict=True)):
        line = table_line(number, *view)
        kinds.setdefault(kind(pair, line), []).append(line)
    for (new, stored, is_aligned), lines in kinds.items():
        launch(lines, sums, new, stored, is_aligned)
    return sums


def launch(lines: list[tuple[int, ...]], sums: Tensor, new: Any, stored: Any, is_aligned: bool) -> None:
    """Both kernels over pairs of one kind; each writes its row of `sums`."""
    table = torch.tensor(lines, dtype=torch.int64, pin_memory=sums.is_cuda).to(sums.device, non_blocking=True)
    blocks = max(rows * triton.cdiv(columns, BLOCK) for _, _, _, rows, columns, *_ in lines)
    partials = torch.empty(len(lines), len(SUMS), blocks, device=sums.device)
    options = {"num_warps": WARPS, "num_stages": 1}
    _blocks_kernel[(blocks, len(lines))](table, partials, blocks, new, stored, is_aligned, BLOCK, **options)
    _total_kernel[(len(SUMS), len(lines))](table, partials, sums, blocks, BLOCK, STEP, **options)


def check(pair: Pair) -> None:
    """Refuse what cannot be compared."""
    for name, other in (("old", pair.old), ("store", pair.store)):
        if other is not None and other.shape != pair.new.shape:
            shapes = f"new is {tuple(pair.new.shape)}, {name} {tuple(other.shape)}"
            raise ValueError(f"distance: {shapes}; wanted one shape")
    if pair.old is not None and pair.store is not None and pair.old.dtype != pair.store.dtype:
        raise ValueError(f"distance: old is {pair.old.dtype}, store {pair.store.dtype}; wanted one dtype")
    for norm in pair.norms:
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}; choose one of {', '.join(NORMS)}")
        if norm != "finite" and pair.old is None:
            raise ValueError(f"distance: {norm} compares two tensors, and there is no old one")


def as_rows(pair: Pair) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """new, old and store as (rows, columns) with contiguous columns, in as few rows as all of them allow."""
    new, old = (
        t if t is None or run_length(t) >= t.shape[-1] else t.contiguous() for t in (pair.new, pair.old)
    )
    tensors = new, old, pair.store
    columns = min(run_length(t) for t in tensors if t is not None)
    views = tuple(None if t is None else t.reshape(-1, columns) for t in tensors)
    if pair.store is not None and views[2].data_ptr() != pair.store.data_ptr():
        raise ValueError(f"distance: the store's strides {pair.store.stride()} are no rows of one distance")
    return views


def run_length(x: Tensor) -> int:
    """How many of the last elements lie side by side in memory."""
    count = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if size != 1 and stride != count:
            break
        count *= size
    return count


def table_line(number: int, new: Tensor, old: Tensor | None, store: Tensor | None) -> tuple[int, ...]:
    """A pair for the kernel: three addresses, 0 for none; rows, columns; three row strides; row of sums."""
    tensors = new, old, store
    strides = (0 if t is None or len(new) == 1 else t.stride(0) for t in tensors)
    return *(0 if t is None else t.data_ptr() for t in tensors), *new.shape, *strides, number


def kind(pair: Pair, line: tuple[int, ...]) -> tuple[Any, Any, bool]:
    """What is compiled in: the types of new and of what is stored, and whether vector loads fit."""
    stored = next((t for t in (pair.old, pair.store) if t is not None), pair.new)
    types = (getattr(tl, str(t.dtype).removeprefix("torch.")) for t in (pair.new, stored))
    *addresses, rows, columns, a, b, c, number = line
    return *types, all(n % 16 == 0 for n in (*addresses, columns, a, b, c))


def cases() -> list[Case]:
    """The launches at a block's state in bf16, and at latents in fp32."""
    blocks, total = Config({}, num_warps=WARPS, num_stages=1), Config({}, num_warps=WARPS, num_stages=1)
    types = {"table_ptr": "*i64", "partials_ptr": "*fp32", "blocks": "i32"}
    found = []
    for name, dtype in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
        constants = {"NEW": dtype, "STORED": dtype, "ALIGNED": True, "BLOCK": BLOCK}
        found.append(Case(f"rel_l1 blocks {name}", _blocks_kernel, types, constants, (blocks,)))
    constants = {"BLOCK": BLOCK, "STEP": STEP}
    types = types | {"sums_ptr": "*fp64"}
    return [*found, Case("rel_l1 total", _total_kernel, types, constants, (total,))]
