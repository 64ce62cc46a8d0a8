"""DiTFastAttn: Attention Compression for Diffusion Transformer Models (Yuan et al., 2024, arXiv 2406.08552).

A map found beforehand says what every self-attention does at every step, cheapest first:
"reuse" (the authors' AST) takes its last output; "window" (WA-RS) attends within a band of the token order
and adds what full attention gave beyond the band when it last ran; "share" (ASC) computes one guidance branch
and copies it to the other; "window-share" does both; "full". The first step is always full.

The map is found by search_map: step by step and block by block, with all other blocks as chosen so far, the
first of these whose loss of the transformer's output stays below threshold * (block + 1) / depth.

Where it differs: the loss is the caller's; the authors' mean |a - b| / max(a, b), clipped to 0 .. 10, divides
by a signed number, and relative L1 of the guided prediction is what the profile uses. The band is one of
tokens in order, as published, not of neighbours in the video. thu-nics/DiTFastAttn 91bfbae.
"""

from collections.abc import Callable, Sequence

from minidit.cache.plan import (
    REUSE,
    Need,
    Plan,
    RunInfo,
    Share,
    Site,
    Sub,
    SubOp,
    Values,
    Window,
    sub,
    window_rest,
)

WAYS = ("reuse", "window-share", "window", "share", "full")  # cheapest first
Map = list[list[str]]  # [step][block]


def search_map(
    steps: int,
    depth: int,
    threshold: float,
    loss: Callable[[int, list[str]], float],
    finish: Callable[[int, list[str]], None] = lambda step, row: None,
    ways: Sequence[str] = WAYS,
) -> Map:
    """The map of one sub-module, greedily. -> [step][block]

    loss(step, row): of the output of this step under a row of ways by block, blocks not yet decided "full",
    with what earlier steps left stored · finish(step, row): the row is decided; store what later steps need
    ways: that are tried, in this order; without guidance those without "share"
    """
    chosen: Map = []
    for step in range(steps):
        row = ["full"] * depth
        for block in range(depth if step else 0):
            bound = threshold * (block + 1) / depth
            tried = ([*row[:block], way, *row[block + 1 :]] for way in ways if way != "full")
            row = next((r for r in tried if loss(step, r) < bound), row)
        finish(step, row)
        chosen.append(row)
    return chosen


def sub_op(way: str, window: Window, source: str) -> SubOp | None:
    """What a way is in a plan; None runs in full. source: the branch that is computed for both"""
    band = window if "window" in way else None
    if way == "reuse":
        return REUSE
    return Share(source, band) if "share" in way else band


class DiTFastAttn:
    """DiTFastAttn (Yuan et al., 2024, arXiv 2406.08552): self-attention reused, windowed or shared by a map.

    ways: that may be used, of reuse, window-share, window and share; where the map says another, it is full
    profile: {"ditfastattn": {"depth", "window", "of", "map": {"attn": [[way by block] by step], ...}}}, where
    `of` tokens attend to each other in attn, and the window reaches `window` to both sides
    """

    needs_values = False

    def __init__(self, ways: tuple[str, ...] = WAYS, profile: dict | None = None):
        if odd := [way for way in ways if way not in WAYS]:
            raise ValueError(f"ditfastattn: unknown way {odd[0]!r}; choose from {', '.join(WAYS)}")
        self.ways, self.profile = ways, (profile or {}).get("ditfastattn")

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        if self.profile is None:
            raise ValueError(
                "ditfastattn needs a map of this model; make one with python -m minidit profile --cache "
                "ditfastattn"
            )
        self.check(run)
        self.constants, self.steps = "profile", len(run.steps)
        self.window, self.source = Window(self.profile["window"], self.profile["of"]), run.branches[0]
        self.map: dict[Sub, list[str]] = {
            (block, name): [row[block] if row[block] in self.ways else "full" for row in rows]
            for name, rows in self.profile["map"].items()
            for block in range(run.depth)
        }
        self.plans = [self.make_plan(i) for i in range(self.steps)]
        return tuple(Need(site) for site in dict.fromkeys(s for plan in self.plans for s in plan.keep))

    def check(self, run: RunInfo) -> None:
        """Refuse a map of another model or run."""
        rows = self.profile["map"]
        steps, depth = {len(by_step) for by_step in rows.values()}, self.profile["depth"]
        if steps != {len(run.steps)} or depth != run.depth:
            raise ValueError(
                f"ditfastattn: the map is of {', '.join(map(str, steps))} steps and {depth} blocks, this run "
                f"of {len(run.steps)} and {run.depth}; make one for it"
            )
        if odd := [name for name in rows if name not in run.subs]:
            raise ValueError(f"ditfastattn: the map has {odd[0]!r}; this model has {', '.join(run.subs)}")
        known = {way for by_step in rows.values() for row in by_step for way in row}
        if odd := known - set(WAYS):
            raise ValueError(f"ditfastattn: the map has {odd.pop()!r}, which is none of {', '.join(WAYS)}")
        has_both = len(run.branches) > 1 and run.cfg_ranks == 1
        if not has_both and any("share" in way for way in known & set(self.ways)):
            raise ValueError(
                "ditfastattn: the map shares attention between branches, and no rank of this run has "
                "two; make a map for it, or leave them out with ways=reuse/window/full"
            )

    def make_plan(self, i: int) -> Plan:
        """Step i: what its ways are, and what the steps after it will read."""
        subs = [(key, sub_op(ways[i], self.window, self.source)) for key, ways in self.map.items()]
        subs = tuple((key, how) for key, how in subs if how is not None)
        keep = [site for key, ways in self.map.items() for site in self.kept(key, ways, i)]
        return Plan(subs=subs, keep=tuple(keep), label="attention" if subs else "full")

    def kept(self, key: Sub, ways: list[str], i: int) -> list[Site]:
        """What step i stores of a sub-module: its output if the next step takes it; what is beyond a window
        if one comes before it runs in full again."""
        later = ways[i + 1 :]
        until = next((n for n, way in enumerate(later) if way in ("full", "share")), len(later))
        sites = [sub(*key)] if later[:1] == ["reuse"] and ways[i] != "reuse" else []
        if ways[i] in ("full", "share") and any("window" in way for way in later[:until]):
            sites.append(window_rest(*key, self.window))
        return sites

    def plan(self, step) -> Plan:
        return self.plans[step.i]

    def tell(self, step, values: Values) -> None:
        pass
