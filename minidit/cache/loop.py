"""The block loop, written once: every model runs its blocks here, and here alone is caching woven in."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from minidit.cache.plan import Plan


class BlockCond(Protocol):
    """What a model's blocks are conditioned on; at(k) is what block k sees of it."""

    def at(self, block: int) -> Any: ...


class BlockCache:
    """The seam inside a block: every sub-module (attn, cross, mlp) is called through run()."""

    def run(self, name: str, module: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """The output of `module`, ungated. name: the sub-module as plans know it"""
        return module(*inputs)


def run_blocks(
    blocks: nn.ModuleList, h: Sequence[Tensor], cond: Sequence[BlockCond], plan: Plan
) -> list[Tensor]:
    """Follow the plan's path from h(0) to h(depth).

    h, cond: one entry per lane, a lane being the guidance branches that run as one batch. Path items are the
    outer loop and lanes the inner one, so that batched and sequential guidance follow the same plan.
    h[i] (B, L, D) -> the same shapes
    """
    h = list(h)
    for item in plan.path:
        for lane, at_lane in enumerate(cond):
            for k in range(item.first, len(blocks) if item.last is None else item.last):
                h[lane] = blocks[k](h[lane], at_lane.at(k), BlockCache())
    return h
