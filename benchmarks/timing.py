"""Clocks, and the yardsticks that a time is held against: what the machine multiplies and copies at most."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of n runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The least, which a busy machine disturbs least."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Between the quartiles; of fewer than four runs from least to most."""
        if len(self.seconds) < 4:
            return max(self.seconds) - min(self.seconds)
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low


def wait(device: str) -> None:
    """Until the device has done what was asked of it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def once(run: Callable[[], object], device: str) -> float:
    """Seconds of one run."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def alternate(runs: dict[str, Callable[[], object]], device: str, n: int) -> dict[str, Times]:
    """Seconds of n runs of each, taken in turns, so that a change of the machine meets all of them alike.

    Every one has run before, to warm up: the caller has compared their outputs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(n):
        for name, run in runs.items():
            seconds[name].append(once(run, device))
    return {name: Times(tuple(times)) for name, times in seconds.items()}


def short(run: Callable[[], object], device: str, budget_ms: int = 100) -> Times:
    """Seconds of a short operation, with a cold cache on a GPU, as many runs as fit into the budget."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return Times(tuple(ms / 1000 for ms in do_bench(run, rep=budget_ms, return_mode="all")))
    first = once(run, device)
    n = max(3, min(200, int(budget_ms / 1000 / max(first, 1e-6))))
    return Times(tuple(once(run, device) for _ in range(n)))


def matmul_ceiling(device: str, dtype: torch.dtype, n: int | None = None) -> float:
    """FLOP/s of an n x n product of random numbers; zeros would run faster."""
    n = n or (8192 if device.startswith("cuda") else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / short(lambda: a @ b, device, 300).median


def copy_bandwidth(device: str, size: int | None = None) -> float:
    """Bytes per second, read and written, of a copy that no cache can hold. size: bytes of the source"""
    size = size or (2**32 if device.startswith("cuda") else 2**28)
    a = torch.empty(size // 2, device=device, dtype=torch.bfloat16).fill_(1)
    b = torch.empty_like(a)
    return 2 * size / short(lambda: b.copy_(a), device, 300).median
