import json
import re
import shutil

import pytest

from minidit.components import DEMO
from minidit.costs import find_parts, footprint, measure
from minidit.generate import Engine
from minidit.inspection import report, settings_of
from minidit.memory import HEAP
from minidit.presets import PRESETS
from minidit.settings import Choices

SIZE = (832, 480, 81)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_what_loading_takes(dtype):
    engine, costs = (
        Engine("demo", device="cpu", dtype=dtype),
        measure(find_parts("demo"), (64, 64, 17), dtype),
    )
    for name in ("text_encoder", "transformer", "vae"):
        loaded = list(engine.module(name).parameters())
        assert costs.parameters[name] == sum(p.numel() for p in loaded)
        assert costs.weight_bytes[name] == sum(p.numel() * p.element_size() for p in loaded)


@pytest.mark.parametrize(
    "name, parameters, macs", [("wan2.1-t2v-1.3b", 1.419e9, 141.5e12), ("wan2.1-t2v-14b", 14.288e9, 839e12)]
)
def test_releases_cost_what_is_known_of_them(name, parameters, macs):
    costs = measure(find_parts(name), SIZE, "bf16")
    assert costs.parameters["transformer"] == pytest.approx(parameters, rel=1e-3)
    assert costs.parameters["text_encoder"] == pytest.approx(5.681e9, rel=1e-3)
    assert costs.macs == pytest.approx(macs, rel=0.01)
    assert costs.macs == sum(costs.macs_by_sub.values()) and set(costs.macs_by_sub) == {
        "attn",
        "cross",
        "mlp",
    }
    assert costs.tokens == 32760


def test_what_stays_fp32_is_counted_as_such():
    fp32, bf16 = (
        measure(find_parts("wan2.1-t2v-1.3b"), SIZE, dtype).weight_bytes for dtype in ("fp32", "bf16")
    )
    assert 0.5 * fp32["transformer"] < bf16["transformer"] < 0.52 * fp32["transformer"]
    assert bf16["text_encoder"] == fp32["text_encoder"] / 2
    assert bf16["vae"] == fp32["vae"]  # always fp32


def test_a_larger_video_takes_more():
    parts = find_parts("wan2.1-t2v-1.3b")
    small, large = measure(parts, (416, 240, 41), "bf16"), measure(parts, SIZE, "bf16")
    assert small.weight_bytes == large.weight_bytes
    assert small.activation_bytes["transformer"] < large.activation_bytes["transformer"]
    assert small.activation_bytes["vae"] < large.activation_bytes["vae"]
    assert small.macs < large.macs / 4


def test_report_uses_the_default_size_where_none_is_given():
    d = PRESETS["wan2.1-t2v-14b"].defaults
    assert f"wan2.1-t2v-14b: {d.width}x{d.height}, {d.num_frames} frames, bf16" in report(
        "wan2.1-t2v-14b", (None, None, None), "bf16"
    )
    assert f"{d.width}x480, {d.num_frames} frames" in report("wan2.1-t2v-14b", (None, 480, None), "bf16")


def test_report_lists_memory_by_stage():
    stages = stages_of("wan2.1-t2v-14b", SIZE, "bf16")
    weights = {name: weights for name, (_, weights, _) in stages.items()}
    transformer, vae = 14.288e9 * 2 / 2**30, 126.89e6 * 4 / 2**30  # the latter always fp32
    assert weights["denoise"] == pytest.approx(transformer, rel=0.03)  # bf16, some of it fp32
    assert weights["decode"] == pytest.approx(transformer + vae, rel=0.03)
    assert all(activations > 0 for name, (_, _, activations) in stages.items() if name != "text")
    assert all(total >= weights + activations - 0.02 for total, weights, activations in stages.values())


def stages_of(*args, **options) -> dict[str, tuple[float, float, float]]:
    """Of a report: total, weights and activations in GiB, by stage."""
    pattern = r" +(text|denoise|decode) +([\d.]+) GiB = ([\d.]+) weights \+ ([\d.]+) activations"
    found = re.finditer(pattern, report(*args, **options))
    return {m[1]: (float(m[2]), float(m[3]), float(m[4])) for m in found}


def test_offloading_and_quantising_make_room():
    name, dtype = "wan2.1-t2v-1.3b", "bf16"
    plain, parts = (stages_of(name, SIZE, dtype, offload=offload) for offload in ("none", "parts"))
    blocks = stages_of(name, SIZE, dtype, offload="blocks")
    assert parts["denoise"] == plain["denoise"] and parts["decode"][1] < 1 < plain["decode"][1]
    assert (
        blocks["denoise"][1] < 0.15 * plain["denoise"][1]
    )  # two of thirty blocks, and what lies around them
    assert stages_of(name, SIZE, dtype, weights="fp8")["denoise"][1] < 0.56 * plain["denoise"][1]


