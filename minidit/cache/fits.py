"""Numbers of four methods for a model that none are published for, found by their authors' procedures.

TeaCache: how far the output moves, as a polynomial of how far the signal does. MagCache: by how much what
all blocks add grows from step to step. AdaCache: the scale at which its codebook, made for another model,
computes as large a share of the steps. DiTFastAttn: which attention may do less at which step, by search.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidit.cache.measure import Measurements, distance
from minidit.cache.plan import Measure, Need, Plan, RunInfo, Site, Values, Window, residual, sub, window_rest
from minidit.cache.policies.adacache import AdaCache, pooled, rate
from minidit.cache.policies.ditfastattn import WAYS, search_map, sub_op
from minidit.cache.policies.magcache import DEFAULTS, MagCache, skipped_steps
from minidit.cache.policies.none import NoCache
from minidit.cache.policies.teacache import SIGNALS, TeaCache
from minidit.cache.policies.teacache_polynomials import polynomial
from minidit.cache.store import make_store
from minidit.checkpoint import Checkpoint
from minidit.components import find_class
from minidit.generate import Engine
from minidit.profiles import Profile
from minidit.sampling import NoiseSource, guided_prediction, site_shapes
from minidit.settings import Settings, profile_match

Curve = list[tuple[float, float]]  # (x, y) by step

DEGREE = 4  # of TeaCache's polynomial, as published
WEAK = 0.5  # R^2 below which the signal tells little
SPEEDUP = 2.43  # in FLOPs: AdaCache-fast on Open-Sora 1.2, 480p, 30 steps (arXiv 2411.02397, table 1)
SCALES = (0.01, 100.0)  # AdaCache's, between which one is looked for
THRESHOLD = 0.05  # DiTFastAttn's, as published for DiT
WINDOW = 8  # its window reaches 1 / 8 of the tokens to both sides: 128 of DiT's 1024
CALIBRATED = 4  # prompts of its search, which runs every step over and over


def encoded(engine: Engine, settings: Settings, prompts: Sequence[str]) -> list[tuple[Settings, list[Any]]]:
    """Of every prompt the settings of its run, with a seed of its own, and its text."""
    runs = [replace(settings, prompt=p, seed=settings.seed + n) for n, p in enumerate(prompts)]
    return list(zip(runs, engine.encode_all(runs), strict=True))


def made(method: str, settings: Settings, data: dict[str, Any]) -> Profile:
    return Profile(method, profile_match(settings), {method: data})


class EveryMove(TeaCache):
    """How far TeaCache's signal and what all blocks add move from step to step, where everything runs."""

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        super().reset(run)
        self.signal = self.find_constants(run)
        site, rest = SIGNALS[self.signal], residual(0, run.depth)
        self.pairs = [(Measure(site, branch=name), Measure(rest, branch=name)) for name in run.branches]
        self.all = Plan(keep=(site, rest), measure=tuple(m for pair in self.pairs for m in pair))
        self.curves: list[Curve] = [[] for _ in self.pairs]  # of every branch
        return Need(site), Need(rest)

    def plan(self, step) -> Plan:
        return self.all

    def tell(self, step, values: Values) -> None:
        for curve, (x, y) in zip(self.curves, self.pairs, strict=True):
            if x in values:
                curve.append((values[x], values[y]))


def profile_teacache(
    engine: Engine,
    settings: Settings,
    prompts: Sequence[str],
    *,
    signal: str | None = None,
    report: Callable = print,
) -> Profile:
    """TeaCache's polynomial. signal: one of SIGNALS; by default the one its authors take for the family

    y is the relative L1 of what all blocks add, which is what a skipped step takes over, and both guidance
    branches are fitted together, as the first author answers in the issues of ali-vilab/TeaCache. The paper
    says "model output". "time" and "time_mod" are the same for all prompts and branches, so y is averaged.
    """
    curves: list[Curve] = []
    for one, text in encoded(engine, settings, prompts):
        policy = EveryMove(signal=signal, coefficients=(1.0, 0.0))
        engine.denoise(one, text, policy=policy)
        curves += policy.curves
        report(f"teacache: measured {one.prompt!r}")
    points = (
        [point for curve in curves for point in curve] if policy.signal == "input" else mean_curve(curves)
    )
    data = {"signal": policy.signal} | fit_polynomial(points) | {"prompts": len(prompts)}
    return made("teacache", settings, data)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """One x and one y per step, averaged over curves."""
    columns = zip(*curves, strict=True)
    return [(fmean(x for x, _ in column), fmean(y for _, y in column)) for column in columns]


