"""The command line: files it makes, files it leaves, and what it says when it refuses."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minidit import __version__
from minidit.__main__ import main, slug
from minidit.components import DEMO
from minidit.generate import Engine, load_latents
from minidit.presets import PRESETS
from minidit.video import read_settings, read_video

PROMPT = "a red circle moves left to right"
SMALL = ["--size", "32x32", "--num-frames", "5", "--steps", "2", "--device", "cpu", "--quiet"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs in a folder of their own, on as many threads as the test before."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def names() -> list[str]:
    """What lies in the current folder."""
    return sorted(path.name for path in Path().iterdir())


def generate(*args: str) -> int:
    return main(["generate", *args, *SMALL])


def frames_of(path: str) -> np.ndarray:
    return read_video(path)[0]


def assert_same_video(one: str, other: str) -> None:
    """Equal frames; of mp4 files nearly, as x264 does not always make the same file of the same frames."""
    difference = np.abs(frames_of(one).astype(int) - frames_of(other))
    assert difference.mean() < 1 if one.endswith(".mp4") else difference.max() == 0


def refused(capsys, *args: str) -> str:
    """Run a command that is to fail with exit code 2 and one line on stderr; returns the line."""
    assert main(list(args)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("minidit: ") and "Traceback" not in error
    return error


def python(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **options)


# What generate makes


def test_every_format_holds_the_video_its_settings_and_a_sidecar(capsys):
    outputs = ["v.mp4", "v.gif", "v.png", "v.npz"]
    for output in outputs:
        assert generate(PROMPT, "--output", output) == 0
    assert names() == sorted(outputs + [f"{output}.json" for output in outputs])
    exact = frames_of("v.npz")
    assert exact.shape == (5, 32, 32, 3)
    assert frames_of("v.mp4").shape == frames_of("v.gif").shape == exact.shape
    near = np.abs(frames_of("v.mp4").astype(int) - exact).mean()
    assert near < 4  # of 255: chroma is kept at half the size, which 32 pixels show
    for output in outputs:
        inside, beside = read_settings(output), json.loads(Path(f"{output}.json").read_text())
        assert inside == beside
        assert (inside["prompt"], inside["minidit"], inside["steps"]) == (PROMPT, __version__, 2)


def test_resolved_settings_and_stages_are_printed(capsys):
    assert generate(PROMPT, "--output", "v.npz", "--negative-prompt", "blur", "--seed", "7") == 0
    out = capsys.readouterr().out
    for text in (
        PROMPT,
        "'blur'",
        "32x32, 5 frames at 8 fps",
        "seed 7",
        "2 steps",
        "guidance 4",
        "fp32 on cpu",
    ):
        assert text in out
    assert re.search(r"v\.npz  text [\d.]+ s  load [\d.]+ s  denoise [\d.]+ s  decode [\d.]+ s", out)


def test_progress_is_shown_unless_quiet(capsys):
    assert main(["generate", PROMPT, *SMALL[:-1], "--output", "v.npz"]) == 0
    loud = capsys.readouterr().err
    assert "denoise: 100%" in loud and "2/2" in loud and "decode: 100%" in loud
    assert generate(PROMPT, "--output", "v.npz") == 0
    assert capsys.readouterr().err == ""


def test_without_output_the_file_is_named_after_the_prompt():
    assert generate("A red circle, moving: left/right!") == 0
    assert names() == ["a-red-circle-moving-left-right.mp4", "a-red-circle-moving-left-right.mp4.json"]


def test_an_empty_prompt_is_a_prompt():
    assert generate("") == 0
    assert names() == ["video.mp4", "video.mp4.json"]
    assert read_settings("video.mp4")["prompt"] == ""


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("A  b_c", "a-b-c"),
        ("圆 移动", "圆-移动"),
        ("../..", "video"),
        ("x" * 99, "x" * 60),
        ("a/b\\c:d", "a-b-c-d"),
    ],
)
def test_file_names_from_prompts_are_safe(prompt, name):
    assert slug(prompt) == name


def test_a_file_of_prompts_makes_a_video_each(capsys):
    Path("prompts.txt").write_text(f"{PROMPT}\n\n  a blue square grows  \n", encoding="utf-8")
    assert generate("--prompts", "prompts.txt", "--output", "out", "--seed", "5") == 0
    files = ["out/000-a-red-circle-moves-left-to-right.mp4", "out/001-a-blue-square-grows.mp4"]
    assert sorted(str(p) for p in Path("out").iterdir()) == sorted(files + [f"{f}.json" for f in files])
    assert [read_settings(f)["seed"] for f in files] == [5, 1005]
    assert [read_settings(f)["prompt"] for f in files] == [PROMPT, "a blue square grows"]
    out = capsys.readouterr().out
    assert f"[1/2] {files[0]}" in out and f"[2/2] {files[1]}" in out
    assert generate("a blue square grows", "--seed", "1005", "--output", "alone.mp4") == 0
    assert_same_video("alone.mp4", files[1])  # its neighbours do not matter


def test_flags_may_be_written_in_diffusers_words():
    theirs = [
        "--width",
        "48",
        "--height=32",
        "--num_frames",
        "5",
        "--num_inference_steps",
        "2",
        "--guidance_scale=3",
    ]
    rest = ["--device", "cpu", "--quiet", "--output", "my_video.npz", "--negative_prompt=snake_case"]
    assert main(["generate", "a_b", *theirs, *rest]) == 0
    settings = read_settings("my_video.npz")
    size = [settings[name] for name in ("width", "height", "num_frames", "steps", "guidance_scale")]
    assert size == [48, 32, 5, 2, 3.0]
    assert (settings["prompt"], settings["negative_prompt"]) == ("a_b", "snake_case")


# --from


@pytest.mark.parametrize("source", ["first.mp4", "first.npz", "first.npz.json"])
def test_from_makes_the_same_video_again(source):
    flags = (
        "--seed 3 --negative-prompt blur --solver euler --flow-shift 2.5 --fps 5 --dtype bf16 --residual fp32"
    )
    first, again = source.removesuffix(".json"), f"again{Path(source.removesuffix('.json')).suffix}"
    assert generate(PROMPT, "--output", first, *flags.split()) == 0
    assert main(["generate", "--from", source, "--output", again, "--quiet"]) == 0
    assert_same_video(again, first)
    assert read_settings(again) == read_settings(first)


def test_from_takes_flags_that_are_given_over_those_of_the_file():
    assert generate(PROMPT, "--output", "first.npz", "--seed", "3") == 0
    args = ["--from", "first.npz", "a blue square", "--seed", "4", "--output", "other.npz", "--quiet"]
    assert main(["generate", *args]) == 0
    first, other = read_settings("first.npz"), read_settings("other.npz")
    assert {n for n in first if first[n] != other[n]} == {"prompt", "seed"}


def test_from_refuses_a_video_of_another_model(capsys):
    other = Path("other")
    shutil.copytree(DEMO, other)
    manifest = json.loads((other / "model.json").read_text())
    manifest["components"]["vae"]["files"][0]["sha256"] = "0" * 64
    (other / "model.json").write_text(json.dumps(manifest))
    assert generate(PROMPT, "--model", "other", "--output", "v.npz") == 0
    settings = read_settings("v.npz")
    for model in ("demo", None):  # the folder is another by now; no model was noted
        Path("v.npz.json").write_text(
            json.dumps({"minidit": "1"} if model is None else settings | {"model": model})
        )
        line = refused(capsys, "generate", PROMPT, "--from", "v.npz.json")
        assert "v.npz.json was made by model" in line and "name a model with --model" in line
    assert main(["generate", "--from", "v.npz", "--model", "demo", "--output", "w.npz", "--quiet"]) == 0
    assert read_settings("w.npz") | {"model": "other", "model_id": settings["model_id"]} == settings


def test_from_refuses_a_file_without_settings(capsys):
    Path("v.json").write_text("{}")
    assert "v.json carries no minidit settings" in refused(capsys, "generate", "--from", "v.json")
    assert "no such file" in refused(capsys, "generate", "--from", "nothing.mp4")


# Failures leave the latents, and nothing half-written


@pytest.fixture
def out_of_memory(monkeypatch):
    def decode(self, latents, *, tiled=False, progress=False):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB\nmore lines")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "decode_stream", decode)
        yield patch


def test_latents_survive_a_failing_decode_and_decode_finishes(capsys, out_of_memory):
    assert generate(PROMPT, "--output", "v.npz") == 2
    line = capsys.readouterr().err
    assert line.startswith("minidit: CUDA out of memory.") and "try a smaller --size" in line
    finish = "python -m minidit decode v.latents.safetensors --output v.npz finishes"
    assert line.endswith(f"; latents are in v.latents.safetensors; {finish}\n") and line.count("\n") == 1
    assert names() == ["v.latents.safetensors"]
    out_of_memory.undo()
    assert main(["decode", "v.latents.safetensors", "--output", "v.npz", "--quiet"]) == 0
    assert generate(PROMPT, "--output", "undisturbed.npz") == 0
    assert_same_video("v.npz", "undisturbed.npz")
    assert read_settings("v.npz") == read_settings("undisturbed.npz")
    assert main(["decode", "v.latents.safetensors", "--quiet"]) == 0
    assert Path("v.mp4").is_file() and capsys.readouterr().out.splitlines()[-1] == "v.mp4"


def test_latents_survive_a_failing_write(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("minidit.video._write_npz", lambda path, *rest: path.write_bytes(b"half") and 1 / 0)
        with pytest.raises(ZeroDivisionError):  # a bug of ours is not dressed up
            generate(PROMPT, "--output", "v.npz")
    assert names() == ["v.latents.safetensors"]


def test_an_older_video_survives_a_failing_decode(out_of_memory):
    Path("v.npz").write_bytes(b"older")
    assert generate(PROMPT, "--output", "v.npz") == 2
    assert Path("v.npz").read_bytes() == b"older"


def test_interrupting_says_so_in_one_line_and_keeps_the_latents(capsys, monkeypatch):
    def interrupt(self, latents, *, tiled=False, progress=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "decode_stream", interrupt)
    assert generate(PROMPT, "--output", "v.npz") == 130
    line = capsys.readouterr().err
    assert line.startswith("minidit: interrupted; latents are in v.latents") and line.count("\n") == 1
    assert names() == ["v.latents.safetensors"]


def test_interrupting_before_anything_is_made_leaves_nothing(capsys, monkeypatch):
    def interrupt(self, runs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "encode_all", interrupt)
    assert generate(PROMPT, "--output", "v.npz") == 130
    assert capsys.readouterr().err == "minidit: interrupted; nothing half-written was left\n"
    assert names() == []


@pytest.mark.parametrize("text", ["[enforce fail at alloc_cpu.cpp:121] can't allocate memory: you tried", ""])
def test_running_out_of_memory_says_what_to_try(capsys, monkeypatch, text):
    def encode_all(self, runs):
        raise RuntimeError(text) if text else MemoryError

    monkeypatch.setattr(Engine, "encode_all", encode_all)
    line = refused(capsys, "generate", PROMPT, *SMALL)
    assert "memory" in line and "try a smaller --size" in line
    assert names() == []


# Refusals


@pytest.mark.parametrize(
    "args, message",
    [
        (["--size", "60x32"], "width=60 is not 16n; nearest are 48 and 64"),
        (["--num-frames", "50"], "num_frames=50 is not 4n+1; nearest are 49 and 53"),
        (["--output", "v.avi"], "unknown output format '.avi' in v.avi; choose one of .mp4"),
        (["--output", "missing/v.mp4"], "folder missing does not exist"),
        (["--model", "missing"], "missing is not a model folder"),
        (["--cache", "everything"], "unknown cache 'everything'; choose one of none"),
        (["--solver", "heun"], "unknown solver 'heun'; choose one of unipc"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'; choose one of fp32, bf16, fp16"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["--attention", "cudnn"], "attention 'cudnn' cannot run here"),  # a forced choice does not fall back
        (["--prompts", "prompts.txt"], "give a prompt or --prompts FILE, not both"),
        (["--trace", "missing/t.json"], "cannot write missing/t.json: folder missing does not exist"),
        (["--timeline", "missing/t.png"], "cannot write missing/t.png: folder missing does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, args, message):
    before = names()
    assert message in refused(capsys, "generate", PROMPT, "--device", "cpu", "--steps", "2", "--quiet", *args)
    assert names() == before


def test_prompts_must_be_there(capsys):
    assert 'no prompt was given; example: python -m minidit generate "' in refused(capsys, "generate")
    Path("empty.txt").write_text("\n \n")
    assert "empty.txt holds no prompts" in refused(capsys, "generate", "--prompts", "empty.txt")
    assert "No such file" in refused(capsys, "generate", "--prompts", "missing.txt")
    Path("latin.txt").write_bytes(b"a caf\xe9")
    assert "latin.txt is not text in UTF-8" in refused(capsys, "generate", "--prompts", "latin.txt")
    Path("two.txt").write_text("a\nb\n")
    line = refused(capsys, "generate", "--prompts", "two.txt", "--trace", "t.json")
    assert "--trace writes the log of one video" in line


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="num_frames=50"):
        main(["generate", PROMPT, "--num-frames", "50", "--debug"])


@pytest.mark.parametrize(
    "args, message",
    [
        (["generate", PROMPT, "--colour", "red"], "unrecognized arguments: --colour red"),
        (["generate", "--prompt", PROMPT], "unrecognized arguments: --prompt"),  # no short form of --prompts
        (["generate", PROMPT, "--size", "big"], "'big' is not WIDTHxHEIGHT, such as 832x480"),
        (["generate", PROMPT, "--steps", "few"], "invalid int value: 'few'"),
        (["paint"], "invalid choice: 'paint'"),
        ([], "COMMAND"),
    ],
)
def test_unknown_flags_and_values_end_with_exit_code_2(capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        main(args)
    assert message in capsys.readouterr().err


# decode, models, inspect, help


def test_decode_refuses_what_is_not_latents_of_this_model(capsys, out_of_memory):
    assert "none.safetensors does not exist" in refused(capsys, "decode", "none.safetensors")
    assert generate(PROMPT, "--output", "v.npz") == 2
    capsys.readouterr()
    latents, settings = load_latents("v.latents.safetensors")
    changed = json.dumps(asdict(settings) | {"model_id": "0123"})
    save_file({"latents": latents}, "w.latents.safetensors", {"settings": changed})
    assert "is of model 0123; name its folder with --model" in refused(
        capsys, "decode", "w.latents.safetensors"
    )
    assert "unknown output format" in refused(capsys, "decode", "v.latents.safetensors", "--output", "v.avi")


def test_models_lists_the_releases(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)
    assert re.search(r"wan2.1-t2v-1.3b +wan +1536 x 30 +832x480 +81 +50", out)


@pytest.mark.parametrize(
    "args, lines",
    [
        ([], ["demo: 64x64, 17 frames, bf16", "per forward and branch"]),
        (
            ["--model", "wan2.1-t2v-14b", "--size", "832x480", "--num_frames", "81"],
            ["wan2.1-t2v-14b: 832x480, 81 frames, bf16", "transformer 14.288 B", "838.1 TMAC"],
        ),
        (["--model", "wan2.1-t2v-1.3b", "--dtype", "fp32"], ["832x480, 81 frames, fp32", "141.4 TMAC"]),
    ],
)
def test_inspect_tells_parameters_macs_and_memory(capsys, args, lines):
    assert main(["inspect", *args]) == 0
    out = capsys.readouterr().out
    assert all(line in out for line in [*lines, "memory by stage"])


def test_inspect_refuses_what_it_does_not_know(capsys):
    assert "unknown preset 'wan-2b'; choose one of wan2.1-t2v-1.3b" in refused(
        capsys, "inspect", "--model", "wan-2b"
    )
    assert "nearest are 48 and 64" in refused(capsys, "inspect", "--size", "50x64")
    assert "unknown dtype 'fp8'" in refused(capsys, "inspect", "--dtype", "fp8")


def test_help_and_models_answer_without_torch():
    code = """
import sys
from minidit.__main__ import main
for args in (["--help"], ["generate", "--help"], ["inspect", "--help"], ["--version"], ["models"]):
    try:
        main(args)
    except SystemExit as end:
        assert not end.code
print("loaded:", [name for name in ("torch", "numpy", "av") if name in sys.modules])
"""
    done = python("-c", code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "loaded: []"
    assert "--num-frames" in done.stdout and "--guidance-scale" in done.stdout


def test_the_module_runs_as_a_program():
    done = python("-m", "minidit", "generate", "--num-frames", "50", "a cat")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "minidit: num_frames=50 is not 4n+1; nearest are 49 and 53\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    run = subprocess.Popen(
        [sys.executable, "-m", "minidit", "caches"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait() == 141
