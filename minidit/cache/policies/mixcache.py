"""MixCache: Mixture-of-Cache for Video Diffusion Transformer Acceleration (Wei et al., 2025).

Algorithm 1 with eq. 6 (interval) and eq. 7 (choose). Modes: "full" runs everything; "step" repeats the last
guided prediction; "cfg" runs cond alone, and uncond is cond plus their difference in the last full step;
"block i" is cfg mode with blocks 0 .. i skipped. Distances D are relative L1 between steps: of the guided
prediction (step), of uncond - cond (cfg), of cond's hidden state (block i); D_full is that of the guided
prediction from full step to full step.

Where the paper is silent: D is that of the step before; what a step did not compute keeps its last D, and
nothing is compared with its own copy; warm-up ends once; N counts from one full step to the next, so N - 1
steps are cached; the first N is the middle one, and D_full sets the N that follows; the penalty looks one
step back; where no mode is left the step is full.
"""

from minidit.cache.plan import (
    CFG_DELTA,
    GUIDED,
    GUIDED_FULL,
    PREDICTION,
    REUSE,
    Add,
    Load,
    Measure,
    Need,
    Plan,
    Run,
    RunInfo,
    Site,
    Values,
    h,
    residual,
)

DRIFT = Measure(GUIDED_FULL)  # D_full: from one full step to the next


def interval(d_full: float, delta: tuple[float, ...], intervals: tuple[int, ...]) -> int:
    """N, the steps from one full step to the next, given the drift between the last two (eq. 6)."""
    low, middling, high = intervals
    return low if d_full < delta[0] else middling if d_full < delta[1] else high


def choose(distance: dict[str, float], impact: dict[str, float], last: str | None) -> str:
    """The mode of the least D * I (eq. 7), never that of the step before (penalty); full if none is left."""
    allowed = [mode for mode in distance if mode != last]
    return min(allowed, key=lambda mode: distance[mode] * impact[mode], default="full")


def default_blocks(depth: int, family: str) -> tuple[int, ...]:
    """The published candidates, those of HunyuanVideo counted from its first double block; else quarters."""
    if depth >= 40:
        return (30, 40, 50) if family.startswith("hunyuan") else (10, 20, 30)
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4} - {depth - 1}))


def default_delta(family: str) -> tuple[float, float]:
    """The published pair of D_full."""
    return (0.3, 0.4) if family == "cogvideox" else (0.05, 0.1)


