"""Profiling: what a caching method has to know of one model at one setting, measured on uncached runs.

MixCache: how redundant step, cfg and every block are, and the impact I of reusing each. UniCP: see
calibrate.py; planned: forecasts.py; methods that others fitted to their models: fits.py. The result is a
Profile, which lies in the model's folder.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from minidit.cache import fits
from minidit.cache.calibrate import SubmoduleProbe, calibrate_unicp, coverage
from minidit.cache.forecasts import measure_forecasts
from minidit.cache.loop import Lane, run_blocks
from minidit.cache.placement import place
from minidit.cache.plan import (
    CFG_DELTA,
    GUIDED,
    GUIDED_FULL,
    RUN_ALL,
    Measure,
    Need,
    Plan,
    Run,
    RunInfo,
    Values,
    h,
)
from minidit.cache.spec import make_policy, parse
from minidit.cache.trace import closing_line
from minidit.generate import Engine
from minidit.metrics import psnr
from minidit.profiles import Profile
from minidit.sampling import Forward, Record
from minidit.settings import Settings, profile_match

SHAPE_PROMPTS = (  # of the embedded model's world; none of those that tables are made with (demo/prompts.txt)
    "a red circle moves left to right",
    "a blue star moves right to left",
    "a green square moves up",
    "a yellow triangle grows",
    "a white square moves right to left",
    "an orange triangle moves down",
    "a purple circle stays still",
    "a small blue star shrinks",
)
SCENE_PROMPTS = (
    "a cat walks over a sunlit wooden floor, close-up",
    "waves break on a rocky coast under a grey sky",
    "a man in a red coat crosses a busy street at night",
    "a paper boat drifts down a narrow stream in the forest",
)
PUBLISHED = {"theta": 0.1, "delta": [0.05, 0.1]}
BAND = 0.02  # D_step counts as settled where it stays this near to its last five values


class Observer:
    """Runs everything, and measures how far each level and block moves from step to step."""

    def __init__(self):
        self.rows: list[dict[str, object]] = []

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        self.rows = []
        cond = ("cond",)
        sites = {"step": GUIDED, "full": GUIDED_FULL} | ({"cfg": CFG_DELTA} if len(run.branches) > 1 else {})
        sites |= {f"block {i}": h(i + 1) for i in range(run.depth - 1)}
        self.sites = sites
        norms = ("l1", "moments", "abs")
        measures = tuple(Measure(site, norm) for site in sites.values() for norm in norms)
        self.all = Plan(keep=tuple(sites.values()), measure=measures)
        return tuple(Need(site, branches=cond) for site in sites.values())

    def plan(self, step) -> Plan:
        return self.all

    def tell(self, step, values: Values) -> None:
        self.rows.append(
            {f"{name} {norm}": values.get(Measure(site, norm)) for name, site in self.sites.items()
             for norm in ("l1", "moments", "abs")}
        )  # fmt: skip


def mean_abs_normal(mu: float, sigma: float) -> float:
    """E|x| for x ~ N(mu, sigma^2), in closed form."""
    if sigma == 0:
        return abs(mu)
    spread = sigma * math.sqrt(2 / math.pi) * math.exp(-(mu**2) / (2 * sigma**2))
    return spread + mu * math.erf(mu / (sigma * math.sqrt(2)))


def settled(d_step: list[float], band: float = BAND) -> int:
    """The first step from which D_step stays within a band of the previous five; where warm-up ends."""
    for t in range(5, len(d_step)):
        last = d_step[t - 5 : t + 1]
        if max(last) - min(last) <= band:
            return t
    return len(d_step) - 1


def thresholds(d_step: list[float]) -> tuple[float, float, float]:
    """theta, and the least and the largest |D_step - theta| after it has settled (delta_1, delta_2)."""
    start = settled(d_step)
    tail = d_step[start:]
    theta = fmean(tail)
    off = [abs(d - theta) for d in tail]
    return theta, min(off), max(off)


def noise_of(rows: list[dict], name: str) -> tuple[float, float]:
    """mu over all steps and sigma over the last 80 %, of real - cached, per element."""
    pairs = [row[f"{name} moments"] for row in rows if row[f"{name} moments"] is not None]
    late = pairs[len(pairs) // 5 :]
    return fmean(mu for mu, _ in pairs), fmean(sigma for _, sigma in late)


def perturbed_impact(
    engine: Engine, settings: Settings, text: list[Tensor], noises: dict[int, tuple[float, float]], every: int
) -> dict[int, dict[int, float]]:
    """I_block(t): how far noise of N(mu, sigma) on cond's h(i + 1) moves the guided prediction, relative L1.

    noises: {i: (mu, sigma)} -> {i: {step: I}}. In block mode uncond is cond plus a stored difference, so the
    guided prediction moves by as much as cond does.
    """
    forward = engine.forward(settings, text)
    impacts: dict[int, dict[int, float]] = {i: {} for i in noises}
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    before: list[Tensor] = []

    def look(record: Record, x: Tensor) -> None:
        if record.step.i % every == 0 and before:
            scale = record.values[Measure(GUIDED, "abs")][0]
            for i, d in moved(forward, before[-1], record.step.t, noises, generator).items():
                impacts[i][record.step.i] = d / scale
        before[:] = [x]

    engine.denoise(settings, text, policy=Observer(), on_step=look)
    return impacts


@torch.inference_mode()
def moved(
    forward: Forward, x: Tensor, t: float, noises: dict[int, tuple[float, float]], generator: torch.Generator
) -> dict[int, float]:
    """Mean |change| of cond's prediction when noise is added to h(i + 1), for every i. x (1, C, T, H, W)"""
    model, context = forward.model, forward.context.select(("cond",))
    state, cond = model.embed(x, torch.full((1,), t, device=x.device), context)
    changes, at = {}, 0
    clean = None
    for i in sorted(noises):
        (state,) = run_blocks(model.blocks, [Lane(("cond",), state, cond)], Plan((Run(at, i + 1),)))
        at = i + 1
        if clean is None:
            clean = finish(model, state, cond, at)
        mu, sigma = noises[i]
        noise = torch.randn(state.shape, generator=generator).mul_(sigma).add_(mu).to(state)
        changes[i] = (finish(model, state + noise, cond, at) - clean).abs().mean().item()
    return changes


