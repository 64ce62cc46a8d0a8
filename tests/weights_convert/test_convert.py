import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidit import weights
from minidit.models.wan import Wan
from minidit.presets import PRESETS, WAN21_MEAN, ScheduleConfig
from minidit.text.t5 import T5Encoder
from minidit.vae.wan import WanVAE
from minidit.weights import load_into, read_manifest
from tests.weights_convert.tiny import (
    LAYOUTS,
    UMT5,
    UNIPC_JSON,
    VAE,
    WAN,
    original,
    repackaged,
    save_diffusers,
    save_original,
    save_sharded,
)
from weights_convert.__main__ import main
from weights_convert.checkpoint import Checkpoint
from weights_convert.convert import Found, convert, describe, read_schedule
from weights_convert.layouts import make_config, read_layout, recognise
from weights_convert.names import Fit

CLASSES = {"transformer": Wan, "text_encoder": T5Encoder, "vae": WanVAE}


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(folder / f"{name}.safetensors") for name in CLASSES}


def load(folder: Path, name: str) -> torch.nn.Module:
    with torch.device("meta"):
        module = CLASSES[name](read_manifest(folder).components[name].config)
    return load_into(module, folder, name, device="cpu", dtype=torch.float32)


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_the_original_release_converts_and_loads(tmp_path):
    manifest = convert(save_original(tmp_path / "in"), tmp_path / "out")
    assert list(manifest.components) == ["transformer", "text_encoder", "vae", "tokenizer"]
    assert read_manifest(tmp_path / "out", verify=True) == manifest
    wan, up = load(tmp_path / "out", "transformer"), original(WAN)
    assert_same({"weight": wan.blocks[1].mlp.up.weight.data}, {"weight": up["blocks.1.ffn.0.weight"]})
    q, k, v = (up[f"blocks.1.self_attn.{x}.weight"] for x in "qkv")
    assert_same({"qkv": wan.blocks[1].attn.qkv.weight.data}, {"qkv": torch.cat([q, k, v])})
    kv = torch.cat([up["blocks.0.cross_attn.k.bias"], up["blocks.0.cross_attn.v.bias"]])
    assert_same({"kv": wan.blocks[0].cross.kv.bias.data}, {"kv": kv})
    assert_same({"patch": wan.patch_in.weight.data}, {"patch": up["patch_embedding.weight"].reshape(48, 64)})
    assert_same({"mod": wan.head.mod.data}, {"mod": up["head.modulation"][0]})
    t5, up = load(tmp_path / "out", "text_encoder"), original(UMT5)
    q, k, v = (up[f"blocks.0.attn.{x}.weight"] for x in "qkv")
    assert_same({"qkv": t5.blocks[0].attn.qkv.weight.data}, {"qkv": torch.cat([q, k, v])})
    vae, up = load(tmp_path / "out", "vae"), original(VAE)
    gamma = up["decoder.upsamples.12.residual.3.gamma"].reshape(
        4
    )  # level 3, block 0: three levels of 3 + 1 before
    assert_same({"norm": vae.decoder.levels[3].blocks[0].norm2.weight.data}, {"norm": gamma})
    conv = up["encoder.downsamples.5.time_conv.weight"]
    assert_same({"conv": vae.encoder.levels[1].down.time_conv.weight.data}, {"conv": conv})


def test_both_layouts_give_the_same_tensors(tmp_path):
    convert(save_original(tmp_path / "original"), tmp_path / "a")
    convert(save_diffusers(tmp_path / "diffusers"), tmp_path / "b")
    for name, tensors in tensors_of(tmp_path / "a").items():
        assert_same(tensors, tensors_of(tmp_path / "b")[name])


