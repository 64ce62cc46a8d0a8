"""UniCP: a static map of the attention outputs that are reused, and sliced attention where they are not.

UniCP (Sun et al., 2025): the error-aware dynamic cache window (EDCW) finds, per block and sub-module, how
long an output stays good; PCA-based slicing (PCAS) narrows queries and keys at the steps that have to run;
the dynamic weight shift (DWS) chooses the width of each block, and full, narrow and reused take turns as the
map says.

Where the paper leaves a gap: errors are relative L2 of outputs before their gate, measured on uncached runs;
one map serves both guidance branches; within a window every step has to stay below the threshold ("strict"),
not the last one alone ("literal"). The map and the widths are found here, on the host, from the numbers of a
profile, so that one profile serves every threshold. Calibration is in cache/calibrate.py.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, takewhile

from minidit.cache.plan import (
    REUSE,
    RUN_ALL,
    Freeze,
    Mix,
    Need,
    Plan,
    RunInfo,
    Site,
    Slice,
    Sub,
    Values,
    attention_map,
    runs,
    sub,
)

THRESHOLDS = {
    "E1": 0.025,
    "E2": 0.05,
    "E3": 0.075,
    "E4": 0.125,
    "E5": 0.175,
}  # relative L2; E3 misprinted 0.75
ATTENTIONS = ("attn", "cross", "t_attn", "t_cross")
WINDOWS = ("strict", "literal")
BASES = ("two-sided", "pca")
MOST_WIDTHS = 2  # per run: every width is one more shape to compile


def threshold_value(threshold: float | str) -> float:
    """A threshold by its name in the paper, or as a number."""
    value = THRESHOLDS.get(threshold, threshold) if isinstance(threshold, str) else threshold
    if isinstance(value, str) or not value > 0:
        raise ValueError(
            f"unicp: threshold={threshold} is neither above 0 nor one of {', '.join(THRESHOLDS)}"
        )
    return float(value)


def search_windows(
    errors: Sequence[Sequence[float]], threshold: float, window: str = "strict"
) -> tuple[int, ...]:
    """EDCW: the step whose output each step uses, its own where it has to run.

    errors[i][k - 1]: distance between the outputs of steps i and i + k. Greedy: step i runs and serves as
    many steps as its errors allow, and the search goes on behind them.
    """
    sources: list[int] = []
    while (i := len(sources)) < len(errors):
        sources += [i] * (1 + window_length(errors[i][: len(errors) - 1 - i], threshold, window))
    return tuple(sources)


def window_length(errors: Sequence[float], threshold: float, window: str) -> int:
    """How many steps an output serves. errors: its distances from those of the steps that follow"""
    below = [error < threshold for error in errors]
    if window == "strict":
        return len(list(takewhile(bool, below)))
    return max((k for k, good in enumerate(below, 1) if good), default=0)


def search_both(
    errors: Sequence[Sequence[float]],
    map_errors: Sequence[Sequence[float]],
    threshold: float,
    window: str = "strict",
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """As search_windows, and where a step's output serves none after it, its attention map may.

    -> the step that each step takes from, and whether it takes the map
    """
    sources: list[int] = []
    by_map: list[bool] = []
    while (i := len(sources)) < len(errors):
        reach = len(errors) - 1 - i
        length = window_length(errors[i][:reach], threshold, window)
        is_map = length == 0
        length = length or window_length(map_errors[i][:reach], threshold, window)
        sources += [i] * (1 + length)
        by_map += [False] + [is_map] * length
    return tuple(sources), tuple(by_map)


def narrowest(losses: Sequence[float], widths: Sequence[int], full: int, threshold: float) -> int:
    """The width that attention at one step can be sliced to, `full` where it cannot be.

    losses: relative L2 that each width costs. widths fall, and the first that costs too much ends the search.
    """
    good = [
        width for width, _ in takewhile(lambda pair: pair[1] < threshold, zip(widths, losses, strict=True))
    ]
    return good[-1] if good else full


def block_width(losses: Sequence[Sequence[float]], widths: Sequence[int], full: int, threshold: float) -> int:
    """DWS: one width for all steps of a block that run, the one that removes least. losses: [step][width]"""
    return max((narrowest(row, widths, full, threshold) for row in losses), default=full)


def at_most(wanted: Sequence[int], full: int, count: int = MOST_WIDTHS) -> tuple[int, ...]:
    """The blocks' widths, at most `count` different ones below full; the others give way to wider ones."""
    sliced = sorted({width for width in wanted if width < full})
    rounded = [
        tuple(min(width for width in (*kept, full) if width >= w) for w in wanted)
        for kept in combinations(sliced, min(count, len(sliced)))
    ]
    return min(rounded, key=sum)


