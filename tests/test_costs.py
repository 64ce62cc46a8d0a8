import json
import re
import shutil

import pytest

from minidit.costs import find_parts, measure, report
from minidit.generate import DEMO, Engine
from minidit.presets import PRESETS

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
    lines = report("wan2.1-t2v-14b", SIZE, "bf16").splitlines()
    stages = [
        m.groups() for line in lines if (m := re.match(r" +(\w+) +([\d.]+) GiB weights +([\d.]+) GiB", line))
    ]
    assert [name for name, _, _ in stages] == ["text_encoder", "transformer", "vae"]
    weights = {name: float(gib) for name, gib, _ in stages}
    assert weights["transformer"] == pytest.approx(14.288e9 * 2 / 2**30, rel=0.03)  # bf16, some of it fp32
    assert weights["vae"] == pytest.approx(126.89e6 * 4 / 2**30, abs=0.01)  # always fp32
    assert all(float(gib) > 0 for name, _, gib in stages if name != "text_encoder")


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
