"""What is let in: files are checked before they are used, and only code that the command line names runs."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from minidit.__main__ import main
from minidit.components import DEMO
from minidit.errors import printable
from minidit.generate import Choices, Engine, save_latents
from minidit.profiles import Profile, write_profile
from minidit.settings import profile_match
from minidit.tensor_files import check_header
from tests.fuzz.damage import read_header, write_header
from weights_convert.__main__ import main as weights_convert

RUN = ["--size", "16x16", "--num-frames", "1", "--steps", "2", "--device", "cpu", "--quiet"]
MINE = """
from dataclasses import dataclass

from minidit.cache.plan import Need, Plan, residual


class Mine:
    def reset(self, run):
        return ()

    def plan(self, step):
        return Plan()

    def tell(self, step, values):
        pass
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs in a folder of their own, on as many threads as the test before."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def generate(*args: str) -> int:
    return main(["generate", "a", *RUN, "--output", "v.npz", *args])


def refused(capsys, code: int) -> str:
    """The one line on stderr of a command that ended with `code`."""
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1) and error.startswith(("minidit: ", "weights_convert: "))
    return error


# Headers of safetensors files


def make(**changes) -> Path:
    """A file of two tensors, with `changes` to its header's entries; None deletes one."""
    path = Path("x.safetensors")
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path)
    header, rest = read_header(path)
    for name, change in changes.items():
        header[name] = (header.get(name, {}) | change) if isinstance(change, dict) else change
    write_header(path, {name: entry for name, entry in header.items() if entry is not None}, rest)
    return path


