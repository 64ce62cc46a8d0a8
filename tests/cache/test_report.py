"""Pictures of runs: what every rectangle stands for, and that nothing half-drawn is left."""

from collections import Counter

import numpy as np
import pytest

from minidit import report
from minidit.cache.plan import (
    REUSE,
    RUN_ALL,
    Add,
    Freeze,
    Load,
    Mix,
    Plan,
    Run,
    Share,
    Slice,
    Tokens,
    Window,
    h,
    residual,
)
from minidit.cache.trace import to_json

DEPTH, SUBS = 4, ["attn", "cross", "mlp"]
PLANS = {
    "full": RUN_ALL,
    "cfg": Plan(branches=("cond",), fill=REUSE, label="cfg"),
    "block 1": Plan(path=(Load(h(2)), Run(2)), branches=("cond",), fill=REUSE, label="block 1"),
    "step": Plan(output=REUSE, label="step"),
    "middle": Plan(path=(Run(0, 1), Add(residual(1, 3)), Run(3)), label="middle"),
    "parts": Plan(
        subs=(
            ((0, "attn"), Window(2, 8)),
            ((1, "attn"), Freeze()),
            ((2, "mlp"), Tokens(4, 8)),
            ((3, "attn"), Share("cond")),
        )
    ),
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
        ("subs", {"run": 2 * (ROW - 3), "reuse": 4, "part": 2}),
        ("parts", {"run": 2 * (ROW - 4) + 1, "part": 6, "reuse": 1}),
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
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([0.1 * i for i in range(7)])
    assert [text.get_text() for text in bars.texts] == [
        "full",
        "cfg",
        "block 1",
        "step",
        "middle",
        "full",
        "full",
    ]
    assert len(grid.patches) == 7 * 2 * ROW


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


def test_costs_are_drawn_with_the_median_the_worst_and_fewer_steps(drawn):
    points = [
        {
            "name": "fora",
            "number": 1,
            "steps": 30,
            "macs": 0.5,
            "seconds": 2.0,
            "median": 40.0,
            "worst": 30.0,
        },
        {
            "name": "fora:interval=4",
            "number": 2,
            "steps": 30,
            "macs": 0.3,
            "seconds": 1.0,
            "median": 33.0,
            "worst": 9.0,
        },
    ]
    rivals = [dict(points[0], steps=15, median=38.0), dict(points[1], steps=9, median=35.0)]
    report.draw_pareto("a.png", points, rivals)
    for axes, x in zip(drawn[0].axes, ("macs", "seconds"), strict=True):
        rival, *lines = axes.lines
        assert list(rival.get_xdata()) == [points[1][x], points[0][x]] and list(rival.get_ydata()) == [
            35.0,
            38.0,
        ]
        falls, dots = lines[::2], lines[1::2]
        assert [list(line.get_ydata()) for line in falls] == [[40.0, 30.0], [33.0, 9.0]]
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in dots] == [
            (p[x], p["median"]) for p in points
        ]
        assert dots[0].get_color() == dots[1].get_color()  # one method
        assert {"1", "2", "15 steps", "9 steps"} == {text.get_text() for text in axes.texts}


def test_a_label_is_readable_and_never_wider_than_its_video():
    bar = report.label_bar("i=1", 40)
    assert bar.shape == (report.BAR, 40, 3)
    letters = (bar[4:14:2, 4:34:2, 0] == 235).astype(int)  # back to 3 x 5 pixels, a column between letters
    picture = ["".join(".#"[pixel] for pixel in row) for row in letters[:, :11]]
    assert picture == ["###......#.", ".#..###.##.", ".#.......#.", ".#..###..#.", "###.....###"]
    long = report.label_bar("mixcache" * 20, 64)
    assert long.shape == (report.BAR, 64, 3) and (long[:, -4:] == 40).all()


def test_pictures_are_fitted_by_whole_factors():
    frames = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    large = report.fit(frames, 20)
    assert large.shape == (2, 12, 18, 3)
    assert np.array_equal(large[:, ::3, ::3], frames) and np.array_equal(large[:, 2::3, 2::3], frames)
    small = report.fit(large, 6)
    assert np.array_equal(small, frames)  # the mean of equal pixels
    assert np.array_equal(report.fit(frames, 6), frames)
    assert report.fit(np.zeros((1, 480, 832, 3), np.uint8), 192).shape == (1, 120, 208, 3)


def test_videos_side_by_side_keep_their_pixels():
    a, b = (np.full((3, 8, 16, 3), level, np.uint8) for level in (10, 200))
    both = report.side_by_side([("a", a), ("b", b)])
    assert both.shape == (3, report.BAR + 8, 16 + report.GAP + 16, 3)
    assert np.array_equal(both[:, report.BAR :, :16], a) and np.array_equal(both[:, report.BAR :, -16:], b)
    assert (both[:, :, 16:-16] == 255).all()


def test_a_contact_sheet_shows_the_first_and_the_last_frame_of_every_video():
    frames = np.stack([np.full((8, 16, 3), 10 * t, np.uint8) for t in range(9)])
    sheet = report.contact_sheet([("a", frames), ("b", frames)], columns=3, width=16)[0]
    assert sheet.shape == (2 * (report.BAR + 8) + report.GAP, 3 * 16, 3)
    for row in (sheet[report.BAR : report.BAR + 8], sheet[-8:]):
        assert [int(row[0, 16 * i, 0]) for i in range(3)] == [0, 40, 80]
