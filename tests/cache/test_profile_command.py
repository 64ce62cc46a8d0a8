"""The profile command: formulas by hand, a profile of a tiny run, and runs that use it or may not."""

import contextlib
import io
import json
import math
import sys

import numpy as np
import pytest
import torch

from minidit.__main__ import main
from minidit.cache.loop import Lane
from minidit.cache.plan import CFG_DELTA, GUIDED, GUIDED_FULL, Measure, RunInfo, h
from minidit.cache.profile import (
    Observer,
    interpolated,
    mean_abs_normal,
    mean_curve,
    moved,
    noise_of,
    settled,
    thresholds,
)
from minidit.cache.seam import BlockCache
from minidit.cache.trace import acted, read_trace
from minidit.profiles import read_profile
from minidit.video import read_video
from tests.cache.test_unicp import embedded_run

STEPS, DEPTH = 6, 8
TINY = ["--size", "32x32", "--num-frames", "5", "--device", "cpu", "--quiet"]
TINY_STEPS = [*TINY, "--steps", str(STEPS)]
PROMPT = "a blue star moves right"


def command(*args: str) -> tuple[int, str, str]:
    """Run a command on one thread -> exit code, what it printed, what it complained of"""
    torch.set_num_threads(1)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(args))
    return code, out.getvalue(), err.getvalue()


def refused(*args: str) -> str:
    code, _, err = command(*args)
    assert code == 2 and err.count("\n") == 1 and err.startswith("minidit: "), err
    return err


@pytest.mark.parametrize(
    "mu, sigma", [(0.0, 1.0), (0.3, 0.5), (-2.0, 0.7), (1.0, 0.0), (-1.5, 0.0), (0.0, 0.0)]
)
def test_the_closed_form_is_the_mean_of_a_large_sample(mu, sigma):
    x = np.random.default_rng(0).normal(mu, sigma, 200_000)
    margin = 5 * sigma / math.sqrt(len(x))  # five standard errors
    assert mean_abs_normal(mu, sigma) == pytest.approx(np.abs(x).mean(), abs=margin + 1e-12)


@pytest.mark.parametrize(
    "d_step, first",
    [
        ([0.9, 0.5, 0.3, 0.11, 0.10, 0.10, 0.11, 0.10, 0.10, 0.11], 8),  # 3 .. 8 lie within 0.02
        ([0.1] * 10, 5),
        ([0.1] * 6, 5),
        ([0.1, 0.12] * 5, 5),  # the band itself is near enough
        ([0.1, 0.121] * 5, 9),  # never: the last one
        ([0.1] * 5, 4),  # too few to see
        ([0.3, 0.2], 1),
    ],
)
def test_warm_up_ends_where_the_last_six_stay_within_a_band(d_step, first):
    assert settled(d_step) == first


def test_thresholds_come_of_what_follows():
    d_step = [0.9, 0.5, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.11, 0.13, 0.1]  # settled from index 8 on
    theta, least, most = thresholds(d_step)
    assert theta == pytest.approx(0.34 / 3)
    assert least == pytest.approx(abs(0.11 - 0.34 / 3)) and most == pytest.approx(0.13 - 0.34 / 3)
    assert thresholds([0.4]) == (0.4, 0.0, 0.0)


@pytest.mark.parametrize(
    "points, steps, values",
    [
        ({2: 1.0}, 4, [1.0] * 4),
        ({0: 1.0, 2: 3.0}, 3, [1.0, 2.0, 3.0]),
        ({1: 1.0, 5: 3.0}, 7, [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]),
        ({4: 0.0, 2: 3.0, 5: 6.0}, 6, [3.0, 3.0, 3.0, 1.5, 0.0, 6.0]),
    ],
)
def test_impact_is_linear_between_points_and_constant_beyond(points, steps, values):
    assert interpolated(points, steps) == values


def test_noise_takes_mu_of_all_steps_and_sigma_of_the_last_four_fifths():
    rows = [{"step moments": None}, *({"step moments": (float(i), 10.0 * i)} for i in range(10))]
    mu, sigma = noise_of(rows, "step")
    assert mu == 4.5 and sigma == pytest.approx(10 * sum(range(2, 10)) / 8)


