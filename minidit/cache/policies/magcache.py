"""MagCache: Fast Video Generation with Magnitude-Aware Cache (Ma et al., 2025).

What all blocks together add shrinks or grows from step to step by a ratio that hardly depends on the prompt.
While the product of these ratios since the last computed step stays near 1, that step's residual serves on.
Everything is known before step 0, so the schedule is made in reset() and nothing is measured.
"""

from collections.abc import Sequence

from minidit.cache.plan import Add, Need, Plan, RunInfo, Values, residual
from minidit.cache.policies.magcache_ratios import RATIOS, Ratios

DEFAULTS = (0.24, 6)  # E and K of a profile's ratios: those published for Wan 14B and HunyuanVideo


def nearest(table: Sequence[float], steps: int) -> tuple[float, ...]:
    """The ratios at another number of steps: of every step those of the nearest one, as the authors do."""
    scale = (len(table) - 1) / (steps - 1) if steps > 1 else 0.0
    return tuple(table[round(i * scale)] for i in range(steps)) if steps > 1 else (table[-1],)


def nearest_table(run: RunInfo) -> str:
    """The published table of this release, of two sizes the nearer one; "" where there is none."""
    names = [name for name in RATIOS if run.model and name.startswith(run.model)]
    return min(names, key=lambda name: abs(RATIOS[name].tokens - run.tokens), default="")


def error(magnitude: float, is_signed: bool) -> float:
    """What a skipped step adds to the error, given the product of ratios since the last full step."""
    return 1 - magnitude if is_signed else abs(1 - magnitude)


def skipped_steps(
    ratios: Sequence[Sequence[float]],
    first: int,
    threshold: float,
    max_skip: int,
    *,
    is_inclusive: bool = False,
    is_signed: bool = False,
) -> tuple[bool, ...]:
    """Whether each step is skipped. ratios: of every branch, by step · first: the first that may be

    The rule of every branch, taken together: a step is skipped where all branches would skip it. In the
    published settings the branches agree at every step.
    """
    steps, branches = len(ratios[0]), range(len(ratios))
    magnitude, total, count = [1.0 for _ in branches], [0.0 for _ in branches], 0
    skips: list[bool] = []
    for i in range(steps):
        if i >= first:
            magnitude = [magnitude[b] * ratios[b][i] for b in branches]
            total = [total[b] + error(magnitude[b], is_signed) for b in branches]
            count += 1
        below = all(e <= threshold if is_inclusive else e < threshold for e in total)
        skips.append(i >= max(first, 1) and below and count <= max_skip)
        if not skips[-1]:
            magnitude, total, count = [1.0 for _ in branches], [0.0 for _ in branches], 0
    return tuple(skips)


class MagCache:
    """MagCache (Ma et al., 2025, arXiv 2506.09045): steps skipped while known magnitude ratios stay near 1.

    The ratios are those of the profile, {"magcache": {"ratios": {branch: [ratio by step]}}}, where the model
    has one, else those published for this release; other numbers of steps take the nearest ones.

    threshold: E, the accumulated error that is still skipped · max_skip: K, most steps skipped in a row; both
    as published for the model, else 0.24 and 6 · retention: the share of the steps that comes first, in full
    table: published ratios by name, such as hunyuan-video-544p, in place of the model's own
    """

    needs_values = False
    knob = ("threshold", 0.005, 1.0)  # what compare tunes, and its bounds

    def __init__(
        self,
        threshold: float | None = None,
        max_skip: int | None = None,
        retention: float = 0.2,
        table: str | None = None,
        profile: dict | None = None,
    ):
        if table is not None and table not in RATIOS:
            raise ValueError(f"magcache: no table {table!r}; choose one of {', '.join(RATIOS)}")
        if not 0 <= retention < 1 or (max_skip is not None and max_skip < 1):
            raise ValueError(
                f"magcache: retention={retention}, max_skip={max_skip}; wanted a share below 1, and 1 or more"
            )
        self.threshold, self.max_skip, self.retention = threshold, max_skip, retention
        self.table, self.profile = table, profile

    @staticmethod
    def needs_profile(options: dict) -> bool:
        """Whether these options of a spec take anything from a profile."""
        return options.get("table") is None

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        n = len(run.steps)
        found = self.find(run)
        ratios = [nearest(self.of_branch(found, branch), n) for branch in run.branches]
        threshold = found.threshold if self.threshold is None else self.threshold
        skips = skipped_steps(
            ratios,
            int(n * self.retention),
            threshold,
            self.max_skip or found.max_skip,
            is_inclusive=found.is_inclusive,
            is_signed=found.is_signed,
        )
        if not any(skips):
            raise ValueError(
                f"magcache: threshold={threshold:g} skips none of {n} steps; raise it, or take more steps"
            )
        site = residual(0, run.depth)
        full, skip = Plan(keep=(site,)), Plan(path=(Add(site),), label="skip")
        self.plans = tuple(skip if is_skipped else full for is_skipped in skips)
        return (Need(site),)

    def find(self, run: RunInfo) -> Ratios:
        """The ratios of this run's model, and where they are from."""
        name = self.table or nearest_table(run)
        if self.table is None and self.profile is not None:
            self.constants = "profile"
            by_branch = {branch: tuple(r) for branch, r in self.profile["magcache"]["ratios"].items()}
            return Ratios(run.family, *DEFAULTS, **by_branch)
        if name not in RATIOS:
            raise ValueError(
                f"magcache: no ratios are published for {run.model or 'this model'}, and it has no profile; "
                f"make one with python -m minidit profile --cache magcache"
            )
        found = RATIOS[name]
        if found.family != run.family:
            raise ValueError(f"magcache: table={name} is of {found.family}, this model of {run.family}")
        steps = len(found.cond)
        self.constants = f"published for {name}" if self.table is None else f"typed: {name}"
        self.constants += f" at {steps} steps" if steps != len(run.steps) else ""
        return found

    def of_branch(self, found: Ratios, branch: str) -> tuple[float, ...]:
        ratios = found.cond if branch == "cond" or found.is_batched else found.uncond
        if not ratios:
            raise ValueError(f"magcache: its ratios ({self.constants}) are of runs with no {branch} branch")
        return ratios

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def tell(self, step, values: Values) -> None:
        pass
