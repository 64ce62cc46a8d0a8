"""Pictures of runs: what every rectangle stands for, and that nothing half-drawn is left."""

from collections import Counter

import pytest

from minidit import report
from minidit.cache.plan import REUSE, RUN_ALL, Add, Load, Mix, Plan, Run, Slice, h, residual
from minidit.cache.trace import to_json

DEPTH, SUBS = 4, ["attn", "cross", "mlp"]
PLANS = {
    "full": RUN_ALL,
    "cfg": Plan(branches=("cond",), fill=REUSE, label="cfg"),
    "block 1": Plan(path=(Load(h(2)), Run(2)), branches=("cond",), fill=REUSE, label="block 1"),
    "step": Plan(output=REUSE, label="step"),
    "middle": Plan(path=(Run(0, 1), Add(residual(1, 3)), Run(3)), label="middle"),
    "subs": Plan(subs=(((0, "attn"), Slice(16)), ((1, "attn"), Mix((2, -1))), ((1, "mlp"), REUSE))),
}
ROW = DEPTH * len(SUBS)


def trace_of(names, **settings) -> dict:
    steps = [{"plan": to_json(PLANS[name]), "macs": 10 * i} for i, name in enumerate(names)]
    settings = {"cache": "mixcache", "prompt": "a red circle", "guidance_scale": 4.0} | settings
    total = {"macs_full": 100 * len(steps)}
    return {"settings": settings, "depth": DEPTH, "subs": SUBS, "steps": steps, "total": total}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    yield figures
    for figure in figures:
        report.import_pyplot().close(figure)


def kinds(axes) -> Counter:
    from matplotlib.colors import to_hex

    names = {colour: kind for kind, colour in report.COLOURS.items()}
    return Counter(names[to_hex(patch.get_facecolor())] for patch in axes.patches)


@pytest.mark.parametrize(
    "name, counts",
    [
        ("full", {"run": 2 * ROW}),
        ("cfg", {"run": ROW, "skip": ROW}),
        ("block 1", {"run": ROW // 2, "skip": ROW // 2 + ROW}),
        ("step", {"skip": 2 * ROW}),
        ("middle", {"run": ROW, "skip": ROW}),
        ("subs", {"run": 2 * (ROW - 3), "reuse": 4, "slice": 2}),
    ],
)
def test_a_step_is_drawn_by_block_sub_module_and_branch(drawn, name, counts):
    report.draw_timeline("a.png", trace_of([name]))
    _, grid = drawn[0].axes
    assert kinds(grid) == counts
    assert [text.get_text() for text in grid.get_yticklabels()] == ["cond", "uncond"]


def test_bars_are_shares_of_a_full_step_under_their_labels(drawn):
    report.draw_timeline("a.png", trace_of(PLANS))
    bars, grid = drawn[0].axes
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([0.1 * i for i in range(6)])
    assert [text.get_text() for text in bars.texts] == ["full", "cfg", "block 1", "step", "middle", "full"]
    assert len(grid.patches) == 6 * 2 * ROW


def test_a_run_without_guidance_has_one_row_of_blocks(drawn):
    report.draw_timeline("a.png", trace_of(["full"], guidance_scale=1.0))
    report.draw_timeline("a.png", trace_of(["full"], guidance_scale=6.0, true_cfg=1.0))
    report.draw_timeline("a.png", trace_of(["full"], guidance_scale=1.0, true_cfg=6.0))
    assert [sum(kinds(figure.axes[1]).values()) for figure in drawn] == [ROW, ROW, 2 * ROW]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw_timeline(tmp_path / "a.png", trace_of(PLANS))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError):
        report.draw_timeline(tmp_path / "a.xyz", trace_of(PLANS))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_curves_show_every_level_and_block(drawn):
    curves = {
        "step": [None, 0.2, 0.1],
        "cfg": [None, 0.3, 0.2],
        "block 0": [None, 0.1, 0.1],
        "block 1": [None, 0.1, 0.2],
    }
    impact = {"step": 0.1, "cfg": 0.4, "block": {"0": [0.1, 0.2, 0.3], "1": [0.2, 0.2, 0.4]}}
    data = {"curves": curves, "impact": impact, "theta": {"published": 0.1, "suggested": 0.15}}
    report.draw_curves("a.png", data, "a title")
    left, right = drawn[0].axes
    named = lambda axes: {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert named(left)["block 1"][1:] == [0.1, 0.2] and named(left)["step"][1:] == [0.2, 0.1]
    assert named(right)["block 1"] == [0.2, 0.2, 0.4] and set(named(right)["cfg"]) == {0.4}
    assert drawn[0].get_suptitle() == "a title"
