"""Samples of many prompts, named as VBench looks for them."""

from pathlib import Path

import numpy as np
import pytest

from minidit.__main__ import main
from minidit.generate import Engine
from minidit.video import read_settings, read_video

SMALL = [
    "--size",
    "32x32",
    "--num-frames",
    "5",
    "--steps",
    "2",
    "--device",
    "cpu",
    "--quiet",
    "--no-text-cache",
]
PROMPTS = ["a red circle, moving up", "A white star doesn't move.", "a red circle, moving up"]


@pytest.fixture
def calls(monkeypatch) -> list:
    """(prompt, seed) of every run that is denoised."""
    seen, denoise = [], Engine.denoise
    keep = lambda self, settings, *args, **options: (
        seen.append((settings.prompt, settings.seed)) or denoise(self, settings, *args, **options)
    )
    monkeypatch.setattr(Engine, "denoise", keep)
    return seen


@pytest.fixture
def words(tmp_path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return ["generate", *SMALL, "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out")]


def test_files_are_named_as_vbench_looks_for_them_and_nothing_lies_beside(words, tmp_path, calls, capsys):
    words += ["--samples", "2", "--layout", "vbench", "--seed", "7"]
    assert main(words) == 0
    names = {f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(2)}
    assert {
        path.name for path in (tmp_path / "out").iterdir()
    } == names  # no sidecars: listed first, they mislead it
    # seed + 1000 * prompt + sample; a prompt that is there twice is one
    assert calls == [(PROMPTS[0], 7), (PROMPTS[0], 8), (PROMPTS[1], 1007), (PROMPTS[1], 1008)]
    path = tmp_path / "out" / f"{PROMPTS[1]}-1.mp4"
    assert read_settings(path)["seed"] == 1008
    frames = [read_video(path.with_name(f"{PROMPTS[1]}-{i}.mp4"))[0] for i in range(2)]
    assert not np.array_equal(*frames)

    path.unlink()
    assert main(words) == 0
    assert calls[4:] == [(PROMPTS[1], 1008)] and "3 of 4 videos are finished" in capsys.readouterr().out

    assert main([*words, "--guidance-scale", "2"]) == 2  # not a mixture of two runs
    assert "guidance_scale 4.0, now it is 2.0; name another --output" in capsys.readouterr().err
    assert len(calls) == 5


def test_numbered_samples_have_a_name_each(words, tmp_path, calls):
    Path(words[words.index("--prompts") + 1]).write_text(PROMPTS[0])
    assert main([*words, "--samples", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == [
        "000-a-red-circle-moving-up-0.mp4",
        "000-a-red-circle-moving-up-1.mp4",
    ]
    assert [seed for _, seed in calls] == [0, 1]


@pytest.mark.parametrize("prompt", ["a circle and/or a square", "x" * 230], ids=["slash", "long"])
def test_a_prompt_that_cannot_be_a_file_name_is_refused(words, prompt, calls, capsys):
    Path(words[words.index("--prompts") + 1]).write_text(f"fine\n{prompt}\n")
    assert main([*words, "--layout", "vbench"]) == 2
    said = capsys.readouterr().err
    assert "prompt 2, " in said and "--layout numbered" in said
    assert calls == []


@pytest.mark.parametrize("flags", [["--samples", "2"], ["--layout", "vbench"]], ids=["samples", "layout"])
def test_samples_and_layouts_are_for_prompt_files(flags, capsys):
    assert main(["generate", "a red circle", *flags]) == 2
    assert "give --prompts FILE" in capsys.readouterr().err


def test_no_samples_are_refused(words, capsys):
    assert main([*words, "--samples", "0"]) == 2
    assert "wanted 1 or more" in capsys.readouterr().err