def test_a_sound_file_is_let_in():
    check_header(make())
    check_header(make(__metadata__={"format": "pt"}))
    for path in DEMO.rglob("*.safetensors"):
        check_header(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"a": {"data_offsets": [0, 20]}}, "a has 20 bytes, but F32 (2, 3) takes 24"),
        ({"a": {"shape": [3, 3]}}, "a has 24 bytes, but F32 (3, 3) takes 36"),
        ({"a": {"dtype": "F16"}}, "a has 24 bytes, but F16 (2, 3) takes 12"),
        ({"a": {"dtype": "F99"}}, "a lacks a known dtype"),
        ({"a": {"shape": None}}, "a lacks a known dtype, a shape"),
        ({"a": {"shape": [-2, -3]}}, "a has a size or an offset that is no whole number"),
        ({"a": {"shape": [2.0, 3]}}, "a has a size or an offset that is no whole number"),
        ({"a": {"shape": [2**62, 2**62]}}, "a has 24 bytes, but F32"),
        ({"a": {"data_offsets": [-24, 0]}}, "no whole number from 0 on"),
        ({"a": 7}, "a lacks a known dtype"),
        ({"b": {"data_offsets": [16, 24]}}, "b begins at byte 16 of the data, which overlaps"),
        ({"b": {"data_offsets": [28, 36]}}, "b begins at byte 28 of the data, which leaves a gap"),
        ({"b": None}, "its tensors take 24 bytes, and 32 are there"),
        ({"c": {"dtype": "U8", "shape": [9], "data_offsets": [32, 41]}}, "take 41 bytes, and 32 are there"),
        ({"__metadata__": {"x": 1}}, "metadata is not text by name"),
    ],
)
def test_tensors_are_the_data_end_to_end(changes, message):
    with pytest.raises(SafetensorError) as error:
        check_header(make(**changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "announce a header of 0 bytes in 0"),
        (b"\x00" * 8, "announce a header of 0 bytes in 8"),
        (b"\xff" * 64, "announce a header of 18446744073709551615 bytes in 64"),
        ((2**40).to_bytes(8, "little") + b"{}", "announce a header of 1099511627776 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "its header is a list"),
        ((2).to_bytes(8, "little") + b"{x", "its header is not JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "its header is not JSON"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "its header is not JSON"),
        ((15).to_bytes(8, "little") + b'{"a":{},"a":{}}', "'a' comes twice"),
    ],
)
def test_a_header_is_a_header(data, message):
    Path("x.safetensors").write_bytes(data)
    with pytest.raises(SafetensorError) as error:
        check_header("x.safetensors")
    assert message in str(error.value)


def test_our_check_refuses_what_the_library_refuses():
    """Cut anywhere, a file is refused by both; so ours may stand before the library."""
    data = make().read_bytes()
    for length in range(len(data)):
        Path("cut.safetensors").write_bytes(data[:length])
        with pytest.raises(SafetensorError):
            check_header("cut.safetensors")
        with pytest.raises(SafetensorError), safe_open("cut.safetensors", "pt") as file:
            list(file.keys())


# Model folders


@pytest.fixture
def folder() -> Path:
    return Path(shutil.copytree(DEMO, "model", ignore=shutil.ignore_patterns("profiles")))


def test_sizes_are_checked_always_and_hashes_with_verify(folder, capsys):
    path = folder / "vae.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert generate("--model", "model") == 0  # one bit of one weight
    line = refused(capsys, generate("--model", "model", "--verify"))
    assert "vae.safetensors is damaged (SHA-256 differs" in line
    path.write_bytes(data[:-1])
    line = refused(capsys, generate("--model", "model"))
    assert "bytes instead of" in line


def test_links_out_of_a_model_folder_are_refused_and_links_to_it_are_not(folder, capsys):
    os.symlink("model", "linked")
    assert generate("--model", "linked") == 0
    (folder / "real").mkdir()
    shutil.move(folder / "vae.safetensors", folder / "real" / "vae.safetensors")
    os.symlink("real/vae.safetensors", folder / "vae.safetensors")
    assert generate("--model", "model") == 0  # inside
    (folder / "vae.safetensors").unlink()
    shutil.move(folder / "real" / "vae.safetensors", "elsewhere")
    os.symlink("../elsewhere", folder / "vae.safetensors")
    assert "model/vae.safetensors is a link out of the folder" in refused(
        capsys, generate("--model", "model")
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stop_the_run_naming_step_and_branch(folder, capsys, value):
    path = folder / "transformer.safetensors"
    tensors = load_file(path)
    tensors["blocks.3.mlp.up.weight"][0, 0] = value
    save_file(tensors, path)
    manifest = json.loads((folder / "model.json").read_text())
    manifest["components"]["transformer"]["files"][0]["bytes"] = path.stat().st_size
    (folder / "model.json").write_text(json.dumps(manifest))
    line = refused(capsys, generate("--model", "model"))
    assert "step 1 of 2: the cond prediction is not finite" in line and "--verify" in line
    assert "v.npz" not in os.listdir()


# Code


class Hostile:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, ("touch witness",)


def test_a_hostile_pickle_is_refused_by_the_converter_and_does_not_run(capsys):
    Path("source").mkdir()
    torch.save({"weight": Hostile()}, "source/model.pth")
    line = refused(capsys, weights_convert(["source", "out"]))
    assert "model.pth calls" in line and "refused, only pickles of plain tensors" in line
    Path("source/model.pth").write_bytes(pickle.dumps({"weight": Hostile()}, protocol=4))
    assert "refused, only pickles of plain tensors" in refused(capsys, weights_convert(["source", "out"]))
    assert sorted(os.listdir()) == ["source"]


def plant() -> None:
    """A policy that leaves a witness as soon as its file is read, and a video whose settings name it."""
    Path("spy.py").write_text("open('witness', 'w').close()\n" + MINE)
    assert generate("--cache", "spy.py:Mine", "--allow-inert", "--trace", "t.json") == 0
    os.remove("witness")


def test_code_that_a_video_names_runs_when_it_is_named_again(capsys):
    plant()
    line = refused(capsys, main(["generate", "--from", "v.npz", "--quiet", "--output", "w.npz"]))
    assert "v.npz was made with spy.py:Mine, which is code; name it with --cache to run it" in line
    assert not Path("witness").exists()
    again = ["generate", "--from", "v.npz", "--quiet", "--output", "w.npz", "--allow-inert"]
    assert main([*again, "--cache", "none"]) == 0 and not Path("witness").exists()
    assert main([*again, "--cache", "spy.py:Mine"]) == 0 and Path("witness").exists()


def test_code_that_a_trace_names_does_not_run():
    plant()
    assert json.loads(Path("t.json").read_text())["settings"]["cache"] == "spy.py:Mine"
    assert generate("--replay", "t.json") == 0
    assert not Path("witness").exists()


def test_code_that_latents_name_does_not_run():
    plant()
    engine = Engine("demo", device="cpu")
    settings = engine.resolve("a", Choices(width=16, height=16, num_frames=1, steps=2, cache="spy.py:Mine"))
    os.remove("witness")
    save_latents("w.latents.safetensors", torch.zeros(1, *engine.latent_shape(settings)), settings)
    assert main(["decode", "w.latents.safetensors", "--quiet"]) == 0
    assert not Path("witness").exists()


def test_a_model_folder_cannot_choose_a_cache(folder, capsys):
    plant()
    manifest = json.loads((folder / "model.json").read_text())
    manifest["defaults"]["cache"] = "spy.py:Mine"
    (folder / "model.json").write_text(json.dumps(manifest))
    assert "defaults has unknown keys cache" in refused(capsys, generate("--model", "model"))
    assert not Path("witness").exists()


def test_a_profile_cannot_choose_a_policy():
    plant()
    content = {"version": 1, "policy": "spy.py:Mine", "match": {}, "data": {}}
    Path("profiles").mkdir()
    Path("profiles/mixcache-x.json").write_text(json.dumps(content))
    assert generate("--cache", "mixcache:impact=uniform", "--profiles", "profiles", "--allow-inert") == 0
    assert not Path("witness").exists()


# A user's own mistakes


@pytest.mark.parametrize(
    "good, bad, said",
    [
        ("return Plan()", "return Plan(speed=2)", "mine.py:12: TypeError: Plan.__init__() got an unexpected"),
        ("return Plan()", "return plans[step]", "mine.py:12: NameError: name 'plans' is not defined"),
        ("return ()", "return {}['x']", "mine.py:9: KeyError: 'x'"),
        ("return ()", "raise ValueError('no, \\nreally')", "mine.py:9: ValueError: no, "),
        ("        pass", "        assert not values and False", "mine.py:15: AssertionError"),
        ("class Mine:", "class Mine", "mine.py:7: SyntaxError: expected ':'"),
        ("class Mine:", "import surely_not_there\nclass Mine:", "mine.py:7: ModuleNotFoundError: No module"),
        ("return Plan()", "return 7", "mine.py:Mine asks for what cannot be done (--debug shows where)"),
        ("return Plan()", "return None", "mine.py:Mine asks for what cannot be done (--debug shows where)"),
        ("return ()", "return None", "mine.py:Mine asks for what cannot be done (--debug shows where)"),
        ("return Plan()", "return Plan(branches=('x',))", "mine.py:Mine asks for what cannot be done"),
    ],
)
def test_a_mistake_in_a_users_policy_is_one_line_with_file_and_line(capsys, good, bad, said):
    assert good in MINE
    Path("mine.py").write_text(MINE.replace(good, bad))
    assert said in refused(capsys, generate("--cache", "mine.py:Mine"))
    with pytest.raises(Exception):  # noqa: B017 - each its own
        generate("--cache", "mine.py:Mine", "--debug")


def test_a_policys_dataclass_may_have_annotations_as_strings():
    fields = "\n@dataclass\nclass Options:\n    every: int = 3\n"
    Path("mine.py").write_text("from __future__ import annotations\n" + MINE + fields)
    assert generate("--cache", "mine.py:Mine", "--allow-inert") == 0


@pytest.mark.parametrize(
    "name, value",
    [
        ("prompt", [1]), ("prompt", None), ("width", 1.5), ("width", "x"), ("width", True), ("seed", {}),
        ("seed", None), ("cache", 7), ("cache", ["none"]), ("tiled", 0), ("tiled", "no"), ("fps", "8"),
        ("fps", True), ("model", 7), ("dtype", []),
    ],
)  # fmt: skip
def test_settings_of_another_type_are_refused_by_name(capsys, name, value):
    Path("x.json").write_text(json.dumps({"minidit": "1", "prompt": "a", name: value}))
    code = main(["generate", "--from", "x.json", "--quiet", "--output", "w.npz"])
    assert f"minidit: {name}={value!r} is not " in refused(capsys, code) and not Path("w.npz").exists()


def test_a_device_that_holds_no_numbers_and_steps_without_end_are_refused(capsys):
    assert "device 'meta' cannot be used" in refused(capsys, generate("--device", "meta"))
    assert "is more than the 1000 noise levels" in refused(capsys, generate("--steps", str(10**12)))


def test_a_replayed_plan_of_odd_parts_is_refused(capsys):
    assert generate("--cache", "fora:interval=2", "--trace", "t.json", "--steps", "3") == 0
    trace = json.loads(Path("t.json").read_text())
    for name, value in (("keep", ["x"]), ("branches", [1]), ("label", 7), ("output", {"is": "Run"})):
        odd = json.loads(json.dumps(trace))
        odd["steps"][1]["plan"][name] = value
        Path("odd.json").write_text(json.dumps(odd))
        line = refused(capsys, generate("--replay", "odd.json", "--steps", "3"))
        assert f"odd.json holds a step that is no plan (Plan.{name} is " in line


def test_a_profile_without_its_numbers_is_named(capsys):
    engine = Engine("demo", device="cpu")
    settings = engine.resolve("a", Choices(width=16, height=16, num_frames=1, steps=2))
    data = {"teacache": {"signal": "time"}}  # and no polynomial
    path = write_profile(Path("profiles"), Profile("teacache", profile_match(settings), data))
    line = refused(capsys, generate("--cache", "teacache", "--profiles", "profiles"))
    assert f"{path}: its data cannot be used (KeyError" in line


def test_control_characters_do_not_reach_the_terminal(capsys):
    for args in (["--model", "\x1b[2J"], ["--cache", "\x1b]0;x\x07"], ["--size", "\x1b[2J"]):
        try:
            code = generate(*args)
        except SystemExit as end:
            code = end.code
        line = refused(capsys, code)
        assert "\x1b" not in line and "\\x1b" in line
    assert printable("é 圆\n\x9b") == "é 圆\\n\\x9b"


def test_a_command_line_that_cannot_be_parsed_is_one_line(capsys):
    for run, argv in ((main, ["generate", "--colour"]), (main, []), (weights_convert, ["x"])):
        with pytest.raises(SystemExit) as end:
            run(argv)
        assert "--help lists what there is" in refused(capsys, end.value.code)


def test_a_log_that_would_be_a_folder_is_refused_before_the_work(capsys):
    for flag in ("--trace", "--preview"):
        assert "it is a folder; name a file" in refused(capsys, generate(flag, "."))
    assert os.listdir() == []