def fit_polynomial(points: Curve, degree: int = DEGREE) -> dict:
    """Least squares y ~ polynomial of x -> {"coefficients", highest power first, "range", "r2"}

    Of the highest degree at most `degree` that leaves more points than coefficients, and that is not negative
    anywhere in the range: after negative estimates nothing would be computed any more.
    """
    x, y = (np.array(column) for column in zip(*points, strict=True))
    low, high = float(x.min()), float(x.max())
    for n in range(min(degree, max(0, len(set(x)) - 2)), -1, -1):
        terms = [float(f"{c:.9g}") for c in np.polyfit(x, y, n)]
        if lowest(terms, low, high) >= 0:
            break
    spread = ((y - y.mean()) ** 2).sum()
    left = sum((polynomial(terms, a) - b) ** 2 for a, b in points)
    r2 = 1 - left / spread if spread else 0.0
    return {"coefficients": terms, "range": list(outward(low, high)), "r2": round(float(r2), 4)}


def outward(low: float, high: float) -> tuple[float, float]:
    """A range at four digits that holds this one: to the nearest, its own ends might lie outside."""
    unit = 10.0 ** (math.floor(math.log10(max(abs(low), abs(high), 1e-12))) - 3)
    return float(f"{math.floor(low / unit) * unit:.12g}"), float(f"{math.ceil(high / unit) * unit:.12g}")


def lowest(terms: Sequence[float], low: float, high: float) -> float:
    """The least value of a polynomial between two points."""
    turns = np.roots(np.polyder(np.poly1d(terms)))
    inside = [t.real for t in turns if abs(t.imag) < 1e-12 and low < t.real < high]
    return min(polynomial(terms, x) for x in (low, high, *inside))


class Keeper:
    """Runs everything and keeps what all blocks add."""

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        self.site = residual(0, run.depth)
        return (Need(self.site),)

    def plan(self, step) -> Plan:
        return Plan(keep=(self.site,))

    def tell(self, step, values: Values) -> None:
        pass


def profile_magcache(
    engine: Engine, settings: Settings, prompts: Sequence[str], *, report: Callable = print
) -> Profile:
    """MagCache's ratios by branch and step: mean over tokens of |res_t| / |res_t-1|, then over prompts

    res: what all blocks add to a video token, | |: L2 over channels. The first entry is 1.
    spread: the mean over steps and branches of the standard deviation over prompts
    """
    found: dict[str, list[list[float]]] = {}
    for one, text in encoded(engine, settings, prompts):
        tokens = engine.family.tokens(engine.latent_shape(one))
        norms: dict[str, list[Tensor]] = {}

        def look(after: Checkpoint, tokens: int = tokens, norms: dict[str, list[Tensor]] = norms) -> None:
            for (_, branch), ring in after.snapshot.rings.items():
                norm = ring.entries()[0][0, :tokens].float().norm(dim=1)  # (L,)
                norms.setdefault(branch, []).append(norm)

        engine.denoise(one, text, policy=Keeper(), keep=look)
        for branch, rows in norms.items():
            found.setdefault(branch, []).append(magnitude_ratios(rows))
        report(f"magcache: measured {one.prompt!r}")
    columns = {branch: list(zip(*runs, strict=True)) for branch, runs in found.items()}
    spread = fmean(pstdev(column) for by_step in columns.values() for column in by_step)
    ratios = {branch: [round(fmean(c), 5) for c in by_step] for branch, by_step in columns.items()}
    data = {"ratios": ratios, "spread": round(spread, 5), "prompts": len(prompts)}
    return made("magcache", settings, data)


def magnitude_ratios(norms: Sequence[Tensor]) -> list[float]:
    """Mean over tokens of each norm over the one of the step before; the first is 1. norms (L,) by step"""
    pairs = zip(norms[1:], norms[:-1], strict=True)
    return [1.0, *((new / old.clamp_min(1e-20)).mean().item() for new, old in pairs)]


class EveryStep(AdaCache):
    """What AdaCache measures, on a run that computes everything, and against all steps within its reach."""

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        site = super().reset(run)[0].site
        reach = max(steps for _, steps in self.table)
        self.moved: list[list[float]] = []  # by step, by steps back
        self.all = Plan(keep=(site,), measure=tuple(m for age in range(reach) for m in self.measures(age)))
        return (Need(site, reach),)

    def measures(self, age: int) -> list[Measure]:
        """The distance of every branch, then its sizes. age: 0 is the step before"""
        return [replace(m, age=age) for m in (*self.distances, *self.sizes)]

    def plan(self, step) -> Plan:
        return self.all

    def tell(self, step, values: Values) -> None:
        moved, branches = [], len(self.distances)
        while (wanted := self.measures(len(moved)))[0] in values:
            sizes = [values[m][1] for m in wanted[branches:]]
            moved.append(pooled([values[m] for m in wanted[:branches]], sizes))
        self.moved.append(moved)