def finish(model, state: Tensor, cond, first: int) -> Tensor:
    (last,) = run_blocks(model.blocks, [Lane(("cond",), state, cond)], Plan((Run(first),)))
    return model.head(last, cond)


def interpolated(points: dict[int, float], steps: int) -> list[float]:
    """A value for every step from those at some: linear between, constant beyond."""
    known = sorted(points)
    return [round(between(points, known, t), 6) for t in range(steps)]


def between(points: dict[int, float], known: list[int], t: int) -> float:
    below = max((k for k in known if k <= t), default=known[0])
    above = min((k for k in known if k >= t), default=known[-1])
    if above <= below:
        return points[below]
    share = (t - below) / (above - below)
    return points[below] * (1 - share) + points[above] * share


def profile_mixcache(
    engine: Engine, settings: Settings, prompts: Sequence[str], *, every: int = 2, report: Callable = print
) -> Profile:
    """Thresholds, noise statistics and impacts of MixCache's levels, over several prompts.

    every: I_block is measured at every so many steps, and interpolated between them
    """
    if settings.steps <= every:
        raise ValueError(f"steps={settings.steps} are too few for a profile; take {every + 1} or more")
    runs, impacts, states = [], [], []
    for number, prompt in enumerate(prompts):
        one = replace(settings, prompt=prompt, seed=settings.seed + number)
        text = engine.encode(one)
        observer = Observer()
        engine.denoise(one, text, policy=observer)
        runs.append(observer.rows)
        states.append((one, text))
        report(f"profiled {prompt!r}")
    blocks = [int(name.split()[1]) for name in observer.sites if name.startswith("block")]
    noise = {name: mean_noise(runs, name) for name in observer.sites if name != "full"}
    noises = {i: noise[f"block {i}"] for i in blocks}
    for one, text in states[:2]:  # the rest of the prompts changes little, and this costs a forward per point
        impacts.append(perturbed_impact(engine, one, text, noises, every))
    return Profile("mixcache", profile_match(settings), mixcache_data(runs, impacts, noise, blocks, settings))


def mean_noise(runs: list[list[dict]], name: str) -> tuple[float, float]:
    pairs = [noise_of(rows, name) for rows in runs]
    return fmean(mu for mu, _ in pairs), fmean(sigma for _, sigma in pairs)


