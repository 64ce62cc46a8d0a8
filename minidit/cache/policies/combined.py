"""Two methods together: one decides what a step runs, the other what happens inside the blocks that run."""

from typing import Any

from minidit.cache.plan import Need, Plan, Policy, RunInfo, Values


class Combined:
    """Two methods: the first plans a step, and UniCP, behind the +, acts inside the blocks that it runs."""

    def __init__(self, outer: Policy, inner: Any):
        if not hasattr(inner, "refine"):
            raise ValueError(
                f"{type(inner).__name__} cannot act inside the blocks of {type(outer).__name__}: it has no "
                f"refine(); put a method behind the + that does, as in mixcache+unicp"
            )
        self.outer, self.inner = outer, inner

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        return (*self.outer.reset(run), *self.inner.reset(run))

    def plan(self, step) -> Plan:
        self.outer_plan = self.outer.plan(step)
        return self.inner.refine(step, self.outer_plan)

    def decide(self, step, plan: Plan, value: float) -> Plan:
        """The outer policy decides about its own plan; what it makes of it is refined anew."""
        return self.inner.refine(step, self.outer.decide(step, self.outer_plan, value))

    def tell(self, step, values: Values) -> None:
        self.outer.tell(step, values)
        self.inner.tell(step, values)
