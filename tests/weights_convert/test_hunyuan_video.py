"""HunyuanVideo's files: every recorded name, both layouts, sharded or not, and the tokenizers."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidit.generate import Engine
from minidit.presets import PRESETS
from minidit.text.tokenizers import CLIPTokenizer
from tests.tensors import randn, rel
from tests.tiny_hunyuan_video import CONFIG, DIT, EXCERPTS, FOLDER, LLAMA, VAE, original, save_original, text
from weights_convert.checkpoint import MappedPickle
from weights_convert.convert import convert
from weights_convert.layouts import check_one, make_config, read_layout, recognise
from weights_convert.tokenizers import clip_rules

RELEASES = sorted(path.name for path in FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_original(tmp_path_factory.mktemp("hunyuan") / "ckpts")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory) -> SimpleNamespace:
    """The converted release and what the converter said."""
    folder, out, err = tmp_path_factory.mktemp("models") / "out", io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        manifest = convert(source, folder)
    return SimpleNamespace(folder=folder, manifest=manifest, out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def encoders(source, tmp_path) -> Path:
    """A copy of the text encoders alone."""
    for name in ("text_encoder", "text_encoder_2"):
        shutil.copytree(source / name, tmp_path / "ckpts" / name)
    return tmp_path / "ckpts"


@pytest.mark.parametrize("name", RELEASES)
def test_every_recorded_name_is_mapped(name):
    shapes, known = read_layout(FOLDER / name)
    assert check_one(shapes, known).startswith("ok, hunyuan_video")


@pytest.mark.parametrize("name", [name for name in RELEASES if "t2v" in name])
def test_shapes_alone_tell_the_config_of_the_release(name):
    shapes, _ = read_layout(FOLDER / name)
    assert "12,821,012,544 parameters" in check_one(shapes, {})


@pytest.mark.parametrize("name", RELEASES)
def test_the_config_of_a_release_is_the_presets(name):
    shapes, known = read_layout(FOLDER / name)
    layout = recognise(shapes)
    class_name, config = PRESETS["hunyuan-video"].components[layout.component]
    assert layout.class_name == class_name
    for values in (known | {"architectures": []}, {}):
        assert make_config(layout, shapes, values, {}) == config


@pytest.mark.parametrize("name", RELEASES)
def test_a_renamed_tensor_is_left_over(name):
    shapes, known = read_layout(FOLDER / name)
    last = [key for key in shapes if "mlp" in key or "conv2" in key][-1]
    if "layers.31" in last:  # not used, and so not missed
        last = last.replace("31", "29")
    shapes["something.else"] = shapes.pop(last)
    with pytest.raises(ValueError, match="1 tensors have no place .*something.else"):
        check_one(shapes, known)


def test_the_parts_of_linear1_and_linear2_go_where_they_belong(made):
    ours, theirs = load_file(made.folder / "transformer.safetensors"), original(DIT)
    fused, joined = (theirs[f"single_blocks.1.linear{i}.weight"] for i in (1, 2))
    assert torch.equal(torch.cat((ours["blocks.3.attn.qkv.weight"], ours["blocks.3.mlp.up.weight"])), fused)
    parts = ours["blocks.3.attn.out.weight"], ours["blocks.3.mlp.down.weight"]
    assert torch.equal(torch.cat(parts, dim=1), joined)
    assert torch.equal(ours["blocks.3.attn.out.bias"], theirs["single_blocks.1.linear2.bias"])
    assert "blocks.3.mlp.down.bias" not in ours
    assert torch.equal(ours["blocks.1.mod.text.weight"], theirs["double_blocks.1.txt_mod.linear.weight"])


def test_the_original_release_becomes_a_model_folder(made):
    manifest, preset = made.manifest, PRESETS["hunyuan-video"]
    assert manifest.family == "hunyuan_video" and manifest.preset is None
    assert (manifest.schedule, manifest.defaults) == (preset.schedule, preset.defaults)
    kinds = {name: part.class_name for name, part in manifest.components.items()}
    assert kinds == {
        "transformer": "HunyuanVideo", "text_encoder": "LlamaEncoder", "text_encoder_2": "CLIPText",
        "vae": "HunyuanVAE", "tokenizer": "LlamaTokenizer", "tokenizer_2": "CLIPTokenizer",
    }  # fmt: skip
    config = {name: part.config for name, part in manifest.components.items()}
    assert config["transformer"] == CONFIG
    assert (config["text_encoder"].depth, config["text_encoder"].kv_heads) == (2, 1)
    assert (config["vae"].groups, config["vae"].scale, config["text_encoder_2"].heads) == (2, 0.5, 2)
    assert "skipped" in made.err and "beside the same in safetensors" in made.err
    assert "run it with" in made.out


def test_what_is_dropped_has_its_reason(made):
    dropped = made.manifest.dropped
    assert dropped["model.layers.3.mlp.up_proj.weight"] == "behind the layer whose states are used"
    assert "model.layers.1.mlp.up_proj.weight" not in dropped
    for name in ("lm_head.weight", "logit_scale", "vision_model.post_layernorm.weight"):
        assert dropped[name]
    assert dropped["text_model.embeddings.position_ids"] == "the numbers from 0 on"


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_the_language_model_is_found_below_every_prefix(made, encoders, tmp_path, prefix):
    """As llava saves it in old and new versions, and bare."""
    source = encoders / "text_encoder"
    tensors, vocab = {}, json.loads((source / "tokenizer.json").read_text("utf-8"))
    for name, tensor in original(LLAMA, 2, n128320=len(vocab["model"]["vocab"])).items():
        tensors[name.replace("model.", prefix, 1) if name.startswith("model.") else name] = tensor
    tensors["model.vision_tower.a.weight"] = torch.ones(3)
    tensors["multi_modal_projector.linear_1.bias"] = torch.ones(3)
    for path in source.glob("model*"):
        path.unlink()
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "out")
    got, want = (load_file(folder / "text_encoder.safetensors") for folder in (tmp_path / "out", made.folder))
    assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


@torch.no_grad()
def test_the_diffusers_layout_in_shards_gives_the_same_numbers(encoders, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    oracle = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=1,
        num_single_layers=2, text_embed_dim=24, pooled_projection_dim=20, rope_axes_dim=(4, 14, 14),
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2
    ).eval()
    oracle.save_pretrained(encoders / "transformer", max_shard_size="400KB")
    vae.save_pretrained(encoders / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(encoders / "scheduler")
    assert len(list((encoders / "transformer").glob("*.safetensors"))) > 2
    manifest = convert(encoders, tmp_path / "out")
    assert (manifest.schedule.solver, manifest.schedule.sigma_grid, manifest.schedule.shift) == (
        "euler",
        "wan",
        5,
    )
    engine = Engine(tmp_path / "out", device="cpu", dtype="fp32")
    model, (states, pooled) = engine.module("transformer"), text(6, seed=1)
    x, t = randn(1, 4, 2, 4, 6), torch.tensor([600.0])
    got = model(x, t, model.prepare([(states, pooled)], (2, 4, 6), guidance=3.0))
    told = torch.tensor([3000.0])
    want = oracle(x, t, states[None], torch.ones(1, 6), pooled[None], told).sample
    assert rel(got, want) < 2e-5
    latents = randn(1, 4, 2, 3, 3)
    got, want = engine.module("vae").decode(latents), vae.decode(latents / 0.476986).sample
    assert rel(got, want) < 2e-5


def test_a_clip_tokenizer_is_made_of_its_parts(made, source, tmp_path):
    """From vocab.json and merges.txt, as diffusers saves it: the same ids as the whole file gives."""
    pytest.importorskip("tokenizers")
    rules = json.loads((made.folder / "tokenizer_2" / "tokenizer.json").read_text("utf-8"))
    assert rules["model"]["vocab"] == json.loads(
        (source / "text_encoder_2" / "vocab.json").read_text("utf-8")
    )
    whole = json.loads((EXCERPTS / "clip_excerpt.json").read_text("utf-8"))
    merges = "\n".join(" ".join(pair) for pair in whole["model"]["merges"])
    (tmp_path / "made.json").write_text(json.dumps(clip_rules(whole["model"]["vocab"], merges)))
    one, other = CLIPTokenizer(tmp_path / "made.json"), CLIPTokenizer(EXCERPTS / "clip_excerpt.json")
    for prompt in ("It's  THE robot's 12345th day", "très jolie!", " 雪山 "):
        assert one.encode(prompt, 77) == other.encode(prompt, 77)


def test_two_different_tokenizers_of_a_kind_are_refused(encoders, tmp_path):
    (encoders / "tokenizer").mkdir()
    rules = json.loads((encoders / "text_encoder" / "tokenizer.json").read_text("utf-8"))
    (encoders / "tokenizer" / "tokenizer.json").write_text(json.dumps(rules | {"version": "0.9"}))
    with pytest.raises(ValueError, match="are different tokenizers; move one of them away"):
        convert(encoders, tmp_path / "out")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"img_in.proj.weight": (3072, 33, 1, 2, 2)}, "image-to-video transformer .33 channels"),
        ({"guidance_in.mlp.0.weight": None, "guidance_in.mlp.0.bias": None, "guidance_in.mlp.2.weight": None,
          "guidance_in.mlp.2.bias": None}, "is not told its guidance"),
    ],
)  # fmt: skip
def test_relatives_that_cannot_be_run_are_refused_by_name(change, reason):
    shapes, known = read_layout(FOLDER / "hunyuanvideo-t2v-720p.original.json")
    changed = {name: shape for name, shape in (shapes | change).items() if shape is not None}
    with pytest.raises(ValueError, match=reason):
        check_one(changed, known)


def test_quantised_weights_are_refused(source, tmp_path):
    path = source / "hunyuan-video-t2v-720p" / "transformers" / "mp_rank_00_model_states.pt"
    weights = torch.load(path, weights_only=True)["module"]
    name = "double_blocks.0.img_mlp.fc1.weight"
    quantised = tmp_path / "mp_rank_00_model_states_fp8.pt"
    torch.save({"module": weights | {name: weights[name].to(torch.float8_e4m3fn)}}, quantised)
    with pytest.raises(ValueError, match=f"not float tensors .{name}.*get an unquantised release"):
        convert(quantised, tmp_path / "out")


def test_a_release_without_its_second_text_encoder_says_so(encoders, tmp_path, capsys):
    shutil.rmtree(encoders / "text_encoder_2")
    convert(encoders, tmp_path / "out")
    assert "SOURCE has no transformer, vae, text_encoder_2, tokenizer_2" in capsys.readouterr().out


def test_a_pickle_is_opened_again_once_much_of_it_was_read(source, monkeypatch):
    path, opened = source / "hunyuan-video-t2v-720p" / "vae" / "pytorch_model.pt", []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: opened.append(1) or load(*args, **kwargs))
    names, want = list(original(VAE, 1))[:20], original(VAE, 1)
    for limit, count in ((2**22, 1), (-1, 20)):
        opened.clear()
        monkeypatch.setattr(MappedPickle, "limit", limit)
        mapped = MappedPickle(path)
        assert all(torch.equal(mapped.read(name), want[name]) for name in names)
        assert len(opened) == count
