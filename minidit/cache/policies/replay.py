"""The plans of an earlier run, step by step, whatever is measured now."""

from dataclasses import replace

from minidit.cache.plan import (
    CFG_DELTA,
    GUIDED,
    REUSE,
    Add,
    Freeze,
    Load,
    Mix,
    Need,
    Plan,
    RunInfo,
    Share,
    Site,
    Slice,
    Spectrum,
    Tokens,
    Values,
    Window,
    attention_map,
    sub,
    token_ages,
    window_rest,
)


class Replay:
    """Forces the plans of a trace, so that a cached run can be repeated and its error attributed."""

    def __init__(self, plans: tuple[Plan, ...]):
        self.plans = tuple(replace(plan, gate=None) for plan in plans)  # its decision stands in the path

    @property
    def slices(self) -> bool:
        """Whether any plan slices attention, and so needs a profile's bases."""
        return any(isinstance(how, Slice) for plan in self.plans for _, how in plan.subs)

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        if len(self.plans) != len(run.steps):
            raise ValueError(
                f"the trace has {len(self.plans)} steps, this run {len(run.steps)}; make them equal"
            )
        needs: dict[tuple[Site, str], Need] = {}  # the branches that read or measure a site, not all of them
        for plan in self.plans:
            names = plan.branches or run.branches
            wanted = [(site, depth, name) for site, depth in reads(plan) for name in names]
            wanted += [(m.site, m.age + 1, m.branch) for m in plan.measure]
            for site, depth, name in wanted:
                known = needs.get((site, name), Need(site))
                needs[site, name] = Need(site, max(known.depth, depth), (name,))
        return tuple(needs.values())

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def tell(self, step, values: Values) -> None:
        pass


def reads(plan: Plan) -> list[tuple[Site, int]]:
    """(site, ring depth) of everything that a plan reads from the store."""
    mixes = [(item.site, item.mix) for item in plan.path if isinstance(item, Load | Add)]
    for key, how in plan.subs:
        how = how.how if isinstance(how, Share) else how
        if isinstance(how, Mix):
            mixes.append((sub(*key), how))
        elif isinstance(how, Freeze):
            mixes.append((attention_map(*key), REUSE))
        elif isinstance(how, Window):
            mixes.append((window_rest(*key, how), REUSE))
        elif isinstance(how, Tokens):
            mixes += [(sub(*key), REUSE)] + [(token_ages(*key), REUSE)] * bool(how.fresh)
    if plan.fill is not None:
        mixes.append((CFG_DELTA, REUSE if isinstance(plan.fill, Spectrum) else plan.fill))
    if plan.output is not None:
        mixes.append((GUIDED, plan.output))
    return [(site, len(mix.coefficients)) for site, mix in mixes]
