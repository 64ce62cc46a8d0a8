"""benchmarks/step.py and what it stands on: both sides predict the same step, and say what they are."""

from dataclasses import replace

import pytest
import torch

from benchmarks import library, models, step
from benchmarks.models import Subject, random_subject
from benchmarks.timing import Times
from minidit.presets import PRESETS

SIZES = {
    "wan2.1-t2v-1.3b": (32, 32, 5),
    "hunyuan-video": (32, 32, 5),
    "cogvideox-5b": (32, 32, 9),
    "open-sora-1.2": (32, 32, 17),
    "latte-1": (32, 32, 16),
}


def narrow(name: str, monkeypatch) -> Subject:
    """A release's shape with 4 heads and 2 blocks."""
    preset = PRESETS[name]
    class_name, c = preset.components["transformer"]
    heads, small = 2, dict(text_width=32)
    width = heads * (c.width // c.heads)
    config = replace(c, width=width, heads=heads, mlp_width=4 * width, **small)
    parts = preset.components | {"transformer": (class_name, config)}
    monkeypatch.setitem(PRESETS, name, replace(preset, components=parts))
    return random_subject(name, SIZES[name], "cpu", torch.float32, depth=2)


@pytest.mark.parametrize("name", SIZES)
@torch.inference_mode()
def test_both_sides_predict_the_same_step(name, monkeypatch):
    pytest.importorskip("diffusers")
    subject = narrow(name, monkeypatch)
    runs = step.our_runs(subject, compiled=False)
    if lacking := library.why_not(subject):
        assert (name, lacking) == ("open-sora-1.2", "diffusers has no class for OpenSora")
        assert runs["minidit"]().isfinite().all()
        return
    runs |= step.their_runs(subject, torch.float32, compiled=False)
    distances = step.compare(runs, step.TOLERANCES["fp32"])
    assert ("diffusers, batched" in distances) == (len(subject.branches) == 2)


@torch.inference_mode()
def test_a_rival_with_another_answer_is_not_timed(monkeypatch):
    subject = narrow("wan2.1-t2v-1.3b", monkeypatch)
    runs = step.our_runs(subject, compiled=False)
    want = runs["minidit"]()
    with pytest.raises(SystemExit, match="wrong differs by"):
        step.compare(runs | {"wrong": lambda: 1.01 * want}, step.TOLERANCES["fp32"])


@torch.inference_mode()
def test_the_step_of_the_embedded_model_is_that_of_sampling():
    subject = models.demo_subject("cpu", "fp32")
    forward = subject.forward(is_batched=False)
    context = forward.context
    t = torch.full((1,), models.T)
    cond, uncond = (subject.model(subject.x, t, context.select((b,))) for b in ("cond", "uncond"))
    assert torch.equal(subject.step(forward), uncond + subject.scale * (cond - uncond))
    counts = subject.model.macs(tuple(subject.x.shape[2:]), subject.text_rows)
    assert subject.macs == 2 * sum(counts.values())


def test_the_baseline_is_the_best_of_diffusers_ways():
    row = lambda way, s: {"way": way, "dtype": "bf16", "step_s": s, "best_s": s / 2}
    rows = [row("minidit", 1.0), row("diffusers", 3.0), row("diffusers, batched", 2.0)]
    (line,) = step.ratios(rows)
    assert line.startswith("bf16: minidit is 2.00 times as fast as diffusers, batched")
    missing = {"way": "diffusers", "dtype": "bf16", "model": "latte", "missing": "diffusers is not installed"}
    assert step.ratios([rows[0], missing]) == [] and step.say(missing).endswith("diffusers is not installed")


def test_tflops_are_of_blocks_multiply_adds_twice():
    assert step.numbers(Times((0.5,)), macs=10**12, ceiling=8e12)["tflops"] == 4.0
    assert step.numbers(Times((0.5,)), macs=10**12, ceiling=8e12)["share_of_matmul"] == 0.5
