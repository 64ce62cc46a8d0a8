"""Both layouts of CogVideoX: every recorded name is mapped, and both give the same model."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidit.components import DEMO
from minidit.generate import Engine
from minidit.presets import PRESETS
from tests.weights_convert.tiny import LAYOUTS, save_sharded
from weights_convert.convert import convert
from weights_convert.layouts import check_one, make_config, read_layout, recognise

FOLDER = LAYOUTS / "cogvideox"
RELEASES = sorted(p.name for p in FOLDER.glob("*.json") if "keymap" not in p.name and "i2v" not in p.name)
PREFIX = "model.diffusion_model."

# recorded size -> tiny size
DIT = {1920: 64, 11520: 384, 7680: 256, 3840: 128, 5760: 192, 23040: 768, 4096: 24, 512: 16}
DIT_JSON = {
    "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "in_channels": 16,
    "text_embed_dim": 24, "max_text_seq_length": 12, "time_embed_dim": 16, "norm_eps": 1e-5,
    "use_rotary_positional_embeddings": True, "sample_height": 6, "sample_width": 8, "patch_size_t": None,
}  # fmt: skip
VAE_JSON = {
    "block_out_channels": [4, 8, 8, 16], "latent_channels": 16, "layers_per_block": 1, "norm_num_groups": 2,
    "scaling_factor": 0.8, "norm_eps": 1e-6, "sample_height": 96, "sample_width": 80,
}  # fmt: skip
T5_JSON = {"d_model": 24, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 768}
DPM_JSON = {"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 1.0}


def layout(name: str) -> dict[str, list[int]]:
    shapes = json.loads((FOLDER / f"{name}.json").read_text())
    return {name: shape for name, shape in shapes.items() if name != "__about__"}


def random(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    """Gains near 1, all else small enough for finite activations."""
    noise = torch.randn(shape, generator=generator)
    is_gain = re.search(r"norm\w*\.weight|layer_norm\.weight", name) and len(shape) == 1
    return 1 + 0.1 * noise if is_gain else noise * (0.1 if len(shape) == 1 else noise[0].numel() ** -0.5)


def shrunk(shapes: dict[str, list[int]], sizes: dict[int, int]) -> dict[str, Tensor]:
    """Random tensors of a recorded layout at tiny widths, two blocks of the many."""
    generator = torch.Generator().manual_seed(1)
    kept = {n: s for n, s in shapes.items() if not re.match(r"transformer_blocks\.([2-9]|\d\d)\.", n)}
    head = lambda name: "norm_q" in name or "norm_k" in name
    return {
        n: random(n, [32] if head(n) else [sizes.get(d, d) for d in s], generator) for n, s in kept.items()
    }


def vae_tensors() -> dict[str, Tensor]:
    """The recorded autoencoder at tiny widths and the least depth; 16 latent channels stay."""
    further = re.compile(r".*(down_blocks\.\d\.resnets\.[12]|up_blocks\.\d\.resnets\.[23])\.")
    shapes = {n: s for n, s in layout("cogvideox-vae.diffusers").items() if not further.match(n)}
    return shrunk(shapes, {128: 4, 256: 8, 512: 16})


def t5_tensors() -> dict[str, Tensor]:
    shapes = json.loads((LAYOUTS / "umt5-xxl-encoder.transformers.json").read_text())
    sizes, generator = {256384: 768, 4096: 24, 10240: 40, 64: 4}, torch.Generator().manual_seed(2)
    kept = re.compile(r"shared\.weight|encoder\.(block\.[01]|final_layer_norm)\..*")
    tensors = {}
    for name, shape in shapes.items():
        is_later_table = "relative_attention_bias" in name and not name.startswith("encoder.block.0.")
        if kept.fullmatch(name) and not is_later_table:
            shape = [sizes.get(n, n) for n in shape]
            if m := re.search(r"SelfAttention\.([qkvo])\.", name):
                shape = [24, 32] if m[1] == "o" else [32, 24]
            tensors[name] = random(name, shape, generator)
    return tensors


def to_sat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same transformer under SAT's names, by the recorded map and its rules."""
    keymap = json.loads((FOLDER / "cogvideox-dit.sat_keymap.json").read_text())
    found = {}
    for sat, sources in keymap.items():
        for i in range(2 if "{i}" in sat else 1):
            names = [name.replace("{i}", str(i)) for name, *_ in sources] if sat != "__about__" else []
            if not names or any(name not in tensors for name in names):
                continue
            parts = [tensors[name] for name in names]
            if "adaLN_modulations" in sat:
                first, second = (part.chunk(6) for part in parts)
                parts = [*first[:3], *second[:3], *first[3:], *second[3:]]
            found[PREFIX + sat.replace("{i}", str(i))] = torch.cat(parts)
    return found


def vae_to_sat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    keymap = json.loads((FOLDER / "cogvideox-vae.sat_keymap.json").read_text())
    return {sat: tensors[name] for sat, name in keymap.items() if sat != "__about__" and name in tensors}


def save_shared_parts(folder: Path, t5: str) -> None:
    """What both releases have in diffusers' form: the text encoder and its tokenizer."""
    save_sharded(t5_tensors(), folder / t5, count=2)
    (folder / t5 / "config.json").write_text(json.dumps(T5_JSON))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes((DEMO / "tokenizer" / "spiece.model").read_bytes())


