"""Defects that caching engines are known for, each held down by a test. Those that had one before stand here:

state of cond and uncond mixed: cache/test_pab.py both_branches_run_to_their_own_outputs,
    cache/test_loop.py a_step_of_one_branch_leaves_the_other_alone
an option that does nothing: cache/test_readme_policy.py, test_generate.py every_choice_changes; below
another step count, size or an aborted run meets stale state: cache/test_matrix.py, for every method; below
a method that crashes on a family: cache/test_matrix.py a_method_acts_on_a_family_or_says_why_not
settings rounded in silence: test_cli.py mistakes_are_one_line; below
frames truncated instead of rounded, or the other way: test_video.py, test_generate_open_sora.py, as released
a tokenizer that drops spaces: text/test_tokenizers.py ids_equal_those_of_transformers; below
prompt cleaning that depends on what is installed: text/test_prompts.py cleaning_without_ftfy_is_refused
ranks that decide differently, means of means over ragged shards: test_parallel.py, kernels/test_references.py
kept tensors that alias: cache/test_loop.py, cache/test_store.py, cache/test_matrix.py
quantisation that does nothing: test_quantize.py
a comparison with a copy of itself, zero for ever: cache/test_mixcache.py
    what_a_step_did_not_compute_keeps_its_distance
a branch known by its place in the batch: below
tables used outside the run they were made for: cache/test_profiles.py, cache/test_teacache.py
    outside_its_range_a_polynomial_warns_once, cache/test_golden_schedules.py
an old gate applied to a new output: cache/test_loop.py a_reused_sub_module_is_gated_anew
timesteps compared exactly, so that a rule never fires: cache/test_pab.py
    mlps_are_reused_after_the_steps_nearest_to_the_listed_timesteps
a residual of the wrong sign: cache/test_delta_dit.py the_residual_is_end_minus_start
a graph that breaks where a number is read: cache/test_compile.py
latents lost with a decode that failed: test_cli.py latents_survive_a_failing_decode
"""

from dataclasses import replace

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from minidit.__main__ import main
from minidit.cache.spec import METHODS, make_policy, parse
from minidit.components import DEMO
from minidit.generate import Choices, Engine
from tests.cache.test_matrix import make_wan

SMALL = Choices(width=16, height=16, num_frames=1, steps=6)


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.set_num_threads(1)
    return Engine("demo", device="cpu", keep_text_encoder=True)


def latents(engine: Engine, choices: Choices, prompt: str = "a red circle") -> torch.Tensor:
    settings = engine.resolve(prompt, choices)
    return engine.denoise(settings, engine.encode(settings)).latents


OPTIONS = [
    ("abcache:interval", "2", "3"),
    ("adacache:scale", "0.01", "100"),
    ("blockdance:block", "1", "3"),
    ("cfg-gating:start", "0.2", "0.8"),
    ("cfg-gating:gain", "0.5", "1.0"),
    ("dbcache:threshold", "0.0001", "100"),
    ("delta-dit:interval", "2", "4"),
    ("easycache:threshold", "0.0001", "100"),
    ("fbcache:threshold", "0.0001", "100"),
    ("fora:interval", "2", "4"),
    ("fora:kinds", "attn", "mlp"),
    ("mixcache:impact=uniform,theta", "0.0001", "100"),
    ("taylorseer:interval", "2", "4"),
    ("taylorseer:order", "0", "1"),
    ("toca:interval", "2", "4"),
    ("toca:ratio", "0.1", "0.6"),
]


@pytest.mark.parametrize("option, low, high", OPTIONS)
def test_an_option_changes_the_result(option, low, high):
    """An option that is accepted and does nothing: a threshold never compared, a table never read."""
    small = make_wan()
    results = [small.run(make_policy(parse(f"{option}={v}"), lambda method: None)) for v in (low, high)]
    assert not torch.equal(results[0].latents, results[1].latents)


