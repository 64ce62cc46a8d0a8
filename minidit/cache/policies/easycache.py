"""EasyCache: Less is Enough: Runtime-Adaptive Caching for Video Diffusion (Zhou et al., 2025).

Between two computed steps the prediction has moved by k times what the latents have moved, in mean absolute
values. As long as k keeps, the movement of the latents alone says how far the prediction would move:
k mean|x_t - x_(t-1)| / mean|last prediction|. These add up, and while their sum stays below the threshold the
prediction of every branch is the latents plus its last offset, prediction - latents: not even the patch
embedding runs. The first steps and the last one are computed.

Where it is unclear: k is of the last two computed steps, predictions and latents alike; cond decides for all
branches. The published first steps (10, of HunyuanVideo 5) are of 50 and scale with the number of steps.
"""

from dataclasses import replace

from minidit.cache.plan import (
    LATENTS,
    LATENTS_FULL,
    OFFSET,
    PREDICTION,
    Gate,
    Load,
    Measure,
    Need,
    Plan,
    RunInfo,
    Values,
)

PUBLISHED = {
    "wan": (0.05, 10),
    "hunyuan_video": (0.025, 5),
}  # threshold, first steps; H-EmbodVis/EasyCache 5127804
STEPS = 50  # of the published settings
MOVED = {site: Measure(site) for site in (PREDICTION, LATENTS, LATENTS_FULL)}  # relative L1
SIZE = {site: Measure(site, "abs") for site in MOVED}  # mean absolute values, now and then


def ratio(moved: float, size: float, moved_latents: float, size_latents: float) -> float:
    """k: how far the prediction has moved for every unit that the latents have. Relative L1 and sizes"""
    way = moved_latents * size_latents
    return moved * size / way if way else float("inf")


class EasyCache:
    """EasyCache (Zhou et al., 2025, arXiv 2507.02860): predictions from latents while these hardly move.

    threshold: of the summed estimates; 0.025 for HunyuanVideo, else the 0.05 published for Wan
    first, last: steps that are always computed; 5 or 10 of 50, and 1
    """

    knob = ("threshold", 0.002, 1.0)

    def __init__(self, threshold: float | None = None, first: int | None = None, last: int = 1):
        if (threshold is not None and threshold <= 0) or (first is not None and first < 2) or last < 0:
            raise ValueError(
                f"easycache: threshold={threshold}, first={first}, last={last}; wanted a number above 0, at "
                f"least 2 first steps, and no fewer than 0 last ones"
            )
        self.given, self.first, self.last = threshold, first, last

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        steps = len(run.steps)
        threshold, first = PUBLISHED.get(run.family, PUBLISHED["wan"])
        self.threshold = self.given or threshold
        first = max(2, round(first * steps / STEPS)) if self.first is None else self.first
        self.asks = range(first, steps - self.last)
        if not self.asks:
            raise ValueError(
                f"easycache: first={first}, last={self.last} leave none of {steps} steps to skip"
            )
        source = f"published for {run.family}" if run.family in PUBLISHED else "published for wan, used here"
        self.constants = "typed" if self.given else source
        watched = (
            SIZE[LATENTS],
            MOVED[LATENTS_FULL],
            SIZE[LATENTS_FULL],
            MOVED[PREDICTION],
            SIZE[PREDICTION],
        )
        self.full = Plan(keep=(LATENTS, LATENTS_FULL, PREDICTION, OFFSET), measure=watched)
        self.asking = replace(self.full, gate=Gate(-1, MOVED[LATENTS]))
        self.skip = Plan((Load(OFFSET),), keep=(LATENTS,), measure=(SIZE[LATENTS],), label="skip")
        self.total, self.k = 0.0, float("inf")
        self.size = self.size_latents = 0.0  # of the last computed prediction, of the last step's latents
        return Need(LATENTS), Need(LATENTS_FULL), Need(PREDICTION, branches=("cond",)), Need(OFFSET)

    def plan(self, step) -> Plan:
        if step.i in self.asks:
            return self.asking
        self.total = 0.0
        return self.full

    def decide(self, step, plan: Plan, value: float) -> Plan:
        self.total += self.k * value * self.size_latents / self.size if self.size else float("inf")
        if self.total < self.threshold:
            return self.skip
        self.total = 0.0
        return plan

    def tell(self, step, values: Values) -> None:
        if SIZE[LATENTS] in values:
            self.size_latents = values[SIZE[LATENTS]][0]
        if MOVED[PREDICTION] in values:
            self.size, before = values[SIZE[PREDICTION]]
            moved = values[MOVED[PREDICTION]], before
            self.k = ratio(*moved, values[MOVED[LATENTS_FULL]], values[SIZE[LATENTS_FULL]][1])
