"""Kernels that should not be shipped, for the compile check to find."""

from minidit_kernels import rel_l1
from minidit_kernels.tuning import Case, Config, jit, tl


@jit
def _product_kernel(a_ptr, b_ptr, c_ptr, count, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, 128), tl.arange(0, BLOCK)
    a_at = rows[:, None] * count + cols[None, :]
    b_at = cols[:, None] * 128 + rows[None, :]
    total = tl.zeros((128, 128), tl.float32)
    for start in range(0, count, BLOCK):
        total = tl.dot(tl.load(a_ptr + a_at + start), tl.load(b_ptr + b_at + start * 128), total)
    tl.store(c_ptr + rows[:, None] * 128 + rows[None, :], total)


def cases() -> list[Case]:
    """A modest product, one with too many stages for shared memory, and sums with too few registers."""
    types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "count": "i32:16"}
    product = lambda name, stages: Case(
        name, _product_kernel, types, {"BLOCK": 64}, (Config({}, num_warps=4, num_stages=stages),)
    )
    sums, starved = rel_l1.cases()[1], Config({}, num_warps=8, num_stages=1, maxnreg=24)
    spilling = Case("spilling", sums.kernel, sums.types, sums.constants, (starved,))
    return [product("modest", 2), product("oversized", 12), spilling]
