"""The benchmarks of whole runs: startup, memory, end to end, profiles, and where results go."""

import argparse
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common, end_to_end, memory, profile_step, startup
from benchmarks.models import demo_subject

DEMO = argparse.Namespace(
    model="demo", size=(None, None), num_frames=None, dtype="fp32", device="cpu", depth=None, tiled=False
)


def test_minidit_imports_neither_torch_nor_triton():
    found = startup.imported_by("import minidit, minidit.__main__")
    assert "minidit.presets" in found and not found & {"torch", "triton", "numpy"}


@pytest.mark.slow
def test_the_first_frame_is_timed_by_stage():
    found = startup.first_frame(threads=1)
    assert list(found)[0] == "torch" and list(found)[-1] == "decode the first frame"
    assert all(seconds > 0 for seconds in found.values())


def test_peaks_count_from_the_start_and_forget_at_reset():
    peak = memory.Peak("cpu")
    big = torch.ones(2**25)  # 128 MiB
    assert peak.read() >= 2**27
    del big
    peak.reset()
    assert peak.read() < 2**26


def test_a_stage_stands_beside_its_prediction():
    found = memory.run_stage("transformer with a cache", DEMO)
    row = memory.row_of("transformer with a cache", found, DEMO)
    assert found["cache"] > 80 * 192 * 4 * 3  # at least the three candidate states of one branch
    assert row["cache_mib"] == round(found["cache"] / 2**20, 2)
    assert row["weights_mib"] == pytest.approx(16.6, abs=0.1)  # 4.35 M parameters of four bytes


def test_methods_take_turns_and_the_first_round_is_not_counted():
    made = []
    makers = {name: lambda name=name: made.append(name) or {"name": name, "n": len(made)} for name in "ab"}
    found = end_to_end.alternate(makers, 2)
    assert "".join(made) == "ababab" and [run["n"] for run in found["a"]] == [3, 5]


@torch.inference_mode()
def test_a_whole_run_gives_stages_ratios_and_quality():
    args = end_to_end.parse_args(
        ["--device", "cpu", "--steps", "4", "--runs", "1", "--cache", "mixcache:impact=uniform,theta=inf"]
    )
    plain, cached = end_to_end.run(args)
    assert (plain["cache"], plain["macs_ratio"]) == ("none", "1.000x")
    assert all(plain[f"{stage}_s"] > 0 for stage in end_to_end.STAGES) and "psnr" not in plain
    assert float(cached["macs_ratio"][:-1]) > 1 and 0 < cached["psnr"] < 99 and cached["cache_mib"] > 0


@torch.inference_mode()
def test_a_profile_has_the_top_kernels_and_their_sum():
    found, seconds = profile_step.trace(demo_subject("cpu", "fp32"), compiled=False)
    rows = profile_step.rows_of(found, seconds, False, 3)
    assert len(rows) == 5 and any("addmm" in row["kernel"] or "linear" in row["kernel"] for row in rows[:3])
    assert sum(row["ms"] for row in rows[:4]) == pytest.approx(rows[4]["ms"], abs=0.01)


def test_results_of_a_card_lie_in_its_folder_below_out(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    path = common.write_results("kernels", "a command", [{"ms": 1.0}], "cuda:0")
    assert path == tmp_path / "nvidia-h200" / "kernels.json"
    assert json.loads(path.read_text())["rows"] == [{"ms": 1.0}]
    assert common.write_results("kernels", "a command", [], "cpu").parent == tmp_path


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(common.os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    monkeypatch.setattr(common.os, "cpu_count", lambda: 2)
    assert common.busy() == "the machine was busy: load 9.0 on 2 cores"
    monkeypatch.setattr(common, "os", SimpleNamespace(getloadavg=lambda: (0.5, 0, 0), cpu_count=lambda: 2))
    assert common.busy() == ""


def test_gpu_md_and_gpu_sh_have_the_same_steps():
    folder = Path(common.__file__).parent
    script = folder / "gpu.sh"
    usage = subprocess.run(["bash", script, "?"], capture_output=True, text=True)
    steps = set(re.search(r"\[(.+)\]", usage.stderr)[1].split("|"))
    told = set(re.findall(r"benchmarks/gpu\.sh (\w+)", (folder / "gpu.md").read_text()))
    assert usage.returncode == 2 and steps == told
    named = set(re.findall(r"bench (\w+)", script.read_text()))
    assert named and all((folder / f"{name}.py").is_file() for name in named)
