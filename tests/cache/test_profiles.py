"""Profile files: written and read back, found by what they match, and refused with what differs."""

import json
import shlex

import pytest
import torch

from minidit.__main__ import parser
from minidit.profiles import Profile, find_profile, profile_name, read_profile, write_profile

MATCH = {
    "model_id": "abc", "width": 64, "height": 32, "num_frames": 17, "steps": 30, "solver": "unipc",
    "sigma_grid": "wan", "flow_shift": 3.0, "guidance_scale": 4.0, "dtype": "fp32",
}  # fmt: skip
OTHER = {
    "model_id": "def", "width": 48, "height": 48, "num_frames": 5, "steps": 50, "solver": "euler",
    "sigma_grid": "diffusers", "flow_shift": 5.0, "guidance_scale": 6.0, "dtype": "bf16",
}  # fmt: skip


def make(policy: str = "mixcache", tensors=None, **changes) -> Profile:
    return Profile(policy, MATCH | changes, {"theta": 0.1, "curve": [None, 0.5]}, tensors or {})


def bases() -> dict:
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 8, 8, generator=draw)
    return {(k, f"attn.{part}.6"): wide[:, :, :6] + k for k in (0, 11) for part in ("q", "k")}


def test_a_profile_is_read_as_it_was_written(tmp_path):
    profile = make("unicp", bases())
    path = write_profile(tmp_path / "new" / "folder", profile)
    again = read_profile(path)
    assert (again.policy, again.match, again.data) == (profile.policy, profile.match, profile.data)
    assert set(again.tensors) == set(profile.tensors)
    assert all(torch.equal(again.tensors[key], t) for key, t in profile.tensors.items())
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.with_suffix(".safetensors").name]


def test_writing_again_replaces_the_profile_and_its_tensors(tmp_path):
    first = write_profile(tmp_path, make("unicp", bases()))
    second = write_profile(tmp_path, make("unicp"))
    assert first == second and read_profile(first).tensors == {}
    assert [p.name for p in tmp_path.iterdir()] == [first.name]


def test_file_names_say_what_fits():
    assert profile_name(make()) == "mixcache-64x32x17-30-unipc-wan-shift3-guidance4-fp32"


def test_the_one_that_fits_is_found_among_several(tmp_path):
    other = tmp_path / "other"
    for name, value in OTHER.items():  # of two models in two folders, all else is told apart by file name
        write_profile(other if name == "model_id" else tmp_path, make(**{name: value}))
    write_profile(tmp_path, make("unicp", bases()))
    assert len(list(tmp_path.glob("mixcache-*.json"))) == 9
    for name, value in OTHER.items():
        found = find_profile([tmp_path, other], "mixcache", MATCH | {name: value})
        assert found.match == MATCH | {name: value} and found.policy == "mixcache"
    assert find_profile([other, tmp_path], "unicp", MATCH).tensors.keys() == bases().keys()


def test_no_profile_at_all_is_none(tmp_path):
    write_profile(tmp_path, make())
    assert find_profile([tmp_path], "unicp", MATCH) is None
    assert find_profile([tmp_path / "nowhere"], "mixcache", MATCH) is None
    assert find_profile([], "mixcache", MATCH) is None


def refused(folder, match: dict) -> str:
    with pytest.raises(ValueError) as error:
        find_profile([folder], "mixcache", match)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", OTHER)
def test_a_mismatch_names_the_key_and_both_values(tmp_path, name):
    write_profile(tmp_path, make(**{name: OTHER[name]}))
    message = refused(tmp_path, MATCH)
    what = f"the nearest has {name} {OTHER[name]} instead of {MATCH[name]}; make"
    assert message.startswith(f"no mixcache profile fits this run: {what}")


def test_every_key_that_differs_is_named_and_the_nearest_profile_is_meant(tmp_path):
    write_profile(tmp_path, make(**OTHER))
    message = refused(tmp_path, MATCH)
    for name, value in OTHER.items():
        assert f"{name} {value} instead of {MATCH[name]}" in message
    write_profile(tmp_path, make(steps=50, dtype="bf16"))
    message = refused(tmp_path, MATCH)
    assert "the nearest has steps 50 instead of 30, dtype bf16 instead of fp32; make" in message


@pytest.mark.parametrize("extra", [{"true_cfg": 6.0}, {"dynamic_cfg": True}])
def test_a_setting_that_one_side_lacks_differs(tmp_path, extra):
    ((name, value),) = extra.items()
    write_profile(tmp_path, make(**extra))
    assert f"{name} {value} instead of None" in refused(tmp_path, MATCH)
    assert find_profile([tmp_path], "mixcache", MATCH | extra).match == MATCH | extra
    write_profile(tmp_path, make())
    assert find_profile([tmp_path], "mixcache", MATCH).match == MATCH


@pytest.mark.parametrize("extra", [{}, {"true_cfg": 6.0}, {"dynamic_cfg": True}])
def test_the_command_in_the_message_makes_a_profile_that_fits(tmp_path, extra):
    write_profile(tmp_path, make(steps=50))
    wanted = MATCH | OTHER | extra
    command = refused(tmp_path, wanted).split("python -m minidit ")[1]
    args = parser().parse_args(shlex.split(command))
    assert args.cache == "mixcache"
    assert {name: getattr(args, name) for name in wanted if name != "model_id"} == {
        name: value for name, value in wanted.items() if name != "model_id"
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"version": 2, "policy": "mixcache", "match": {}, "data": {}}',
        '{"version": 1, "policy": "mixcache", "match": {}}',
        '{"version": 1, "policy": "mixcache", "match": 3, "data": {}}',
    ],
)
def test_a_damaged_profile_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "mixcache-x.json"
    path.write_text(text, encoding="utf-8")
    for read in (lambda: read_profile(path), lambda: find_profile([tmp_path], "mixcache", MATCH)):
        with pytest.raises(ValueError, match="mixcache-x.json cannot be read as a profile .*; make it again"):
            read()


def test_damaged_tensors_are_refused_in_one_line(tmp_path):
    path = write_profile(tmp_path, make("unicp", bases()))
    path.with_suffix(".safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="safetensors cannot be read .*; make the profile again"):
        read_profile(path)


def test_a_profile_that_cannot_be_written_leaves_no_part_of_it(tmp_path):
    with pytest.raises(TypeError):
        write_profile(tmp_path, Profile("mixcache", MATCH, {"theta": {1, 2}}))  # no JSON
    assert list(tmp_path.iterdir()) == []
    path = write_profile(tmp_path, make())
    assert json.loads(path.read_text())["version"] == 1
