"""--cache-budget: the text's keys and values go first, then a method's larger parts, by name."""

from math import inf

import pytest
import torch

from minidit import generate
from minidit.__main__ import main
from minidit.budget import within_budget
from minidit.cache.plan import Plan
from minidit.cache.spec import smaller_specs
from minidit.compiled import CompiledBlock
from minidit.costs import count_crosses, text_macs
from minidit.generate import Engine
from minidit.settings import Choices
from minidit.video import read_settings
from tests import tiny_cogvideox
from tests.cache.families import Scripted, follow, forward_of, rel

PROMPT = "a red circle moves left to right"
KIB = 2**10


@pytest.mark.parametrize(
    "spec, smaller",
    [
        ("mixcache", ["mixcache:levels=step/cfg"]),
        ("mixcache:eff:theta=0.2", ["mixcache:eff:theta=0.2,levels=step/cfg"]),
        ("mixcache:levels=step/block", []),  # what was typed stays
        ("mixcache:eff+unicp", ["mixcache:eff", "mixcache:eff:levels=step/cfg"]),
        ("planned+unicp", ["planned"]),
        ("taylorseer:interval=3", ["taylorseer:lite:interval=3"]),
        ("taylorseer:diffusers", []),
        ("fastercache", ["fastercache:cfg"]),
        ("fora", []),
        ("my_policy.py:MyPolicy:every=3", []),
    ],
)
def test_what_a_method_may_shrink_to(spec, smaller):
    assert smaller_specs(spec) == smaller


def test_the_first_form_within_the_budget_is_taken():
    sizes = {"mixcache+unicp": 3200, "mixcache": 200, "mixcache:levels=step/cfg": 30}
    size_of = lambda spec: sizes.get(spec, inf)
    chosen = {budget: within_budget("mixcache+unicp", budget, size_of) for budget in (3200, 3199, 200, 100)}
    assert list(chosen.values()) == ["mixcache+unicp", "mixcache", "mixcache", "mixcache:levels=step/cfg"]


def test_a_method_that_no_budget_has_room_for_is_refused_with_the_largest_that_fits():
    size_of = lambda spec: {"fora": 2**30, "teacache": 3 * 2**20, "easycache": 2**20}.get(spec, inf)
    refusal = r"cache fora keeps 1.00 GiB, and the budget is 4.00 MiB; teacache keeps 3.00 MiB"
    with pytest.raises(ValueError, match=refusal):
        within_budget("fora", 4 * 2**20, size_of)
    with pytest.raises(ValueError, match="and the budget is 0.00 KiB; no method keeps less"):
        within_budget("fora", 1, size_of)


def finished(budget: int | None, cache: str = "none", **options):
    engine = Engine("demo", device="cpu", cache_budget=budget, **options)
    return engine, engine.generate(PROMPT, steps=8, cache=cache)


def test_text_keys_and_values_go_first_and_change_nothing():
    (kept, want), (anew, video) = finished(None), finished(1)
    assert kept.keeps_text and kept.notes == []
    assert not anew.keeps_text and "every block makes its own at every step" in anew.notes[0]
    assert torch.equal(video.latents, want.latents) and (video.frames == want.frames).all()
    assert video.settings == want.settings  # it is no other video
    denoise = {engine: engine.stages[1] for engine in (kept, anew)}
    assert denoise[kept].text > 0 == denoise[anew].text
    assert denoise[kept].total - denoise[anew].total == denoise[kept].text


def test_the_prediction_counts_the_bytes_that_are_kept():
    engine, _ = finished(None)
    settings = engine.resolve(PROMPT, Choices(steps=8))
    context = engine.forward(settings, engine.encode(settings)).context
    assert engine.stages[1].text == sum(x.nbytes for text in context.text for x in text)


def test_what_is_made_anew_is_counted_as_multiply_adds():
    totals = {budget: finished(budget)[1].trace["total"]["macs"] for budget in (None, 1)}
    model, rows = forward_of("wan").model, 1
    assert count_crosses(model) == 3 and text_macs(model, rows) == 2 * 48**2
    engine = Engine("demo", device="cpu")
    transformer = engine.module("transformer")
    each = count_crosses(transformer) * text_macs(transformer, engine.family.text_len)
    assert totals[1] - totals[None] == 8 * 2 * each  # steps, branches


