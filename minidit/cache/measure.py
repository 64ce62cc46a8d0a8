"""Measurements of a step: sums collected on the device, read back together, told to the policy as numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minidit.cache.plan import Measure, Values
from minidit_kernels.rel_l1 import COLUMNS, SUMS, Pair, distance_sums


class Measurements:
    """The sums of one step. Nothing waits for the device until read() is called.

    add: of sums that are this rank's part, those of all ranks; None where there is one rank
    """

    def __init__(self, add: Callable[[Tensor], Tensor] | None = None):
        self.add_ranks = add
        self.wanted: dict[Measure, None] = {}  # by every plan of this step, in an order that all ranks share
        self.sums: list[Tensor] = []  # (pairs, 7) of every launch
        self.rows = 0  # in all of them
        self.measures: dict[Measure, tuple[int, int]] = {}  # its row, and the number of elements
        self.finite: dict[str, int] = {}  # the row of a watched value
        self.numbers: Tensor | None = None  # on the host, once `arrived`
        self.arrived: torch.cuda.Event | None = None

    def expect(self, measures: Sequence[Measure]) -> None:
        """Remember what a plan wants, whether or not this rank comes to see it."""
        self.wanted |= dict.fromkeys(measures)

    def take(self, pairs: Sequence[Pair], asked: Sequence[Sequence[Measure]]) -> None:
        """Launch pairs, and remember what is asked of each."""
        for row, (pair, measures) in enumerate(zip(pairs, asked, strict=True), self.rows):
            self.measures |= {measure: (row, pair.new.numel()) for measure in measures}
        self.sums.append(distance_sums(pairs))
        self.rows += len(pairs)

    def add(self, measure: Measure, new: Tensor, old: Tensor) -> None:
        """Measure one pair by itself."""
        self.take([Pair(new, old, norms=(measure.norm,))], [[measure]])

    def watch(self, values: Mapping[str, Tensor]) -> None:
        """Remember whether these named values are finite, in every element."""
        self.finite |= {name: row for row, name in enumerate(values, self.rows)}
        self.take([Pair(value, norms=("finite",)) for value in values.values()], [[]] * len(values))

    def send(self) -> None:
        """Order all sums to the host, in one copy behind the work that makes them; nothing waits."""
        if self.add_ranks is not None and (self.wanted or self.finite):
            self.sums, self.rows = [self.add_ranks(self.table())], len(self.wanted) + len(self.finite)
            self.finite = {name: row for row, name in enumerate(self.finite, len(self.wanted))}
        if not self.sums:
            return
        sums = torch.cat(self.sums)
        if not sums.is_cuda:
            self.numbers = sums
            return
        self.numbers = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
        self.numbers.copy_(sums, non_blocking=True)
        self.arrived = torch.cuda.Event()
        self.arrived.record()

    def table(self) -> Tensor:
        """What this rank has of every sum that any rank has. -> (measures and watched values, 8)

        Columns: the seven sums, and the elements they are over: 0 where this rank saw nothing.
        """
        names = [*self.wanted, *self.finite]
        found = self.measures | {name: (row, 1) for name, row in self.finite.items()}
        device = self.sums[0].device if self.sums else "cpu"
        table = torch.zeros(len(names), len(SUMS) + 1, dtype=torch.float64, device=device)
        if seen := [i for i, name in enumerate(names) if name in found]:
            rows, counts = zip(*(found[names[i]] for i in seen), strict=True)
            table[seen, :-1] = torch.cat(self.sums)[list(rows)]
            table[seen, -1] = table.new_tensor(counts)
        return table

    def read(self) -> tuple[Values, list[str]]:
        """Wait for the device -> (the values, the names of what is not finite)"""
        if self.numbers is None:
            self.send()
        if self.arrived is not None:
            self.arrived.synchronize()
        rows = [] if self.numbers is None else self.numbers.tolist()
        if self.add_ranks is not None:  # a measurement is there where any rank has made it
            counts = {measure: (row, int(rows[row][-1])) for row, measure in enumerate(self.wanted)}
            self.measures = {measure: found for measure, found in counts.items() if found[1]}
        values = {m: value_of(m.norm, rows[row], count) for m, (row, count) in self.measures.items()}
        broken = COLUMNS["finite"][0]
        return values, [name for name, row in self.finite.items() if rows[row][broken]]

    def at_gate(self, norm: str, part: tuple[Tensor, int] | None) -> Any:
        """One distance at once: waits for the device. part: see sums_of; None: there is nothing to compare"""
        if self.add_ranks is None:
            return float("inf") if part is None else value_of(norm, part[0].tolist(), part[1])
        row = torch.zeros(1, len(SUMS) + 1, dtype=torch.float64)
        if part is not None:
            row = torch.cat((part[0], part[0].new_tensor([part[1]])))[None]
        *sums, count = self.add_ranks(row)[0].tolist()
        return value_of(norm, sums, count) if count else float("inf")


def sums_of(new: Tensor, old: Tensor, norm: str) -> tuple[Tensor, int]:
    """The sums of one distance, (7,), and the elements they are over."""
    return distance_sums([Pair(new, old, norms=(norm,))])[0], new.numel()


def distance(new: Tensor, old: Tensor, norm: str) -> Any:
    """One distance at once: waits for the device."""
    sums, count = sums_of(new, old, norm)
    return value_of(norm, sums.tolist(), count)


def value_of(norm: str, sums: Sequence[float], count: int) -> Any:
    """The number that a pair's sums stand for in this norm. count: its elements"""
    return value(norm, *(sums[column] for column in COLUMNS[norm]), count)


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
