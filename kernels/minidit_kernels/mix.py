"""A weighted sum of stored states: y = sum_j c_j * slot_j, accumulated in fp32 and rounded once.

One verb for reuse (1), linear extrapolation (2, -1) and every Taylor forecast of a cached feature.
"""

from collections.abc import Sequence

from torch import Tensor


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


mix = mix_reference
