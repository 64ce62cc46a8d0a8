"""Pictures of runs and profiles, by matplotlib (extra `report`)."""

from pathlib import Path
from typing import Any

from minidit.cache.plan import Mix, Slice, runs
from minidit.cache.trace import from_json
from minidit.video import whole_file

COLOURS = {"run": "#3b6ea5", "reuse": "#d9e2ec", "slice": "#8fb7dd", "skip": "#ffffff"}


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
                    kind = state_of(plan, block, name, ran)
                    y = row * (depth + 1) + block + n / len(subs)
                    grid.add_patch(Rectangle((i - 0.45, y), 0.9, 1 / len(subs), color=COLOURS[kind], lw=0))
    grid.set(xlim=(-0.6, len(steps) - 0.4), ylim=(len(branches) * (depth + 1) - 1, 0), xlabel="step")
    grid.set_yticks([row * (depth + 1) + depth / 2 for row in range(len(branches))], branches)
    names = {"run": "ran", "slice": "ran sliced", "reuse": "reused inside the block", "skip": "block skipped"}
    handles = [
        Patch(facecolor=COLOURS[kind], edgecolor="#999999", label=text) for kind, text in names.items()
    ]
    grid.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, fontsize=7, frameon=False
    )
    figure.suptitle(f"{trace['settings']['cache']}: {trace['settings']['prompt'][:60]}", fontsize=9, y=1.06)
    save(figure, path)


def state_of(plan: Any, block: int, name: str, ran: set[int]) -> str:
    if block not in ran:
        return "skip"
    how = dict(plan.subs).get((block, name))
    return "reuse" if isinstance(how, Mix) else "slice" if isinstance(how, Slice) else "run"


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
