"""Measurements of a step: sums collected on the device, read back together, told to the policy as numbers."""

from typing import Any

import torch
from torch import Tensor

from minidit.cache.plan import Measure, Values
from minidit_kernels.rel_l1 import distance_sums


class Measurements:
    """The sums of one step. Nothing waits for the device until read() is called."""

    def __init__(self):
        self.sums: list[Tensor] = []
        self.measures: list[tuple[Measure, int]] = []  # and the number of elements
        self.finite: list[tuple[str, Tensor]] = []

    def add(self, measure: Measure, new: Tensor, old: Tensor) -> None:
        self.sums.append(distance_sums(new, old, norm=measure.norm))
        self.measures.append((measure, new.numel()))

    def watch(self, name: str, value: Tensor) -> None:
        """Remember whether `value` is finite: a sum is NaN or infinite as soon as one element is."""
        self.finite.append((name, value.sum(dtype=torch.float64)))

    def read(self) -> tuple[Values, list[str]]:
        """Wait for the device -> (the values, the names of what is not finite)"""
        flat = [*(s for pair in self.sums for s in pair), *(s for _, s in self.finite)]
        numbers = torch.stack(flat).tolist() if flat else []
        values = {m: value(m.norm, *numbers[2 * i : 2 * i + 2], n) for i, (m, n) in enumerate(self.measures)}
        tail = numbers[2 * len(self.measures) :]
        return values, [name for (name, _), s in zip(self.finite, tail, strict=True) if s - s != 0]


def distance(new: Tensor, old: Tensor, norm: str) -> float:
    """One distance at once: waits for the device."""
    return value(norm, *distance_sums(new, old, norm=norm).tolist(), new.numel())


def value(norm: str, first: float, second: float, count: int) -> Any:
    """The number that two sums stand for; a distance from nothing is infinite, so that nothing is reused."""
    if norm == "moments":
        mean = first / count
        return mean, max(second / count - mean**2, 0.0) ** 0.5
    if norm == "abs":
        return first / count, second / count
    if second == 0:
        return 0.0 if first == 0 else float("inf")
    return first / second if norm == "l1" else (first / second) ** 0.5
