"""Comparing methods: the numbers, what is kept and found again, what is refused, and the page."""

import json
import re
from dataclasses import replace
from pathlib import Path
from signal import SIGINT

import numpy as np
import pytest

from minidit import compare as comparing
from minidit import metrics, page, report
from minidit.__main__ import main
from minidit.compare import Bench, Made, Row, compare
from minidit.generate import Engine
from minidit.metrics import psnr, ssim
from minidit.settings import Choices
from minidit.stopping import Stopped
from minidit.tune import find_knob, read_match, sweep, with_option
from minidit.video import read_settings, read_video
from tests.test_imports import SOURCES, imports

SIZE = ["--size", "32x32", "--num-frames", "5", "--steps", "6", "--device", "cpu", "--dtype", "fp32"]
SMALL = Choices(width=32, height=32, num_frames=5, steps=6)
PROMPTS = ["a red circle moves up", "a blue star grows"]
POLICIES = '''
from minidit.cache.plan import GUIDED, REUSE, Need, Plan


class Every:
    """Reuse of the guided prediction."""

    knob = ("every", 1, 6)

    def __init__(self, every: int = 2):
        self.every = every

    def reset(self, run):
        self.constants = "typed"
        return (Need(GUIDED),)

    def plan(self, step):
        is_full = step.i % self.every == 0
        return Plan(keep=(GUIDED,)) if is_full else Plan(output=REUSE, label="step")

    def tell(self, step, values):
        pass


class Breaks(Every):
    """Fails in mid-run."""

    def tell(self, step, values):
        raise KeyError("a bug")
'''


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policies") / "mine.py"
    path.write_text(POLICIES)
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory, policies) -> list[str]:
    """A comparison of two methods and one that is refused."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    specs = [f"{policies}:Every", f"{policies}:Every:every=3", "mixcache"]
    caches = [word for spec in specs for word in ("--cache", spec)]
    return [
        "compare",
        *SIZE,
        *caches,
        "--prompts",
        str(folder / "prompts.txt"),
        "--output",
        str(folder / "out"),
    ]


@pytest.fixture(scope="module")
def made(words) -> Path:
    """The folder of the comparison."""
    pytest.importorskip("matplotlib")
    assert main(words) == 0
    return Path(words[-1])


@pytest.fixture(scope="module")
def content(made) -> dict:
    return json.loads((made / "compare.json").read_text())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("demo", device="cpu", dtype="fp32", keep_text_encoder=True)


@pytest.fixture
def calls(monkeypatch) -> list:
    """The settings of every run that is denoised."""
    seen, denoise = [], Engine.denoise
    keep = lambda self, settings, *args, **options: (
        seen.append(settings) or denoise(self, settings, *args, **options)
    )
    monkeypatch.setattr(Engine, "denoise", keep)
    return seen


def bench_in(folder: Path, engine: Engine, **options) -> Bench:
    return Bench(engine, SMALL, PROMPTS[:1], folder, say=lambda line: None, **options)


def test_multiply_adds_are_those_of_the_steps_that_ran(content):
    plain, half, third, *_ = content["rows"]
    assert plain["spec"] == "none" and [len(row["videos"]) for row in (plain, half, third)] == [2, 2, 2]
    assert half["macs"]["mean"] == plain["macs"]["mean"] * 3 / 6
    assert third["macs"]["worst"] == plain["macs"]["mean"] * 2 / 6
    assert half["constants"] == "typed" and plain["constants"] == ""


def test_every_method_stands_beside_as_many_steps_as_its_multiply_adds_buy(content):
    plain, half, third, *_ = content["rows"]
    assert plain["fewer_steps"] is None
    for row, steps in ((half, 3), (third, 2)):
        rival = row["fewer_steps"]
        assert rival["steps"] == steps and rival["macs"]["mean"] == row["macs"]["mean"]
        assert [video["settings"]["steps"] for video in rival["videos"]] == [steps, steps]
        assert [video["settings"]["cache"] for video in rival["videos"]] == ["none", "none"]


def test_fewer_steps_is_always_a_row(content):
    row = content["rows"][-1]
    assert row["spec"] == "fewer-steps:steps=3" and row["steps"] == 3 and row["fewer_steps"] is None
    assert row["psnr"] == content["rows"][1]["fewer_steps"]["psnr"]  # the same three steps


def test_quality_is_that_of_the_frames_before_encoding(engine, content, policies):
    plain, half = content["rows"][:2]
    assert plain["psnr"]["worst"] == comparing.IDENTICAL
    settings = dict(width=32, height=32, num_frames=5, steps=6, seed=1000)
    full = engine.generate(PROMPTS[1], **settings).frames
    frames = engine.generate(PROMPTS[1], **settings, cache=f"{policies}:Every").frames
    video = half["videos"][1]
    assert video["settings"]["seed"] == 1000
    assert video["psnr"] == psnr(full, frames) and video["ssim"] == ssim(full, frames)
    values = [video["psnr"] for video in half["videos"]]
    assert half["psnr"] == {
        "mean": pytest.approx(sum(values) / 2),
        "median": pytest.approx(sum(values) / 2),
        "worst": min(values),
    }


def test_what_was_not_measured_is_null(content):
    for row in content["rows"][:3]:
        assert row["peak_bytes"] is None  # on a CPU
        assert min(video["seconds"] for video in row["videos"]) > 0


def test_a_method_that_is_refused_is_a_row_with_its_reason(content, made):
    refused = content["rows"][3]
    assert refused["spec"] == "mixcache" and "no mixcache profile fits this run" in refused["error"]
    assert refused["videos"] == []
    assert "no mixcache profile fits this run" in (made / "report.html").read_text()


def test_a_policy_with_a_bug_leaves_the_other_rows_alone(engine, tmp_path, policies):
    specs = [f"{policies}:Breaks", f"{policies}:Every"]
    rows = compare(bench_in(tmp_path, engine), specs)
    assert rows[1].error == "KeyError: 'a bug'" and rows[1].videos == []
    assert [len(row.videos) for row in rows] == [1, 0, 1, 1] and rows[2].rival.steps == 3
    with pytest.raises(KeyError):
        compare(bench_in(tmp_path, engine), specs, debug=True)


def test_the_page_needs_nothing_but_itself(made):
    text = (made / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
    sources = re.findall(r"(?:src|href)='?\"?([^'\" >]{0,30})", text)
    assert sources and all(source.startswith("data:") for source in sources)
    # per prompt a sheet, and a video of every method and of fewer steps; a picture of costs, two timelines
    assert (
        len(re.findall("data:video/mp4", text)) == 2 * 3
        and len(re.findall("data:image/png", text)) == 2 + 1 + 2
    )


def test_the_page_explains_itself(made, words):
    text = (made / "report.html").read_text()
    for prompt in PROMPTS:
        assert prompt in text
    for column in ("MACs", "seconds", "PSNR dB", "SSIM", "cache", "fewer steps", "gain"):
        assert f"<th>{column}" in text and f"<dt>{column}<dd>" in text
    assert "peak memory: not measured" in text and "LPIPS: not measured" in text
    assert "6 steps of unipc" in text and "Constants: typed." in text
    assert "<code>mine.py:Every:every=3</code>" in text


def test_videos_beside_each_other_carry_the_settings_of_the_method(made):
    paths = sorted((made / "videos").glob("*.mp4"))
    assert len(paths) == 6
    for path in paths:
        frames, _ = read_video(path)
        panels = 2 if "fewer" in path.name else 3
        assert frames.shape == (5, 192 + report.BAR, panels * 192 + (panels - 1) * report.GAP, 3)
    assert {read_settings(path)["steps"] for path in paths} == {3, 6}


def test_a_second_call_makes_nothing_again(made, words, content, calls, capsys):
    assert main(words) == 0
    assert calls == []
    assert json.loads((made / "compare.json").read_text())["rows"] == content["rows"]
    assert "mine.py:Every" in capsys.readouterr().out


def test_another_setting_is_another_video(engine, tmp_path, policies):
    bench = bench_in(tmp_path, engine)
    settings = bench.plain[0]
    paths = {
        bench.path(s, "video")
        for s in (
            settings,
            replace(settings, seed=1),
            replace(settings, prompt="another"),
            replace(settings, guidance_scale=2.0),
            replace(settings, steps=3),
            replace(settings, cache=f"{policies}:Every"),
        )
    }
    assert len(paths) == 6 and bench.path(settings, "video") in paths


def test_a_policy_that_was_edited_is_run_again(engine, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(POLICIES)
    path_now = lambda: (bench := bench_in(tmp_path, engine)).path(
        replace(bench.plain[0], cache=f"{file}:Every"), "video"
    )
    before = path_now()
    assert path_now() == before
    file.write_text(POLICIES.replace("every: int = 2", "every: int = 4"))
    assert path_now() != before


def test_lpips_that_came_later_is_measured_on_the_kept_frames(engine, tmp_path, policies, monkeypatch, calls):
    assert compare(bench_in(tmp_path, engine), [f"{policies}:Every"])[1].spread("lpips") is None
    count = len(calls)
    monkeypatch.setattr(metrics, "load_lpips", lambda device: "a network")
    monkeypatch.setattr(metrics, "lpips", lambda network, a, b: float(np.abs(a.astype(int) - b).mean()))
    plain, row, _ = compare(bench_in(tmp_path, engine), [f"{policies}:Every"])
    assert plain.spread("lpips")["mean"] == 0 < row.spread("lpips")["mean"] and len(calls) == count


def test_an_interrupted_comparison_goes_on_where_it_was(words, tmp_path, monkeypatch, capsys, calls):
    words = [*words[:-1], str(tmp_path / "out")]
    denoise = Engine.denoise

    def stop_at_third(self, settings, *args, **options):
        if len(calls) == 3:  # a warm-up and two videos
            raise Stopped(SIGINT)
        return denoise(self, settings, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "denoise", stop_at_third)
        assert main(words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    first = list(calls)
    with monkeypatch.context() as patch:
        patch.setattr(page, "write_report", lambda folder, about, rows: folder)
        assert main(words) == 0
    again = [settings for settings in calls[len(first) + 1 :] if settings in first[1:]]
    assert again == []


def test_without_matplotlib_the_page_says_what_draws(engine, tmp_path, policies, monkeypatch):
    def missing():
        raise ValueError("pictures need matplotlib; install it with pip install 'minidit[report]'")

    monkeypatch.setattr(report, "import_pyplot", missing)
    bench = bench_in(tmp_path, engine)
    rows = compare(bench, [f"{policies}:Every"])
    text = page.write_report(tmp_path, comparing.describe_run(bench, "a command", None), rows).read_text()
    assert "pip install" in text and text.count("data:video/mp4") == 2 and text.count("data:image/png") == 1


def test_matching_tunes_a_knob_on_prompts_that_the_table_does_not_use(engine, tmp_path, policies, calls):
    bench = bench_in(tmp_path, engine, tune_prompts=["a green square grows", PROMPTS[0]])
    assert bench.tune_prompts == ["a green square grows"]
    specs = [f"{policies}:Every", f"{policies}:Every:every=6", "none"]
    rows = compare(bench, specs, macs=0.35)
    assert [row.spec for row in rows[1:]] == [
        f"{policies}:Every:every=3",
        f"{policies}:Every:every=6",
        "fewer-steps:steps=2",
    ]
    assert (
        rows[1].note
        == "every=3 takes 0.333 of the MACs on the prompts for tuning, the nearest to 0.35 that it can"
    )
    assert rows[2].note == "not tuned: every was given"
    tuned = {s.prompt for s in calls if s.cache != "none" and s.cache not in {row.spec for row in rows[1:]}}
    assert tuned == {"a green square grows"}


def test_an_inert_method_says_so_and_has_no_rival(engine, tmp_path, policies):
    row = compare(bench_in(tmp_path, engine), [f"{policies}:Every:every=1"])[1]
    assert row.rival is None and "never acted" in row.note
    assert row.spread("psnr")["worst"] == comparing.IDENTICAL


@pytest.mark.parametrize(
    "share, low, high, target, value",
    [
        (lambda v: 1 / v, 1, 10, 0.5, 2),  # a whole knob, falling
        (lambda v: v / 10, 1, 10, 0.54, 5),  # between two values: one of them
        (lambda v: 0.9 if v < 0.3 else 0.2, 0.01, 1.0, 0.5, None),  # a cliff: whatever is nearest
        (lambda v: v, 0.01, 1.0, 0.5, 0.5),  # rising
        (lambda v: 1 / (1 + v), 0.01, 10.0, 0.5, 1.0),  # falling
        (lambda v: 0.8, 0.01, 1.0, 0.5, 0.01),  # has no effect
        (lambda v: 0.6 + v, 0.01, 0.3, 0.5, 0.01),  # out of reach: the nearest end
    ],
)
def test_a_knob_is_bisected_to_the_wanted_share(share, low, high, target, value):
    asked = []
    found, reached = find_knob(lambda v: asked.append(v) or share(v), low, high, target)
    assert reached == share(found) and len(asked) <= 11
    assert abs(reached - target) == min(abs(share(v) - target) for v in asked)
    if value is not None:
        assert share(found) == pytest.approx(share(value), rel=0.02)
    assert type(found) is type(low)


def test_a_sweep_is_a_spec_per_value():
    assert sweep("teacache:threshold=0.1..0.3/3") == [
        f"teacache:threshold={t}" for t in ("0.1", "0.2", "0.3")
    ]
    assert len(sweep("teacache:threshold=0.05..0.3")) == 5
    assert sweep("mixcache:eff:interval=2..4") == [f"mixcache:eff:interval={n}" for n in (2, 3, 4)]
    assert sweep("mixcache:interval=1..10/3,penalty=false+unicp") == [
        f"mixcache:interval={n},penalty=false+unicp" for n in (1, 6, 10)
    ]
    for text in ("teacache", "teacache:threshold=0.3..0.1", "teacache:threshold=0.1..0.3/1"):
        with pytest.raises(ValueError, match="sweep"):
            sweep(text)


def test_an_option_is_added_to_the_outer_method():
    assert with_option("fora", "interval", 3) == "fora:interval=3"
    assert with_option("mixcache:eff", "interval", 3) == "mixcache:eff:interval=3"
    assert (
        with_option("mixcache:eff:theta=0.1+unicp", "interval", 3)
        == "mixcache:eff:theta=0.1,interval=3+unicp"
    )
    assert with_option("a.py:Mine", "threshold", 0.125) == "a.py:Mine:threshold=0.125"


@pytest.mark.parametrize("text", ["macs", "macs=", "macs=2", "macs=0", "seconds=0.5", "0.5"])
def test_a_match_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="macs=0.5"):
        read_match(text)


def test_fewer_steps_is_a_run_with_fewer_steps_and_no_cache(engine):
    small = dict(width=32, height=32, num_frames=5)
    fewer = engine.generate(PROMPTS[0], steps=6, cache="fewer-steps:share=0.5", **small)
    assert np.array_equal(fewer.frames, engine.generate(PROMPTS[0], steps=3, **small).frames)
    assert (fewer.settings.steps, fewer.settings.cache) == (3, "none")
    with pytest.raises(ValueError, match="at most 6"):
        engine.resolve("", replace(SMALL, cache="fewer-steps:steps=7"))
    with pytest.raises(ValueError, match="cannot be joined"):
        engine.resolve("", replace(SMALL, cache="mixcache+fewer-steps"))


def row_of(spec: str, values: list[float], **others) -> Row:
    """A row of given PSNRs, at half the MACs of one that costs 100."""
    base = {
        "seconds": 1.0,
        "macs": 50,
        "cache_bytes": 3 * 2**20,
        "peak_bytes": None,
        "ssim": 0.5,
        "lpips": 0.25,
    }
    return Row(
        spec, videos=[Made(Path(), base | others | {"psnr": value}, {}, "") for value in values], steps=6
    )


def test_the_table_shows_the_spread_and_what_fewer_steps_would_do():
    plain = row_of("none", [99.0] * 3, macs=100, seconds=4.0)
    row = row_of("mine", [50.0, 40.0, 9.0], peak_bytes=2**31)
    row.rival = row_of("fewer-steps:steps=3", [45.0, 42.0, 30.0])
    row.rival.steps = 3
    line = page.cells(row, plain)
    assert line["MACs"] == "0.500 (2.00x)" and line["seconds"] == "1.00 (4.00x)"
    assert line["PSNR dB"] == "33.0 (40.0, 9.0)" and line["their PSNR dB"] == "39.0 (42.0, 30.0)"
    assert (line["fewer steps"], line["gain"]) == ("3", "-2.0 dB")
    assert (line["cache"], line["peak memory"]) == ("3 MiB", "2 GiB") and line["LPIPS"].startswith("0.2500")
    text = page.text_table([plain, row, Row("other", error="it cannot")])
    assert "other: left out: it cannot" in text and "none (uncached)" in text


def test_making_a_video_does_not_need_the_comparison():
    for name in ("minidit.sampling", "minidit.generate"):
        found = imports(SOURCES[name].read_text(encoding="utf-8"))
        assert not found & {"minidit.compare", "minidit.page", "minidit.tune", "minidit.report"}
