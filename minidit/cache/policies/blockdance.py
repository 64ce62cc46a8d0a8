"""BlockDance: Reuse Structurally Similar Spatio-Temporal Features (Zhang et al., 2025).

Through the middle of a run, steps come in groups: the first runs in full and stores the hidden state that
leaves block i, the others start from it and run the blocks behind it. Of a new latent those see nothing but
the timestep's modulation and the head.
"""

from minidit.cache.plan import Load, Need, Plan, Run, RunInfo, Values, h

PUBLISHED = 20, 28  # i, of that many blocks: DiT-XL/2, PixArt-alpha and Open-Sora


def resume_at(depth: int) -> int:
    """The block to resume at: behind the published one, at the same share of the depth."""
    block, of = PUBLISHED
    return round((block + 1) / of * depth)


def full_steps(n: int, start: float, stop: float, group: int) -> list[bool]:
    """Whether each of n steps runs in full: outside of start .. stop (shares), and as first of its group."""
    active = [i for i in range(n) if start <= i / n < stop]
    return [i not in active or (i - active[0]) % group == 0 for i in range(n)]


class BlockDance:
    """BlockDance (Zhang et al., 2025, arXiv 2503.15927): steps in groups that share the first blocks' state.

    Published: i = 20 of 28 blocks, active from 40 % to 95 % of the steps, N from 2 to 4. Variant mixcache is
    the baseline of MixCache's table 1: i = 20 at any depth, no end, N = 4; its 20 of HunyuanVideo counts
    single-stream blocks, so say block=40 there.

    group: N, steps from one full step to the next · start, stop: shares of the steps between which it acts
    block: i, the last block whose output is stored; by default the published one, scaled by depth
    """

    variants = {"mixcache": {"group": 4, "stop": 1.0, "block": 20}}
    needs_values = False
    knob = ("group", 2, 10)  # what compare tunes, and its bounds

    def __init__(self, group: int = 2, start: float = 0.4, stop: float = 0.95, block: int | None = None):
        if group < 2 or not 0 <= start < stop <= 1:
            raise ValueError(
                f"blockdance: group={group}, start={start}, stop={stop}; wanted 2 or more, and rising shares"
            )
        self.group, self.start, self.stop, self.block = group, start, stop, block

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        n, first = len(run.steps), resume_at(run.depth) if self.block is None else self.block + 1
        if not 0 < first < run.depth:
            raise ValueError(f"blockdance: block={first - 1} is none of 0 .. {run.depth - 2} of this model")
        fulls = full_steps(n, self.start, self.stop, self.group)
        if all(fulls):
            raise ValueError(
                f"blockdance: none of {n} steps follows a full one between start and stop; take more"
            )
        full, resume = Plan(keep=(h(first),)), Plan(path=(Load(h(first)), Run(first)), label="resume")
        self.plans = tuple(full if is_it else resume for is_it in fulls)
        self.constants = "typed" if self.block is not None else "published for open-sora-1.2"
        if self.block is None and run.depth != PUBLISHED[1]:
            self.constants = f"scaled from {PUBLISHED[1]} blocks"
        return (Need(h(first)),)

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def tell(self, step, values: Values) -> None:
        pass
