"""AdaCache: Adaptive Caching for Faster Video Generation with DiTs (Kahatapitiya et al., 2024).

After every computed step the output of one attention in the middle of the stack is compared with that of the
last computed step: c = |new - old| / |old| / steps between, in sums of absolute values over all branches. A
codebook turns c into the number of steps until the next computed one; until then a step adds the last
residual of all blocks. The first step and the last two are always computed.

Where it differs: the authors keep the gated outputs of every block, which add up to the one residual kept
here, and compare the gated output of temporal attention in block 13 of 28; here it is the output before its
gate. In models without temporal attention it is self-attention in the middle block (LightX2V's Wan).
Codebooks are of 30 or 100 steps: at n steps c and the number of steps are both multiplied by n / 30 or 100.
Motion regularisation, an option of theirs, is left out. AdaCache-DiT/AdaCache 2c6d3ca, configs/.
"""

from collections.abc import Sequence

from minidit.cache.plan import Add, Measure, Need, Plan, RunInfo, Values, residual, sub

CODEBOOKS = {  # (c below this, steps until the next computed one), and the number of steps they are made for
    "fast": (((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.00, 1)), 30),
    "slow": (((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.40, 1), (1.00, 1)), 30),
    "hundred": (((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.00, 3)), 100),
}
BLOCK = 13 / 28  # of the stack, published for Open-Sora


def rate(c: float, codebook: Sequence[tuple[float, int]]) -> int:
    """Steps until the next computed one; from the last entry's c on, as many as it says."""
    return next((steps for bound, steps in codebook if c < bound), codebook[-1][1])


def pooled(distances: Sequence[float], sizes: Sequence[float]) -> float:
    """One relative L1 of several tensors, from those of each and their mean absolute values."""
    return sum(d * s for d, s in zip(distances, sizes, strict=True)) / (sum(sizes) or float("inf"))


class AdaCache:
    """AdaCache (Kahatapitiya et al., 2024, arXiv 2411.02397): the last change sets the next computed step.

    codebook: fast, slow (published for 30 steps) or hundred (for 100), scaled to the steps of the run
    scale: multiplies c's bounds in the codebook; 1, else the profile's
    block, name: where c is measured; the published place, scaled by depth
    profile: {"adacache": {"scale": ...}}, under which the codebook's mean rate is the published model's
    """

    variants = {
        "fast": {"codebook": "fast"},
        "slow": {"codebook": "slow"},
        "hundred": {"codebook": "hundred"},
    }
    knob = ("scale", 0.01, 100.0)

    def __init__(
        self,
        codebook: str = "fast",
        scale: float | None = None,
        block: int | None = None,
        name: str | None = None,
        profile: dict | None = None,
    ):
        if codebook not in CODEBOOKS or (scale is not None and scale <= 0):
            raise ValueError(
                f"adacache: codebook={codebook}, scale={scale}; wanted one of {', '.join(CODEBOOKS)}, and a "
                f"number above 0"
            )
        self.codebook, self.given, self.block, self.name = codebook, scale, block, name
        self.profile = (profile or {}).get("adacache")

    @staticmethod
    def needs_profile(options: dict) -> bool:
        return "scale" not in options

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        if len(run.steps) < 5:
            raise ValueError(f"adacache: {len(run.steps)} steps leave none to skip; take at least 5")
        name = self.name or ("t_attn" if "t_attn" in run.subs else "attn")
        has_time = "t_attn" in run.subs
        block = int(run.depth * (BLOCK if has_time else 0.5)) if self.block is None else self.block
        if name not in run.subs or not 0 <= block < run.depth:
            raise ValueError(
                f"adacache: name={name}, block={block}; this model's blocks 0 .. {run.depth - 1} have "
                f"{', '.join(run.subs)}"
            )
        scale = self.find_scale(run)
        entries, made_for = CODEBOOKS[self.codebook]
        self.stretch = len(run.steps) / made_for
        self.table = [(bound * scale, max(1, round(steps * self.stretch))) for bound, steps in entries]
        site, rest = sub(block, name), residual(0, run.depth)
        self.distances = [Measure(site, branch=branch) for branch in run.branches]
        self.sizes = [Measure(site, "abs", branch) for branch in run.branches]
        self.full = Plan(keep=(site, rest), measure=(*self.distances, *self.sizes))
        self.skip = Plan(path=(Add(rest),), label="skip")
        self.next, self.computed = 0, -1  # the step to compute next, and the one computed last
        return Need(site), Need(rest)

    def find_scale(self, run: RunInfo) -> float:
        """What the codebook's bounds are multiplied by."""
        if self.given is None and self.profile:
            self.constants = "profile"
            return self.profile["scale"]
        is_published = run.family == "open_sora" and self.given is None
        self.constants = (
            "published for open-sora-1.2" if is_published else "codebook published for open-sora-1.2"
        )
        return self.given or 1.0

    def plan(self, step) -> Plan:
        return self.full if step.i >= self.next or step.i >= step.n - 2 else self.skip

    def tell(self, step, values: Values) -> None:
        if step.i < self.next and step.i < step.n - 2:
            return
        self.next = step.i + 1
        if all(m in values for m in (*self.distances, *self.sizes)):
            moved = pooled([values[m] for m in self.distances], [values[m][1] for m in self.sizes])
            c = moved / (step.i - self.computed) * self.stretch
            self.next = step.i + rate(c, self.table)
        self.computed = step.i
