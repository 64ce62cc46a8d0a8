"""The comparison itself: right recordings pass, wrong ones fail, and the message points at the place."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import SHIPPED
from tests.parity import RUNNERS, compare, difference, main, open_recording
from tests.trim_goldens import trim


def copy_recording(source: Path, out: Path) -> Path:
    """A recording that a test may change, in a folder with the bounds."""
    folder = out / source.name
    folder.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(source.parent / "tolerances.json", out / "tolerances.json")
    return folder


def change(path: Path, edit) -> None:
    """Rewrite a safetensors file after edit(tensors)."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def record_mids(folder: Path) -> None:
    """Add mid-states of our own: the recordings that ship have none."""
    mids = RUNNERS[folder.name](open_recording(folder)).mids
    change(folder / "io.safetensors", lambda io: io.update((n, x.contiguous()) for n, x in mids.items()))


def recorded() -> list[str]:
    """The supported components: in a fuller set all of them must be there, else those that ship are run."""
    return [name for name in RUNNERS if "MINIDIT_GOLDENS" in os.environ or (SHIPPED / name).is_dir()]


@pytest.mark.parametrize("component", recorded())
def test_every_supported_component_equals_its_recording(goldens, component):
    verdict = compare(open_recording(goldens(component)))
    assert verdict.ok, str(verdict)
    assert 0 <= verdict.error <= verdict.bound


@pytest.mark.parametrize(
    "component, weight, first_mid",
    [
        ("wan_t2v_dit", "blocks.0.cross_attn.o.weight", "mid.block_0.cross_attn"),
        ("wan_t2v_dit", "blocks.1.ffn.0.weight", "mid.block_1"),
        ("wan_t2v_dit", "time_embedding.2.bias", "mid.time_embedding"),
        ("wan_vae", "decoder.upsamples.4.residual.2.weight", "mid.decoder.upsamples.4"),
        ("umt5_encoder", "blocks.1.ffn.fc1.weight", "mid.block_1"),
    ],
)
def test_a_wrong_weight_fails_and_names_the_first_state_that_differs(
    goldens, tmp_path, capsys, component, weight, first_mid
):
    folder = copy_recording(goldens(component), tmp_path)
    record_mids(folder)
    assert compare(open_recording(folder)).ok
    change(folder / "weights.safetensors", lambda weights: weights[weight].mul_(1.05))
    verdict = compare(open_recording(folder))
    assert not verdict.ok and verdict.first_mid.split()[0] == first_mid
    assert main([str(folder)]) == 1
    line = capsys.readouterr().out
    assert "FAIL" in line and f"first mid-state that differs: {first_mid} " in line


def test_a_failure_without_mid_states_says_so(goldens, tmp_path):
    folder = copy_recording(goldens("umt5_encoder"), tmp_path)
    change(folder / "io.safetensors", lambda io: [io.pop(n) for n in list(io) if "mid" in n.split(".")])
    change(folder / "weights.safetensors", lambda weights: weights["norm.weight"].mul_(1.05))
    assert "out.hidden; first mid-state that differs: none" in str(compare(open_recording(folder)))


def test_nan_is_a_failure(goldens, tmp_path):
    folder = copy_recording(goldens("umt5_encoder"), tmp_path)
    change(folder / "weights.safetensors", lambda weights: weights["norm.weight"][3].fill_(float("nan")))
    verdict = compare(open_recording(folder))
    assert not verdict.ok and verdict.error == float("inf")


def test_an_output_that_we_do_not_make_is_a_failure(goldens, tmp_path):
    folder = copy_recording(goldens("wan_rope"), tmp_path)
    change(folder / "io.safetensors", lambda io: io.update({"out.more": torch.zeros(1)}))
    verdict = compare(open_recording(folder))
    assert not verdict.ok and verdict.worst == "out.more"


@pytest.mark.parametrize("bound, ok", [({"rel": 1e-3}, True), ({"rel": 1e-12}, False)])
def test_the_bound_is_that_of_the_matching_pattern(goldens, tmp_path, bound, ok):
    folder = copy_recording(goldens("wan_rope"), tmp_path)
    table = {"default": {"rel": 1.0}, "patterns": {"other_*": {"rel": 1.0}, "wan_r*": bound}}
    (tmp_path / "tolerances.json").write_text(json.dumps(table))
    verdict = compare(open_recording(folder))
    assert (verdict.ok, verdict.bound) == (ok, bound["rel"])


@pytest.mark.parametrize(
    "got, wanted, error",
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), 0.5),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 4.0]), float("inf")),
        (torch.zeros(2), torch.zeros(3), float("inf")),
        (torch.tensor([3, 4]), torch.tensor([3, 4]), 0.0),
        (torch.tensor([3, 5]), torch.tensor([3, 4]), float("inf")),
        (torch.tensor([7], dtype=torch.uint8), torch.tensor([8], dtype=torch.uint8), 0.0),
        (torch.tensor([6], dtype=torch.uint8), torch.tensor([8], dtype=torch.uint8), float("inf")),
        ("a b", "a b", 0.0),
        ("a b", "a  b", float("inf")),
    ],
)
def test_difference_is_relative_for_floats_and_equality_for_the_rest(got, wanted, error):
    assert difference(got, wanted) == error


def test_exit_codes(goldens, tmp_path, capsys):
    good = str(goldens("wan_rope"))
    unknown = tmp_path / "other_dit"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"component": "other_dit"}')
    bad = copy_recording(goldens("wan_prompt_clean"), tmp_path)
    (bad / "cases.json").write_text('{"cases": [["a  b", "a  b"]]}')
    assert main([good]) == 0
    assert main([good, str(unknown)]) == 3
    assert main(["--skip-unsupported", good, str(unknown)]) == 0
    assert main(["--skip-unsupported", str(unknown), str(bad), good]) == 1
    out = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["other_dit", "not", "supported"] for line in out)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "is not a recording" in capsys.readouterr().err


def test_trimming_drops_the_mid_states_and_nothing_else(tmp_path):
    source = tmp_path / "some_dit"
    source.mkdir()
    (source / "config.json").write_text('{"component": "some_dit"}')
    save_file({"w.mid.bias": torch.ones(2)}, source / "weights.safetensors")
    names = ("in.x", "out.x", "pad.out.x", "mid.h", "sub.mid.h", "dpmpp.mid.h", "midway.x")
    save_file({name: torch.ones(3) for name in names}, source / "io.safetensors")
    assert trim(source, tmp_path / "out") == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert set(load_file(tmp_path / "out" / "io.safetensors")) == {"in.x", "out.x", "pad.out.x", "midway.x"}
    for name in ("config.json", "weights.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    with pytest.raises(ValueError, match="is not a recording"):
        trim(tmp_path / "nothing", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()  # refused before anything was removed


def test_the_recordings_that_ship_are_small_and_in_use():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 25e6
    shipped = {path.name for path in SHIPPED.iterdir() if path.is_dir()}
    assert shipped >= {"wan_t2v_dit", "wan_vae", "umt5_encoder", "wan_schedulers", "wan_denoise", "wan_rope"}
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name in shipped if name not in RUNNERS and f'goldens("{name}")' not in tests] == []
