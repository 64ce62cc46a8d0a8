"""Planned steps: minidit's own, grown out of MixCache's step level and its impact table.

Two things differ from MixCache (mixcache.py). A step that is not computed forecasts the guided prediction on
from the last two computed ones, where MixCache repeats the last. And which steps are computed is
settled before step 0 (cache/placement.py), from how good forecasts are at every step and how much each step
matters for the final latents, where MixCache decides from step to step by thresholds. Both come from a
profile; nothing is measured at run time.
"""

from minidit.cache.placement import place, weights
from minidit.cache.plan import CFG_DELTA, GUIDED, PREDICTION, Load, Mix, Need, Plan, RunInfo, Values


class Planned:
    """Planned (minidit's own, after MixCache): steps chosen by a profile are computed, the others forecast.

    share: of the steps, to compute
    """

    knob = ("share", 0.2, 0.95)  # what compare tunes, and its bounds
    needs_values = False

    def __init__(self, share: float = 0.5, profile: dict | None = None):
        if not 0 < share <= 1:
            raise ValueError(f"planned: share={share} is not above 0 and at most 1, such as 0.5")
        self.share, self.profile = share, profile

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        steps = len(run.steps)
        if self.profile is None or len(self.profile["impact"]) != steps:
            raise ValueError(
                f"planned needs a profile of this model at {steps} steps; make one with "
                f"python -m minidit profile --cache planned"
            )
        self.constants = "profile"
        self.placed = place(self.profile["errors"], self.profile["impact"], max(2, round(self.share * steps)))
        # where guidance changes from step to step, its parts are forecast and guided by the step's own scale
        self.by_parts = run.guidance_varies
        sites = (PREDICTION, CFG_DELTA) if self.by_parts else (GUIDED,)
        self.full = Plan(keep=sites)
        self.computed: tuple[int, ...] = ()  # the last two, newest first
        return tuple(Need(site, depth=2, branches=("cond",)) for site in sites)

    def plan(self, step) -> Plan:
        if step.i in self.placed:
            self.computed = (step.i, *self.computed[:1])
            return self.full
        forecast = Mix(weights(self.profile["ahead"], self.computed, step.i))
        if self.by_parts:
            return Plan((Load(PREDICTION, forecast),), branches=("cond",), fill=forecast, label="forecast")
        return Plan(output=forecast, label="forecast")

    def tell(self, step, values: Values) -> None:
        pass