@pytest.mark.parametrize("kind", ["shards", "pth", "bin"])
def test_the_form_of_the_files_does_not_matter(tmp_path, kind):
    source, tensors = tmp_path / "in", original(UMT5)
    if kind == "shards":
        save_sharded(tensors, source)
    else:
        source.mkdir()
        torch.save(tensors, source / f"model.{kind}")
    convert(source, tmp_path / "out")
    up = load_file(tmp_path / "out" / "text_encoder.safetensors")
    assert_same({"o": up["blocks.1.attn.out.weight"]}, {"o": tensors["blocks.1.attn.o.weight"]})
    assert up["blocks.1.attn.qkv.weight"].shape == (96, 32)


def test_dtypes_are_kept_unless_one_is_asked_for(tmp_path):
    tensors = original(VAE)
    mixed = {n: t.bfloat16() if n.endswith("weight") else t for n, t in tensors.items()}
    save_file(mixed, tmp_path / "vae.safetensors")
    convert(tmp_path / "vae.safetensors", tmp_path / "keep")
    kept = load_file(tmp_path / "keep" / "vae.safetensors")
    assert kept["quant.weight"].dtype == torch.bfloat16 and kept["quant.bias"].dtype == torch.float32
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        convert(tmp_path / "vae.safetensors", tmp_path / name, dtype=name)
        cast = load_file(tmp_path / name / "vae.safetensors")
        assert_same(cast, {n: t.to(dtype) for n, t in kept.items()})


def test_values_beyond_fp16_are_not_turned_into_infinities(tmp_path):
    tensors = original(VAE)
    tensors["conv1.bias"][3] = 1e5
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="conv1.bias has values beyond the range of fp16"):
        convert(tmp_path / "vae.safetensors", tmp_path / "out", dtype="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vae.safetensors"]


def test_config_json_decides_what_shapes_cannot_tell(tmp_path):
    a = convert(save_original(tmp_path / "original"), tmp_path / "a").components
    b = convert(save_diffusers(tmp_path / "diffusers"), tmp_path / "b").components
    assert a["transformer"].config.heads == b["transformer"].config.heads == 3
    assert a["transformer"].config.text_len == 24 and b["transformer"].config.text_len == 512
    assert a["text_encoder"].config.max_distance == 128 and b["text_encoder"].config.max_distance == 64
    assert a["vae"].config.mean == WAN21_MEAN and b["vae"].config.mean == (0.25,) * 16


def test_what_no_file_tells_is_asked_for(tmp_path):
    save_file(original(WAN), tmp_path / "model.safetensors")  # width 48: not a multiple of the releases' 128
    with pytest.raises(ValueError, match="transformer.config lacks heads; give the values .* --config"):
        convert(tmp_path / "model.safetensors", tmp_path / "out")
    config = tmp_path / "config-file"
    config.write_text('{"components": {"transformer": {"config": {"heads": 2, "text_len": 7}}}}')
    manifest = convert(tmp_path / "model.safetensors", tmp_path / "out", config=config)
    assert manifest.components["transformer"].config.heads == 2
    assert manifest.components["transformer"].config.text_len == 7


