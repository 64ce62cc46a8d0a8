"""Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers (Chen et al., 2024).

What a segment of blocks adds, h(b) - h(a), is kept, and in the steps between two full ones added to the new
h(a) in place of running the segment. Early steps draw outlines, which front blocks make, so they skip the
rear blocks; later ones draw details, which rear blocks make, and skip the front.

Where we had to choose: the paper's settings for video are unknown. Three quarters of the blocks skipped every
second step come to the 1.6x that it reports for PixArt-alpha at 20 steps; the boundary, a little behind the
middle of the run, is ours. Full steps are counted anew from it, as no front residual is stored yet. The sign
is that of the paper, end minus start: the re-implementation in VideoSys (branch exp/tgate_deltadit) keeps
start minus end, and skips front blocks early, so its numbers are no anchor.
"""

from minidit.cache.plan import Add, Need, Plan, Run, RunInfo, Values, residual


class DeltaDiT:
    """Delta-DiT (Chen et al., 2024, arXiv 2406.01125): what rear blocks add, early on, then front blocks.

    interval: N, steps from one full step to the next · share: of the blocks, those that are skipped (N_c)
    boundary: the share of the steps that skip rear blocks
    """

    needs_values = False
    knob = ("interval", 2, 10)  # what compare tunes, and its bounds

    def __init__(self, interval: int = 2, share: float = 0.75, boundary: float = 0.6):
        if interval < 2 or not 0 < share < 1 or not 0 <= boundary <= 1:
            raise ValueError(
                f"delta-dit: interval={interval}, share={share}, boundary={boundary}; "
                f"wanted 2 or more, and shares"
            )
        self.interval, self.share, self.boundary = interval, share, boundary

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        n, depth = len(run.steps), run.depth
        count, turn = round(self.share * depth), round(self.boundary * n)
        fulls = [(i if i < turn else i - turn) % self.interval == 0 for i in range(n)]
        if not 0 < count < depth or all(fulls):
            raise ValueError(
                f"delta-dit: nothing to skip: {count} of {depth} blocks, {n} steps; change share or steps"
            )
        rear, front = residual(depth - count, depth), residual(0, count)
        early = Plan(keep=(rear,)), Plan(path=(Run(0, depth - count), Add(rear)), label="rear")
        late = Plan(keep=(front,)), Plan(path=(Add(front), Run(count)), label="front")
        self.plans = tuple((early if i < turn else late)[not fulls[i]] for i in range(n))
        is_default = (self.interval, self.share, self.boundary) == (2, 0.75, 0.6)
        self.constants = "defaults" if is_default else "typed"
        return tuple(Need(site) for site in dict.fromkeys(plan.keep[0] for plan in self.plans if plan.keep))

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def tell(self, step, values: Values) -> None:
        pass
