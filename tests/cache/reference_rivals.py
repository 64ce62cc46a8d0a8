"""Rivals by hand, to hold the policies against: a plain loop over a model's blocks and a dict for a cache.

Of the cache package nothing is used but the seam that a block wants to be called with.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minidit.cache.seam import BlockCache
from minidit.sampling import Forward
from minidit.schedules import Schedule

Blocks = Callable[[Tensor, int, int], Tensor]  # (h, first, last) -> h after blocks first .. last-1
Walk = Callable[[int, str, Tensor, Blocks], Tensor]  # (step, branch, h(0), blocks) -> h(depth)


@torch.inference_mode()
def unrolled(forward: Forward, schedule: Schedule, noise: Tensor, guidance: float, walk: Walk) -> Tensor:
    """Sample with `walk` in place of the run through all blocks, one branch after the other -> latents"""
    model, x, state = forward.model, noise, schedule.start()
    for step in schedule.steps(guidance):
        out = {}
        for branch in forward.branches:
            h, cond = model.embed(x, torch.tensor([step.t]), forward.context.select((branch,)))

            def blocks(h: Tensor, first: int, last: int, cond=cond) -> Tensor:
                for k in range(first, last):
                    h = model.blocks[k](h, cond.at(k), BlockCache())
                return h

            out[branch] = model.head(walk(step.i, branch, h, blocks), cond)
        guided = out["uncond"] + guidance * (out["cond"] - out["uncond"])
        x, state = schedule.step(step.i, x, guided, state)
    return x
