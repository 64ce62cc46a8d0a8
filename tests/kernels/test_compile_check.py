"""The compile check: shipped configs fit their cards, and one that does not is found. Needs no GPU."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minidit_kernels import resources
from minidit_kernels.resources import FILES, Usage, config_name
from minidit_kernels.tuning import Config

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
BOTH = """
import sys
from minidit_kernels import resources
folder = sys.argv[1]
shipped = resources.main(["--json", folder + "/shipped.json"])
from tests.kernels import greedy
resources.shipped = lambda files: greedy.cases()
print(shipped, resources.main(["--all", "--arch", "sm_80", "sm_90", "--json", folder + "/greedy.json"]))
"""


def run(folder: Path, *command: str) -> str:
    """Python in a process of its own, without the interpreter of kernels -> the last line of its output."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """The check of each kernel's first config, and of kernels that are too greedy."""
    folder = tmp_path_factory.mktemp("check")
    codes = run(folder, "-c", BOTH, str(folder)).split()
    rows = lambda name: [Usage(**row) for row in json.loads((folder / f"{name}.json").read_text())["configs"]]
    return {"codes": codes, "shipped": rows("shipped"), "greedy": rows("greedy")}


def test_shipped_kernels_fit_every_architecture(found):
    assert found["codes"][0] == "0"
    assert [row for row in found["shipped"] if row.complaints()] == []
    for file in FILES:
        rows = [row for row in found["shipped"] if row.kernel.startswith(file)]
        assert {row.arch for row in rows} == {"sm_80", "sm_90", "sm_100"}, file
        assert all(0 < row.registers <= 255 for row in rows)


def test_a_config_that_asks_too_much_fails_the_check(found):
    assert found["codes"][1] == "1"
    said = {(row.kernel, row.arch): row.complaints() for row in found["greedy"]}
    for arch, limit in (("sm_80", 163), ("sm_90", 227)):
        assert said["modest", arch] == []
        (large,) = said["oversized", arch]
        assert re.fullmatch(rf"wants \d+ KiB of shared memory, a block has {limit}", large)
        (spill,) = said["spilling", arch]
        assert spill.startswith("spills: ")


def test_the_unit_of_matrix_products_is_named(found):
    assert {row.unit for row in found["greedy"] if row.kernel == "modest"} == {"mma", "wgmma"}
    assert {row.unit for row in found["greedy"] if row.kernel == "spilling"} == {""}


def test_too_much_tensor_memory_is_a_complaint():
    fits = Usage("attention", "", "sm_100", 227.0, 255, 0, 512, "tcgen05")
    assert fits.complaints() == []
    said = replace(fits, tensor_columns=576).complaints()
    assert said == ["wants 576 columns of tensor memory, there are 512"]


def test_a_config_has_a_short_name():
    assert (
        config_name(Config({"BLOCK_M": 128}, num_warps=8, num_stages=3)) == "BLOCK_M 128, warps 8, stages 3"
    )


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(resources, "INTERPRET", True)
    with pytest.raises(SystemExit, match="no TRITON_INTERPRET in the environment"):
        resources.main([])


@pytest.mark.slow
def test_every_shipped_config_fits(tmp_path):
    table = tmp_path / "all.json"
    run(tmp_path, "-m", "minidit_kernels.resources", "--all", "--json", str(table))
    rows = [Usage(**row) for row in json.loads(table.read_text())["configs"]]
    assert rows and [(row, row.complaints()) for row in rows if row.complaints()] == []
