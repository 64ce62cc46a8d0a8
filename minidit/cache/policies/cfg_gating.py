"""Guidance without its second forward in the later part of a run.

Adaptive Guidance (Castillo et al., 2023) finds guided and conditional predictions more and more alike in the
second half of a run, and leaves guidance out from there on. Here uncond is cond plus the last difference of
the two that was computed, times a gain: 1 keeps guiding by it, as the cfg part of FasterCache does (Lv et
al., 2024, arXiv 2410.19355; without its frequencies), 0 is no guidance, as in Adaptive Guidance. The
published rule of when to stop watches how alike the two are; a share of the steps needs no measurement.
"""

from minidit.cache.plan import CFG_DELTA, Mix, Need, Plan, RunInfo, Values


class CFGGating:
    """CFG gating (Castillo et al., 2023, arXiv 2312.12487: Adaptive Guidance): no uncond in the second half.

    start: the share of the steps before it acts · every: steps from one full step to the next from there on,
    none for no full step at all · gain: of the last difference of the branches, 0 for none
    """

    needs_values = False
    knob = ("start", 0.02, 0.9)  # what compare tunes, and its bounds

    def __init__(self, start: float = 0.5, every: int | None = None, gain: float = 1.0):
        if not 0 <= start < 1 or (every is not None and every < 2):
            raise ValueError(
                f"cfg-gating: start={start}, every={every}; wanted a share below 1, and 2 or more"
            )
        self.start, self.every, self.gain = start, every, gain

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        if "uncond" not in run.branches:
            raise ValueError("cfg-gating: this run has one guidance branch, so there is none to leave out")
        if run.cfg_ranks > 1:
            raise ValueError(
                "cfg-gating: each branch has ranks of its own, so that one left out saves no time; use "
                "--parallel ulysses"
            )
        n = len(run.steps)
        turn = max(round(self.start * n), 1)
        fulls = [i < turn or (self.every is not None and (i - turn + 1) % self.every == 0) for i in range(n)]
        if all(fulls):
            raise ValueError(
                f"cfg-gating: start={self.start} is the end of {n} steps; lower it, or take more"
            )
        full = Plan(keep=(CFG_DELTA,))
        cond = Plan(branches=("cond",), fill=Mix((self.gain,)), label="cfg")
        self.plans = tuple(full if is_full else cond for is_full in fulls)
        self.constants = "defaults" if (self.start, self.every, self.gain) == (0.5, None, 1.0) else "typed"
        return (Need(CFG_DELTA),)

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def tell(self, step, values: Values) -> None:
        pass