def test_curves_are_means_over_prompts():
    runs = [[{"a": None}, {"a": 0.1}, {"a": 0.3}], [{"a": None}, {"a": 0.3}, {"a": 0.5}]]
    assert mean_curve(runs, "a") == [None, 0.2, 0.4]


def test_the_observer_measures_every_level_and_block():
    observer, info = Observer(), RunInfo((), 4, ("attn",), ("cond", "uncond"), "wan")
    needs = observer.reset(info)
    sites = {GUIDED, GUIDED_FULL, CFG_DELTA, h(1), h(2), h(3)}
    assert {need.site for need in needs} == sites == set(observer.plan(None).keep)
    observer.tell(None, {})
    observer.tell(None, {Measure(h(2)): 0.5, Measure(GUIDED, "abs"): (1.0, 2.0)})
    assert set(observer.rows[0].values()) == {None}
    assert observer.rows[1]["block 1 l1"] == 0.5 and observer.rows[1]["step abs"] == (1.0, 2.0)
    alone = RunInfo((), 4, ("attn",), ("cond",), "wan")
    assert CFG_DELTA not in {need.site for need in observer.reset(alone)}


def test_impact_is_how_far_noise_on_a_state_moves_conds_prediction():
    forward, x = embedded_run()
    model = forward.model
    with torch.inference_mode():
        context = forward.context.select(("cond",))
        state, cond = model.embed(x, torch.full((1,), 500.0), context)
        lane, states = Lane(("cond",), state, cond), [state]
        for k, block in enumerate(model.blocks):
            states.append(block(states[-1], lane.cond.at(k), BlockCache()))
        shifted = states[4] + 0.25
        for k in range(4, DEPTH):
            shifted = model.blocks[k](shifted, cond.at(k), BlockCache())
        want = (model.head(shifted, cond) - model.head(states[-1], cond)).abs().mean().item()
    noises = {3: (0.25, 0.0), 1: (0.0, 0.0), 6: (0.0, 0.05), 5: (0.0, 0.5)}  # i: mu, sigma of h(i + 1)
    changes = moved(forward, x, 500.0, noises, torch.Generator().manual_seed(0))
    assert changes[3] == pytest.approx(want, rel=1e-4)  # the same fp32 sums in another order
    assert changes[1] == pytest.approx(0.0, abs=1e-6 * want) and 0 < changes[6] < changes[5]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """(folder of profiles of a tiny setting, what the command printed)"""
    folder = tmp_path_factory.mktemp("profiles")
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{PROMPT}\na red circle grows\n")
    options = ["--prompts", str(prompts), "--output", str(folder)]
    code, out, err = command(
        "profile", "--cache", "mixcache:theta=9+unicp:threshold=0.5", *TINY_STEPS, *options
    )
    assert code == 0, err
    return folder, out


def files(folder, method: str) -> list:
    return sorted(folder.glob(f"{method}-*.json"))


def test_both_profiles_are_written_and_described(profiled):
    folder, out = profiled
    for method in ("mixcache", "unicp"):
        (path,) = files(folder, method)
        assert str(path) in out and read_profile(path).policy == method
    published = ("theta    suggested", ", published 0.1", "published [0.05, 0.1]")
    impacts = ("impact   step", "noise    cfg", "impact   block 6")
    for words in (*published, *impacts, f"of {STEPS * DEPTH} outputs", "slices of 32 (two-sided)"):
        assert words in out, words
    loops = [line for line in out.splitlines() if "PSNR" in line and "full-equivalent" in line]
    assert len(loops) == 2 and PROMPT in loops[0]


def test_a_profile_carries_the_settings_it_was_made_with(profiled):
    for method in ("mixcache", "unicp"):
        match = read_profile(files(profiled[0], method)[0]).match
        assert {key: match[key] for key in ("width", "height", "num_frames", "steps", "dtype")} == {
            "width": 32, "height": 32, "num_frames": 5, "steps": STEPS, "dtype": "fp32",
        }  # fmt: skip
        assert {"model_id", "solver", "sigma_grid", "flow_shift", "guidance_scale"} <= set(match)


