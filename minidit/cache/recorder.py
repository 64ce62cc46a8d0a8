"""What a plan wants of the values that pass by in a step: measured, kept, shown to a gate."""

from collections.abc import Callable, Sequence

from torch import Tensor

from minidit.cache.measure import Measurements, sums_of
from minidit.cache.plan import Measure, Plan, Site, check, check_change
from minidit.cache.store import Store
from minidit_kernels.rel_l1 import Pair


class Recorder:
    """Measures and keeps what a plan wants of the values that pass by.

    video_tokens: the first rows of a state, at which alone distances look; None is all
    """

    def __init__(self, plan: Plan, store: Store, measurements: Measurements, video_tokens: int | None = None):
        self.store, self.measurements, self.video_tokens = store, measurements, video_tokens
        self.peeked: Site | None = None  # an input that a gate has seen before its block runs
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """Take orders from this plan from now on."""
        self.plan = plan
        self.gate_sums: tuple[Tensor, int] | None = None  # as long as there is nothing to compare with
        self.at_gate: dict[str, Tensor] = {}  # what the gate looked at, by branch
        self.measurements.expect(plan.measure)
        self.keep = set(plan.keep)
        self.wanted = (
            self.keep | {m.site for m in plan.measure} | ({plan.gate.measure.site} if plan.gate else set())
        )
        self.starts = {site.first for site in self.wanted if site.kind == "residual"}
        self.subs = {(site.first, site.name) for site in self.wanted if site.kind == "sub"}
        self.maps = {(site.first, site.name) for site in self.wanted if site.kind == "map"}
        self.rests = {(site.first, site.name): site for site in self.wanted if site.kind == "rest"}
        shown = self.wanted - {self.peeked}
        self.inputs = {(site.first, site.name) for site in shown if site.kind == "input"}

    def settle(self, decide: Callable[[Plan, float], Plan], depth: int, at: int | None = None) -> Plan:
        """The policy decides at the plan's gate, after `at` items of its path (None: before everything)."""
        plan, shown = self.plan, self.at_gate
        changed = decide(plan, self.gate_value)  # under several ranks, all of them meet here
        if at is None:
            check(changed, depth)
        else:
            check_change(plan, changed, at, depth)
        self.follow(changed)
        site = plan.gate.measure.site
        if site in self.keep - set(plan.keep):  # decided upon when it had passed
            for branch, value in shown.items():
                self.keep_value(site, branch, value)
        return changed

    @property
    def gate_value(self) -> float:
        """What the plan's gate has measured; infinite where there is nothing to compare with."""
        return self.measurements.at_gate(self.plan.gate.measure.norm, self.gate_sums)

    def see(self, site: Site, branches: Sequence[str], value: Tensor) -> None:
        """A value passes by, one batch row per branch: read new, read old, then write."""
        if site not in self.wanted:
            return
        found: list[tuple[Pair, list[Measure]]] = []
        for row, branch in zip(value.chunk(len(branches)), branches, strict=True):
            gate = self.plan.gate
            if gate and gate.measure.site == site:
                self.at_gate[branch] = row
            if gate and (gate.measure.site, gate.measure.branch) == (site, branch or gate.measure.branch):
                if (old := self.old(site, branch, gate.measure.age)) is not None:
                    pair = self.video(site, row), self.video(site, old)
                    self.gate_sums = sums_of(*pair, gate.measure.norm)
            if pairs := self.pairs(site, branch, row):
                found += pairs
            elif site in self.keep:
                self.keep_value(site, branch, row)
        if found:
            self.measurements.take(*zip(*found, strict=True))

    def pairs(self, site: Site, branch: str, row: Tensor) -> list[tuple[Pair, list[Measure]]]:
        """This value beside the stored ones it is measured against; the oldest pair also writes the store."""
        asked = [m for m in self.plan.measure if (m.site, m.branch) == (site, branch or m.branch)]
        ages = sorted({m.age for m in asked})
        olds = {age: old for age in ages if (old := self.old(site, branch, age)) is not None}
        slot, new = None, self.video(site, row)
        if olds and site in self.keep and self.store.holds(site, branch):
            slot = self.store.claim(site, branch)  # no entry but the oldest of all can lie there
            slot[:, new.shape[1] :].copy_(row[:, new.shape[1] :])  # text, which is not measured
        found = []
        for age, old in olds.items():
            measures = [m for m in asked if m.age == age]
            store = None if slot is None or age < max(olds) else self.video(site, slot)
            norms = tuple(m.norm for m in measures)
            found.append((Pair(new, self.video(site, old), store, norms), measures))
        return found

    def keep_value(self, site: Site, branch: str, row: Tensor) -> None:
        """Store a value where the policy has asked for a ring."""
        if self.store.holds(site, branch):
            self.store.push(site, branch, row)

    def video(self, site: Site, value: Tensor) -> Tensor:
        """What distances look at: of a state (1, L + M, D) the first L rows."""
        return value[:, : self.video_tokens] if site.kind in ("h", "residual", "sub", "input") else value

    def old(self, site: Site, branch: str, age: int) -> Tensor | None:
        """The stored value of that age, or None while there is none."""
        if not self.store.holds(site, branch):
            return None
        entries = self.store.rings[site, branch].entries()
        return entries[age] if age < len(entries) else None
