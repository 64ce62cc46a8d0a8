"""Latte and Open-Sora: every recorded name is mapped, and folders like the releases make models that run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidit.components import DEMO
from minidit.generate import Engine
from minidit.presets import PRESETS
from tests.recordings.base import open_recording
from tests.recordings.latte import kl_vae, latte_transformer, t5_encoder
from tests.weights_convert.tiny import LAYOUTS
from weights_convert.convert import convert
from weights_convert.layouts import check_one, make_config, read_layout, recognise

RELEASES = sorted(path for name in ("latte", "open_sora") for path in (LAYOUTS / name).glob("*.json"))
DDIM_JSON = {"_class_name": "DDIMScheduler", "timestep_spacing": "leading", "steps_offset": 0}
T5_JSON = {"d_model": 48, "d_kv": 16, "num_heads": 4, "num_layers": 3, "vocab_size": 900}

# recorded sizes -> tiny ones, of the transformer and of the autoencoder
DIT_SIZES = {1152: 48, 3456: 144, 4608: 96, 6912: 288, 2304: 96, 4096: 24, 256: 16, 300: 12, 72: 12}
VAE_SIZES = {128: 4, 256: 8, 512: 16, 1024: 32}


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.name)
def test_every_recorded_name_is_mapped(path):
    shapes, known = read_layout(path)
    assert check_one(shapes, known).startswith("ok, ")
    assert check_one(shapes, {}).startswith("ok, ")  # shapes alone tell the config of a release


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.name)
def test_a_renamed_or_misshapen_tensor_is_named(path):
    shapes, known = read_layout(path)
    last = list(shapes)[len(shapes) // 2]
    odd = dict(shapes) | {last: (*shapes[last][:-1], shapes[last][-1] + 1)}
    with pytest.raises(ValueError, match=f"1 tensors do not fit .{re.escape(last)} gives"):
        check_one(odd, known)
    shapes["something.else"] = shapes.pop(last)
    with pytest.raises(ValueError, match="1 tensors have no place .*something.else"):
        check_one(shapes, known)


@pytest.mark.parametrize(
    "name, preset, component",
    [
        ("latte/Latte-1.transformer.original", "latte-1", "transformer"),
        ("latte/Latte-1.vae.diffusers", "latte-1", "vae"),
        ("latte/Latte-1.vae_temporal_decoder.diffusers", "latte-1", "vae_2"),
        ("latte/Latte-1.text_encoder.transformers", "latte-1", "text_encoder"),
        ("open_sora/OpenSora-STDiT-v3.original", "open-sora-1.2", "transformer"),
        ("open_sora/OpenSora-VAE-v1.2.original", "open-sora-1.2", "vae"),
    ],
)
def test_the_releases_have_their_presets_configs(name, preset, component):
    shapes, known = read_layout(LAYOUTS / f"{name}.json")
    config = make_config(recognise(shapes), shapes, known, {})
    assert config == PRESETS[preset].components[component][1]


def save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Two pickled shards and their index, as DeepFloyd's T5 is published."""
    folder.mkdir(parents=True)
    names, weight_map = sorted(tensors), {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in names[i::2]}, folder / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save_part(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def legacy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that autoencoders had before diffusers 0.15."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    rename = lambda name: next((name.replace(k, v) for k, v in old.items() if k in name), name)
    return {rename(name): t for name, t in tensors.items()}


@pytest.mark.parametrize("vae_names", [lambda tensors: tensors, legacy], ids=["today", "legacy"])
@torch.no_grad()
def test_a_folder_like_latte_becomes_the_same_modules(goldens, tmp_path, vae_names):
    names = "latte_t2v_dit", "latte_vae_kl", "t5_v1_1_encoder"
    dit, vae, text = (open_recording(goldens(name)) for name in names)
    source = tmp_path / "Latte-1"
    stray = {"caption_projection.y_embedding": torch.zeros(120, 44)}
    save_part(source / "transformer", dit.weights() | stray, dit.config["constructor"])
    save_part(source / "vae", vae_names(vae.weights()), vae.config["constructor"])
    save_shards(text.weights(), source / "text_encoder")
    (source / "text_encoder" / "config.json").write_text(json.dumps(T5_JSON))
    (source / "scheduler").mkdir()
    (source / "scheduler" / "scheduler_config.json").write_text(json.dumps(DDIM_JSON))
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "spiece.model").write_bytes((DEMO / "tokenizer" / "spiece.model").read_bytes())
    manifest = convert(source, tmp_path / "out")
    assert manifest.family == "latte" and manifest.schedule == PRESETS["latte-1"].schedule
    assert manifest.defaults == PRESETS["latte-1"].defaults
    assert set(manifest.dropped) == {"caption_projection.y_embedding", "encoder.embed_tokens.weight"}
    engine = Engine(tmp_path / "out", device="cpu", dtype="fp32")
    wanted = latte_transformer(dit), kl_vae(vae), t5_encoder(text)
    for component, want in zip(("transformer", "vae", "text_encoder"), wanted, strict=True):
        got = engine.module(component)
        assert got.config == want.config
        for name, tensor in want.state_dict().items():
            assert torch.equal(got.state_dict()[name], tensor), name


