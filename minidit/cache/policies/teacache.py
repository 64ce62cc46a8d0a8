"""TeaCache: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model (Liu et al., 2024).

A signal that costs next to nothing moves from step to step by x = mean|new - old| / mean|old|; a polynomial
fitted per model turns x into an estimate of how far the output moves. Estimates add up, and while their sum
stays below the threshold a step adds the last computed residual of all blocks in place of the blocks.

The signal is the embedding of the timestep ("time": CogVideoX, Wan), its projection for the blocks
("time_mod", which the authors call e0: Wan), or the modulated input of block 0 ("input": HunyuanVideo,
Open-Sora, Latte). x is measured against the step before, skipped or not.

Where it is unclear: a polynomial holds only for the x that it was fitted to, and elsewhere may be far below
0, after which nothing is computed any more. The ranges are not published; so an estimate below 0, or an x
outside a profile's range, warns once. cond decides for all: only HunyuanVideo's signal looks at the text.
"""

import warnings
from dataclasses import replace

from minidit.cache.plan import (
    TIME,
    TIME_MOD,
    Add,
    Gate,
    Measure,
    Need,
    Plan,
    RunInfo,
    Values,
    residual,
    sub_input,
)
from minidit.cache.policies.teacache_polynomials import PUBLISHED, polynomial

SIGNALS = {"time": TIME, "time_mod": TIME_MOD, "input": sub_input(0, "attn")}
PROJECTING = ("wan", "open_sora", "latte")  # families with one projection of the embedding for all blocks
INFINITE = float("inf")


class TeaCache:
    """TeaCache (Liu et al., 2024, arXiv 2411.19108): all blocks skipped while a cheap signal hardly moves.

    threshold: slow or fast of the release's published ones (0.1, 0.2 without), or a number
    signal: time, time_mod or input; the release's own by default · coefficients: of the polynomial, highest
    power first; by default the profile's, else those published for the release
    first, last: steps that are always computed (1 and 1; of time_mod 5 and 0, the authors' use_ret_steps)
    outside: where the polynomial is not made for x: warn, refuse, or clamp x to the range and estimates to 0
    profile: {"teacache": {"signal": "time", "coefficients": [...], "range": [low, high]}}
    """

    variants = {"slow": {"threshold": "slow"}, "fast": {"threshold": "fast"}}
    knob = ("threshold", 0.01, 1.0)

    def __init__(
        self,
        threshold: float | str = "slow",
        signal: str | None = None,
        coefficients: tuple[float, ...] | None = None,
        first: int | None = None,
        last: int | None = None,
        outside: str = "warn",
        profile: dict | None = None,
    ):
        is_name = isinstance(threshold, str)
        if (is_name and threshold not in self.variants) or (not is_name and threshold <= 0):
            raise ValueError(f"teacache: threshold={threshold} is neither slow, fast nor a number above 0")
        if signal not in (None, *SIGNALS) or outside not in ("warn", "refuse", "clamp"):
            wanted = f"one of {', '.join(SIGNALS)}, and of warn, refuse, clamp"
            raise ValueError(f"teacache: signal={signal}, outside={outside}; wanted {wanted}")
        self.given, self.signal, self.coefficients = threshold, signal, coefficients
        self.first, self.last, self.outside = first, last, outside
        self.profile = (profile or {}).get("teacache")

    @staticmethod
    def needs_profile(options: dict) -> bool:
        return "coefficients" not in options

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        signal = self.find_constants(run)
        if signal == "time_mod" and run.family not in PROJECTING:
            raise ValueError(f"teacache: {run.family} projects the timestep in every block; use signal=time")
        first, last = (5, 0) if signal == "time_mod" else (1, 1)
        first = first if self.first is None else self.first
        last = last if self.last is None else self.last
        self.asks = range(max(first, 1), len(run.steps) - last)
        if not self.asks:
            raise ValueError(f"teacache: first={first}, last={last} leave none of {len(run.steps)} steps")
        site, rest = SIGNALS[signal], residual(0, run.depth)
        self.full = Plan(keep=(site, rest))
        self.asking = replace(self.full, gate=Gate(-1, Measure(site)))
        self.skip = Plan(path=(Add(rest),), keep=(site,), label="skip")
        self.total, self.has_warned = 0.0, False
        return Need(site, branches=("cond",)), Need(rest)

    def find_constants(self, run: RunInfo) -> str:
        """The polynomial, its range and the threshold of this run -> the signal"""
        own = [name for model, name in PUBLISHED if model == run.model]
        fitted = None if self.coefficients else self.profile
        usual = "time" if run.family in ("wan", "cogvideox") else "input"
        signal = self.signal or (fitted["signal"] if fitted else own[0] if own else usual)
        known, self.range = PUBLISHED.get((run.model, signal)), (-INFINITE, INFINITE)
        if self.coefficients:
            self.terms, self.constants = self.coefficients, "typed"
        elif fitted and fitted["signal"] == signal:
            self.terms, self.range, self.constants = fitted["coefficients"], fitted["range"], "profile"
        elif known:
            self.terms, self.constants = known.coefficients, f"published for {run.model}"
        else:
            raise ValueError(
                f"teacache: no polynomial is known for {run.model or 'this model'} and signal={signal}; fit "
                f"one with python -m minidit profile --cache teacache, or give coefficients=a4/a3/a2/a1/a0"
            )
        slow, *_, fast = known.thresholds if known else (0.1, 0.2)
        self.threshold = {"slow": slow, "fast": fast}.get(self.given, self.given)
        return signal

    def plan(self, step) -> Plan:
        if step.i in self.asks:
            return self.asking
        self.total = 0.0
        return self.full

    def decide(self, step, plan: Plan, value: float) -> Plan:
        self.total += self.estimate(value, step)
        if self.total < self.threshold:
            return self.skip
        self.total = 0.0
        return plan

    def estimate(self, x: float, step) -> float:
        """How far the output moves where the signal moves by x; infinitely where there was none before."""
        low, high = self.range
        if x == INFINITE or self.outside == "clamp":
            return x if x == INFINITE else max(polynomial(self.terms, min(max(x, low), high)), 0.0)
        y = polynomial(self.terms, x)
        if (y < 0 or not low <= x <= high) and not self.has_warned:
            text = (
                f"teacache: at step {step.i + 1} the signal moves by {x:.4g}, the polynomial gives {y:.4g}; "
                f"it is not made for that ({self.constants}): use outside=clamp, or fit another"
            )
            if self.outside == "refuse":
                raise ValueError(text)
            warnings.warn(text, stacklevel=2)
            self.has_warned = True
        return y

    def tell(self, step, values: Values) -> None:
        pass