def save_diffusers(folder: Path) -> Path:
    save_sharded(shrunk(layout("cogvideox-2b.diffusers"), DIT), folder / "transformer")
    (folder / "vae").mkdir()
    save_file(vae_tensors(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_shared_parts(folder, "text_encoder")
    (folder / "scheduler").mkdir()
    for path, content in (
        ("transformer/config.json", DIT_JSON),
        ("vae/config.json", VAE_JSON),
        ("scheduler/scheduler_config.json", DPM_JSON),
    ):
        (folder / path).write_text(json.dumps(content))
    return folder


def save_sat(folder: Path) -> Path:
    (folder / "transformer" / "1000").mkdir(parents=True)
    (folder / "vae").mkdir()
    module = to_sat(shrunk(layout("cogvideox-2b.diffusers"), DIT))
    module[f"{PREFIX}mixins.pos_embed.freqs_cos"] = torch.zeros(3)
    path = folder / "transformer" / "1000" / "mp_rank_00_model_states.pt"
    torch.save({"module": module, "dp_world_size": 1, "global_steps": 7}, path)
    state = vae_to_sat(vae_tensors()) | {"loss.logvar": torch.zeros(()), "loss.steps": torch.tensor(3)}
    torch.save({"epoch": 1, "state_dict": state}, folder / "vae" / "3d-vae.pt")
    save_shared_parts(folder, "t5-v1_1-xxl")
    return folder


def test_both_layouts_convert_to_the_same_model_and_it_makes_a_video(tmp_path):
    convert(save_diffusers(tmp_path / "hub"), tmp_path / "a")
    override = {
        "components": {
            "transformer": {
                "config": {
                    "heads": 2,
                    "positions": "rope-cropped",
                    "text_len": 12,
                    "base_grid": [3, 4],
                }
            },
            "vae": {"config": {"scale": 0.8, "groups": 2, "tile": [48, 40]}},
        },
        "schedule": {"solver": "dpm", "shift": 1.0, "dynamic_guidance": True},
    }
    (tmp_path / "config.json").write_text(json.dumps(override))
    manifest = convert(save_sat(tmp_path / "sat"), tmp_path / "b", config=tmp_path / "config.json")
    assert set(manifest.dropped) == {f"{PREFIX}mixins.pos_embed.freqs_cos", "loss.logvar", "loss.steps"}
    for name in ("transformer", "vae", "text_encoder"):
        a, b = (load_file(tmp_path / out / f"{name}.safetensors") for out in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    engines = [Engine(tmp_path / out, device="cpu", dtype="fp32") for out in "ab"]
    assert engines[0].manifest.components["transformer"].config.base_grid == (3, 4)
    choices = dict(width=64, height=48, num_frames=9, steps=3)
    videos = [engine.generate("a red circle", **choices) for engine in engines]
    assert torch.equal(videos[0].latents, videos[1].latents)
    assert videos[0].frames.shape == (9, 48, 64, 3) and videos[0].frames.std() > 1
    assert videos[0].settings.solver == "dpm" and videos[0].settings.dynamic_cfg


def test_what_no_file_of_sat_says_has_to_be_given(tmp_path):
    source = save_sat(tmp_path / "sat")
    positions = {"transformer": {"config": {"heads": 2, "positions": "rope"}}}
    vae = {"config": {"groups": 2}}
    config = tmp_path / "config.json"
    with pytest.raises(ValueError, match="transformer.config lacks positions"):
        convert(source, tmp_path / "out")
    config.write_text(json.dumps({"components": positions | {"vae": vae}}))
    with pytest.raises(ValueError, match="3d-vae.pt does not say scale, and SOURCE is no known release"):
        convert(source, tmp_path / "out", config=config)


@pytest.mark.parametrize("name", RELEASES)
def test_every_recorded_name_is_mapped(name):
    shapes, known = read_layout(FOLDER / name)
    assert check_one(shapes, known).startswith("ok, cogvideox")
    assert check_one(shapes, {}).startswith("ok, cogvideox")


@pytest.mark.parametrize("name", RELEASES)
def test_a_renamed_tensor_is_left_over_on_both_sides(name):
    shapes, known = read_layout(FOLDER / name)
    last = list(shapes)[-1]
    shapes["something.else"] = shapes.pop(last)
    with pytest.raises(
        ValueError, match=r"1 tensors have no place .*something.else.*; 1 parameters are not in"
    ):
        check_one(shapes, known)


@pytest.mark.parametrize(
    "name, preset",
    [
        ("cogvideox-2b.diffusers", "cogvideox-2b"),
        ("cogvideox-2b.original", "cogvideox-2b"),
        ("cogvideox1.5-5b.diffusers", "cogvideox1.5-5b"),
        ("cogvideox1.5-5b.original", "cogvideox1.5-5b"),
    ],
)
def test_a_release_is_known_by_its_config(name, preset):
    shapes, known = read_layout(FOLDER / f"{name}.json")
    found = recognise(shapes)
    known = known if isinstance(known, dict) else {}
    assert make_config(found, shapes, known, {}) == PRESETS[preset].transformer


@pytest.mark.parametrize("form", ["(D, C * 4)", "conv"])
def test_patch_weights_of_either_form_are_read(form):
    shapes, _ = read_layout(FOLDER / "cogvideox-2b.original.json")
    if form != "conv":
        shapes[f"{PREFIX}mixins.patch_embed.proj.weight"] = (1920, 64)
    assert make_config(recognise(shapes), shapes, {}, {}) == PRESETS["cogvideox-2b"].transformer
    assert check_one(shapes, {}).startswith("ok, cogvideox")


def test_image_to_video_is_refused_by_name():
    shapes, known = read_layout(FOLDER / "cogvideox-5b-i2v.diffusers.json")
    with pytest.raises(ValueError, match="CogVideoX image-to-video transformer; minidit runs text-to-video"):
        check_one(shapes, known)
