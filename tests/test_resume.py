"""Runs that end early: killed, interrupted, out of memory or of disk. What they leave goes on to the bit."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minidit.__main__ import main
from minidit.cache.plan import GUIDED, REUSE, Gate, Measure, Need, Plan, Run, h
from minidit.cache.spec import METHODS
from minidit.cache.store import Ring
from minidit.checkpoint import (
    Checkpoint,
    Keeper,
    checkpoint_path,
    find,
    load_checkpoint,
    save_checkpoint,
)
from minidit.generate import Engine, load_latents, save_latents
from minidit.sampling import NoiseSource, Record, Snapshot
from minidit.schedules import State, Step
from minidit.settings import Choices, Settings
from minidit.stopping import Stopped, on_signals
from minidit.video import read_settings, read_video
from tests.tiny_cogvideox import DPM, save_tiny

PROMPT = "a red circle moves left to right"
SMALL = ["--size", "32x32", "--num-frames", "5", "--steps", "8", "--device", "cpu", "--quiet"]
PROFILED = ["--steps", "30", "--device", "cpu", "--quiet"]  # the size that the shipped profiles are of
CHECKPOINT = Path("v.npz.partial.safetensors")
LATENTS = Path("v.latents.safetensors")

# Runs minidit, and kills it in mid-step: before the given number of blocks, or of files, is complete
KILLED = """
import os, signal, sys
from minidit.__main__ import main
from minidit.models.wan import WanBlock

what, left = sys.argv.pop(1), int(sys.argv.pop(1))
owner, name = (WanBlock, "forward") if what == "blocks" else (os, "replace")
done = getattr(owner, name)