def test_a_method_keeps_what_it_needs_before_the_text_does():
    method = "mixcache:impact=uniform,theta=inf"
    free, want = finished(None, method)
    settings = free.resolve(PROMPT, Choices(steps=8, cache=method))
    size = free.cache_bytes(settings)
    tight, video = finished(size, method)
    assert not tight.keeps_text and len(tight.notes) == 1
    assert video.settings.cache == method and torch.equal(video.latents, want.latents)
    roomy, _ = finished(size + free.stages[1].text, method)
    assert roomy.keeps_text and roomy.notes == []


@pytest.mark.parametrize(
    "cache, budget, runs",
    [
        ("taylorseer", 300 * KIB, "taylorseer:lite"),
        ("mixcache:impact=uniform", 100 * KIB, "mixcache:impact=uniform,levels=step/cfg"),
    ],
)
def test_a_smaller_form_of_the_method_runs_under_its_own_name(cache, budget, runs):
    engine, video = finished(budget, cache)
    assert video.settings.cache == runs
    assert f"cache {cache} keeps" in engine.notes[0] and f"{runs} runs in its place" in engine.notes[0]
    assert video.trace["total"]["cache_bytes"] <= budget
    assert torch.equal(video.latents, finished(None, runs)[1].latents)


def test_what_does_not_fit_is_refused_before_anything_is_loaded():
    engine = Engine("demo", device="cpu", cache_budget=100 * KIB)
    with pytest.raises(ValueError, match=r"cache fora keeps 2.81 MiB, .* is 100 KiB; (\S+) keeps \d\d KiB"):
        engine.generate(PROMPT, steps=8, cache="fora")
    assert engine.modules == {}


def test_a_budget_of_many_videos_is_found_once(monkeypatch):
    calls, count = [], generate.cache_bytes
    monkeypatch.setattr(generate, "cache_bytes", lambda *args: calls.append(1) or count(*args))
    engine = Engine("demo", device="cpu", cache_budget=10 * 2**20)
    for seed, prompt in enumerate((PROMPT, "a blue star", "a green square")):
        engine.resolve(prompt, Choices(steps=8, cache="fora", seed=seed))
    assert len(calls) == 1


def test_the_command_says_what_it_left_out_and_the_file_what_ran(tmp_path, capsys):
    output = tmp_path / "v.npz"
    words = ["generate", PROMPT, "--steps", "8", "--size", "32x32", "--num-frames", "5", "--device", "cpu"]
    words += ["--quiet", "--no-text-cache", "--output", str(output)]
    assert main([*words, "--cache", "taylorseer", "--cache-budget", "30KiB"]) == 0
    out = capsys.readouterr().out
    assert "taylorseer:lite runs in its place" in out and "makes its own at every step" in out
    assert read_settings(output)["cache"] == "taylorseer:lite"


@pytest.mark.parametrize("family", ["wan", "open_sora", "latte"])
def test_every_family_with_cross_attention_makes_the_same_anew(family):
    run = lambda **options: follow(forward_of(family, **options), Scripted((), *[Plan()] * 2)).latents
    assert torch.equal(run(keep_text=False), run())
    alone = run(keep_text=False, is_batched=False)  # products of one branch's rows: another rounding
    assert rel(alone, run(is_batched=False)) < 1e-6


def test_blocks_that_visit_make_theirs_while_they_are_there():
    (_, want), (_, video) = finished(None), finished(1, offload="blocks")
    assert torch.equal(video.latents, want.latents)


def test_compiled_blocks_make_theirs_too():
    engine = Engine("demo", device="cpu", cache_budget=1)
    engine.block_fn = CompiledBlock(backend="eager")
    assert torch.equal(engine.generate(PROMPT, steps=8).latents, finished(None)[1].latents)
    assert not engine.keeps_text


def test_a_family_whose_text_is_part_of_h_has_none_to_drop(tmp_path):
    engine = Engine(tiny_cogvideox.save_tiny(tmp_path / "model"), device="cpu", cache_budget=1)
    engine.generate(PROMPT, steps=2)
    assert engine.keeps_text and engine.notes == [] and engine.stages[1].text == 0