def test_ranks_share_activations_and_caches_but_not_weights():
    args, options = ("wan2.1-t2v-14b", SIZE, "bf16"), dict(cache="mixcache:impact=uniform")
    alone, four = report(*args, **options), report(*args, ranks=4, **options)
    line = "4 ranks (ulysses 4, cfg 1): the busiest has 8190 video tokens and 419 TMAC of a full step"
    assert line in four and "ranks" not in alone
    both = report(*args, ranks=8, parallel="ulysses+cfg", **options)
    assert "8 ranks (ulysses 4, cfg 2): the busiest has 8190 video tokens and 209.5 TMAC" in both
    cache = lambda text: float(re.search(r"([\d.]+) cache", text)[1])
    assert cache(alone) / 4 == pytest.approx(cache(four), abs=0.03)  # predictions are whole on every rank
    one, many = (stages_of(*args, ranks=ranks)["denoise"] for ranks in (1, 8))
    assert one[1] == many[1] and many[2] < 0.5 * one[2]


def test_ranks_that_cannot_share_a_video_are_refused():
    args = "wan2.1-t2v-14b", SIZE, "bf16"
    with pytest.raises(ValueError, match="3 ranks do not share out the 40 heads of this model; nearest"):
        report(*args, ranks=3)
    with pytest.raises(ValueError, match="--ranks 0: wanted 1 or more"):
        report(*args, ranks=0)
    with pytest.raises(ValueError, match="toca picks tokens of the whole video"):
        report(*args, ranks=2, cache="toca")


def test_decoding_is_that_of_the_autoencoder_that_decodes():
    latte = find_parts("latte-1")
    video, image = (measure(latte, (512, 512, frames), "bf16") for frames in (16, 1))
    assert (video.decoder, image.decoder) == ("vae_2", "vae")
    assert video.activation_bytes["vae"] > 14 * image.activation_bytes["vae"]  # a chunk, not a frame
    (decode,) = (s for s in footprint_of("latte-1").stages("parts") if s.name == "decode")
    assert decode.weights == video.weight_bytes["vae_2"]


def footprint_of(name: str, device: str = "cuda"):
    parts = find_parts(name)
    return footprint(parts, settings_of(parts, name, {"dtype": "bf16", "device": device, "weights": "full"}))


def test_a_finished_video_lies_in_cpu_memory():
    card, cpu = (footprint_of("wan2.1-t2v-1.3b", device) for device in ("cuda", "cpu"))
    decode = lambda found: next(s for s in found.stages("parts") if s.name == "decode").activations
    assert decode(card) == card.costs.activation_bytes["vae"]
    assert decode(cpu) == pytest.approx(HEAP * (decode(card) + 832 * 480 * 81 * 3 * 5), rel=1e-6)


def test_tiles_make_room_for_decoding():
    sizes = {"wan2.1-t2v-14b": SIZE, "open-sora-1.2": (848, 480, 51)}
    for name in ("wan2.1-t2v-14b", "open-sora-1.2", "latte-1", "cogvideox-5b"):
        size = sizes.get(name, (None, None, None))
        plain, tiled = (stages_of(name, size, "bf16", tiled=tiled) for tiled in (False, True))
        assert tiled["denoise"] == plain["denoise"], name
        most = 0.65 if name.startswith("open-sora") else 0.5  # whose part over time has no tiles
        assert tiled["decode"][2] < most * plain["decode"][2], name
    with pytest.raises(ValueError, match="tiled: .* always decodes in tiles; leave it out"):
        report("hunyuan-video", (None, None, None), "bf16", tiled=True)


def test_the_cache_is_predicted_as_the_store_will_be():
    settings = dict(steps=8, cache="mixcache:impact=uniform")
    engine = Engine("demo", device="cpu")
    outcome = engine.generate("a red circle", **settings)
    resolved = engine.resolve("a red circle", Choices(**settings))
    assert engine.cache_bytes(resolved) == outcome.trace["total"]["cache_bytes"] > 0


@pytest.mark.parametrize("name", ["hunyuan-video", "cogvideox-2b", "open-sora-1.2", "latte-1"])
def test_caches_of_every_family_are_predicted(name):
    assert re.search(r"[\d.]+ cache", report(name, (None, None, None), "bf16", cache="fora"))


def test_a_model_folder_is_measured_like_the_preset_it_holds(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    assert find_parts(str(folder)) == find_parts("demo")
    manifest = json.loads((folder / "model.json").read_text())
    del manifest["components"]["vae"]
    (folder / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has no vae; convert the whole release"):
        find_parts(str(folder))


def test_unknown_models_dtypes_and_sizes_are_refused():
    with pytest.raises(ValueError, match="unknown preset 'wan-2b'; choose one of wan2.1-t2v-1.3b"):
        report("wan-2b", (None, None, None), "bf16")
    with pytest.raises(ValueError, match="unknown dtype 'int4'; choose one of fp32, bf16, fp16"):
        report("demo", (None, None, None), "int4")
    with pytest.raises(ValueError, match="num_frames=16 is not 4n\\+1; nearest are 13 and 17"):
        report("demo", (None, None, 16), "bf16")