def counted(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return done(*args)

setattr(owner, name, counted)
main()
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs in a folder of their own, on as many threads as the test before."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def keep_after(steps: int, settings: Settings) -> Callable[[Checkpoint], None]:
    """Writes the checkpoint of that many steps, and no other."""

    def keep(checkpoint):
        if len(checkpoint.snapshot.records) == steps:
            save_checkpoint(CHECKPOINT, settings, checkpoint)

    return keep


def steps_done() -> int:
    """How far the checkpoint of v.npz has come."""
    found = find(Path("v.npz"))
    assert found.path == CHECKPOINT
    return found.done


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("demo", device="cpu", dtype="fp32", keep_text_encoder=True)


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def generate(*args: str, prompt: str = PROMPT) -> int:
    return main(["generate", prompt, *args])


def killed(what: str, count: int, *args: str) -> None:
    """Generate v.npz in a process of its own that is killed on the way."""
    words = ["generate", PROMPT, "--output", "v.npz", *args]
    done = subprocess.run([sys.executable, "-c", KILLED, what, str(count), *words], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def frames_of(path: str) -> np.ndarray:
    return read_video(path)[0]


def steps_of(path: str) -> list[tuple]:
    """What the steps of a trace did and measured; not how long it took."""
    return [(step["i"], step["plan"], step["values"]) for step in json.loads(Path(path).read_text())["steps"]]


def assert_as_if_never_killed(args: list[str]) -> None:
    """Go on with v.npz, and compare with a run that nothing stops: frames, plans, measured values."""
    assert generate(*args, "--output", "v.npz", "--trace", "v.json", "--resume") == 0
    assert generate(*args, "--output", "whole.npz", "--trace", "whole.json") == 0
    assert np.array_equal(frames_of("v.npz"), frames_of("whole.npz"))
    assert steps_of("v.json") == steps_of("whole.json")
    assert read_settings("v.npz") == read_settings("whole.npz")
    made = ["v.json", "v.npz", "v.npz.json", "whole.json", "whole.npz", "whole.npz.json"]
    assert names() == made


# Killed


@pytest.mark.parametrize(
    "blocks, args",
    [
        (43, [*SMALL, "--solver", "euler"]),  # of 8 blocks and 8 steps, both branches at once
        (30, [*SMALL, "--cache", "mixcache:theta=9,impact=uniform"]),
        (77, [*PROFILED, "--cache", "mixcache+unicp"]),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(blocks, args):
    killed("blocks", blocks, *args, "--checkpoint-every", "1")
    assert 0 < steps_done() < 30
    assert_as_if_never_killed(args)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_a_run_killed_anywhere_goes_on_to_the_same_bits(number):
    draw = random.Random(number)
    caches = "none", "mixcache:eff", "mixcache:residual=on", "unicp:threshold=E3", "mixcache+unicp"
    cache = draw.choice(caches)
    solver = draw.choice(["unipc", "dpm++", "euler"]) if cache == "none" else "unipc"
    args = [*PROFILED, "--cache", cache, "--solver", solver, "--seed", str(number)]
    every = draw.choice([1, 2, 5])
    killed("blocks", draw.randrange(40, 105), *args, "--checkpoint-every", str(every))
    assert steps_done() % every == 0
    assert_as_if_never_killed(args)


def test_a_run_killed_while_it_writes_goes_on_from_what_was_whole():
    killed("files", 3, *SMALL, "--checkpoint-every", "1", "--no-text-cache")
    assert steps_done() == 3  # the fourth lies beside it, and is not looked at
    assert len(names()) == 2
    assert_as_if_never_killed(SMALL)


def test_a_run_killed_while_it_decodes_goes_on_with_its_latents(capsys, monkeypatch):
    killed("files", 1, *SMALL, "--checkpoint-every", "0", "--no-text-cache")
    assert names() == [".v.npz.partial.json", ".v.partial.npz", LATENTS.name]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "denoise", None)
        assert generate(*SMALL, "--output", "v.npz", "--trace", "v.json", "--resume") == 0
    assert f"going on after step 8 of 8 ({LATENTS})" in capsys.readouterr().out
    assert generate(*SMALL, "--output", "whole.npz", "--trace", "whole.json") == 0
    assert np.array_equal(frames_of("v.npz"), frames_of("whole.npz"))
    assert steps_of("v.json") == steps_of("whole.json")


# Interrupted


@contextmanager
def stopped_after(step: int, number: int):
    """Sends a signal to this process while the step after `step` is made."""
    wants = Keeper.wants

    def wanted(self, done):
        result = wants(self, done)
        if done == step:
            os.kill(os.getpid(), number)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "wants", wanted)
        yield


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_step_and_names_the_command_that_goes_on(capsys, number, code):
    args = [*SMALL, "--output", "v.npz", "--negative-prompt", "two words"]
    with stopped_after(4, number):
        assert generate(*args) == code
    line = capsys.readouterr().err
    command = f"python -m minidit generate '{PROMPT}' {' '.join(args[:-1])} 'two words' --resume"
    assert line == f"minidit: interrupted; step 5 of 8 is kept in {CHECKPOINT}; {command} goes on\n"
    assert names() == [CHECKPOINT.name]
    assert_as_if_never_killed([*SMALL, "--negative-prompt", "two words"])


def test_the_process_itself_ends_with_the_signal_and_goes_on():
    words = ["-m", "minidit", "generate", PROMPT, "--output", "v.npz", *SMALL[:-1], "--steps", "900"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    with subprocess.Popen([sys.executable, *words], **pipes) as run:
        read = ""
        while not re.search(r"[1-9]\d*/900", read):  # the bar has come to a step
            piece = run.stderr.read(1)
            assert piece, f"ended early: {read}"
            read += piece
        run.send_signal(signal.SIGTERM)
        error = run.communicate(timeout=60)[1]
    assert run.returncode == 143 and "Traceback" not in error
    done = steps_done()
    assert done and f"minidit: interrupted; step {done} of 900 is kept in {CHECKPOINT}" in error


def test_a_signal_where_nothing_would_be_lost_stops_at_once():
    keeper = Keeper(CHECKPOINT, None)
    with pytest.raises(Stopped) as stop:
        keeper.on_signal(signal.SIGTERM)  # no step is done yet
    assert stop.value.exit_code == 143
    keeper.done = 1
    keeper.on_signal(signal.SIGTERM)  # waits for the step
    with pytest.raises(Stopped):
        keeper.on_signal(signal.SIGTERM)  # the second does not


def test_signals_that_are_ignored_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and & have it
    try:
        with on_signals(lambda number: pytest.fail("called")):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# Disk and memory


@contextmanager
def files_of_at_most(size: int):
    """A disk that takes no file above this size: what a full one does, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".npz", ".png", ".gif", ".mp4"])
def test_a_disk_that_takes_no_video_keeps_the_latents_and_decode_finishes(capsys, suffix):
    output = f"v{suffix}"
    args = ["--size", "64x64", "--num-frames", "17", "--steps", "1", "--device", "cpu", "--quiet"]
    with files_of_at_most(16_000):  # latents fit
        assert generate(*args, "--output", output) == 2
    finish = f"python -m minidit decode {LATENTS} --output {output} finishes"
    reason = f"cannot write {output}: File too large; make room or choose another folder"
    assert capsys.readouterr().err == f"minidit: {reason}; latents are in {LATENTS}; {finish}\n"
    assert names() == [LATENTS.name]
    assert main(["decode", LATENTS.name, "--output", output, "--quiet"]) == 0
    assert Path(output).stat().st_size > 16_000  # so it was the video that did not fit


def test_a_disk_that_takes_no_checkpoint_does_not_end_the_run(capsys):
    args = ["--num-frames", "17", "--size", "64x64", "--output", "v.mp4", "--checkpoint-every", "2"]
    with files_of_at_most(32_000):  # latents and video fit
        assert generate(*SMALL, *args) == 0
    line = capsys.readouterr().err
    name = checkpoint_path(Path("v.mp4"))
    assert line.startswith(f"step 2 was not kept, and none will be: cannot write {name}: ")
    assert line.count("\n") == 1
    assert names() == ["v.mp4", "v.mp4.json"]


def test_latents_that_cannot_be_written_leave_the_checkpoint(capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minidit.generate.save", full)
    assert generate(*SMALL, "--output", "v.npz", "--checkpoint-every", "3") == 2
    line = capsys.readouterr().err
    assert "No space left on device" in line and f"step 6 of 8 is kept in {CHECKPOINT}" in line
    assert line.count("\n") == 1 and names() == [CHECKPOINT.name]


def test_running_out_of_memory_in_a_step_keeps_what_was_kept(capsys, monkeypatch):
    wants = Keeper.wants

    def out_of_memory(self, done):
        if done == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore lines")
        return wants(self, done)

    monkeypatch.setattr(Keeper, "wants", out_of_memory)
    assert generate(*SMALL, "--output", "v.npz", "--checkpoint-every", "2") == 2
    line = capsys.readouterr().err
    assert line.startswith("minidit: CUDA out of memory. Tried to allocate 20 GiB; try a smaller --size")
    assert f"step 4 of 8 is kept in {CHECKPOINT}" in line and line.count("\n") == 1


# What is found


def stop_after(step: int, *args: str) -> None:
    """Leave a checkpoint of v.npz."""
    with stopped_after(step - 1, signal.SIGTERM):
        assert generate(*SMALL, "--output", "v.npz", *args) == 143
    assert steps_done() == step


@pytest.mark.parametrize("every", ["-1", "few"])
def test_a_count_of_steps_is_wanted(capsys, every):
    try:
        assert generate(*SMALL, "--checkpoint-every", every) == 2
    except SystemExit as end:
        assert end.code == 2
    assert "--checkpoint-every" in capsys.readouterr().err and names() == []


@pytest.mark.parametrize(
    "args, message",
    [
        (["--seed", "1"], "is of another run (seed 0 instead of 1); leave out --resume to start anew"),
        (["--steps", "9"], "steps 8 instead of 9"),
        (["--dtype", "bf16"], "residual 'fp32' instead of 'bf16', dtype 'fp32' instead of 'bf16'"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(capsys, args, message):
    stop_after(3)
    capsys.readouterr()
    assert generate(*SMALL, "--output", "v.npz", "--resume", *args) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    assert steps_done() == 3


def test_a_run_without_resume_mentions_what_it_will_replace(capsys):
    stop_after(3)
    capsys.readouterr()
    assert generate(*SMALL, "--output", "v.npz") == 0
    line = f"found an unfinished run at step 3 of 8 ({CHECKPOINT}); --resume would continue it"
    assert line in capsys.readouterr().out.splitlines()
    assert names() == ["v.npz", "v.npz.json"]


def test_a_damaged_checkpoint_is_refused_and_a_new_run_replaces_it(capsys):
    CHECKPOINT.write_bytes(b"nothing")
    assert generate(*SMALL, "--output", "v.npz", "--resume") == 2
    assert f"{CHECKPOINT} cannot be read as an unfinished run" in capsys.readouterr().err
    assert generate(*SMALL, "--output", "v.npz") == 0
    assert names() == ["v.npz", "v.npz.json"]


def test_resume_without_anything_to_go_on_with_starts(capsys):
    assert generate(*SMALL, "--output", "v.npz", "--resume") == 0
    assert "going on" not in capsys.readouterr().out
    assert generate(*SMALL, "--output", "v.npz", "--resume") == 0  # and what is finished is finished
    assert capsys.readouterr().out == "1 of 1 videos are finished\n"


def test_a_prompt_file_goes_on_where_it_stopped(capsys, monkeypatch):
    Path("prompts.txt").write_text("a\nb\nc\n")
    args = ["generate", "--prompts", "prompts.txt", "--output", "out", *SMALL]
    real = Engine.decode_stream

    def decode(self, latents, **options):
        made.append(latents)
        if len(made) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, latents, **options)

    made: list = []
    monkeypatch.setattr(Engine, "decode_stream", decode)
    assert main(args) == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("minidit: out/001-b.mp4: CUDA out of memory.") and "decode out/001-b" in first
    assert last == "minidit: 1 of 3 videos failed: 001-b.mp4"
    assert sorted(path.name for path in Path("out").glob("*.mp4")) == ["000-a.mp4", "002-c.mp4"]
    times = Path("out/000-a.mp4").stat().st_mtime_ns
    assert main([*args, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 videos are finished" in out and "going on after step 8 of 8" in out
    assert len(made) == 4 and Path("out/000-a.mp4").stat().st_mtime_ns == times
    assert main([*args, "--seed", "9"]) == 0  # other settings: all of them
    assert len(made) == 7


def test_a_full_disk_ends_a_prompt_file(capsys, monkeypatch):
    Path("prompts.txt").write_text("a\nb\n")
    write = lambda path, *rest: path.parent.joinpath("no/such").touch()
    monkeypatch.setattr("minidit.video._write_mp4", write)
    assert main(["generate", "--prompts", "prompts.txt", "--output", "out", *SMALL]) == 2
    line = capsys.readouterr().err
    assert line.startswith("minidit: cannot write out/000-a.mp4: ") and line.count("\n") == 1


# What a checkpoint holds


METHODS_ALONE = [name for name, method in METHODS.items() if not method.profile and name != "replay"]


@pytest.mark.parametrize("cache", [*METHODS_ALONE, "adacache:scale=1", "mixcache:theta=9,impact=uniform"])
def test_every_method_that_needs_no_profile_goes_on_to_the_same_bits(engine, cache):
    settings = engine.resolve(PROMPT, Choices(width=32, height=32, num_frames=5, steps=10, cache=cache))
    text = engine.encode(settings)
    whole = engine.denoise(settings, text, keep=keep_after(7, settings))
    rest = engine.denoise(settings, text, start=load_checkpoint(CHECKPOINT, settings))
    done = lambda outcome: [(r.step, r.plan, r.values, r.gates) for r in outcome.records]
    assert torch.equal(rest.latents, whole.latents) and done(rest) == done(whole)


def test_a_run_that_is_ahead_of_its_numbers_is_kept_at_the_step_that_was_asked_for(engine, monkeypatch):
    monkeypatch.setattr("minidit.sampling.runs_ahead", lambda policy, x: True)  # as on a GPU
    choices = Choices(width=32, height=32, num_frames=5, steps=10, cache="fora")
    settings = engine.resolve(PROMPT, choices)
    text, kept = engine.encode(settings), []

    def keep(checkpoint):
        kept.append(len(checkpoint.snapshot.records))
        save_checkpoint(CHECKPOINT, settings, checkpoint)

    whole = engine.denoise(settings, text, keep=keep, wants=lambda done: done == 4)
    rest = engine.denoise(settings, text, start=load_checkpoint(CHECKPOINT, settings))
    assert kept == [4] and torch.equal(rest.latents, whole.latents)
    assert [r.plan for r in rest.records] == [r.plan for r in whole.records]


class Gated:
    """Has a gate in every step, and remembers what it was told."""

    def reset(self, run):
        self.told = []
        return (Need(GUIDED), Need(h(4)))

    def plan(self, step):
        keep = (GUIDED, h(4))
        gate = Gate(0, Measure(h(4)))
        return Plan(path=(Run(0, 4), Run(4)), keep=keep, measure=(Measure(GUIDED),), gate=gate)

    def decide(self, step, plan, value):
        self.told.append(value)
        return replace(plan, gate=None, label=f"gate {value:.3f}")

    def tell(self, step, values):
        self.told.append(values.get(Measure(GUIDED)))


def test_a_gated_policy_is_told_again_what_it_was_told(engine):
    settings = engine.resolve(PROMPT, Choices(width=32, height=32, num_frames=5, steps=5))
    text = engine.encode(settings)
    whole, again = Gated(), Gated()
    one = engine.denoise(settings, text, policy=whole, keep=keep_after(3, settings))
    other = engine.denoise(settings, text, policy=again, start=load_checkpoint(CHECKPOINT, settings))
    assert again.told == whole.told and len(whole.told) == 10
    assert torch.equal(one.latents, other.latents)


def test_a_policy_that_plans_otherwise_now_is_refused(engine):
    settings = engine.resolve(PROMPT, Choices(width=32, height=32, num_frames=5, steps=3))
    text, kept = engine.encode(settings), []
    engine.denoise(settings, text, keep=kept.append)
    records = [replace(kept[0].snapshot.records[0], plan=Plan(output=REUSE, label="step"))]
    start = replace(kept[0], snapshot=replace(kept[0].snapshot, records=records))
    with pytest.raises(ValueError, match="step 1 of the unfinished run was step, and would be full now"):
        engine.denoise(settings, text, start=start)


def test_a_checkpoint_comes_back_to_the_bit(engine):
    settings = engine.resolve(PROMPT, Choices())
    x, draw = torch.randn(1, 8, 5, 8, 8, generator=torch.Generator().manual_seed(0)), NoiseSource(3)
    draw((5,))
    measure = Measure(GUIDED, norm="moments")
    values = {measure: (0.1, 1 / 3), Measure(h(2)): float("inf")}
    record = Record(Step(0, 50, 999.0, 0.999, 4.0), Plan(keep=(GUIDED,)), values, 0.25, (0.125,))
    rings = {
        (h(2), "cond"): Ring(torch.randn(2, 1, 4, 3).bfloat16(), pushed=3),
        (GUIDED, ""): Ring(torch.ones(1, 2), pushed=0),  # written in place, never pushed
    }
    snapshot = Snapshot(x, State(x0=x, corrected=x * 2), rings, [record])
    save_checkpoint(CHECKPOINT, settings, Checkpoint(snapshot, draw.generator.get_state()))
    back = load_checkpoint(CHECKPOINT, replace(settings, model="moved/elsewhere"))
    assert torch.equal(back.snapshot.x, x) and back.snapshot.records == [record]
    assert torch.equal(back.snapshot.state.x0, x) and back.snapshot.state.x0_before is None
    assert torch.equal(back.snapshot.state.corrected, x * 2)
    for key, ring in rings.items():
        assert torch.equal(back.snapshot.rings[key].slots, ring.slots)
        assert back.snapshot.rings[key].pushed == ring.pushed
    again = NoiseSource(8)
    again.generator.set_state(back.generator)
    assert torch.equal(again((7,)), draw((7,)))


def test_a_solver_that_draws_at_every_step_goes_on_with_the_noise_that_follows(tmp_path):
    engine = Engine(save_tiny(tmp_path / "model", "5b", DPM), device="cpu", dtype="fp32")
    settings = engine.resolve(PROMPT, Choices(steps=4))
    text = engine.encode(settings)
    whole = engine.denoise(settings, text, keep=keep_after(2, settings))
    rest = engine.denoise(settings, text, start=load_checkpoint(CHECKPOINT, settings))
    assert settings.solver == "dpm" and torch.equal(rest.latents, whole.latents)


def test_checkpoints_take_less_than_a_hundredth_of_the_work(engine, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("minidit.checkpoint.time.perf_counter", lambda: clock[0])
    written = []

    def save(path, settings, checkpoint):
        clock[0] += 2.0  # seconds of writing
        written.append(clock[0])

    monkeypatch.setattr("minidit.checkpoint.save_checkpoint", save)
    settings = engine.resolve(PROMPT, Choices(steps=1000))
    keeper = Keeper(CHECKPOINT, settings)
    for done in range(1, 501):
        clock[0] += 3.0  # seconds of a step
        if keeper.wants(done):
            keeper.keep(None)
    assert written[0] == 14.0  # ten seconds of work, to the step
    gaps = [b - a for a, b in zip(written, written[1:], strict=False)]
    assert len(gaps) == 7 and min(gaps) >= 200


def test_a_checkpoint_is_named_after_the_whole_file_name():
    assert checkpoint_path(Path("a/v.mp4")) == Path("a/v.mp4.partial.safetensors")


def test_latents_without_a_trace_are_for_decode(capsys):
    stop_after(3)
    start = load_checkpoint(CHECKPOINT, Settings(**find(Path("v.npz")).settings))
    save_latents(LATENTS, start.snapshot.x, Settings(**find(Path("v.npz")).settings))
    capsys.readouterr()
    assert generate(*SMALL, "--output", "v.npz", "--resume") == 2
    assert f"{LATENTS} holds no trace; use it with python -m minidit decode" in capsys.readouterr().err


def test_latents_hold_the_trace_of_their_run(capsys, monkeypatch):
    def decode(self, latents, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "decode_stream", decode)
        assert generate(*SMALL, "--output", "v.npz") == 2
    assert load_latents(LATENTS)[1].steps == 8
    assert generate(*SMALL, "--output", "v.npz", "--resume", "--trace", "t.json") == 0
    assert "going on after step 8 of 8" in capsys.readouterr().out and len(steps_of("t.json")) == 8


@pytest.mark.parametrize("trace", [{"version": 1}, {"settings": 7, "total": {}}, []])
def test_latents_with_a_damaged_trace_are_for_decode_too(capsys, trace):
    stop_after(3)
    settings = Settings(**find(Path("v.npz")).settings)
    save_latents(LATENTS, load_checkpoint(CHECKPOINT, settings).snapshot.x, settings)
    data = load_file(LATENTS)
    text = {"settings": json.dumps(asdict(settings)), "trace": json.dumps(trace)}
    save_file(data, LATENTS, text)
    capsys.readouterr()
    assert generate(*SMALL, "--output", "v.npz", "--resume") == 2
    line = capsys.readouterr().err
    assert f"{LATENTS} holds a damaged trace" in line and line.count("\n") == 1
    assert main(["decode", str(LATENTS), "--output", "v.npz", "--quiet"]) == 0