def mean_curve(runs: list[list[dict]], key: str) -> list[float | None]:
    """A measured curve, averaged over prompts; None at steps where nothing was measured."""
    columns = zip(*([row[key] for row in rows] for rows in runs), strict=True)
    return [None if None in column else round(fmean(column), 6) for column in columns]


def mixcache_data(runs, impacts, noise, blocks: list[int], settings: Settings) -> dict:
    """What the policy reads, and what people read beside it."""
    curves = {name: mean_curve(runs, f"{name} l1") for name in noise}
    per_prompt = [thresholds([row["step l1"] for row in rows if row["step l1"] is not None]) for rows in runs]
    theta, delta_1, delta_2 = (fmean(column) for column in zip(*per_prompt, strict=True))
    after = 1 + settled(curves["step"][1:])
    drift = [row["full l1"] for rows in runs for row in rows[after:]]
    scale = fmean(row["step abs"][0] for rows in runs for row in rows[after:])
    impact = {"step": mean_abs_normal(*noise["step"]) / scale}
    if "cfg" in noise:
        impact["cfg"] = abs(settings.cfg_scale - 1) * mean_abs_normal(*noise["cfg"]) / scale
    steps = len(curves["step"])
    averaged = {i: {t: fmean(run[i][t] for run in impacts) for t in impacts[0][i]} for i in blocks}
    return {
        "theta": {"suggested": round(theta, 4), "published": PUBLISHED["theta"]},
        "delta": {"suggested": [round(delta_1, 4), round(delta_2, 4)], "published": PUBLISHED["delta"]},
        "d_full": {"min": round(min(drift), 4), "max": round(max(drift), 4)},
        "settled": after,
        "noise": {name: [round(v, 6) for v in pair] for name, pair in noise.items()},
        "impact": {name: round(value, 6) for name, value in impact.items()}
        | {"block": {str(i): interpolated(averaged[i], steps) for i in blocks}},
        "curves": curves,
        "prompts": len(runs),
    }


class Announcer:
    """Runs everything, and tells a probe which step comes."""

    def __init__(self, probe: SubmoduleProbe, prompt: int):
        self.probe, self.prompt = probe, prompt

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        return ()

    def plan(self, step) -> Plan:
        self.probe.begin_step(self.prompt, step.i)
        return RUN_ALL

    def tell(self, step, values: Values) -> None:
        pass


def profile_unicp(
    engine: Engine,
    settings: Settings,
    prompts: Sequence[str],
    *,
    basis: str = "two-sided",
    report: Callable = print,
) -> Profile:
    """Drift of attention outputs, slicing bases and slice losses, in three passes over the prompts."""
    runs = [replace(settings, prompt=p, seed=settings.seed + n) for n, p in enumerate(prompts)]
    texts = [engine.encode(one) for one in runs]

    def run_once(probe: SubmoduleProbe) -> None:
        for number, (one, text) in enumerate(zip(runs, texts, strict=True)):
            engine.denoise(one, text, policy=Announcer(probe, number), probe=probe)
        report(f"{type(probe).__name__}: {len(runs)} prompts")

    data, tensors = calibrate_unicp(run_once, basis=basis)
    return Profile("unicp", profile_match(settings), data, tensors)


def profile_planned(
    engine: Engine, settings: Settings, prompts: Sequence[str], *, report: Callable = print
) -> Profile:
    """How good forecasts of the guided prediction are, and how much each step matters."""
    runs = [replace(settings, prompt=p, seed=settings.seed + n) for n, p in enumerate(prompts)]
    data = measure_forecasts(engine, settings, [(one, engine.encode(one)) for one in runs], report=report)
    return Profile("planned", profile_match(settings), data)


def methods_to_profile(cache: str) -> dict[str, str]:
    """The methods of a --cache argument, {name: SPEC}; what cannot be made is refused at once."""
    specs = parse(cache)
    if odd := [spec.name for spec in specs if spec.name not in PROFILED]:
        raise ValueError(f"{odd[0]} has nothing to profile; choose from {', '.join(PROFILED)}")
    make_policy(specs, lambda method: None)  # knows its options
    return dict(zip((spec.name for spec in specs), cache.split("+"), strict=True))


