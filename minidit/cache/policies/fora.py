"""FORA: Fast-Forward Caching in Diffusion Transformer Acceleration (Selvaraju et al., 2024).

Every N-th step runs in full and keeps what attention and MLP of every block give, before their gates; the
steps in between reuse all of it. The original's blocks have these two sub-modules; here those for the text
and for time are reused as well.
"""

from minidit.cache.plan import REUSE, Need, Plan, RunInfo, Values, sub


class FORA:
    """FORA (Selvaraju et al., 2024, arXiv 2407.01425): every sub-module's output, recomputed every N-th step.

    Published: N = 3 on DiT-XL/2 at 250 steps.

    interval: N · kinds: the sub-modules that are reused (all), such as attn/mlp
    """

    needs_values = False
    knob = ("interval", 2, 7)  # what compare tunes, and its bounds

    def __init__(self, interval: int = 3, kinds: tuple[str, ...] | None = None):
        if interval < 2:
            raise ValueError(f"fora: interval={interval} recomputes every step; wanted 2 or more")
        self.interval, self.kinds = interval, kinds

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        kinds = self.kinds or run.subs
        if odd := [kind for kind in kinds if kind not in run.subs]:
            raise ValueError(f"fora: kinds has {odd[0]!r}; this model's blocks have {', '.join(run.subs)}")
        if len(run.steps) < 2:
            raise ValueError("fora: a run of one step has nothing to reuse; take more steps")
        keys = tuple((block, kind) for block in range(run.depth) for kind in kinds)
        full = Plan(keep=tuple(sub(*key) for key in keys))
        reuse = Plan(subs=tuple((key, REUSE) for key in keys), label="reuse")
        self.plans = tuple(reuse if i % self.interval else full for i in range(len(run.steps)))
        self.constants = "published for DiT-XL/2" if (self.interval, self.kinds) == (3, None) else "typed"
        return tuple(Need(site) for site in full.keep)

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def tell(self, step, values: Values) -> None:
        pass
