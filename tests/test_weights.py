import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minidit.models.wan import Wan
from minidit.presets import Defaults, ScheduleConfig, WanConfig
from minidit.weights import (
    Entry,
    config_from_json,
    load_into,
    new_folder,
    read_manifest,
    save_model_folder,
    write_manifest,
    write_tensors,
)

CONFIG = WanConfig(
    width=32, mlp_width=40, heads=2, depth=2, channels=4, text_width=16, text_len=8, freq_width=16
)
DEFAULTS = Defaults(
    width=64, height=64, num_frames=17, steps=30, guidance_scale=4.0, fps=8, negative_prompt="色"
)


@pytest.fixture
def wan() -> Wan:
    torch.manual_seed(0)
    return Wan(CONFIG)


@pytest.fixture
def folder(tmp_path, wan):
    (tmp_path / "spiece.model").write_bytes(b"pieces")
    parts = {
        "transformer": ("Wan", CONFIG, wan),
        "tokenizer": ("SentencePiece", None, tmp_path / "spiece.model"),
    }
    save_model_folder(
        tmp_path / "model",
        family="wan",
        components=parts,
        schedule=ScheduleConfig("euler", "diffusers", 3.0),
        defaults=DEFAULTS,
        source="a test",
    )
    return tmp_path / "model"


def meta(config: WanConfig = CONFIG) -> Wan:
    with torch.device("meta"):
        return Wan(config)


def load(folder, module: nn.Module, **options) -> nn.Module:
    return load_into(module, folder, "transformer", **({"device": "cpu", "dtype": torch.float32} | options))


def edit(folder, change) -> None:
    content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "model.json").write_text(json.dumps(content), encoding="utf-8")


def test_a_saved_model_comes_back_bit_for_bit(folder, wan):
    loaded = load(folder, meta())
    for name, tensor in wan.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_the_manifest_comes_back_as_it_was_written(folder):
    manifest = read_manifest(folder, verify=True)
    assert manifest.components["transformer"].config == CONFIG
    assert manifest.schedule == ScheduleConfig("euler", "diffusers", 3.0)
    assert manifest.defaults == DEFAULTS
    assert manifest.components["tokenizer"].files[0].name == "tokenizer/spiece.model"
    assert (folder / "tokenizer" / "spiece.model").read_bytes() == b"pieces"
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest


def test_keep_fp32_goes_by_whole_parts_of_a_name(folder):
    loaded = load(folder, meta(), dtype=torch.bfloat16, keep_fp32=("mod", "time_mlp"))
    kept = {name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert kept == {n for n in loaded.state_dict() if n.endswith(".mod") or n.startswith("time_mlp.")}
    assert loaded.time_mod.weight.dtype == torch.bfloat16  # "mod" is not a whole part of time_mod


def test_loaded_weights_outlive_their_file(folder, wan):
    loaded = load(folder, meta())
    (folder / "transformer.safetensors").write_bytes(b"")
    assert torch.equal(loaded.patch_in.weight, wan.patch_in.weight)


def test_names_and_shapes_that_do_not_fit_are_listed(folder):
    with pytest.raises(ValueError) as error:
        load(folder, meta(replace(CONFIG, depth=3, mlp_width=48)))
    message = str(error.value)
    assert "transformer.safetensors does not fit WanConfig(width=32, mlp_width=40" in message
    assert "21 missing (blocks.2.mod, " in message
    assert "6 of the wrong shape (blocks.0.mlp.up.weight is (40, 32), wanted (48, 32), " in message
    assert message.endswith("convert it with python -m weights_convert SOURCE OUT") and "\n" not in message
    with pytest.raises(ValueError, match=r"21 unexpected \(blocks.1"):
        load(folder, meta(replace(CONFIG, depth=1)))


def test_a_buffer_that_no_file_fills_is_an_error(folder):
    module = meta()
    module.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(TypeError, match=r"no file fills \(table\)"):
        load(folder, module)


def test_an_absent_component_is_an_error(folder):
    with pytest.raises(ValueError, match="has no vae, only transformer, tokenizer"):
        load_into(meta(), folder, "vae", device="cpu", dtype=torch.float32)


def test_a_truncated_file_is_found_by_its_size_and_a_changed_one_by_its_hash(folder):
    path = folder / "transformer.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert read_manifest(folder)
    with pytest.raises(ValueError, match="transformer.safetensors is damaged"):
        read_manifest(folder, verify=True)
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=f"has {len(data) - 100} bytes instead of {len(data)}"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(ValueError, match="transformer.safetensors is missing"):
        load(folder, meta())


def test_a_file_of_the_right_size_that_is_no_safetensors_is_refused(folder):
    path = folder / "transformer.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(folder, meta())


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "C:/x", "..\\x"])
def test_files_outside_the_folder_are_refused(folder, name):
    edit(folder, lambda c: c["components"]["tokenizer"]["files"][0].update(name=name))
    with pytest.raises(ValueError, match="outside the folder; refused"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format=2), "has format 2, wanted 1"),
        (lambda c: c.pop("defaults"), "KeyError.'defaults'"),
        (lambda c: c.update(components=[]), "does not have the keys"),
        (lambda c: c["components"].update(audio={}), "unknown component 'audio'"),
        (lambda c: c["components"]["tokenizer"].update({"class": "Wan3"}), "has class 'Wan3'"),
        (
            lambda c: c["components"]["transformer"]["config"].update(depth=0),
            "depth is 0, wanted a whole number",
        ),
        (lambda c: c["components"]["transformer"]["config"].update(patch=[1, 2]), r"patch is \[1, 2\]"),
        (lambda c: c["components"]["transformer"]["config"].update(heads=3), "does not split into 3 heads"),
        (lambda c: c["schedule"].update(shift="high"), "schedule.shift is 'high', wanted a number"),
        (lambda c: c["defaults"].update(seed=1), "unknown keys seed"),
        (lambda c: c["defaults"].pop("steps"), "lacks steps"),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        read_manifest(folder)


