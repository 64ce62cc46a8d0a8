"""Where cached tensors live: one preallocated ring per (site, branch), and the constants of a profile."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minidit.attention import Folded, FoldedText
from minidit.cache.plan import SHARED, Mix, Need, Site
from minidit.memory import left_bytes
from minidit_kernels.mix import mix

GIB = 2**30
Shape = tuple[tuple[int, ...], torch.dtype]  # of one entry


@dataclass
class Ring:
    """The last entries of one site; fixed slots, so that no address changes during a run."""

    slots: Tensor  # (depth, ...)
    pushed: int = 0

    def claim(self) -> Tensor:
        """The slot of the oldest entry, from now on that of the newest: who claims it has to fill it."""
        self.pushed += 1
        return self.slots[(self.pushed - 1) % len(self.slots)]

    def push(self, value: Tensor) -> None:
        """Copy a value in, over the oldest: a reference would change when its owner is written in place."""
        self.claim().copy_(value)

    def entries(self) -> list[Tensor]:
        """What has been pushed and not overwritten, newest first."""
        depth = len(self.slots)
        return [self.slots[(self.pushed - 1 - age) % depth] for age in range(min(self.pushed, depth))]


@dataclass
class Store:
    """The rings of one generation. Sites that belong to no branch have the branch ""."""

    rings: dict[tuple[Site, str], Ring] = field(default_factory=dict)
    constants: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)  # (block, name) -> tensor
    folds: dict[tuple[int, str, int], Folded | FoldedText] = field(
        default_factory=dict
    )  # (block, name, width)

    @property
    def bytes(self) -> int:
        tensors = [ring.slots for ring in self.rings.values()] + list(self.constants.values())
        tensors += [t for fold in self.folds.values() for t in vars(fold).values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def holds(self, site: Site, branch: str) -> bool:
        """Whether there is a ring for this site and branch."""
        return (site, branch) in self.rings

    def claim(self, site: Site, branch: str) -> Tensor:
        """The slot for a new entry, which a measurement fills in passing."""
        return self.rings[site, branch].claim()

    def push(self, site: Site, branch: str, value: Tensor) -> None:
        self.rings[site, branch].push(value)

    def constant(self, block: int, name: str) -> Tensor:
        if (block, name) not in self.constants:
            raise ValueError(
                f"no profile of this run has {name} of block {block}; make one with python -m minidit profile"
            )
        return self.constants[block, name]

    def entries(self, site: Site, branch: str) -> list[Tensor]:
        ring = self.rings.get((site, branch))
        if ring is None or not ring.pushed:
            raise ValueError(
                f"the plan reads {site} of {branch or 'the run'}, which was never kept; name it in "
                f"reset()'s needs, and keep it in an earlier step"
            )
        return ring.entries()

    def mix(self, site: Site, branches: Sequence[str], how: Mix) -> Tensor:
        """A mix of a site's entries, one batch row per branch."""
        rows = [self.entries(site, branch) for branch in branches]
        if len(rows) == 1:
            return mix(rows[0], how.coefficients)
        first = rows[0][0]
        out = first.new_empty(len(rows) * len(first), *first.shape[1:])
        for entries, mixed in zip(rows, out.chunk(len(rows)), strict=True):
            mix(entries, how.coefficients, out=mixed)
        return out


Rings = dict[tuple[Site, str], tuple[int, tuple[int, ...], torch.dtype]]  # depth, and shape of one entry


def ring_shapes(
    needs: Sequence[Need], branches: Sequence[str], shape_of: Callable[[Site, str], Shape]
) -> Rings:
    """The rings that these needs come to."""
    depths: dict[tuple[Site, str], int] = {}
    for need in needs:
        for branch in ("",) if need.site in SHARED else need.branches or branches:
            if branch in ("", *branches):  # two methods may need one site: the deeper ring serves both
                depths[need.site, branch] = max(need.depth, depths.get((need.site, branch), 0))
    return {key: (depth, *shape_of(*key)) for key, depth in depths.items()}


def ring_bytes(rings: Rings) -> int:
    return sum(depth * math.prod(shape) * dtype.itemsize for depth, shape, dtype in rings.values())


def make_store(
    needs: Sequence[Need],
    branches: Sequence[str],
    shape_of: Callable[[Site, str], Shape],
    device: torch.device | str,
    constants: Mapping[tuple[int, str], Tensor] | None = None,
) -> Store:
    """Allocate all rings before step 0; too much for the device is refused with the number."""
    wanted = ring_shapes(needs, branches, shape_of)
    total, free = ring_bytes(wanted), left_bytes(str(device))
    if free is not None and total > free:
        raise ValueError(
            f"the cache needs {total / GIB:.2f} GiB and {free / GIB:.2f} GiB are free on {device}; "
            f"choose a method or a size that keeps less"
        )
    rings = {
        key: Ring(torch.zeros(depth, *shape, dtype=dtype, device=device))
        for key, (depth, shape, dtype) in wanted.items()
    }
    return Store(rings, constants or {})
