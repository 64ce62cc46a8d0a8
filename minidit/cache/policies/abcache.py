"""AB-Cache: Training-Free Acceleration via Adams-Bashforth Cached Feature Reuse (Yu et al., 2025).

Where the transformer does not run, the guided prediction is extrapolated from the last k that were computed:
2 O_1 - O_2 for k = 2, sum over j of (-1)^(j+1) C(k, j) O_j in general, of which an error of O(h^k) remains.

Where the paper leaves a gap: extrapolated predictions are not extrapolated from in turn (on the embedded
model that diverges), so the steps between two full ones share one prediction; while fewer than k predictions
are known, the order is lower.
"""

from math import comb

from minidit.cache.plan import GUIDED, PREDICTION, Load, Mix, Need, Plan, RunInfo, Values


def weights(order: int) -> tuple[float, ...]:
    """Of the last `order` predictions, newest first, in the one that would come next."""
    return tuple(float((-1) ** (j + 1) * comb(order, j)) for j in range(1, order + 1))


class ABCache:
    """AB-Cache (Yu et al., 2025, arXiv 2504.10540): whole steps extrapolated from the last predictions.

    Published for FLUX.1: two full steps, then every sixth. Its settings for HunyuanVideo are unknown.

    order: k · warmup: full steps at the beginning · interval: steps from one full step to the next
    """

    needs_values = False
    knob = ("interval", 2, 8)  # what compare tunes, and its bounds

    def __init__(self, order: int = 2, warmup: int = 2, interval: int = 6):
        if order < 1 or warmup < 1 or interval < 2:
            raise ValueError(
                f"abcache: order={order}, warmup={warmup}, interval={interval}; wanted 1, 1 and 2, or more"
            )
        self.order, self.warmup, self.interval = order, warmup, interval

    def is_full(self, i: int) -> bool:
        return i < self.warmup or (i - self.warmup + 1) % self.interval == 0

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        n = len(run.steps)
        fulls = [self.is_full(i) for i in range(n)]
        if all(fulls):
            raise ValueError(
                f"abcache: warmup={self.warmup} leaves none of {n} steps; lower it, or take more"
            )
        varies = run.guidance_varies  # then each branch is extrapolated, and guided by the step's own scale
        site = PREDICTION if varies else GUIDED
        plans = []
        for i, is_full in enumerate(fulls):
            mix = Mix(weights(min(self.order, sum(fulls[: i + 1]))))
            if is_full:
                plans.append(Plan(keep=(site,)))
            elif varies:
                plans.append(Plan(path=(Load(site, mix),), label="step"))
            else:
                plans.append(Plan(output=mix, label="step"))
        self.plans = tuple(plans)
        self.constants = "defaults" if (self.order, self.warmup, self.interval) == (2, 2, 6) else "typed"
        return (Need(site, self.order),)

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def tell(self, step, values: Values) -> None:
        pass
