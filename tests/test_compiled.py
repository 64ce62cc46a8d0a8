"""--compile: the blocks of a whole run compiled, once per distinct row, with the same plans and latents."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import minidit
from minidit.compiled import CompiledBlock, row_of
from minidit.generate import Engine
from minidit.settings import Choices

PROMPT = "a red circle moves left to right"
# method -> spec, and backend: aot_eager is slow to trace, and test_compile.py has it for single blocks
CACHES = {
    "none": ("none", "aot_eager"),
    "mixcache": ("mixcache:eff:theta=profile", "eager"),
    "unicp": ("unicp", "eager"),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("demo", device="cpu", dtype="fp32", keep_text_encoder=True)


def denoise_with(engine: Engine, cache: str, block_fn):
    """A run of the embedded model's own 30 steps, which its profiles are of."""
    engine.block_fn = block_fn
    settings = engine.resolve(PROMPT, Choices(cache=cache, seed=3))
    outcome = engine.denoise(settings, engine.encode(settings))
    engine.block_fn = None
    return settings, outcome


@pytest.mark.parametrize("cache", ["none", "mixcache", pytest.param("unicp", marks=pytest.mark.slow)])
def test_a_compiled_run_has_the_same_plans_and_the_same_latents(engine, cache):
    torch._dynamo.reset()
    spec, backend = CACHES[cache]
    counter = CompileCounterWithBackend(backend)
    block_fn = CompiledBlock(counter)
    _, plain = denoise_with(engine, spec, None)
    settings, compiled = denoise_with(engine, spec, block_fn)
    assert [r.plan for r in compiled.records] == [r.plan for r in plain.records]
    assert torch.equal(compiled.latents, plain.latents)  # nothing is fused: the same operations
    assert counter.frame_count == len(block_fn.rows)  # torch's graphs are the rows that we count
    assert settings.compile


@pytest.mark.slow
def test_inductor_differs_by_rounding_only(engine):
    torch._dynamo.reset()
    _, plain = denoise_with(engine, "mixcache:eff:theta=profile", None)
    _, compiled = denoise_with(engine, "mixcache:eff:theta=profile", CompiledBlock())
    distance = ((compiled.latents - plain.latents).norm() / plain.latents.norm()).item()
    assert distance < 1e-4  # fp32 sums in another order, through 30 steps: measured 1e-6


def test_one_row_too_many_is_refused_with_what_to_do():
    calls = []
    block_fn = CompiledBlock("eager", most_rows=2)
    block_fn.compiled = lambda *args: calls.append(args)
    block, h = torch.nn.Linear(2, 2), torch.zeros(1, 3, 2)
    for codes in ((), (("attn", "run"),), ()):
        block_fn(block, h, None, codes, {})
    with pytest.raises(ValueError, match="more than 2 distinct rows .*'attn': 'reuse'.*leave out --compile"):
        block_fn(block, h, None, (("attn", "reuse"),), {"attn": h})
    assert len(calls) == 3  # the row that was refused did not run


def test_a_row_is_what_a_graph_is_specialised_to():
    block, h = torch.nn.Linear(2, 2), torch.zeros(1, 3, 2)
    codes = (("attn", "reuse"),)
    row = row_of(block, h, codes, {"attn": h})
    assert row == row_of(
        torch.nn.Linear(2, 2), h + 1, codes, {"attn": h + 2}
    )  # numbers and weights are inputs
    others = [
        row_of(torch.nn.Identity(), h, codes, {"attn": h}),
        row_of(block, h.expand(2, -1, -1), codes, {"attn": h}),
        row_of(block, h, (("attn", "run"),), {"attn": h}),
        row_of(block, h, codes, {"attn": h[:, :2]}),
    ]
    assert row not in others and len(set(others)) == 4


def test_the_settings_say_that_a_run_was_compiled():
    compiled, plain = minidit.load("demo", compile=True), minidit.load("demo")
    settings = compiled.resolve(PROMPT, Choices())
    assert settings.compile
    assert replace(settings, compile=False) == plain.resolve(PROMPT, Choices())


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["none", "mixcache:eff:theta=profile", "unicp"])
def test_on_a_card_a_compiled_run_differs_by_rounding_only(cache):
    torch._dynamo.reset()
    engine = Engine("demo", device="cuda", dtype="fp32", keep_text_encoder=True)
    _, plain = denoise_with(engine, cache, None)
    _, compiled = denoise_with(engine, cache, CompiledBlock())
    distance = ((compiled.latents - plain.latents).norm() / plain.latents.norm()).item()
    assert distance < 1e-3  # fp32 sums in another order, through 30 steps: 1e-6 on a CPU; other exp, too
