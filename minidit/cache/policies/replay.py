"""Replay: the plans of an earlier run, step by step, whatever is measured now."""

from dataclasses import replace

from minidit.cache.plan import CFG_DELTA, GUIDED, Add, Load, Mix, Need, Plan, RunInfo, Site, Values, sub


class Replay:
    """Forces the plans of a trace, so that a cached run can be repeated and its error attributed."""

    def __init__(self, plans: tuple[Plan, ...]):
        self.plans = tuple(replace(plan, gate=None) for plan in plans)  # its decision stands in the path

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        if len(self.plans) != len(run.steps):
            raise ValueError(
                f"the trace has {len(self.plans)} steps, this run {len(run.steps)}; make them equal"
            )
        depths: dict[Site, int] = {}
        for plan in self.plans:
            for site, depth in [*reads(plan), *((m.site, m.age + 1) for m in plan.measure)]:
                depths[site] = max(depths.get(site, 1), depth)
        return tuple(Need(site, depth) for site, depth in depths.items())

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def tell(self, step, values: Values) -> None:
        pass


def reads(plan: Plan) -> list[tuple[Site, int]]:
    """(site, ring depth) of everything that a plan reads from the store."""
    mixes = [(item.site, item.mix) for item in plan.path if isinstance(item, Load | Add)]
    mixes += [(sub(*key), how) for key, how in plan.subs if isinstance(how, Mix)]
    mixes += [(site, mix) for site, mix in ((CFG_DELTA, plan.fill), (GUIDED, plan.output)) if mix is not None]
    return [(site, len(mix.coefficients)) for site, mix in mixes]