def test_a_folder_without_a_manifest_is_not_a_model(tmp_path):
    with pytest.raises(ValueError, match="is not a model folder"):
        read_manifest(tmp_path)
    (tmp_path / "model.json").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="is not JSON"):
        read_manifest(tmp_path)


def test_whole_numbers_are_floats_where_floats_are_wanted():
    assert config_from_json(ScheduleConfig, {"shift": 3}, "x") == ScheduleConfig(shift=3.0)


def test_written_tensors_are_read_by_safetensors_whatever_their_order(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "half": torch.randn(3, generator=generator).half(),  # 6 bytes: would misalign what follows
        "scalar": torch.randn((), generator=generator),
        "brain": torch.randn(2, 5, generator=generator).bfloat16(),
        "double": torch.randn(4, 1, generator=generator).double(),
        "strided": torch.randn(6, 4, generator=generator).t(),
    }
    entries = [Entry(n, tuple(t.shape), t.dtype, lambda t=t: (t,)) for n, t in tensors.items()]
    fused = torch.randn(6, 4, generator=generator)
    entries.append(Entry("fused", (6, 4), torch.bfloat16, lambda: fused.chunk(3)))
    file = write_tensors(tmp_path / "a.safetensors", entries)
    read = load_file(tmp_path / "a.safetensors")
    for name, tensor in (tensors | {"fused": fused.bfloat16()}).items():
        assert torch.equal(read[name], tensor), name
    assert file.bytes == (tmp_path / "a.safetensors").stat().st_size
    save_file(read, tmp_path / "b.safetensors", metadata={"format": "pt"})
    # not a byte more than the library itself writes
    assert file.bytes == (tmp_path / "b.safetensors").stat().st_size


def test_parts_that_do_not_add_up_are_an_error(tmp_path):
    entry = Entry("fused", (6, 4), torch.float32, lambda: (torch.ones(3, 4), torch.ones(2, 4)))
    with pytest.raises(ValueError, match="fused: its parts do not add up"):
        write_tensors(tmp_path / "a.safetensors", [entry])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_appears_complete_or_not_at_all(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise error
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_model_folders_are_replaced_and_only_when_asked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as folder:  # an empty folder is as good as none
        (folder / "model.json").write_text("old")
    with pytest.raises(OSError, match="exists and is not an empty folder.*--overwrite"), new_folder(out):
        pass
    with pytest.raises(ValueError), new_folder(out, overwrite=True):
        raise ValueError("on the way")
    assert (out / "model.json").read_text() == "old"
    with new_folder(out, overwrite=True) as folder:
        (folder / "model.json").write_text("new")
    assert (out / "model.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / "model.json").rename(out / "precious.txt")
    with pytest.raises(OSError, match="is not a model folder"), new_folder(out, overwrite=True):
        pass
    assert (out / "precious.txt").exists()


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    with new_folder(tmp_path / "out"):
        with pytest.raises(OSError, match="out.partial exists"), new_folder(tmp_path / "out"):
            pass