def saves(width: int, full: int, tokens: int) -> bool:
    """Whether narrower scores save more multiply-adds (per token and head) than turning q and k costs."""
    return tokens * (full - width) > 2 * full * width


def nearest_width(widths: Sequence[int], full: int, ratio: float) -> int:
    """The width that removes the share of the directions that is nearest to `ratio`."""
    return min(widths, key=lambda width: abs(full - width - ratio * full))


class UniCP:
    """UniCP (Sun et al., 2025, arXiv 2502.04393): attention reused along a map, and narrowed where it runs.

    threshold: E1 .. E5 or a number · window: strict or literal · slice, reuse: the two halves of the method
    ratio: slices every block by this share (0.1 .. 0.4), whatever it costs; without it the threshold decides,
    and only where it saves multiply-adds: few tokens are not worth the rotation of queries and keys
    ramp: threshold * (block + 1) / depth · max_window: longest window, None for all that was calibrated
    basis: of the slices, two-sided or pca · kinds: sub-modules with windows (all attentions)
    maps: where an output serves no later step, its attention map may, of attention over time; values and all
    that follows are computed · freeze: of attention within frames too, whose queries and keys are kept
    slice_kinds: what is sliced; beside attn, where a slice folds into the projections: cross and the like
    map_gib: most that maps may take; those that serve fewest steps give way, with a warning
    """

    knob = ("threshold", 0.02, 1.0)  # what compare tunes, and its bounds

    def __init__(
        self,
        threshold: float | str = "E2",
        window: str = "strict",
        slice: bool = True,
        reuse: bool = True,
        ratio: float | None = None,
        ramp: bool = False,
        max_window: int | None = None,
        basis: str = "two-sided",
        kinds: tuple[str, ...] | None = None,
        maps: bool = False,
        freeze: bool = False,
        map_gib: float | None = None,
        slice_kinds: tuple[str, ...] = ("attn",),
        profile: dict | None = None,
    ):
        for name, value, known in (("window", window, WINDOWS), ("basis", basis, BASES)):
            if value not in known:
                raise ValueError(f"unicp: unknown {name} {value!r}; choose one of {', '.join(known)}")
        if not (slice or reuse or maps):
            raise ValueError("unicp: slice=off and reuse=off leave nothing to do; use --cache none")
        if ratio is not None and not (slice and 0 < ratio < 1):
            raise ValueError(f"unicp: ratio={ratio} wants a share between 0 and 1, and slice=on")
        if max_window is not None and max_window < 1:
            raise ValueError(f"unicp: max_window={max_window} is not above 0; use reuse=off for no windows")
        self.threshold, self.window, self.ramp = threshold_value(threshold), window, ramp
        self.slice, self.reuse, self.ratio, self.basis = slice, reuse, ratio, basis
        if (freeze or map_gib is not None) and not maps:
            raise ValueError("unicp: freeze and map_gib say which attention maps are kept; add maps=on")
        self.max_window, self.given_kinds, self.maps, self.profile = max_window, kinds, maps, profile
        self.freeze, self.map_gib, self.slice_kinds = freeze, map_gib, slice_kinds

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        known = self.profile["errors"] if self.profile else ATTENTIONS
        own = tuple(kind for kind in ATTENTIONS if kind in run.subs and kind in known)
        self.kinds = self.given_kinds or own
        self.map_kinds = ("t_attn", "attn")[: 1 + self.freeze] if self.maps else ()
        self.check(run)
        self.depth, self.branches = run.depth, run.branches
        self.by_map: dict[Sub, tuple[bool, ...]] = {}
        self.sources = self.find_sources(len(run.steps))
        self.fit_maps(dict(run.map_bytes))
        self.slices = self.find_slices() if self.slice else {}
        self.widths = {block: width for (block, name), width in self.slices.items() if name == "attn"}
        self.kept: dict[tuple[Site, str], int] = {}  # (what is stored, branch) -> its step
        self.pending: dict[tuple[Site, str], int] = {}  # what this step will have stored
        served = [(key, i) for key, sources in self.sources.items() for i, s in enumerate(sources) if s < i]
        return tuple(Need(site) for site in dict.fromkeys(self.taken_at(key, i) for key, i in served))

    def taken_at(self, key: Sub, i: int) -> Site:
        """What step i takes from its source: the output, or the attention map."""
        return attention_map(*key) if key in self.by_map and self.by_map[key][i] else sub(*key)

    def plan(self, step) -> Plan:
        plan = self.refine(step, RUN_ALL)
        if any(isinstance(how, Mix | Freeze) for _, how in plan.subs):
            return replace(plan, label="reuse")
        return replace(plan, label="slice") if plan.subs else plan

    def refine(self, step, plan: Plan) -> Plan:
        """Another policy's plan with the map applied inside the blocks that it runs.

        An output is reused only where every branch that reads it has one of its source step or later: an
        outer policy may have skipped the source. Then the sub-module runs in full and serves the rest of the
        window.
        """
        branches, blocks = plan.branches or self.branches, runs(plan, self.depth)
        subs, keep, taken = [], [], dict(plan.subs)
        self.pending = {}
        for key, sources in self.sources.items():
            block, name = key
            if block not in blocks or key in taken:
                continue
            source, site = sources[step.i], self.taken_at(key, step.i)
            if source < step.i and all(self.kept.get((site, b), -1) >= source for b in branches):
                subs.append((key, REUSE if site.kind == "sub" else Freeze()))
                continue
            if source == step.i and key in self.slices:
                subs.append((key, Slice(self.slices[key])))
            if step.i + 1 < len(sources) and sources[step.i + 1] <= step.i:  # the window goes on
                keep.append(self.taken_at(key, step.i + 1))
                self.pending |= {(keep[-1], b): step.i for b in branches}
        return replace(plan, subs=(*plan.subs, *subs), keep=tuple(dict.fromkeys((*plan.keep, *keep))))

    def tell(self, step, values: Values) -> None:
        self.kept |= self.pending
        self.pending = {}

    def check(self, run: RunInfo) -> None:
        """Refuse what this model or this profile cannot do."""
        if self.maps and "t_attn" not in run.subs:
            raise ValueError(
                f"unicp: maps=on keeps attention maps, which only temporal attention is short enough for; "
                f"{run.family or 'this model'} has {', '.join(run.subs)}; use maps=off"
            )
        if self.profile is None:
            raise ValueError("unicp needs a profile; make one with python -m minidit profile --cache unicp")
        p = self.profile
        if odd := [kind for kind in self.kinds if kind not in run.subs]:
            raise ValueError(f"unicp: kinds has {odd[0]!r}; this model's blocks have {', '.join(run.subs)}")
        if odd := [kind for kind in self.kinds if kind not in p["errors"]]:
            raise ValueError(
                f"unicp: the profile knows {', '.join(p['errors'])}, not {odd[0]!r}; make one that does"
            )
        if odd := [kind for kind in self.map_kinds if kind not in p.get("map_errors", {})]:
            raise ValueError(f"unicp: the profile knows no attention maps of {odd[0]}; make it again")
        sliced = ("attn", *p.get("more_losses", {}))
        if self.slice and (odd := [kind for kind in self.slice_kinds if kind not in sliced]):
            raise ValueError(f"unicp: slice_kinds has {odd[0]!r}; this profile has {', '.join(sliced)}")
        if (p["steps"], p["depth"]) != (len(run.steps), run.depth):
            raise ValueError(
                f"unicp: the profile is of {p['steps']} steps and {p['depth']} blocks, this run of "
                f"{len(run.steps)} and {run.depth}; make one for it"
            )
        if self.reuse and self.max_window is not None and self.max_window > p["max_window"]:
            raise ValueError(
                f"unicp: max_window={self.max_window}, but the profile goes up to {p['max_window']}"
            )
        if self.slice and p["basis"] != self.basis:
            raise ValueError(
                f"unicp: the profile's basis is {p['basis']}; say basis={p['basis']} or make another"
            )

    def threshold_of(self, block: int) -> float:
        return self.threshold * ((block + 1) / self.depth if self.ramp else 1)

    def find_sources(self, steps: int) -> dict[Sub, tuple[int, ...]]:
        """The map: the step that every step's output comes from, for all sub-modules it can act on."""
        found: dict[Sub, tuple[int, ...]] = {}
        kinds = dict.fromkeys((*self.kinds, *self.map_kinds, *self.slice_kinds))  # with or without windows
        nothing = [()] * steps
        for key in ((block, kind) for block in range(self.depth) for kind in kinds):
            outputs = self.errors("errors", key) if self.reuse and key[1] in self.kinds else nothing
            maps = self.errors("map_errors", key) if key[1] in self.map_kinds else nothing
            found[key], by_map = search_both(outputs, maps, self.threshold_of(key[0]), self.window)
            if any(by_map):
                self.by_map[key] = by_map
        return found

    def errors(self, table: str, key: Sub) -> list[Sequence[float]]:
        """How a sub-module's output or map drifts, by step."""
        block, kind = key
        return [row[block][: self.max_window] for row in self.profile[table][kind]]

    def fit_maps(self, sizes: dict[str, int]) -> None:
        """Drop the maps that serve fewest steps until the rest fits; sizes: bytes by sub-module, if known."""
        if self.map_gib is None or not sizes:
            return
        left, wanted = self.map_gib * 2**30, len(self.by_map)
        for key in sorted(self.by_map, key=lambda key: -sum(self.by_map[key]) / sizes[key[1]]):
            left -= (size := sizes[key[1]] * len(self.branches))
            if left >= 0:
                continue
            left += size
            by_map = self.by_map.pop(key)
            pairs = enumerate(zip(self.sources[key], by_map, strict=True))
            self.sources[key] = tuple(i if is_map else source for i, (source, is_map) in pairs)
        if len(self.by_map) < wanted:
            warnings.warn(
                f"unicp: {len(self.by_map)} of {wanted} attention maps fit into {self.map_gib} GiB; "
                f"the steps that the others would serve run in full",
                stacklevel=2,
            )

    def find_slices(self) -> dict[Sub, int]:
        """The width of everything that is sliced; queries and keys that are kept stay whole."""
        p = self.profile
        widths, full = p["widths"], p["head_width"]
        whole = {key for key in self.by_map if key[1] == "attn"}
        keys = [(block, kind) for kind in self.slice_kinds for block in range(self.depth)]
        keys = [key for key in keys if key not in whole]
        if self.ratio is not None:
            return dict.fromkeys(keys, nearest_width(widths, full, self.ratio))
        wanted = []
        for block, kind in keys:
            table = p["slice_losses"] if kind == "attn" else p["more_losses"][kind]
            runs_at = [i for i, source in enumerate(self.sources[block, kind]) if i == source]
            losses = [table[i][block] for i in runs_at]
            width = block_width(losses, widths, full, self.threshold_of(block))
            pays = kind != "attn" or p.get("folds") or saves(width, full, p["tokens"])
            wanted.append(width if pays else full)
        chosen = at_most(wanted, full) if wanted else ()
        return {key: width for key, width in zip(keys, chosen, strict=True) if width < full}
