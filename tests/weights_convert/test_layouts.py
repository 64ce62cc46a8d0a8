import json
import os
from pathlib import Path

import pytest

from tests.weights_convert.tiny import LAYOUTS
from weights_convert.layouts import check, check_one, read_layout

RELEASES = sorted(path.name for path in LAYOUTS.glob("*.json") if "keymap" not in path.name)


@pytest.mark.parametrize("name", RELEASES)
def test_every_recorded_name_is_mapped(name):
    shapes, known = read_layout(LAYOUTS / name)
    assert check_one(shapes, known).startswith("ok, wan")


@pytest.mark.parametrize("name", RELEASES)
def test_shapes_alone_tell_the_config_of_a_release(name):
    shapes, _ = read_layout(LAYOUTS / name)
    assert check_one(shapes, {}).startswith("ok, wan")


@pytest.mark.parametrize("name", RELEASES)
def test_a_renamed_tensor_is_left_over_on_both_sides(name):
    shapes, known = read_layout(LAYOUTS / name)
    last = list(shapes)[-1]
    shapes["something.else"] = shapes.pop(last)
    with pytest.raises(
        ValueError, match=r"1 tensors have no place .*something.else.*; 1 parameters are not in"
    ):
        check_one(shapes, known)


@pytest.mark.parametrize("name", RELEASES)
def test_a_wrong_shape_is_named(name):
    shapes, known = read_layout(LAYOUTS / name)
    last = list(shapes)[-1]
    shapes[last] = (*shapes[last][:-1], shapes[last][-1] + 1)
    with pytest.raises(ValueError, match=f"1 tensors do not fit .{last} gives"):
        check_one(shapes, known)


def test_a_missing_part_of_a_fused_parameter_is_named():
    shapes, known = read_layout(LAYOUTS / "Wan2.1-T2V-1.3B.original.json")
    del shapes["blocks.7.self_attn.k.bias"]
    with pytest.raises(
        ValueError, match="blocks.7.attn.qkv.bias wants 3 parts, got blocks.7.self_attn.q.bias"
    ):
        check_one(shapes, known)


def test_a_copied_embedding_is_dropped_and_either_name_is_enough():
    shapes, known = read_layout(LAYOUTS / "umt5-xxl-encoder.transformers.json")
    both = shapes | {"encoder.embed_tokens.weight": shapes["shared.weight"]}
    assert check_one(both, known).endswith("1 dropped")
    del both["shared.weight"]
    assert check_one(both, known).endswith("parameters")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"img_emb.proj.0.weight": (1280,)}, "image-to-video"),
        ({"blocks.0.cross_attn.k_img.weight": (1536, 1536)}, "image-to-video"),
        ({"patch_embedding.weight": (1536, 36, 1, 2, 2)}, "image-to-video"),
        ({"patch_embedding.weight": (1536, 48, 1, 2, 2), "head.head.weight": (192, 1536)}, "Wan 2.2 TI2V-5B"),
    ],
)
def test_relatives_that_cannot_be_run_are_refused_by_name(change, reason):
    shapes, known = read_layout(LAYOUTS / "Wan2.1-T2V-1.3B.original.json")
    with pytest.raises(ValueError, match=reason):
        check_one(shapes | change, known)


def test_check_prints_a_line_per_file_and_returns_the_worst_status(tmp_path, capsys):
    good = LAYOUTS / "Wan2.1_VAE.original.json"
    unknown = tmp_path / "unknown.json"
    unknown.write_text(json.dumps({"weight": [2, 3]}))
    keymap = tmp_path / "some.keymap.json"
    keymap.write_text("{}")
    assert check([good]) == 0
    assert check([good, unknown]) == 1
    assert check([keymap, good, unknown]) == 2
    printed = capsys.readouterr()
    assert "194 tensors -> 194 with 126,892,531 parameters" in printed.out
    assert "unknown.json: not recognised" in printed.out
    assert "some.keymap.json maps names to names" in printed.err


@pytest.mark.skipif("MINIDIT_LAYOUTS" not in os.environ, reason="MINIDIT_LAYOUTS names no folder of layouts")
def test_every_text_to_video_layout_of_wan_is_mapped(capsys):
    folder = Path(os.environ["MINIDIT_LAYOUTS"])
    paths = [p for pattern in ("Wan2.*T2V*", "Wan2.1_VAE*", "umt5*") for p in folder.glob(f"{pattern}.json")]
    assert paths
    assert check(paths) == 0, capsys.readouterr().out
