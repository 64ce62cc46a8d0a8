"""CogVideoX-2B at its real size, of random numbers: converts in little memory, loads, and makes a video."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from minidit.components import DEMO
from minidit.video import read_settings, read_video
from minidit.weights import Entry, read_manifest, write_tensors
from tests.test_real_size import MIB, folder, peak_of, random  # noqa: F401  a fixture is among them
from tests.weights_convert.test_cogvideox import layout, save_diffusers
from tests.weights_convert.tiny import LAYOUTS

LARGEST = 10240 * 4096 * 2  # bytes of the text encoder's MLP


def text_encoder() -> dict[str, list[int]]:
    """The text encoder with a vocabulary of 1000 and its first two layers; the widths stay."""
    shapes = json.loads((LAYOUTS / "umt5-xxl-encoder.transformers.json").read_text())
    later_table = re.compile(r"encoder\.block\.1\..*relative_attention_bias.*")
    kept = re.compile(r"encoder\.(block\.[01]|final_layer_norm)\..*")
    found = {n: s for n, s in shapes.items() if kept.fullmatch(n) and not later_table.fullmatch(n)}
    return found | {"shared.weight": [1000, 4096]}


def save_release(out: Path) -> Path:
    """A folder like the download: the transformer in two shards."""
    dit = layout("cogvideox-2b.diffusers")
    halves = [dict(list(dit.items())[i::2]) for i in range(2)]
    known = json.loads((LAYOUTS / "cogvideox" / "cogvideox-2b.diffusers.json").read_text())["__about__"]
    vae_known = json.loads((LAYOUTS / "cogvideox" / "cogvideox-vae.diffusers.json").read_text())["__about__"]
    files = {f"transformer/model-0000{i + 1}-of-00002.safetensors": half for i, half in enumerate(halves)}
    files["vae/model.safetensors"] = layout("cogvideox-vae.diffusers")
    files["text_encoder/model.safetensors"] = text_encoder()
    for name, shapes in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        entries = [
            Entry(n, tuple(s), torch.bfloat16, lambda n=n, s=s: (random(n, s),)) for n, s in shapes.items()
        ]
        write_tensors(out / name, entries)
    (out / "transformer" / "config.json").write_text(json.dumps(known["hyper_parameters"]))
    (out / "vae" / "config.json").write_text(json.dumps(vae_known["hyper_parameters"]))
    (out / "tokenizer").mkdir()
    shutil.copyfile(DEMO / "tokenizer" / "spiece.model", out / "tokenizer" / "spiece.model")
    return out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_real_size_release_converts_loads_and_makes_a_video(folder):  # noqa: F811
    tiny, source, model = save_diffusers(folder / "tiny"), save_release(folder / "release"), folder / "model"
    baseline = peak_of("weights_convert.__main__", str(tiny), str(folder / "tiny-model"))
    extra = peak_of("weights_convert.__main__", str(source), str(model)) - baseline
    print(f"conversion: {extra / MIB:.0f} MiB above {baseline / MIB:.0f}, largest {LARGEST / MIB:.0f}")
    assert extra < 2.5 * LARGEST  # a tensor and the pages of the file it is read from
    manifest = read_manifest(model)
    assert manifest.preset == "cogvideox-2b"
    shutil.rmtree(source)

    flags = ["--size", "64x48", "--num-frames", "9", "--steps", "1", "--dtype", "bf16", "--device", "cpu"]
    output = folder / "noise.npz"
    files = ["--model", str(model), "--output", str(output), "--quiet"]
    peak = peak_of("minidit.__main__", "generate", "a red fox in the snow", *flags, *files)
    print(f"generation: {peak / MIB:.0f} MiB")
    frames, fps = read_video(output)
    assert frames.shape == (9, 48, 64, 3) and fps == 8
    assert frames.std() > 1  # noise, not one colour
    settings = read_settings(output)
    assert (settings["dtype"], settings["flow_shift"], settings["solver"]) == ("bf16", 3.0, "ddim")
    assert peak < 6 * 2**30  # the transformer's 3.4 GB once, not twice
