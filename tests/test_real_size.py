"""A checkpoint of the real size, of random numbers: converts in little memory, loads, and makes a video."""

import json
import math
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minidit.components import DEMO
from minidit.video import read_settings, read_video
from minidit.weights import Entry, read_manifest, write_tensors
from tests.weights_convert.tiny import LAYOUTS, save_original

MIB = 2**20
PEAK = (
    "\nprint('peak', next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
)


def layout(name: str) -> dict[str, list[int]]:
    """Names and shapes of a release's file."""
    shapes = json.loads((LAYOUTS / f"{name}.original.json").read_text())
    return {name: shape for name, shape in shapes.items() if name != "__about__"}


def two_layers(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The text encoder with a vocabulary of 1000 and its first two layers; the widths stay."""
    kept = {n: s for n, s in shapes.items() if not re.match(r"blocks\.([2-9]|\d\d)\.", n)}
    return kept | {"token_embedding.weight": [1000, 4096]}


def random(name: str, shape: list[int]) -> Tensor:
    """Numbers that keep activations finite, the same in every run."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 100
    is_gain = re.search(r"norm.*\.weight|gamma", name)
    return (1 + 0.1 * noise if is_gain else noise * fan_in**-0.5).bfloat16()


def save_release(folder: Path) -> Path:
    """A folder like the download: safetensors, two pickles, the tokenizer."""
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    entries = [
        Entry(name, tuple(shape), torch.bfloat16, lambda name=name, shape=shape: (random(name, shape),))
        for name, shape in layout("Wan2.1-T2V-1.3B").items()
    ]
    write_tensors(folder / "diffusion_pytorch_model.safetensors", entries)
    for file, shapes in (
        ("models_t5_umt5-xxl-enc-bf16.pth", two_layers(layout("umt5-xxl-encoder"))),
        ("Wan2.1_VAE.pth", layout("Wan2.1_VAE")),
    ):
        torch.save({name: random(name, shape) for name, shape in shapes.items()}, folder / file)
    shutil.copyfile(DEMO / "tokenizer" / "spiece.model", folder / "google" / "umt5-xxl" / "spiece.model")
    return folder


def peak_of(module: str, *args: str) -> int:
    """Run a command in a process of its own -> the most memory it had, in bytes."""
    code = f"import sys; from {module} import main; assert main(sys.argv[1:]) == 0{PEAK}"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return int(done.stdout.split("peak")[-1]) * 1024


@pytest.fixture
def folder(tmp_path):
    """A folder that is emptied at once: pytest keeps the folders of three runs, 8 GB each here."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_real_size_release_converts_loads_and_makes_a_video(folder):
    tiny, source, model = save_original(folder / "tiny"), save_release(folder / "release"), folder / "model"
    baseline = peak_of("weights_convert.__main__", str(tiny), str(folder / "tiny-model"))
    extra = peak_of("weights_convert.__main__", str(source), str(model)) - baseline
    largest = 10240 * 4096 * 2  # bytes of the text encoder's MLP
    print(f"conversion: {extra / MIB:.0f} MiB above {baseline / MIB:.0f}, largest tensor {largest / MIB:.0f}")
    assert extra < 2.5 * largest  # a tensor and the pages of the file it is read from
    manifest = read_manifest(model)
    assert manifest.preset == "wan2.1-t2v-1.3b"
    assert sum(f.bytes for part in manifest.components.values() for f in part.files) > 3.5e9

    flags = ["--size", "128x128", "--num-frames", "17", "--steps", "2", "--dtype", "bf16", "--device", "cpu"]
    output = folder / "noise.npz"
    files = ["--model", str(model), "--output", str(output), "--quiet"]
    peak = peak_of("minidit.__main__", "generate", "a red fox in the snow", *flags, *files)
    print(f"generation: {peak / MIB:.0f} MiB")
    frames, fps = read_video(output)
    assert frames.shape == (17, 128, 128, 3) and fps == 16
    assert frames.std() > 1  # noise, not one colour
    settings = read_settings(output)
    assert (settings["dtype"], settings["flow_shift"], settings["sigma_grid"]) == ("bf16", 5.0, "wan")
    assert peak < 6.5 * 2**30  # weights of 2.8 GB, the file pages they come from, the VAE; measured 5.6