def test_mixcaches_numbers_are_complete_and_agree_with_each_other(profiled):
    data = read_profile(files(profiled[0], "mixcache")[0]).data
    names = {"step", "cfg", *(f"block {i}" for i in range(DEPTH - 1))}
    assert set(data["curves"]) == set(data["noise"]) == names and data["prompts"] == 2
    for curve in data["curves"].values():
        assert len(curve) == STEPS and curve[0] is None and all(0 < d < 10 for d in curve[1:])
    assert set(data["impact"]["block"]) == {str(i) for i in range(DEPTH - 1)}
    assert all(len(row) == STEPS and min(row) > 0 for row in data["impact"]["block"].values())
    scale = mean_abs_normal(*data["noise"]["step"]) / data["impact"]["step"]  # mean |guided prediction|
    assert 0.1 < scale < 10
    cfg = 3 * mean_abs_normal(*data["noise"]["cfg"]) / scale  # guidance 4
    assert data["impact"]["cfg"] == pytest.approx(cfg, rel=1e-2)  # of rounded numbers
    assert data["settled"] == 1 + settled(data["curves"]["step"][1:])
    assert 0 < data["d_full"]["min"] <= data["d_full"]["max"]


def test_unicps_tables_and_bases_are_complete(profiled):
    profile = read_profile(files(profiled[0], "unicp")[0])
    data = profile.data
    assert (data["steps"], data["depth"], data["head_width"]) == (STEPS, DEPTH, 32)
    assert {kind: (len(rows), len(rows[0])) for kind, rows in data["errors"].items()} == {
        "attn": (STEPS, DEPTH), "cross": (STEPS, DEPTH),
    }  # fmt: skip
    names = {f"attn.{part}.{width}" for part in ("q", "k") for width in data["widths"]}
    assert set(profile.tensors) == {(k, name) for k in range(DEPTH) for name in names}


def generate(folder, output, cache: str, *args: str) -> tuple[int, str, str]:
    return command(
        "generate", PROMPT, "--profiles", str(folder), "--cache", cache, "--output", str(output), *args
    )


@pytest.mark.parametrize(
    "cache",
    [
        "mixcache:theta=9",
        "unicp:threshold=0.5",
        "mixcache:eff:theta=9+unicp:threshold=0.5",
        "mixcache:theta=profile",
    ],
)
def test_a_run_with_the_profile_acts(profiled, tmp_path, cache):
    options = ("--allow-inert",) if "theta=profile" in cache else ()  # six steps may be too few for that
    code, out, err = generate(
        profiled[0], tmp_path / "a.npz", cache, *TINY_STEPS, "--trace", str(tmp_path / "t.json"), *options
    )
    assert code == 0, err
    trace = read_trace(tmp_path / "t.json")
    assert options or acted(trace)
    assert f"{cache}: " in out and "x fewer MACs" in out


def test_a_replay_finds_the_bases_of_slices(profiled, tmp_path):
    folder, trace = profiled[0], tmp_path / "mixcache+unicp.json"  # a + is no second method here
    cache = "mixcache:theta=9+unicp:ratio=0.4"
    assert generate(folder, tmp_path / "a.npz", cache, *TINY_STEPS, "--trace", str(trace))[0] == 0
    assert '"Slice"' in trace.read_text()
    code, _, err = generate(folder, tmp_path / "b.npz", f"replay:{trace}", *TINY_STEPS)
    assert code == 0, err
    frames = [read_video(tmp_path / name)[0] for name in ("a.npz", "b.npz")]
    assert np.array_equal(*frames)
    code, _, err = generate(tmp_path / "none", tmp_path / "c.npz", f"replay:{trace}", *TINY_STEPS)
    assert code == 2 and "no profile of this run has attn.q." in err and err.count("\n") == 1


