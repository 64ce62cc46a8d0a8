"""What placement.py has to know of a model: how good forecasts are, and how much each step matters. Ours.

Errors come from the guided predictions of uncached runs. Impact is measured: at every few steps, one
prediction is replaced by its forecast, the run goes on from there, and the final latents are compared.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, geometric_mean
from typing import Any

import torch
from torch import Tensor

from minidit.cache.plan import GUIDED, REUSE, Need, Plan, RunInfo, Values
from minidit.cache.store import Ring
from minidit.checkpoint import Checkpoint
from minidit.generate import Engine
from minidit.settings import Settings

REACH = 8  # the longest gap between computed steps
SMOOTH = 2  # impacts are averaged over so many steps on both sides; a single prompt's are noisy


class Keeper:
    """Runs everything and keeps the guided prediction."""

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        return (Need(GUIDED),)

    def plan(self, step) -> Plan:
        return Plan(keep=(GUIDED,))

    def tell(self, step, values: Values) -> None:
        pass


class Replacer(Keeper):
    """A Keeper that at one step takes what its ring holds for the prediction."""

    def __init__(self, step: int):
        self.at = step

    def plan(self, step) -> Plan:
        return Plan(output=REUSE, label="forecast") if step.i == self.at else super().plan(step)


@dataclass(frozen=True)
class Trajectory:
    """An uncached run: what entered and what came out of every step."""

    starts: list[Checkpoint]  # the state after every step
    guided: list[Tensor]  # (1, C, T, H, W) fp32
    latents: Tensor


def trajectory(engine: Engine, settings: Settings, text: list[Any]) -> Trajectory:
    starts, guided = [], []

    def look(after: Checkpoint) -> None:
        snapshot = after.snapshot
        (ring,) = snapshot.rings.values()
        guided.append(ring.slots[0].clone())
        starts.append(replace(after, snapshot=replace(snapshot, rings={}, records=tuple(snapshot.records))))

    outcome = engine.denoise(settings, text, policy=Keeper(), keep=look)
    return Trajectory(starts, guided, outcome.latents)


class Fit:
    """Least squares of v_j - v_a on v_a - v_b over several trajectories, for all b < a < j within reach."""

    def __init__(self, steps: int, reach: int = REACH):
        self.steps, self.reach = steps, reach
        self.moves: list[dict[tuple[int, int, int], tuple[float, float, float]]] = []

    def add(self, guided: Sequence[Tensor]) -> None:
        """One uncached run's predictions."""
        products = gram(guided)  # all that follows is a matter of inner products
        dot = lambda p, q: float(sum(x * y * products[i, j] for i, x in p for j, y in q))
        moves = {}
        for b, a, j in self.triples():
            behind, wanted = ((a, 1), (b, -1)), ((j, 1), (a, -1))
            moves[b, a, j] = dot(behind, behind), dot(behind, wanted), dot(wanted, wanted)
        self.moves.append(moves)

    def triples(self) -> Iterator[tuple[int, int, int]]:
        for a in range(1, self.steps):
            for b in range(max(0, a - self.reach), a):
                for j in range(a + 1, min(self.steps, a + self.reach)):
                    yield b, a, j

    def tables(self) -> dict[str, list]:
        """ahead and errors, as placement.py reads them; 0 beyond the last step."""
        ahead, errors = {}, {}
        for key in self.triples():
            rows = [moves[key] for moves in self.moves]
            c = sum(row[1] for row in rows) / max(sum(row[0] for row in rows), 1e-20)
            ahead[key] = c
            errors[key] = fmean(max(0.0, c * c * bb - 2 * c * bw + ww) ** 0.5 for bb, bw, ww in rows)
        table = lambda found: [
            [
                [float(f"{found.get((b, a, j), 0.0):.4g}") for j in range(a + 1, a + self.reach)]
                for b in range(a - 1, max(-1, a - self.reach - 1), -1)
            ]
            for a in range(self.steps)
        ]
        return {"ahead": table(ahead), "errors": table(errors)}


def gram(guided: Sequence[Tensor]) -> Tensor:
    """Inner products of all predictions, (n, n) fp64: neighbours differ little, fp32 would be too coarse."""
    rows = torch.stack([v.flatten().double().cpu() for v in guided])
    return rows @ rows.T


def impact_at(engine: Engine, settings: Settings, text: list[Any], run: Trajectory, step: int) -> float:
    """How far an error in one step's prediction moves the final latents, in units of that error (L2)."""
    value = 2 * run.guided[step - 1] - run.guided[step - 2]  # the line: any error of a typical kind will do
    before = run.starts[step - 1]
    rings = {(GUIDED, ""): Ring(value[None].clone(), pushed=1)}
    start = replace(before, snapshot=replace(before.snapshot, rings=rings))
    outcome = engine.denoise(settings, text, policy=Replacer(step), start=start)
    return ((outcome.latents - run.latents).norm() / (value - run.guided[step]).norm()).item()


def smoothed(points: dict[int, float], steps: int, around: int = SMOOTH) -> list[float]:
    """Impacts of all steps from those of some: log-linear between, averaged over neighbours.

    The last steps, where impact leaps because the noise levels do, are left as they are.
    """
    known = sorted(points)
    logs = []
    for i in range(steps):
        below = max((k for k in known if k <= i), default=known[0])
        above = min((k for k in known if k >= i), default=known[-1])
        share = (i - below) / (above - below) if above > below else 0.0
        logs.append(math.log(points[below]) * (1 - share) + math.log(points[above]) * share)
    last = steps - steps // 5
    near = lambda i: logs[max(2, i - around) : i + around + 1] if 2 <= i < last else [logs[i]]
    return [float(f"{math.exp(fmean(near(i))):.4g}") for i in range(steps)]


def measure_forecasts(
    engine: Engine,
    settings: Settings,
    states: Sequence[tuple[Settings, list[Any]]],
    *,
    points: int = 25,
    report: Callable = print,
) -> dict[str, Any]:
    """A profile's data, {"ahead", "errors", "impact"}. states: of every prompt its settings and text

    points: how many steps' impact is measured per prompt; each costs the rest of a run
    """
    if settings.steps < 8:
        raise ValueError(f"steps={settings.steps} are too few to plan; take 8 or more")
    n = settings.steps
    spread = {2 + round(i * (n - 3) / max(1, points - 1)) for i in range(points)}
    at = sorted(spread | {i for i in range(n - 4, n) if i >= 2})  # it leaps at the end
    found: dict[int, list[float]] = {i: [] for i in at}
    fit = Fit(n)
    for one, text in states:
        run = trajectory(engine, one, text)
        fit.add(run.guided)
        for i in at:
            found[i].append(impact_at(engine, one, text, run, i))
        report(f"planned: measured {one.prompt!r}")
    impact = smoothed({i: geometric_mean(values) for i, values in found.items()}, n)
    return fit.tables() | {"impact": impact, "prompts": len(states)}