def test_user_values_go_over_everything_else(tmp_path):
    config = tmp_path / "mine"
    config.write_text(json.dumps({"defaults": {"width": 64, "steps": 30}, "schedule": {"shift": 1.5}}))
    manifest = convert(save_diffusers(tmp_path / "in"), tmp_path / "out", config=config)
    assert manifest.schedule == ScheduleConfig("unipc", "diffusers", 1.5)
    assert (manifest.defaults.width, manifest.defaults.steps, manifest.defaults.height) == (64, 30, 480)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"default": {}}', "unknown keys default"),
        ('{"defaults": {"widht": 3}}', "unknown keys widht"),
        ('{"defaults": {"fps": "8"}}', "defaults.fps is '8', wanted a whole number"),
        ('{"components": {"vae": {"class": "x"}}}', "components.vae is"),
        ('{"components": {"vae_2": {"config": {}}}}', "names vae_2, but"),
        ('{"components": {"transformer": {"config": {"depht": 3}}}}', "unknown keys depht"),
        ('{"schedule": [1]}', "objects with named values"),
        ("[]", "wanted an object"),
        ("{", "is not JSON"),
    ],
)
def test_a_wrong_config_file_is_refused(tmp_path, capsys, content, message):
    (tmp_path / "mine.json").write_text(content)
    source = save_diffusers(tmp_path / "in")
    assert main([str(source), str(tmp_path / "out"), "--config", str(tmp_path / "mine.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_known_release_brings_its_own_settings(tmp_path):
    shapes, known = read_layout(LAYOUTS / "Wan2.1-T2V-1.3B.diffusers.json")
    layout = recognise(shapes)
    assert make_config(layout, shapes, known, {}) == PRESETS["wan2.1-t2v-1.3b"].transformer
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(UNIPC_JSON))
    config = PRESETS["wan2.1-t2v-1.3b"].transformer
    release = Found(layout, Checkpoint((), {}, {}), config, {}, Fit({}, {}, []))
    manifest = describe(tmp_path, {"transformer": release}, {}, {})
    assert manifest.preset == "wan2.1-t2v-1.3b"
    assert manifest.schedule == PRESETS["wan2.1-t2v-1.3b"].schedule
    assert manifest.defaults == PRESETS["wan2.1-t2v-1.3b"].defaults
    assert manifest.source.endswith("(diffusers; scheduler UniPCMultistepScheduler, shift 3.0)")


def test_scheduler_files_are_read():
    assert read_schedule({}, False) == ScheduleConfig()
    assert read_schedule(UNIPC_JSON, False) == ScheduleConfig("unipc", "diffusers", 3.0)
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7}
    assert read_schedule(euler, False) == ScheduleConfig("euler", "diffusers", 7.0)
    ddim = {"_class_name": "DDIMScheduler", "steps_offset": 1, "set_alpha_to_one": False}
    table = ScheduleConfig("ddim", "leading-1", 1.0, "linear", "epsilon", ends_clean=False)
    assert read_schedule(ddim, False) == table
    with pytest.raises(ValueError, match="scheduler PNDMScheduler is not known"):
        read_schedule({"_class_name": "PNDMScheduler"}, False)


def test_two_files_of_one_kind_are_both_named(tmp_path, capsys):
    source = save_original(tmp_path / "in")
    save_file(original(VAE), source / "vae.safetensors")
    assert main([str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "Wan2.1_VAE.pth and" in error and "vae.safetensors are both a vae" in error


def test_a_part_of_a_release_converts_and_says_what_is_missing(tmp_path, capsys):
    torch.save(original(VAE), tmp_path / "vae.pth")
    assert main([str(tmp_path / "vae.pth"), str(tmp_path / "out")]) == 0
    assert "SOURCE has no transformer, text_encoder, tokenizer" in capsys.readouterr().out
    assert list(read_manifest(tmp_path / "out").components) == ["vae"]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("blocks.1.ffn.2.bias"),
            "1 parameters are not in the checkpoint (blocks.1.mlp.down.bias)",
        ),
        (lambda t: t.update(extra=torch.ones(2)), "1 tensors have no place in the model (extra)"),
        (
            lambda t: t.update({"norm": torch.ones(2, dtype=torch.int8)}),
            "1 entries are not float tensors (norm)",
        ),
        (
            lambda t: t.update({"blocks.0.ffn.0.bias": torch.ones(3)}),
            "1 tensors do not fit (blocks.0.ffn.0.bias",
        ),
        (lambda t: t.pop("time_embedding.0.weight"), "a tensor that tells its size is missing"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_what_is_left_over(tmp_path, capsys, change, message):
    source, tensors = save_original(tmp_path / "in"), original(WAN)
    change(tensors)
    save_file(tensors, source / "diffusion_pytorch_model.safetensors")
    assert main([str(source), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_image_to_video_is_refused_by_name(tmp_path, capsys):
    tensors = repackaged(original(WAN), "dit")
    tensors["patch_embedding.weight"] = torch.randn(48, 36, 1, 2, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    assert main([str(tmp_path / "model.safetensors"), str(tmp_path / "out")]) == 2
    assert "image-to-video transformer (36 channels); minidit runs text-to-video" in capsys.readouterr().err


def test_unrecognised_files_are_named(tmp_path, capsys):
    save_file({"weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "skipped" in error and "lora.safetensors: not recognised" in error
    assert "holds nothing that is recognised" in error


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path, capsys):
    source, out = save_diffusers(tmp_path / "in"), tmp_path / "out"
    assert main([str(source), str(out)]) == 0
    (out / "note").touch()
    assert main([str(source), str(out)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err and (out / "note").exists()
    assert main([str(source), str(out), "--overwrite"]) == 0
    assert not (out / "note").exists() and read_manifest(out, verify=True)


def test_debug_shows_where_an_error_comes_from(tmp_path):
    with pytest.raises(OSError, match="does not exist"):
        main([str(tmp_path / "nothing"), str(tmp_path / "out"), "--debug"])


def test_layouts_are_checked_without_weights(capsys):
    assert main(["--check-layout", str(LAYOUTS / "Wan2.1_VAE.original.json")]) == 0
    assert main(["--check-layout", str(LAYOUTS / "wan.keymap.json")]) == 2
    assert "wan.keymap.json maps names to names" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(tmp_path, capsys, monkeypatch):
    source = save_original(tmp_path / "in")
    header, calls = weights._header, []

    def interrupted(entries):
        calls.append(1)
        if len(calls) == 2:  # the first component is written, the second has begun
            raise KeyboardInterrupt
        return header(entries)

    monkeypatch.setattr(weights, "_header", interrupted)
    assert main([str(source), str(tmp_path / "out")]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_source_inside_out_is_not_overwritten(tmp_path, capsys):
    source = save_original(tmp_path / "in")
    (tmp_path / "model.json").touch()
    assert main([str(source), str(tmp_path), "--overwrite"]) == 2
    assert "lies in" in capsys.readouterr().err and source.exists()


def test_help_does_not_import_torch():
    code = "import sys, weights_convert.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


PEAK = """
import sys
from pathlib import Path
import torch
from weights_convert.convert import convert
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
with torch.device("meta"):
    torch.nn.Embedding(3, 4), torch.nn.Linear(3, 4)  # the first use imports 150 MB of torch
before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype=sys.argv[3])
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name, dtype", [("t5.safetensors", "keep"), ("t5.pth", "bf16")])
def test_memory_holds_about_one_tensor(tmp_path, name, dtype):
    tensors = {f"blocks.0.attn.{x}.weight": torch.zeros(4096, 2048) for x in "qkv"}
    tensors |= {f"blocks.0.ffn.{x}.weight": torch.zeros(4096, 2048) for x in ("gate.0", "fc1")}
    tensors |= {f"blocks.0.{x}.weight": torch.zeros(2048, 4096) for x in ("attn.o", "ffn.fc2")}
    tensors |= {f"blocks.0.norm{i}.weight": torch.zeros(2048) for i in (1, 2)}
    tensors |= {"token_embedding.weight": torch.zeros(4096, 2048), "norm.weight": torch.zeros(2048)}
    tensors["blocks.0.pos_embedding.embedding.weight"] = torch.zeros(32, 64)
    assert sum(t.nbytes for t in tensors.values()) > 8 * 32 * 2**20
    torch.save(tensors, tmp_path / name) if name.endswith("pth") else save_file(tensors, tmp_path / name)
    args = [sys.executable, "-c", PEAK, tmp_path / name, tmp_path / "out", dtype]
    run = subprocess.run(args, capture_output=True, text=True, check=True)
    # MB: 34 and 50 measured, one source tensor and its cast; more for code that is imported on the way
    assert float(run.stdout.split()[-1]) < 110
