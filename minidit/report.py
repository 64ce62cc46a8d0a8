"""Pictures: of runs, profiles and comparisons by matplotlib (extra `report`); of frames, by numpy alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minidit.cache.plan import Mix, Share, runs
from minidit.cache.trace import from_json
from minidit.video import whole_file

COLOURS = {"run": "#3b6ea5", "reuse": "#d9e2ec", "part": "#8fb7dd", "skip": "#ffffff"}
FONT = {  # 3 x 5 pixels, an octal digit per row
    **dict(zip("ABCDEFGHIJKLM", (
        "25755", "65656", "34443", "65556", "74647", "74644", "34553", "55755", "72227", "11152", "55655",
        "44447", "57755"), strict=True)),
    **dict(zip("NOPQRSTUVWXYZ", (
        "65555", "75557", "65644", "25563", "65655", "34216", "72222", "55557", "55552", "55775", "55255",
        "55222", "71247"), strict=True)),
    **dict(zip("0123456789", (
        "25552", "26227", "61247", "61216", "55711", "74616", "74757", "71222", "75757", "75716"),
        strict=True)),
    **dict(zip(".,:=+-/_()", (
        "00002", "00024", "02020", "07070", "02720", "00700", "11244", "00007", "12221", "42224"),
        strict=True)),
}  # fmt: skip
BAR, GAP = 18, 4  # pixels: the height of a label, the space between pictures


def import_pyplot() -> Any:
    """matplotlib without a display; a clear message where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib; install it with pip install 'minidit[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    with whole_file(Path(path)) as partial:
        figure.savefig(partial, dpi=110, bbox_inches="tight")
    import_pyplot().close(figure)


def draw_timeline(path: Path, trace: dict) -> None:
    """A run as a picture: a column per step, a row per block and branch; what ran, what was reused.

    Above it the step's mode (full, step, cfg, block i) and its share of a full step's multiply-adds.
    """
    pyplot = import_pyplot()
    from matplotlib.patches import Patch, Rectangle

    steps = trace["steps"]
    plans = [from_json(step["plan"]) for step in steps]
    guided = (trace["settings"].get("true_cfg") or trace["settings"]["guidance_scale"]) != 1
    branches = ("cond", "uncond") if guided else ("cond",)
    depth, subs = trace["depth"], trace["subs"]
    height = max(2.4, 0.1 * depth * len(branches) + 1.2)
    figure, (bars, grid) = pyplot.subplots(
        2, 1, figsize=(max(7, 0.22 * len(steps)), height + 1.2), sharex=True, height_ratios=(1.2, height)
    )
    full = trace["total"]["macs_full"] / len(steps)
    bars.bar(range(len(steps)), [step["macs"] / full for step in steps], width=0.9, color=COLOURS["run"])
    bars.set(ylabel="of a full step", ylim=(0, 1.05))
    for i, plan in enumerate(plans):
        bars.text(i, 1.1, plan.label, rotation=90, ha="center", va="bottom", fontsize=6)
        for row, branch in enumerate(branches):
            ran = runs(plan, depth) if branch in (plan.branches or branches) else set()
            for block in range(depth):
                for n, name in enumerate(subs):
                    kind = state_of(plan, block, name, ran, branch)
                    y = row * (depth + 1) + block + n / len(subs)
                    grid.add_patch(Rectangle((i - 0.45, y), 0.9, 1 / len(subs), color=COLOURS[kind], lw=0))
    grid.set(xlim=(-0.6, len(steps) - 0.4), ylim=(len(branches) * (depth + 1) - 1, 0), xlabel="step")
    grid.set_yticks([row * (depth + 1) + depth / 2 for row in range(len(branches))], branches)
    names = {"run": "ran", "part": "ran in part", "reuse": "reused inside the block", "skip": "block skipped"}
    handles = [
        Patch(facecolor=COLOURS[kind], edgecolor="#999999", label=text) for kind, text in names.items()
    ]
    grid.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, fontsize=7, frameon=False
    )
    figure.suptitle(f"{trace['settings']['cache']}: {trace['settings']['prompt'][:60]}", fontsize=9, y=1.06)
    save(figure, path)


def state_of(plan: Any, block: int, name: str, ran: set[int], branch: str) -> str:
    """run, part (sliced, windowed, some tokens, a frozen map), reuse (of a step or a branch) or skip."""
    if block not in ran:
        return "skip"
    how = dict(plan.subs).get((block, name))
    if isinstance(how, Share):
        if branch != how.branch:
            return "reuse"
        how = how.how
    return "run" if how is None else "reuse" if isinstance(how, Mix) else "part"