def profile_adacache(
    engine: Engine, settings: Settings, prompts: Sequence[str], *, report: Callable = print
) -> Profile:
    """AdaCache's scale: where codebook fast would compute 1 / SPEEDUP of the steps of these uncached runs."""
    runs = []
    for one, text in encoded(engine, settings, prompts):
        watcher = EveryStep(scale=1.0)
        engine.denoise(one, text, policy=watcher)
        runs.append(watcher.moved)
        report(f"adacache: measured {one.prompt!r}")
    table, stretch, steps = watcher.table, watcher.stretch, len(runs[0])
    count = lambda scale: fmean(len(computed_steps(moved, table, stretch, scale)) for moved in runs)
    scale = float(f"{find_scale(count, steps / SPEEDUP):.3g}")
    computed = round(count(scale), 2)
    data = {"scale": scale, "computed": computed, "steps": steps, "prompts": len(prompts)}
    return made("adacache", settings, data)


def computed_steps(
    moved: Sequence[Sequence[float]], table: Sequence[tuple[float, int]], stretch: float, scale: float
) -> list[int]:
    """The steps that AdaCache computes. moved: its distances by step, from 1, 2, ... steps back

    table: a codebook for this number of steps, whose bounds are multiplied by scale · stretch: c's factor
    """
    scaled = [(bound * scale, steps) for bound, steps in table]
    n, computed, after = len(moved), [0], 1
    for i in range(1, n):
        if i < after and i < n - 2:
            continue
        gap = i - computed[-1]
        after = i + rate(moved[i][gap - 1] / gap * stretch, scaled)
        computed.append(i)
    return computed


def find_scale(count: Callable[[float], float], wanted: float) -> float:
    """Where a count that falls with the scale comes nearest to what is wanted: bisection of log(scale)."""
    low, high = SCALES
    best = low
    for _ in range(40):
        middle = (low * high) ** 0.5
        if abs(count(middle) - wanted) < abs(count(best) - wanted):
            best = middle
        low, high = (middle, high) if count(middle) > wanted else (low, middle)
    return best


