"""The whole run on the embedded model, at sizes that take a fraction of a second."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import minidit
from minidit.__main__ import main
from minidit.components import DEMO
from minidit.generate import Engine, load_latents, save_latents
from minidit.settings import Choices, Settings
from minidit.video import read_settings, read_video, to_frames
from tests.tensors import rel

PROMPT = "a red circle moves left to right"
SMALL = dict(width=32, height=32, num_frames=5, steps=3)
REL = 1e-4  # fp32 sums in another order, through every layer and step


def load() -> Engine:
    return minidit.load("demo", device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load()


@pytest.fixture(scope="module")
def video(engine):
    return engine.generate(PROMPT, **SMALL)


@pytest.fixture
def broken(engine):
    """Breaks a prediction: broken(step) makes all branches of that step, counted from 1, NaN."""
    head, handles = engine.module("transformer").head, []

    def break_at(step: int) -> None:
        calls = []

        def forward_hook(module, args, out):
            calls.append(out)
            return out * float("nan") if len(calls) == step else out

        handles.append(head.register_forward_hook(forward_hook))

    yield break_at
    for handle in handles:
        handle.remove()


def test_same_seed_gives_the_same_frames_to_the_bit(engine, video):
    for again in (engine.generate(PROMPT, **SMALL), load().generate(PROMPT, **SMALL)):
        assert torch.equal(again.latents, video.latents)
        assert np.array_equal(again.frames, video.frames)
        assert again.settings == video.settings


def test_a_video_has_the_size_that_was_asked_for(video):
    assert video.frames.shape == (5, 32, 32, 3) and video.frames.dtype == np.uint8
    assert video.latents.shape == (1, 8, 2, 4, 4) and video.latents.dtype == torch.float32
    assert set(video.seconds) == {"text", "denoise", "decode"} and min(video.seconds.values()) > 0


@pytest.mark.parametrize(
    "prompt, other",
    [
        (PROMPT, {"seed": 1}),
        ("a blue square grows", {}),
        ("", {}),
        (PROMPT, {"negative_prompt": "a blue square"}),
        (PROMPT, {"guidance_scale": 2.0}),
        (PROMPT, {"flow_shift": 5.0}),
        (PROMPT, {"solver": "euler"}),
        (PROMPT, {"solver": "dpm++"}),
        (PROMPT, {"sigma_grid": "diffusers"}),
        (PROMPT, {"steps": 4}),
    ],
)
def test_every_choice_changes_the_video(engine, video, prompt, other):
    changed = engine.generate(prompt, **SMALL | other)
    assert rel(changed.latents, video.latents) > 0.01
    assert changed.settings != video.settings


@pytest.mark.parametrize("other", [{"fps": 3.5}, {"attention": "math"}, {"residual": "fp32"}])
def test_other_choices_do_not_change_it(engine, video, other):
    same = engine.generate(PROMPT, **SMALL | other)
    assert rel(same.latents, video.latents) < REL


def test_another_thread_count_gives_the_same_video(engine):
    threads, videos = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            videos.append(engine.generate(PROMPT, **SMALL | {"width": 64, "height": 64, "steps": 2}))
    finally:
        torch.set_num_threads(threads)
    assert rel(videos[1].latents, videos[0].latents) < REL
    assert np.abs(videos[1].frames.astype(int) - videos[0].frames).max() <= 1


def test_batched_and_sequential_guidance_give_the_same_video(engine, video):
    batches = []
    hook = lambda module, args, out: batches.append(len(out))
    handle = engine.module("transformer").head.register_forward_hook(hook)
    settings = replace(video.settings, batched_guidance=False)
    latents = engine.denoise(settings, engine.encode(settings)).latents
    assert video.settings.batched_guidance and batches == [1, 1] * 3
    engine.denoise(video.settings, engine.encode(video.settings))
    handle.remove()
    assert batches[6:] == [2] * 3
    assert rel(latents, video.latents) < REL


def test_large_videos_run_one_branch_at_a_time(engine):
    sized = lambda **size: engine.resolve(PROMPT, Choices(**size)).batched_guidance
    assert sized(width=256, height=256, num_frames=61)  # 16 x 16 x 16 = 4096 tokens
    assert not sized(width=256, height=256, num_frames=65)


def test_without_guidance_only_the_prompt_is_run(engine):
    batches = []
    handle = engine.module("transformer").head.register_forward_hook(
        lambda module, args, out: batches.append(len(out))
    )
    one, other = (
        engine.generate(PROMPT, guidance_scale=1, negative_prompt=negative, **SMALL)
        for negative in (None, "a blue square")
    )
    handle.remove()
    assert batches == [1] * 6
    assert torch.equal(one.latents, other.latents)
    settings = one.settings
    assert len(engine.encode(settings)) == 1 and len(engine.encode(replace(settings, guidance_scale=2))) == 2


def test_bf16_stays_near_fp32_and_the_latents_are_fp32(video):
    half = minidit.load("demo", device="cpu", dtype="bf16")
    for residual in (None, "fp32"):
        other = half.generate(PROMPT, residual=residual, **SMALL)
        assert (other.settings.dtype, other.settings.residual) == ("bf16", residual or "bf16")
        assert other.latents.dtype == torch.float32
        assert (
            0 < rel(other.latents, video.latents) < 0.2
        )  # guidance 4 widens differences (measured 0.06, 0.04)


def test_the_text_encoder_is_let_go_unless_kept(engine):
    settings = engine.resolve(PROMPT, Choices(**SMALL))
    engine.encode(settings)
    assert "text_encoder" not in engine.modules
    keeping = Engine("demo", device="cpu", keep_text_encoder=True)
    keeping.encode(settings)
    assert list(keeping.modules) == ["text_encoder"]


def test_defaults_are_the_models_own(engine):
    settings, defaults = engine.resolve(PROMPT, Choices()), engine.manifest.defaults
    for name, value in asdict(defaults).items():
        assert getattr(settings, name) == value
    schedule = engine.manifest.schedule
    chosen = settings.solver, settings.sigma_grid, settings.flow_shift
    assert chosen == (schedule.solver, schedule.sigma_grid, schedule.shift)
    assert (settings.seed, settings.cache, settings.attention, settings.dtype) == (0, "none", "auto", "fp32")


def test_another_solver_takes_a_grid_that_exists_for_it(engine):
    grid = lambda **choices: engine.resolve(PROMPT, Choices(**choices)).sigma_grid
    own = engine.manifest.schedule
    assert grid(solver=own.solver) == own.sigma_grid
    assert grid(solver="dpm++") == "wan"
    assert grid(solver="euler", sigma_grid="diffusers") == "diffusers"


@pytest.mark.parametrize(
    "choices, message",
    [
        (dict(width=60), "width=60 is not 16n; nearest are 48 and 64"),
        (dict(width=8), "width=8 is not 16n; the least is 16"),
        (dict(height=65), "height=65 is not 16n; nearest are 64 and 80"),
        (dict(height=0), "height=0 is not 16n; the least is 16"),
        (dict(num_frames=50), r"num_frames=50 is not 4n\+1; nearest are 49 and 53"),
        (dict(num_frames=0), r"num_frames=0 is not 4n\+1; the least is 1"),
        (dict(steps=0), "steps=0 is not a whole number of at least 1"),
        (dict(solver="heun"), "unknown solver 'heun'; choose one of unipc, dpm\\+\\+, euler"),
        (dict(solver="dpm++", sigma_grid="diffusers"), "no sigma_grid 'diffusers' for solver 'dpm\\+\\+'"),
        (dict(sigma_grid="karras"), "no sigma_grid 'karras'.*choose one of wan, diffusers"),
        (dict(cache="everything"), "unknown cache 'everything'; choose one of none"),
        (dict(attention="slow"), "unknown attention 'slow'; choose one of auto, flash"),
        (dict(residual="bf16"), "residual='bf16'; choose fp32 or the run's dtype, fp32"),
        (dict(seed=-1), "seed=-1 is not a whole number between 0 and"),
        (dict(seed=2**63), "seed=9223372036854775808 is not a whole number between"),
        (dict(seed=1.5), "seed=1.5 is not a whole number"),
        (dict(guidance_scale=float("nan")), "guidance_scale=nan is not a number"),
        (dict(flow_shift=0.0), "shift=0.0 is not a finite number above 0"),
        (dict(fps=0.0), "fps=0.0 is not above 0"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_loaded(choices, message):
    engine = load()
    with pytest.raises(ValueError, match=message):
        engine.generate(PROMPT, **choices)
    assert engine.modules == {}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(dtype="fp8"), "unknown dtype 'fp8'; choose one of fp32, bf16, fp16"),
        (dict(device="tpu9"), "device 'tpu9' cannot be used.*try --device cpu"),
        (dict(model="nowhere"), "nowhere is not a model folder.*python -m weights_convert"),
    ],
)
def test_engines_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        minidit.load(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device 'cuda' cannot be used.*try --device cpu"):
        minidit.load(device="cuda")


@pytest.mark.parametrize("step", [1, 3])
def test_a_prediction_that_is_not_finite_stops_the_run_and_names_the_step(engine, broken, step):
    broken(step)
    with pytest.raises(ValueError, match=f"step {step} of 3: the cond prediction is not finite"):
        engine.generate(PROMPT, **SMALL)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_a_prediction_that_is_not_finite_names_its_branch(engine, video, branch, batched):
    settings = replace(video.settings, batched_guidance=batched)
    text = engine.encode(settings)
    text[("cond", "uncond").index(branch)][0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"step 1 of 3: the {branch} prediction is not finite"):
        engine.denoise(settings, text)


def test_python_and_the_command_line_make_the_same_frames(video, tmp_path):
    out = tmp_path / "out.npz"
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["generate", PROMPT, *small, "--output", str(out), "--device", "cpu", "--quiet"]) == 0
    frames, fps = read_video(out)
    assert np.array_equal(frames, video.frames) and fps == video.settings.fps
    assert read_settings(out) == asdict(video.settings)


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.png", "v.npz"])
def test_a_saved_video_carries_its_settings(video, tmp_path, name):
    video.save(tmp_path / name)
    assert read_settings(tmp_path / name) == asdict(video.settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f"{name}.json"]


def test_the_model_id_is_that_of_the_weights(engine, tmp_path):
    folder = tmp_path / "another name"
    shutil.copytree(DEMO, folder)
    assert minidit.load(folder).model_id == engine.model_id == load().model_id
    manifest = json.loads((folder / "model.json").read_text())
    manifest["components"]["vae"]["files"][0]["sha256"] = "0" * 64
    (folder / "model.json").write_text(json.dumps(manifest))
    assert minidit.load(folder).model_id != engine.model_id


def test_a_model_without_a_component_says_which(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    manifest = json.loads((folder / "model.json").read_text())
    for missing in ("tokenizer", "text_encoder"):
        parts = {name: part for name, part in manifest["components"].items() if name != missing}
        (folder / "model.json").write_text(json.dumps(manifest | {"components": parts}))
        with pytest.raises(ValueError, match=f"has no {missing}; convert the whole release"):
            minidit.load(folder).generate(PROMPT, **SMALL)


def test_verify_finds_a_changed_weight(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    path = folder / "vae.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    minidit.load(folder)  # sizes agree
    with pytest.raises(ValueError, match="vae.safetensors is damaged"):
        minidit.load(folder, verify=True)


def test_latents_come_back_with_their_settings(video, tmp_path):
    path = tmp_path / "v.latents.safetensors"
    save_latents(path, video.latents, video.settings)
    latents, settings = load_latents(path)
    assert torch.equal(latents, video.latents) and settings == video.settings
    assert isinstance(settings, Settings)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, "holds no latents of minidit"),
        ({"settings": '{"prompt": "a"}'}, "cannot be read as latents"),
        ({"settings": '{"colour": "a"}'}, "cannot be read as latents"),
        ({"settings": "[]"}, "cannot be read as latents"),
        ({"settings": "{"}, "cannot be read as latents"),
    ],
)
def test_files_without_latents_are_refused(tmp_path, metadata, message):
    path = tmp_path / "v.safetensors"
    save_file({"latents": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=f"{path.name} {message}"):
        load_latents(path)


def test_damaged_and_missing_latents_are_refused(tmp_path):
    damaged = tmp_path / "v.safetensors"
    damaged.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="v.safetensors cannot be read as latents"):
        load_latents(damaged)
    with pytest.raises(ValueError, match="other.safetensors does not exist"):
        load_latents(Path(tmp_path / "other.safetensors"))


def test_a_plane_larger_than_a_tile_is_decoded_in_tiles_where_that_is_asked_for(engine, capfd):
    size = dict(width=288, height=64, num_frames=5, steps=1)  # two tiles beside each other
    plain, tiled = (engine.generate(PROMPT, **size, tiled=choice) for choice in (False, True))
    assert torch.equal(plain.latents, tiled.latents) and tiled.settings.tiled
    want = to_frames(engine.module("vae").decode(plain.latents, tiled=True)[0])
    assert np.array_equal(tiled.frames, want) and not np.array_equal(plain.frames, want)
    assert np.array_equal(engine.decode(plain.latents, tiled=True, progress=True), want)
    assert "decode tiles" in capfd.readouterr().err  # how many of them are done
    small = engine.generate(PROMPT, **SMALL, tiled=True)
    assert np.array_equal(small.frames, engine.decode(small.latents))
