"""From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers (Liu et al., 2025).

Every N-th step runs in full. In between, what each sub-module gives is continued as a Taylor polynomial, with
divided differences of the last full steps for derivatives. The polynomial is a weighted sum of the last m + 1
outputs whose weights the host knows, so a ring of plain outputs is all that is stored.

That takes (m + 1) outputs of every sub-module of every block: 150 GiB for Wan 14B at 832x480x81, which the
store refuses where it does not fit. The lite form (diffusers, cache-dit) continues one tensor alone, what all
blocks together add.
"""

from collections.abc import Sequence
from math import factorial

from minidit.cache.plan import Add, Mix, Need, Plan, RunInfo, Values, residual, sub


def weights(anchors: Sequence[int], at: int) -> tuple[float, ...]:
    """The weights of the outputs of steps `anchors`, newest first, in the forecast for step `at`.

    D_0 is the output, D_j+1 = (D_j - D_j of the anchor before) / (steps between the two), and the forecast is
    the sum of D_j x^j / j! with x = at - anchors[0].
    """
    count = len(anchors)
    terms = [[float(k == j) for j in range(count)] for k in range(count)]  # D_0 of every anchor
    total = [0.0] * count
    for order in range(count):
        factor = (at - anchors[0]) ** order / factorial(order)
        total = [sum_ + factor * d for sum_, d in zip(total, terms[0], strict=True)]
        gaps = [anchors[k] - anchors[k + 1] for k in range(len(terms) - 1)]
        terms = [
            [(new - old) / gap for new, old in zip(terms[k], terms[k + 1], strict=True)]
            for k, gap in enumerate(gaps)
        ]
    return tuple(total)


class TaylorSeer:
    """TaylorSeer (Liu et al., 2025, arXiv 2503.06923): sub-modules forecast by polynomials.

    Published for HunyuanVideo and Wan: N = 5, m = 1, one full step to begin with. Variant lite forecasts the
    residual of all blocks together; diffusers has its port's order of steps: 0, 1, 2, 4, 9, 14, ...

    interval: N, steps from one full step to the next · order: m, the degree of the polynomial
    warmup: full steps at the beginning · first: the first full step after them (warmup + interval - 1)
    lite: forecast the residual of all blocks, not each sub-module
    """

    variants = {"lite": {"lite": True}, "diffusers": {"lite": True, "warmup": 3, "first": 4}}
    needs_values = False
    knob = ("interval", 2, 8)  # what compare tunes, and its bounds

    def __init__(
        self,
        interval: int = 5,
        order: int = 1,
        warmup: int = 1,
        first: int | None = None,
        lite: bool = False,
    ):
        self.first = warmup + interval - 1 if first is None else first
        if interval < 2 or order < 0 or not 1 <= warmup <= self.first:
            raise ValueError(
                f"taylorseer: interval={interval}, order={order}, warmup={warmup}, first={first}; wanted "
                f"2, 0 and 1 or more, and a step after the warm-up"
            )
        self.interval, self.order, self.warmup, self.lite = interval, order, warmup, lite

    def is_full(self, i: int) -> bool:
        return i < self.warmup or (i >= self.first and (i - self.first) % self.interval == 0)

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        n = len(run.steps)
        fulls = [i for i in range(n) if self.is_full(i)]
        if len(fulls) == n:
            raise ValueError(
                f"taylorseer: warmup={self.warmup} leaves none of {n} steps; lower it, or take more"
            )
        keys = tuple((block, name) for block in range(run.depth) for name in run.subs)
        sites = (residual(0, run.depth),) if self.lite else tuple(sub(*key) for key in keys)
        plans = []
        for i in range(n):
            anchors = [k for k in reversed(fulls) if k <= i][: self.order + 1]
            mix = Mix(weights(anchors, i))
            if i in fulls:
                plans.append(Plan(keep=sites))
            elif self.lite:
                plans.append(Plan(path=(Add(sites[0], mix),), label="forecast"))
            else:
                plans.append(Plan(subs=tuple((key, mix) for key in keys), label="forecast"))
        self.plans = tuple(plans)
        is_default = (self.interval, self.order, self.warmup) == (5, 1, 1)
        is_published = is_default and run.model.startswith(("wan2.1", "hunyuan"))
        self.constants = (
            f"published for {run.model}" if is_published else "defaults" if is_default else "typed"
        )
        return tuple(Need(site, self.order + 1) for site in sites)

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def tell(self, step, values: Values) -> None:
        pass