def shrunk(path: Path, sizes: dict[int, int], seed: int) -> dict[str, Tensor]:
    """Random tensors of a recorded layout at tiny widths, two blocks of the many."""
    shapes, _ = read_layout(path)
    generator = torch.Generator().manual_seed(seed)
    deep = re.compile(r"(spatial|temporal)_blocks\.([2-9]|\d\d)\.")
    tensors = {}
    for name, shape in shapes.items():
        if deep.match(name):
            continue
        noise = torch.randn([sizes.get(n, n) for n in shape], generator=generator)
        is_gain = "norm" in name and name.endswith("weight") and noise.ndim == 1
        tensors[name] = 1 + 0.1 * noise if is_gain else noise * max(1, noise[0].numel()) ** -0.5
    return tensors


def test_a_folder_like_open_sora_becomes_a_model_that_runs(goldens, tmp_path):
    source, text = tmp_path / "Open-Sora", open_recording(goldens("t5_v1_1_encoder"))
    dit = shrunk(LAYOUTS / "open_sora" / "OpenSora-STDiT-v3.original.json", DIT_SIZES, 1)
    vae = shrunk(LAYOUTS / "open_sora" / "OpenSora-VAE-v1.2.original.json", VAE_SIZES, 2)
    encoder = {name: t[..., :24] if t.shape[-1] == 48 else t for name, t in text.weights().items()}
    narrow = lambda name, t: t[:24] if "wo" in name or name.endswith(".o.weight") else t
    save_part(source / "STDiT-v3", dit, {"input_sq_size": 512, "num_heads": 4})
    groups = {"vae_2d": {"norm_num_groups": 4}, "vae_temporal": {"num_groups": 4}}
    save_part(source / "VAE-v1.2", vae, {"micro_frame_size": 17, **groups})
    save_shards({n: narrow(n, t).contiguous() for n, t in encoder.items()}, source / "t5-v1_1-xxl")
    (source / "t5-v1_1-xxl" / "config.json").write_text(json.dumps(T5_JSON | {"d_model": 24}))
    (source / "t5-v1_1-xxl" / "spiece.model").write_bytes((DEMO / "tokenizer" / "spiece.model").read_bytes())
    manifest = convert(source, tmp_path / "out")
    assert manifest.family == "open_sora" and manifest.defaults == PRESETS["open-sora-1.2"].defaults
    assert set(manifest.dropped) == {"rope.freqs", "scale", "shift", "encoder.embed_tokens.weight"}
    engine = Engine(tmp_path / "out", device="cpu", dtype="fp32")
    ours = engine.module("transformer").state_dict()
    assert torch.equal(
        ours["blocks.1.t_cross.kv.weight"], dit["temporal_blocks.1.cross_attn.kv_linear.weight"]
    )
    assert torch.equal(ours["null_text"], dit["y_embedder.y_embedding"])
    up = engine.module("vae").state_dict()["time_decoder.levels.0.up.weight"]  # levels run from the coarsest
    assert torch.equal(up, vae["temporal_vae.decoder.conv_blocks.2.conv.weight"])
    video = engine.generate("a red circle", width=24, height=16, num_frames=17, steps=2)
    assert video.frames.shape == (17, 16, 24, 3) and np.ptp(video.frames) > 0
    assert load_file(tmp_path / "out" / "vae.safetensors").keys() == engine.module("vae").state_dict().keys()