def make_profile(method: str, engine: Engine, settings: Settings, prompts: Sequence[str]) -> Profile:
    """The profile of a caching method. method: a SPEC, of which the name counts and what PROFILED lists"""
    methods_to_profile(method)  # refuses others
    (spec,) = parse(method)
    profiled = PROFILED[spec.name]
    options = {key: value for key, value in spec.options.items() if key in profiled.options}
    return profiled.make(engine, settings, prompts, **options)


def closed_loop(engine: Engine, settings: Settings, cache: str, prompts: Sequence[str]) -> Iterator[str]:
    """What the method does with its new profile: its closing line and PSNR against no caching, per prompt."""
    for number, prompt in enumerate(prompts):
        one = replace(settings, prompt=prompt, seed=settings.seed + number)
        text = engine.encode(one)
        plain = engine.denoise(one, text)
        one = replace(one, cache=cache)
        cached = engine.denoise(one, text)
        quality = psnr(engine.decode(cached.latents), engine.decode(plain.latents))
        yield f"{prompt!r}: {closing_line(engine.trace(one, cached))}, PSNR {quality:.1f} dB against none"


def describe(profile: Profile) -> str:
    """A profile's numbers for people."""
    return PROFILED[profile.policy].describe(profile.data)


def describe_planned(data: dict) -> str:
    """Which steps would be computed at a few shares."""
    steps = len(data["impact"])
    shares = [share for share in (0.65, 0.5, 0.35) if share * steps > 3]
    placed = {share: place(data["errors"], data["impact"], round(share * steps)) for share in shares}
    return "\n".join(f"share {share:g}  computes {', '.join(map(str, p))}" for share, p in placed.items())


def describe_unicp(data: dict) -> str:
    """How many outputs windows cover at each threshold, of how many."""
    outputs = data["steps"] * data["depth"]
    lines = [f"of {outputs} outputs of each kind ({data['steps']} steps x {data['depth']} blocks), reused:"]
    for name, windows in coverage(data).items():
        counts = [f"{window} {kind} {n}" for window, kinds in windows.items() for kind, n in kinds.items()]
        lines.append(f"  {name}  " + "  ".join(counts))
    losses = [[row[i] for step in data["slice_losses"] for row in step] for i in range(len(data["widths"]))]
    kept = zip(data["widths"], losses, strict=True)
    lines.append(
        f"slices of {data['head_width']} ({data['basis']}): "
        + ", ".join(f"{width} loses {fmean(loss):.3f} (at most {max(loss):.3f})" for width, loss in kept)
    )
    return "\n".join(lines)


def describe_mixcache(d: dict) -> str:
    """The numbers of a MixCache profile, the paper's beside them."""
    p = PUBLISHED
    lines = [
        f"theta    suggested {d['theta']['suggested']:.4f}, published {p['theta']}",
        f"delta    suggested {d['delta']['suggested']}, published {p['delta']}; "
        f"D_full was {d['d_full']['min']:.4f} to {d['d_full']['max']:.4f}",
        f"settled  at step {d['settled']} of {len(d['curves']['step'])}",
        "impact   " + ", ".join(f"{k} {v:.4f}" for k, v in d["impact"].items() if k != "block"),
    ]
    for name, (mu, sigma) in d["noise"].items():
        lines.append(f"noise    {name:<9} mu {mu:+.2e}  sigma {sigma:.2e}")
    for i, row in d["impact"]["block"].items():
        middle = row[len(row) // 2]
        lines.append(f"impact   block {i:<3} first {row[0]:.4f}  middle {middle:.4f}  last {row[-1]:.4f}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Profiled:
    """How a method's profile is made, from (engine, settings, prompts) and `options`, and told to people."""

    make: Callable[..., Profile]
    describe: Callable[[dict], str]
    options: tuple[str, ...] = ()  # of the SPEC, that the profile depends on


PROFILED = {
    "mixcache": Profiled(profile_mixcache, describe_mixcache),
    "unicp": Profiled(profile_unicp, describe_unicp, ("basis",)),
    "planned": Profiled(profile_planned, describe_planned),
    "teacache": Profiled(fits.profile_teacache, fits.describe_teacache, ("signal",)),
    "magcache": Profiled(fits.profile_magcache, fits.describe_magcache),
    "adacache": Profiled(fits.profile_adacache, fits.describe_adacache),
    "ditfastattn": Profiled(fits.profile_ditfastattn, fits.describe_ditfastattn),
}