def check_choices(name: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Refuse a value that an option does not know."""
    if odd := [value for value in values if value not in known]:
        raise ValueError(f"mixcache: {name}={odd[0]!r} is not one of {', '.join(known)}")


class MixCache:
    """MixCache (Wei et al., 2025, arXiv 2508.12691): reuse of a step, a guidance branch or the first blocks.

    Published defaults: theta 0.1, delta 0.05/0.1 (CogVideoX: 0.3/0.4), N 4/3/2, variant eff 5/4/3.

    theta: warm-up ends once D_step is below; "profile" takes the one that the profile suggests
    delta: the two D_full at which N changes · intervals: N for a low, middling and high D_full
    interval: one N in place of these
    levels: what may be reused; cfg only where the branches share their ranks
    blocks: candidates i; block i stores h(i + 1) and resumes there (10/20/30 from depth 40 on, else quarters)
    block_uncond: in block mode, fill uncond as in cfg mode, or run it too, from its own stored state
    residual: resume from h(0) + what blocks 0 .. i last added, not from the last h(i + 1)
    relatch: a D_step of theta or more brings warm-up back · per_step: divide D by the age of what was stored
    penalty: no mode twice in a row; turn it off with a single mode, which it would stop every second time
    impact: I as in the profile, {"impact": {"step": I, "cfg": I, "block": {"i": [I by step]}}}; uniform: 1
    """

    variants = {"eff": {"intervals": (5, 4, 3)}}
    knob = ("interval", 1, 10)  # what compare tunes, and its bounds

    def __init__(
        self,
        theta: float | str = 0.1,
        delta: tuple[float, ...] | None = None,
        intervals: tuple[int, ...] = (4, 3, 2),
        interval: int | None = None,
        levels: tuple[str, ...] = ("step", "cfg", "block"),
        blocks: tuple[int, ...] | None = None,
        block_uncond: str = "fill",
        residual: bool = False,
        relatch: bool = False,
        per_step: bool = False,
        penalty: bool = True,
        impact: str = "profile",
        profile: dict | None = None,
    ):
        self.theta, self.delta, self.intervals, self.fixed = theta, delta, intervals, interval
        self.levels, self.blocks, self.block_uncond, self.residual = levels, blocks, block_uncond, residual
        self.relatch, self.per_step, self.penalty = relatch, per_step, penalty
        self.source, self.profile = impact, profile
        counts = (*intervals, 1 if interval is None else interval)
        is_pair = delta is None or (len(delta) == 2 and delta[0] <= delta[1])
        if not is_pair or len(counts) != 4 or min(counts) < 1:
            raise ValueError(
                f"mixcache: delta={delta}, intervals={intervals}, interval={interval}; wanted two rising "
                f"distances, and three counts and one of at least 1, such as 0.05/0.1 and 4/3/2"
            )
        if isinstance(theta, str) and theta != "profile":
            raise ValueError(f"mixcache: theta={theta!r} is neither a distance, such as 0.1, nor profile")
        check_choices("levels", levels, ("step", "cfg", "block"))
        check_choices("block_uncond", (block_uncond,), ("fill", "run"))
        check_choices("impact", (impact,), ("profile", "uniform"))

    @staticmethod
    def needs_profile(options: dict) -> bool:
        """Whether these options of a spec take anything from a profile."""
        return options.get("impact") != "uniform" or options.get("theta") == "profile"

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        depth, guided = run.depth, "uncond" in run.branches
        self.bounds = self.delta or default_delta(run.family)
        chosen = self.blocks or default_blocks(depth, run.family)
        self.candidates = tuple(sorted(set(chosen))) if "block" in self.levels else ()
        if odd := [i for i in self.candidates if not 0 <= i < depth - 1]:
            raise ValueError(f"mixcache: blocks={odd[0]} leaves nothing to run; wanted 0 .. {depth - 2}")
        blocks = {f"block {i}": Measure(self.site(i)) for i in self.candidates}
        self.measures = {"step": Measure(GUIDED)} | ({"cfg": Measure(CFG_DELTA)} if guided else {}) | blocks
        levels = [level for level in self.levels if level != "cfg" or run.cfg_ranks == 1]
        modes = [mode for mode in self.measures if mode.split()[0] in levels]
        if not modes:
            where = "without guidance" if not guided else "whose branches have ranks of their own"
            raise ValueError(f"mixcache: levels={'/'.join(self.levels)} cannot act on a run {where}")
        self.impact = {mode: self.impact_of(mode, len(run.steps)) for mode in modes}
        self.plans = self.make_plans(guided, run.guidance_varies)
        self.limit = self.suggested_theta() if self.theta == "profile" else self.theta
        self.on, self.count, self.mode = False, 0, "full"
        self.n = self.fixed or self.intervals[1]
        self.distance: dict[str, float] = {}  # the last known D of every mode
        self.stored_at: dict[Site, int] = {}  # the step that a stored value is of
        fills = guided and self.block_uncond == "fill"
        return tuple(
            Need(site, branches=("cond",) if fills or site == PREDICTION else ())
            for site in self.plans["full"].keep
        )

    def site(self, block: int) -> Site:
        """What candidate `block` stores."""
        return residual(0, block + 1) if self.residual else h(block + 1)

    def suggested_theta(self) -> float:
        """The profile's theta: where D_step settles."""
        if self.profile is None:
            raise ValueError("mixcache: theta=profile needs one; make it with python -m minidit profile")
        return self.profile["theta"]["suggested"]

    def impact_of(self, mode: str, steps: int) -> list[float]:
        """I of a mode by step."""
        level, _, block = mode.partition(" ")
        if self.source == "uniform":
            return [1.0] * steps
        if self.profile is None:
            raise ValueError(
                "mixcache needs a profile of this model at this size and number of steps; make one with "
                "python -m minidit profile --cache mixcache, or take every I as 1: mixcache:impact=uniform"
            )
        value = self.profile["impact"][level]
        if level != "block":
            return [value] * steps
        if len(value.get(block, ())) != steps:
            raise ValueError(
                f"mixcache: the profile has blocks {', '.join(value)}, not {block} at {steps} steps; choose "
                f"blocks= among these, or make one with python -m minidit profile --cache mixcache"
            )
        return value[block]

    def make_plans(self, guided: bool, guidance_varies: bool) -> dict[str, Plan]:
        """One plan per mode. What a plan does not measure keeps its D, what it does not keep stays stored."""
        cond = {"branches": ("cond",), "fill": REUSE} if guided else {}
        outputs = (GUIDED, PREDICTION) if guidance_varies else (GUIDED,)
        full = (*outputs, GUIDED_FULL, *((CFG_DELTA,) if guided else ()), *map(self.site, self.candidates))
        plans = {
            "full": Plan(keep=full, measure=(*self.measures.values(), DRIFT)),
            "step": Plan(output=REUSE, label="step"),
            "cfg": Plan(**self.watch(-1, outputs), **cond, label="cfg"),
        }
        if guidance_varies:  # the guided prediction is then of another scale: guide the stored parts anew
            plans["step"] = Plan(path=(Load(PREDICTION),), **cond, label="step")
        for i in self.candidates:
            path = ((Add if self.residual else Load)(self.site(i)), Run(i + 1))
            branches = cond if self.block_uncond == "fill" else {}
            plans[f"block {i}"] = Plan(path, **self.watch(i, outputs), **branches, label=f"block {i}")
        return plans

    def watch(self, block: int, outputs: tuple[Site, ...]) -> dict[str, tuple]:
        """What a step that runs the blocks after `block` can measure and keep."""
        sites = tuple(self.site(i) for i in self.candidates if i > block)
        return {"keep": (*outputs, *sites), "measure": (Measure(GUIDED), *map(Measure, sites))}

    def plan(self, step) -> Plan:
        if self.relatch or not self.on:
            self.on = self.distance.get("step", float("inf")) < self.limit
        self.count = (self.count + 1) % self.n if self.on else 0
        known = {mode: self.distance[mode] for mode in self.impact if mode in self.distance}
        impact = {mode: table[step.i] for mode, table in self.impact.items()}
        last = self.mode if self.penalty else None
        self.mode = choose(known, impact, last) if self.count else "full"
        if self.mode == "full":
            self.count = 0  # N counts from here, also where no mode was allowed
        return self.plans[self.mode]

    def tell(self, step, values: Values) -> None:
        for mode, measure in self.measures.items():
            if measure in values:
                age = step.i - self.stored_at[measure.site] if self.per_step else 1
                self.distance[mode] = values[measure] / age
        if self.on and DRIFT in values:
            self.n = self.fixed or interval(values[DRIFT], self.bounds, self.intervals)
        self.stored_at |= dict.fromkeys(self.plans[self.mode].keep, step.i)