def draw_curves(path: Path, data: dict, title: str) -> None:
    """Redundancy and impact by step, as in MixCache's figures 2, 5 and 6. data: of a mixcache profile"""
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8))
    blocks = [int(i) for i in data["impact"]["block"]]
    shade = lambda i: pyplot.cm.viridis(i / max(1, max(blocks)))
    steps = range(len(data["curves"]["step"]))
    for name, curve in data["curves"].items():
        style = {"color": "#c0392b", "lw": 2} if name == "step" else {"color": "#e08e0b", "lw": 2}
        if name.startswith("block"):
            style = {"color": shade(int(name.split()[1])), "lw": 1}
        left.plot(steps, [float("nan") if v is None else v for v in curve], label=name, **style)
    left.axhline(data["theta"]["published"], color="#888888", ls=":", lw=1)
    left.axhline(data["theta"]["suggested"], color="#c0392b", ls=":", lw=1)
    left.set(xlabel="step", ylabel="relative L1 from the step before", title="Redundancy (dotted: theta)")
    for i in blocks:
        right.plot(steps, data["impact"]["block"][str(i)], color=shade(i), lw=1, label=f"block {i}")
    for name, colour in (("step", "#c0392b"), ("cfg", "#e08e0b")):
        if name in data["impact"]:
            right.axhline(data["impact"][name], color=colour, lw=2, label=name)
    right.set(xlabel="step", ylabel="relative L1 of the guided prediction", title="Impact of reuse")
    left.legend(fontsize=6, ncols=2, frameon=False)
    right.legend(fontsize=6, ncols=2, frameon=False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def draw_pareto(path: Path, points: Sequence[dict], rivals: Sequence[dict]) -> None:
    """PSNR over multiply-adds and over seconds: the median video, and a line down to the worst.

    points, rivals: {name, number, steps, macs, seconds, median, worst}; macs are a share of the uncached
    run's, and rivals fewer steps.
    """
    pyplot = import_pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    families = list(dict.fromkeys(point["name"].partition(":")[0] for point in points))
    for axes, x, label in zip(
        panels,
        ("macs", "seconds"),
        ("multiply-adds, as a share of the uncached run's", "seconds"),
        strict=True,
    ):
        ordered = sorted(rivals, key=lambda point: point["macs"])
        line = [[point[key] for point in ordered] for key in (x, "median")]
        axes.plot(*line, color="#777777", marker="s", ms=4, lw=1, ls="--", label="fewer steps, no caching")
        named = -1.0
        for rival in ordered:
            if rival["macs"] - named > 0.05:  # names side by side, not on top of each other
                named, at = rival["macs"], (rival[x], rival["median"])
                axes.annotate(f"{rival['steps']} steps", at, (4, -10), textcoords="offset points", fontsize=7)
        for point in points:
            n = point["number"]
            colour = pyplot.cm.tab10(families.index(point["name"].partition(":")[0]) % 10)
            axes.plot([point[x]] * 2, [point["median"], point["worst"]], color=colour, lw=1, alpha=0.5)
            axes.plot([point[x]], [point["median"]], "o", color=colour, label=f"{n}  {point['name']}")
            axes.annotate(str(n), (point[x], point["median"]), (5, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel=label, xlim=(0, axes.get_xlim()[1] * 1.05))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("PSNR in dB against the uncached run")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=8, frameon=False
    )
    figure.suptitle("Better is up and to the left (dot: median video, line: down to the worst)", fontsize=10)
    save(figure, path)


def label_bar(text: str, width: int) -> np.ndarray:
    """A dark bar with text on it, as much as fits. -> (BAR, width, 3) uint8"""
    bar = np.full((BAR, width, 3), 40, np.uint8)
    for i, letter in enumerate(text.upper()[: (width - 4) // 8]):
        rows = [f"{int(digit):03b}" for digit in FONT.get(letter, "00000")]
        glyph = np.array([[pixel == "1" for pixel in row] for row in rows]).repeat(2, 0).repeat(2, 1)
        bar[4:14, 4 + 8 * i : 10 + 8 * i][glyph] = 235
    return bar


def fit(frames: np.ndarray, width: int) -> np.ndarray:
    """Frames enlarged or reduced by a whole factor, to about a width. (T, H, W, 3) -> (T, h, w, 3)"""
    T, H, W, _ = frames.shape
    if W <= width:
        return frames.repeat(width // W, 1).repeat(width // W, 2)
    k = round(W / width)
    h, w = H // k // 2 * 2, W // k // 2 * 2  # even, as mp4 wants it
    cells = frames[:, : h * k, : w * k].reshape(T, h, k, w, k, 3)
    return cells.mean((2, 4)).round().astype(np.uint8)


def side_by_side(videos: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Labelled videos in one. videos: (label, frames (T, H, W, 3) of one size) -> (T, BAR + H, w, 3)"""
    parts = []
    for label, frames in videos:
        T, H, W, _ = frames.shape
        bar = np.broadcast_to(label_bar(label, W), (T, BAR, W, 3))
        parts += [np.full((T, BAR + H, GAP, 3), 255, np.uint8), np.concatenate([bar, frames], 1)]
    return np.concatenate(parts[1:], 2)


def contact_sheet(
    videos: Sequence[tuple[str, np.ndarray]], *, columns: int = 6, width: int = 128
) -> np.ndarray:
    """A row of frames per video under its label. videos: (label, frames (T, H, W, 3)) -> (1, h, w, 3)"""
    rows = []
    for label, frames in videos:
        at = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
        strip = np.concatenate(list(fit(frames[at], width)), 1)
        rows += [label_bar(label, strip.shape[1]), strip, np.full((GAP, strip.shape[1], 3), 255, np.uint8)]
    return np.concatenate(rows[:-1])[None]
