"""The policy of one's own that the README shows: it is short, it runs as written, and it acts."""

import re
from pathlib import Path

import pytest
import torch

from minidit.__main__ import main
from minidit.cache.trace import acted, read_trace

README = Path(__file__).parents[2] / "README.md"
RUN = ["--size", "32x32", "--num-frames", "5", "--steps", "9", "--device", "cpu", "--quiet"]
INERT = """
from minidit.cache.plan import Plan


class Idle:
    def reset(self, run):
        return ()

    def plan(self, step):
        return Plan()

    def tell(self, step, values):
        pass
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def example() -> str:
    """The README's python block with a policy in it."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "class MyPolicy" in block]
    return block


def generate(cache: str, *args: str) -> int:
    return main(["generate", "a red circle grows", "--cache", cache, "--output", "a.npz", *RUN, *args])


def test_the_example_is_about_25_lines():
    assert len(example().strip().splitlines()) <= 26


def test_the_example_runs_from_the_command_line_and_acts(here, capsys):
    (here / "my_policy.py").write_text(example(), encoding="utf-8")
    macs = []
    for every in (2, 3):
        assert generate(f"my_policy.py:MyPolicy:every={every}", "--trace", "t.json") == 0
        trace = read_trace("t.json")
        assert acted(trace)
        macs.append(trace["total"]["macs"])
    assert macs[1] < macs[0]  # the option does something
    assert generate(f"{here / 'my_policy.py'}:MyPolicy") == 0
    assert re.search(
        r"my_policy.py:MyPolicy: \d\.\d of 9 steps full-equivalent, 1\.\d\dx fewer MACs",
        capsys.readouterr().out,
    )


def test_a_policy_that_never_acts_is_an_error_unless_that_is_allowed(here, capsys):
    (here / "idle.py").write_text(INERT)
    assert generate("idle.py:Idle") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cache idle.py:Idle never acted" in error and "--allow-inert" in error
    assert (here / "a.npz").is_file() and "a.npz is written" in error
    assert generate("idle.py:Idle", "--allow-inert") == 0
    assert "1.00x fewer MACs" in capsys.readouterr().out
    assert generate("none") == 0  # which is not meant to act