class Calibration:
    """One prompt on its way through the steps, each of which may be tried in several ways before it is taken.

    modules: the attentions of all blocks that a row of ways is for, in the order of the row
    window: as wide as the authors' is, unless one is given
    """

    @torch.inference_mode()
    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        text: list[Any],
        names: Sequence[str],
        window: Window | None = None,
    ):
        self.forward = engine.forward(settings, text)
        self.schedule = engine.family.schedule(settings)
        self.steps = self.schedule.steps(settings.cfg_scale)
        shape = engine.latent_shape(settings)
        self.draw = NoiseSource(settings.seed)
        self.x = self.draw((1, *shape)).to(engine.device)
        self.modules = [(block, name) for block in range(len(self.forward.model.blocks)) for name in names]
        rows = self.forward.shapes["cond"][0][1]
        of = self.forward.video_tokens // shape[1] if "t_attn" in names else rows
        self.window = window or Window(max(1, of // WINDOW), of)
        self.state, self.clean = self.schedule.start(), None
        sites = [self.rest(key) for key in self.modules if key[1] == "attn"]
        needs = [Need(site) for site in (*sites, *(sub(*key) for key in self.modules))]
        shapes = site_shapes(self.forward, self.x)
        self.store = make_store(needs, self.forward.branches, shapes, engine.device)

    def rest(self, key: tuple[int, str]) -> Site:
        return window_rest(*key, self.window)

    def plan(self, row: Sequence[str]) -> Plan:
        subs = ((key, sub_op(way, self.window, "cond")) for key, way in zip(self.modules, row, strict=True))
        return Plan(subs=tuple((key, how) for key, how in subs if how is not None))

    def predict(self, step: int, plan: Plan) -> Tensor:
        """The guided prediction of the step that comes next."""
        here = self.steps[step]
        guided, _ = guided_prediction(self.forward, self.x, here, plan, self.store, Measurements(), NoCache())
        return guided

    @torch.inference_mode()
    def loss(self, step: int, row: Sequence[str]) -> float:
        """Relative L1 of the guided prediction under these ways against the one with full attention."""
        if self.clean is None:
            self.clean = self.predict(step, Plan())
        return distance(self.predict(step, self.plan(row)), self.clean, "l1")

    @torch.inference_mode()
    def finish(self, step: int, row: Sequence[str]) -> None:
        """Take the step in these ways, and store what later steps may take from it."""
        ways = zip(self.modules, row, strict=True)
        rests = [self.rest(key) for key, way in ways if key[1] == "attn" and way in ("full", "share")]
        keep = (*rests, *(sub(*key) for key in self.modules))
        guided = self.predict(step, replace(self.plan(row), keep=keep))
        fresh = [self.draw(self.x.shape).to(self.x.device) for _ in range(self.schedule.needs_noise)]
        self.x, self.state = self.schedule.step(step, self.x, guided, self.state, fresh)
        self.clean = None


def profile_ditfastattn(
    engine: Engine,
    settings: Settings,
    prompts: Sequence[str],
    *,
    threshold: float = THRESHOLD,
    report: Callable = print,
) -> Profile:
    """DiTFastAttn's map, by greedy search over the first CALIBRATED prompts

    Every prompt follows its own run under the map as found so far; a loss is the mean over prompts.
    """
    subs = find_class(engine.part("transformer").class_name).subs
    names = [name for name in ("attn", "t_attn") if name in subs]
    states = encoded(engine, settings, prompts[:CALIBRATED])
    runs: list[Calibration] = []
    for one, text in states:  # one window for all, though texts may be of several lengths
        runs.append(Calibration(engine, one, text, names, runs[0].window if runs else None))
    modules, steps = runs[0].modules, len(runs[0].steps)
    can_share = all(
        len(run.forward.branches) > 1 and len(set(run.forward.shapes.values())) == 1 for run in runs
    )
    ways = [way for way in WAYS if can_share or "share" not in way]

    def loss(step: int, row: list[str]) -> float:
        pairs = zip(modules, row, strict=True)
        if any("window" in way and name != "attn" for (_, name), way in pairs):
            return math.inf  # there are no windows in time
        return fmean(run.loss(step, row) for run in runs)

    def finish(step: int, row: list[str]) -> None:
        for run in runs:
            run.finish(step, row)
        report(f"ditfastattn: step {step + 1} of {steps}: {counts(row)}")

    found = search_map(steps, len(modules), threshold, loss, finish, ways)
    by_name = {name: [row[at :: len(names)] for row in found] for at, name in enumerate(names)}
    band = runs[0].window
    data = {"depth": engine.family.depth, "window": band.width, "of": band.of, "map": by_name}
    return made("ditfastattn", settings, data | {"prompts": len(runs)})


def counts(ways: Sequence[str]) -> str:
    """How often each way was taken: reuse 3, full 5."""
    return ", ".join(f"{way} {ways.count(way)}" for way in WAYS if way in ways)


def describe_teacache(data: dict) -> str:
    """The polynomial, and how much of the output's movement it tells."""
    d = data["teacache"]
    low, high = d["range"]
    least = lowest(d["coefficients"], low, high)
    remark = "" if d["r2"] >= WEAK else f"; below {WEAK}: the output's distance hardly depends on it"
    return (
        f"signal {d['signal']}, which moves by {low} to {high} per step\n"
        f"coefficients {'/'.join(f'{c:g}' for c in d['coefficients'])}, at least {least:.4f} in that range\n"
        f"R^2 {d['r2']:.2f}, the share of the output's variance that the signal tells{remark}"
    )


def describe_magcache(data: dict) -> str:
    """The ratios' extent, and the steps that the default setting would skip."""
    d = data["magcache"]
    later = [r for row in d["ratios"].values() for r in row[1:]]
    steps = len(d["ratios"]["cond"])
    skips = skipped_steps(list(d["ratios"].values()), int(steps * MagCache().retention), *DEFAULTS)
    return (
        f"ratios {min(later):.4f} to {max(later):.4f}, between prompts they spread by {d['spread']:.4f}\n"
        f"threshold {DEFAULTS[0]:g} computes {', '.join(str(i) for i in range(steps) if not skips[i])}"
    )


def describe_adacache(data: dict) -> str:
    """The scale, and what it would compute."""
    d = data["adacache"]
    return f"scale {d['scale']:g}, at which codebook fast computes {d['computed']:g} of {d['steps']} steps"


def describe_ditfastattn(data: dict) -> str:
    """How often each way was found good enough."""
    d = data["ditfastattn"]
    ways = {name: [way for row in rows for way in row] for name, rows in d["map"].items()}
    return "\n".join(f"{name}  {counts(found)}, of {len(found)}" for name, found in ways.items())
