"""FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality (Lv et al., 2024).

Two parts. Attention: at some steps every self-attention continues its last two outputs, new + w (new - old),
in place of running. Guidance: at most later steps cond runs alone, and uncond is cond plus their difference
at the last step that ran both, whose low and high spatial frequencies are weighted separately; every step
that does without uncond multiplies each weight once more.

Schedules and weights are Vchitect/FasterCache 02d05ef, scripts/, by the number of the step counted from 1;
at another number of steps the bounds are scaled, the periods not. Models without a script get the windows
over timesteps of diffusers 0.42.1, which are those of its port.

Where it is unclear: attention is continued only where the branches that run have all been computed at the
last step that computed attention, which is what the authors' shapes come to: a step that brings uncond back
after cond-only ones computes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from minidit.cache.plan import CFG_DELTA, Mix, Need, Plan, RunInfo, Spectrum, Values, sub

SELF_ATTENTION = ("attn", "t_attn")


@dataclass(frozen=True)
class Script:
    """A model's schedule. c: a step's number in a run of `steps`, from 1 · t: its timestep, 0 .. 1000"""

    steps: int | None  # None: bounds are timesteps
    reuses: Callable[[float, float, int], bool]  # (c, t, number of the step): attention is continued
    w: Callable[[float], float]  # (c): how far
    skips: Callable[[float, float, int], bool]  # (c, t, number of the step): cond runs alone
    low: Callable[[float, float], float]  # (c, t): factor of the low frequencies
    high: Callable[[float, float], float]


SCRIPTS = {
    "open_sora": Script(
        steps=30,
        reuses=lambda c, t, i: c > 7 and i % 2 == 0,
        w=lambda c: (c - 7) / 20 * 0.9,
        skips=lambda c, t, i: c > 11 and i % 5 != 0,
        low=lambda c, t: 1.15 if c <= 25 else 1.0,
        high=lambda c, t: 1.15 if c >= 20 else 1.0,
    ),
    "latte": Script(
        steps=50,
        reuses=lambda c, t, i: c >= 16 and i % 2 == 0,
        w=lambda c: 0.5,
        skips=lambda c, t, i: c >= 18 and i % 5 != 0,
        low=lambda c, t: 1.1 if c < 45 else 1.0,
        high=lambda c, t: 1.1 if c >= 45 else 1.0,
    ),
    "cogvideox": Script(
        steps=50,
        reuses=lambda c, t, i: c >= 18 and i % 3 != 0,
        w=lambda c: 0.3,
        skips=lambda c, t, i: c >= 18 and i % 5 != 0,
        low=lambda c, t: 1.1 if c <= 40 else 1.0,
        high=lambda c, t: 1.1 if c >= 30 else 1.0,
    ),
    "": Script(
        steps=None,
        reuses=lambda c, t, i: t < 681 and i % 2 == 0,
        w=lambda c: 0.5,
        skips=lambda c, t, i: t < 641 and (i - 1) % 5 != 0,  # diffusers counts from 0
        low=lambda c, t: 1.1 if 99 < t < 901 else 1.0,
        high=lambda c, t: 1.1 if t < 301 else 1.0,
    ),
}


class FasterCache:
    """FasterCache (Lv et al., 2024, arXiv 2410.19355): attention continued, uncond from cond by frequencies.

    attention, cfg: the two parts · kinds: the sub-modules that are continued (all self-attentions)
    w: how far attention is continued, in place of the script's
    """

    needs_values = False
    variants = {"attention": {"cfg": False}, "cfg": {"attention": False}}

    def __init__(
        self,
        attention: bool = True,
        cfg: bool = True,
        kinds: tuple[str, ...] | None = None,
        w: float | None = None,
    ):
        if not (attention or cfg):
            raise ValueError("fastercache: attention=off and cfg=off leave nothing to do; use --cache none")
        self.attention, self.cfg, self.given, self.w = attention, cfg, kinds, w

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        if self.cfg and "uncond" not in run.branches:
            raise ValueError("fastercache: this run has no uncond branch to skip; use fastercache:attention")
        if self.cfg and run.cfg_ranks > 1:
            raise ValueError(
                "fastercache: each branch has ranks of its own, so that one left out saves no time; use "
                "fastercache:attention"
            )
        kinds = self.given or tuple(name for name in SELF_ATTENTION if name in run.subs)
        if odd := [name for name in kinds if name not in run.subs]:
            raise ValueError(f"fastercache: kinds has {odd[0]!r}; this model has {', '.join(run.subs)}")
        name = run.family if run.family in SCRIPTS else ""
        self.script = SCRIPTS[name]
        self.constants = f"published for {name}" if name else "diffusers' defaults"
        self.stretch = (self.script.steps or len(run.steps)) / len(run.steps)
        self.branches, self.keys = run.branches, tuple((k, n) for k in range(run.depth) for n in kinds)
        self.outputs = tuple(sub(*key) for key in self.keys) if self.attention else ()
        self.weights = [1.0, 1.0]  # of the low and the high frequencies
        self.counts = dict.fromkeys(run.branches, 0)  # computed attentions that are stored, up to 2
        self.held: tuple[str, ...] = ()  # branches of the last step that computed attention
        delta = (Need(CFG_DELTA),) if self.cfg else ()
        return (*delta, *(Need(site, depth=2) for site in self.outputs))

    def plan(self, step) -> Plan:
        number = step.i + 1
        where = number * self.stretch, step.t, number
        alone = self.cfg and step.i > 0 and self.script.skips(*where)
        runs = ("cond",) if alone else self.branches
        if not alone:
            self.weights = [1.0, 1.0]  # the difference is taken anew
        fill = self.fill(*where[:2]) if alone else None
        ready = set(runs) <= set(self.held) and all(self.counts[branch] == 2 for branch in runs)
        names = ["cond only"] * alone
        subs, keep = (), () if alone or not self.cfg else (CFG_DELTA,)
        if self.attention and ready and self.script.reuses(*where):
            w = self.script.w(where[0]) if self.w is None else self.w
            subs = tuple((key, Mix((1 + w, -w))) for key in self.keys)
            names.append("reuse")
        elif self.attention:
            keep += self.outputs
            self.held = runs
            self.counts |= {branch: min(2, self.counts[branch] + 1) for branch in runs}
        branches = runs if alone else ()
        return Plan(branches=branches, subs=subs, keep=keep, fill=fill, label=", ".join(names) or "full")

    def fill(self, c: float, t: float) -> Spectrum:
        """The weights of this step, one more than those of the last without uncond."""
        self.weights[0] *= self.script.low(c, t)
        self.weights[1] *= self.script.high(c, t)
        return Spectrum(*self.weights)

    def tell(self, step, values: Values) -> None:
        pass
