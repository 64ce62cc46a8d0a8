"""MixCache, unrolled by hand: the whole sampling loop of Algorithm 1 over plain tensors.

Nothing of minidit/cache decides, stores or measures here.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidit.cache.seam import BlockCache
from minidit.sampling import Forward
from minidit.schedules import Schedule


def distance(new: Tensor, old: Tensor) -> float:
    """Relative L1."""
    return ((new - old).abs().sum(dtype=torch.float64) / old.abs().sum(dtype=torch.float64)).item()


@torch.inference_mode()
def mixcache_reference(
    forward: Forward,
    schedule: Schedule,
    noise: Tensor,
    guidance: float | Sequence[float],
    *,
    theta: float,
    impact: dict,  # {"step": I, "cfg": I, "block": {"i": [I by step]}}
    candidates: tuple[int, ...],
    delta: tuple[float, float] = (0.05, 0.1),
    intervals: tuple[int, int, int] = (4, 3, 2),
    levels: tuple[str, ...] = ("step", "cfg", "block"),
    penalty: bool = True,
    block_uncond: str = "fill",
    residual: bool = False,
    draw: Callable[[Sequence[int]], Tensor] | None = None,
) -> tuple[Tensor, list[str]]:
    """-> latents, and the mode of every step: full, step, cfg or block i"""
    model, depth = forward.model, len(forward.model.blocks)
    x, solver = noise, schedule.start()
    old = {}  # "guided", "guided_full", "cond", "delta", and (branch, i) for the state after block i
    D = {}
    on, cnt, N, last, modes = False, 0, intervals[1], "full", []

    def run(branches: tuple[str, ...], resume: int | None) -> list[Tensor]:
        """A prediction per branch, after block `resume` where that is given; measures the states of cond."""
        rows = len(branches)
        t = torch.full((rows,), step.t)
        h, cond = model.embed(x.expand(rows, -1, -1, -1, -1), t, forward.context.select(branches))
        start, h_0 = 0, h
        if resume is not None:
            stored = torch.cat([old[branch, resume] for branch in branches])
            start, h = resume + 1, h_0 + stored if residual else stored
        for i in range(start, depth):
            h = model.blocks[i](h, cond.at(i), BlockCache())
            if i in candidates:
                for row, branch in enumerate(branches):
                    state = (h - h_0 if residual else h)[row : row + 1].clone()
                    if branch == "cond" and (branch, i) in old:
                        video = slice(forward.video_tokens)  # text rows may follow
                        D[f"block {i}"] = distance(state[:, video], old[branch, i][:, video])
                    old[branch, i] = state
        return list(model.head(h, cond).split(1))

    for step in schedule.steps(guidance):
        # Algorithm 1, first half: is this step cached, and how
        if not on and "step" in D and D["step"] < theta:
            on = True
        mode = "full"
        if on:
            cnt = (cnt + 1) % N
            if cnt > 0:
                cost = {}
                for psi, d in D.items():
                    level = psi.split()[0]
                    if level not in levels or (penalty and psi == last):
                        continue
                    value = impact[level]
                    cost[psi] = d * (value[psi.split()[1]][step.i] if level == "block" else value)
                mode = min(cost, key=cost.get) if cost else "full"
        if mode == "full":
            cnt = 0

        # second half: the guided prediction
        if mode == "step":
            cond, uncond = old["cond"], old["cond"] + old["delta"]
            guided = uncond + step.guidance * (cond - uncond)
            if len({s.guidance for s in schedule.steps(guidance)}) == 1:
                guided = old["guided"]
        else:
            resume = int(mode.split()[1]) if mode.startswith("block") else None
            if mode == "full" or (resume is not None and block_uncond == "run"):
                both = ("cond", "uncond")
                groups = [both] if forward.is_batched else [(branch,) for branch in both]
                cond, uncond = [prediction for group in groups for prediction in run(group, resume)]
            else:
                (cond,) = run(("cond",), resume)
                uncond = cond + old["delta"]
            guided = uncond + step.guidance * (cond - uncond)
            if "guided" in old:
                D["step"] = distance(guided, old["guided"])
            if mode == "full":
                if "delta" in old:
                    D["cfg"] = distance(uncond - cond, old["delta"])
                if on:
                    drift = distance(guided, old["guided_full"])
                    N = (
                        intervals[0]
                        if drift < delta[0]
                        else intervals[1]
                        if drift < delta[1]
                        else intervals[2]
                    )
                old["delta"], old["guided_full"] = uncond - cond, guided
            old["guided"], old["cond"] = guided, cond
        last = mode
        modes.append(mode)
        fresh = [draw(x.shape) for _ in range(schedule.needs_noise)]
        x, solver = schedule.step(step.i, x, guided, solver, fresh)
    return x, modes