@pytest.mark.parametrize("cache", ["mixcache", "unicp", "mixcache+unicp"])
def test_a_run_of_other_settings_is_refused_with_the_difference(profiled, tmp_path, cache):
    options = ("--profiles", str(profiled[0]), "--cache", cache, "--output", str(tmp_path / "a.npz"))
    message = refused("generate", PROMPT, *options, *TINY, "--steps", "9")
    method = cache.split("+")[0]
    assert (
        f"no {method} profile fits this run: the nearest has steps {STEPS} instead of 9; make one" in message
    )
    assert f"python -m minidit profile --cache {method} --size 32x32 " in message and "--steps 9" in message
    message = refused("generate", PROMPT, *options, *TINY_STEPS, "--guidance-scale", "3", "--solver", "euler")
    assert "solver unipc instead of euler" in message and "guidance_scale 4.0 instead of 3.0" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cache, word", [("teacache:threshold=9", "R^2"), ("magcache", "ratios")])
def test_what_others_fitted_to_their_models_is_fitted_to_this_one(tmp_path, cache, word):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n")
    options = ["--prompts", str(prompts), "--output", str(tmp_path)]
    code, out, err = command("profile", "--cache", cache, *TINY_STEPS, *options)
    assert code == 0, err
    (path,) = files(tmp_path, cache.split(":")[0])
    assert str(path) in out and word in out and "x fewer MACs" in out and path.stat().st_size < 2000
    trace = tmp_path / "t.json"
    code, out, err = generate(tmp_path, tmp_path / "a.npz", cache, *TINY_STEPS, "--trace", str(trace))
    assert code == 0, err
    assert acted(read_trace(trace))
    options = ("--profiles", str(tmp_path), "--cache", cache, "--output", str(tmp_path / "b.npz"))
    message = refused("generate", PROMPT, *options, *TINY, "--steps", "9")
    assert f"the nearest has steps {STEPS} instead of 9; make one" in message


def test_what_takes_nothing_from_a_profile_runs_at_any_setting(profiled, tmp_path):
    code, _, err = generate(
        profiled[0], tmp_path / "a.npz", "mixcache:impact=uniform,theta=9", *TINY, "--steps", "5"
    )
    assert code == 0, err


@pytest.mark.parametrize(
    "args, said",
    [
        (["--cache", "none"], "none has nothing to profile; choose from mixcache, unicp, planned, teacache"),
        (["--cache", "mixcache+none"], "none has nothing to profile"),
        (["--cache", "mixcache:tetha=1"], "has no option 'tetha'"),
        (["--cache", "mixcache+unicp:basis=both"], "unknown basis 'both'"),
        (["--cache", "mixcache", "--steps", "2"], "steps=2 are too few for a profile; take 3 or more"),
        (["--cache", "unicp", "--figure", "a.png"], "--figure draws mixcache's curves, and --cache is unicp"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_anything_is_measured(tmp_path, args, said):
    assert said in refused("profile", *TINY, "--output", str(tmp_path), *args)
    assert list(tmp_path.iterdir()) == []


def test_figures_are_drawn(profiled, tmp_path):
    pytest.importorskip("matplotlib")
    figure, prompts = tmp_path / "curves.png", str(profiled[0] / "prompts.txt")
    options = ["--prompts", prompts, "--output", str(tmp_path), "--figure", str(figure)]
    code, _, err = command("profile", "--cache", "mixcache", *TINY_STEPS, *options)
    assert code == 0, err
    timeline = tmp_path / "timeline.png"
    cache = "mixcache:theta=9+unicp:threshold=0.5"
    assert generate(profiled[0], tmp_path / "a.npz", cache, *TINY_STEPS, "--timeline", str(timeline))[0] == 0
    for path in (figure, timeline):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["figure", "timeline"])
def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    options = ["--output", str(tmp_path / "a.npz"), f"--{kind}", str(tmp_path / "a.png")]
    args = ["profile", "--cache", "mixcache"] if kind == "figure" else ["generate", PROMPT]
    message = refused(*args, *options, *TINY_STEPS)
    assert message == "minidit: pictures need matplotlib; install it with pip install 'minidit[report]'\n"
    assert list(tmp_path.iterdir()) == []  # said before the run


def test_a_profile_is_json_of_a_few_kilobytes(profiled):
    (path,) = files(profiled[0], "mixcache")
    assert json.loads(path.read_text())["version"] == 1 and path.stat().st_size < 20_000