def test_an_option_of_every_method_is_tried():
    """A method that is added without its option being tried."""
    needs_profile = {"unicp", "mixcache+unicp", "planned", "ditfastattn", "teacache", "magcache"}
    own_tests = {"none", "replay", "pab", "fastercache", "duca"}  # windows and names, not one number
    assert {option.partition(":")[0] for option, *_ in OPTIONS} == set(METHODS) - needs_profile - own_tests


SPECS = [
    "none",
    "mixcache:impact=uniform",
    "fora",
    "cfg-gating",
    "dbcache:threshold=0.5",
    "easycache",
    "adacache",
]


@pytest.mark.parametrize("spec", SPECS)
def test_the_order_of_branches_in_the_batch_does_not_matter(spec):
    """Branches known by their place in the batch: [cond, uncond] in one release, the reverse in others."""
    small = make_wan()
    turned = small.forward.context.select(("uncond", "cond"))
    other = replace(small, forward=replace(small.forward, context=turned))
    policy = lambda: make_policy(parse(spec), lambda method: None)
    one, two = small.run(policy()), other.run(policy())
    assert turned.branches == ("uncond", "cond")
    assert [r.plan.path for r in one.records] == [r.plan.path for r in two.records]
    torch.testing.assert_close(two.latents, one.latents, rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("spec", ["fora:interval=3", "mixcache:impact=uniform,theta=100", "taylorseer"])
def test_an_engine_remembers_nothing_of_other_runs(engine, spec):
    """State on modules or classes, reset at the end of a run only: another step count, size, guidance or an
    abort leaves it half-used."""
    choices = replace(SMALL, cache=spec)
    fresh = latents(engine, choices)

    def stop(record, x):
        if record.step.i == 4:
            raise InterruptedError

    settings = engine.resolve("a red circle", choices)
    with pytest.raises(InterruptedError):
        engine.denoise(settings, engine.encode(settings), on_step=stop)
    for other in (
        dict(steps=5),
        dict(width=32),
        dict(guidance_scale=1.0),
        dict(num_frames=5),
        dict(cache="fora"),
    ):
        latents(engine, replace(choices, **other), "a blue square")
    assert torch.equal(latents(engine, choices), fresh)


@pytest.mark.parametrize(
    "change, nearest",
    [
        (dict(width=17), "nearest are 16 and 32"),
        (dict(height=40), "nearest are 32 and 48"),
        (dict(num_frames=2), "nearest are 1 and 5"),
        (dict(num_frames=16), "nearest are 13 and 17"),
        (dict(steps=2.5), "steps=2.5 is not a whole number"),
        (dict(seed=1.0), "seed=1.0 is not a whole number"),
    ],
)
def test_nothing_is_rounded_in_silence(engine, change, nearest):
    """A size or a count that is rounded down, so that the video is another one than was asked for."""
    with pytest.raises(ValueError, match=nearest):
        engine.resolve("a", replace(SMALL, **change))


def test_spaces_count_between_words_and_come_back():
    """A tokenizer that drops or adds a space before a word, as re-packaged ones do."""
    tokenizer = SentencePieceProcessor(model_file=str(DEMO / "tokenizer" / "spiece.model"))
    together, apart = (tokenizer.encode(text) for text in ("redcircle", "red circle"))
    assert together != apart
    for text in ("red circle", "a red circle moves left to right", "two  spaces", "a"):
        assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.split())


def test_a_command_leaves_no_settings_behind_in_the_process(tmp_path, monkeypatch):
    """Flags that stay on in a process: threads, handlers, or a cache of the run before."""
    import signal

    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run = [
        "generate",
        "a",
        "--size",
        "16x16",
        "--num-frames",
        "1",
        "--steps",
        "3",
        "--device",
        "cpu",
        "--quiet",
    ]
    frames = []
    for name, flags in (
        ("a.npz", []),
        ("b.npz", ["--cache", "fora:interval=2", "--guidance-scale", "2"]),
        ("c.npz", ["--size", "17x17"]),
        ("d.npz", []),
    ):
        assert main([*run, "--output", name, *flags]) == (2 if name == "c.npz" else 0)
        if name in ("a.npz", "d.npz"):
            from minidit.video import read_video

            frames.append(read_video(name)[0])
    assert (frames[0] == frames[1]).all()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
