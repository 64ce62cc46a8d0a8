"""Sums for relative distances between two states: how far has `new` moved from `old`?

    l1:       (sum |new - old|, sum |old|)
    l2:       (sum (new - old)^2, sum old^2)
    moments:  (sum (new - old), sum (new - old)^2)
    abs:      (sum |new|, sum |old|)

The quotient (l2: its root) is the relative distance; sums, not means, so that shards of a state can be added.
"""

import torch
from torch import Tensor


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


distance_sums = distance_sums_reference
