"""First and dual block caches: the first blocks always run, and tell by their change whether the rest must.

First Block Cache (chengzeyi/ParaAttention, src/para_attn/first_block_cache) compares what block 0 adds with
what it added at the last computed step; DBCache (vipshop/cache-dit) what the first F blocks add, and also
runs the last B blocks at every step. Where the change is below a threshold, the stored residual of the middle
stands in for it.

Branches share the decision, which looks at cond alone (originals: one per branch, or one for a batch). The
gate takes one number in mid-step, so the host waits for the device once per step. Stores are written by copy,
so a block that writes its input in place cannot make the signal compare with itself.
"""

from dataclasses import replace

from minidit.cache.plan import Add, Gate, Measure, Need, Plan, Run, RunInfo, Values, residual


class DBCache:
    """DBCache (vipshop/cache-dit, 2025, no paper): the middle's residual while F blocks change little.

    Defaults of cache-dit: F8 B0, threshold 0.08, 8 steps of warm-up, no limit.

    threshold: relative L1 of what the first blocks add, against the last computed step
    front: F, by default 8, but at most a quarter of the blocks · back: B, blocks that run at the end
    warmup: full steps at the beginning · max_continuous: most cached steps in a row
    """

    knob = ("threshold", 0.01, 1.0)  # what compare tunes, and its bounds
    name, source, defaults = "dbcache", "cache-dit", (0.08, None, 0, 8, None)

    def __init__(
        self,
        threshold: float = 0.08,
        front: int | None = None,
        back: int = 0,
        warmup: int = 8,
        max_continuous: int | None = None,
    ):
        counts = (1 if front is None else front, 1 if max_continuous is None else max_continuous)
        if threshold <= 0 or min(counts) < 1 or back < 0 or warmup < 0:
            raise ValueError(
                f"{self.name}: threshold={threshold}, front={front}, back={back}, warmup={warmup}, "
                f"max_continuous={max_continuous}; wanted above 0, 1, 0, 0 and 1 or more"
            )
        self.threshold, self.front, self.back, self.warmup = threshold, front, back, warmup
        self.max_continuous = max_continuous

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        n, depth = len(run.steps), run.depth
        front = min(8, max(1, depth // 4)) if self.front is None else self.front
        end = depth - self.back
        if front >= end:
            raise ValueError(
                f"{self.name}: front={front} and back={self.back} leave none of {depth} blocks; lower them"
            )
        if n <= max(1, self.warmup):
            raise ValueError(f"{self.name}: warmup={self.warmup} is all of {n} steps; lower it, or take more")
        signal, middle = residual(0, front), residual(front, end)
        tail = (Run(end),) if self.back else ()
        self.hit = Plan(path=(Run(0, front), Add(middle), *tail), label="hit")
        self.full = Plan(path=(Run(0, front), Run(front)), keep=(signal, middle))
        self.ask = replace(self.full, keep=(), gate=Gate(0, Measure(signal)))
        self.hits = 0  # in a row
        given = (self.threshold, self.front, self.back, self.warmup, self.max_continuous)
        self.constants = f"defaults of {self.source}" if given == self.defaults else "typed"
        return Need(signal, branches=("cond",)), Need(middle)

    def plan(self, step) -> Plan:
        may = step.i >= max(1, self.warmup)
        is_spent = self.max_continuous is not None and self.hits >= self.max_continuous
        if may and not is_spent:
            return self.ask
        self.hits = 0
        return self.full

    def decide(self, step, plan: Plan, value: float) -> Plan:
        is_hit = value < self.threshold
        self.hits = self.hits + 1 if is_hit else 0
        return self.hit if is_hit else self.full

    def tell(self, step, values: Values) -> None:
        pass


class FBCache(DBCache):
    """First Block Cache (chengzeyi/ParaAttention, 2024, no paper): DBCache with F = 1 and B = 0.

    threshold: relative L1 of what block 0 adds; 0.06 is ParaAttention's for HunyuanVideo, diffusers has 0.05
    warmup: full steps at the beginning · max_continuous: most cached steps in a row
    """

    name, source, defaults = "fbcache", "ParaAttention", (0.06, 1, 0, 1, None)

    def __init__(self, threshold: float = 0.06, warmup: int = 1, max_continuous: int | None = None):
        super().__init__(threshold, front=1, warmup=warmup, max_continuous=max_continuous)
