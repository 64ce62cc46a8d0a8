"""Caching methods by name: what a --cache argument may say, and what it is told when it may not."""

import inspect
import re
import subprocess
import sys

import pytest

from minidit.__main__ import main
from minidit.cache.plan import REUSE, Plan
from minidit.cache.policies.combined import Combined
from minidit.cache.policies.mixcache import MixCache
from minidit.cache.policies.none import NoCache
from minidit.cache.policies.replay import Replay
from minidit.cache.policies.unicp import UniCP
from minidit.cache.spec import METHODS, Spec, find_class, make_policy, options_of, parse, read_value, summary
from minidit.cache.trace import to_json

POLICY = """
from __future__ import annotations
from typing import Optional


class Mine:
    variants = {"wide": {"widths": (9, 9), "every": 7}}

    def __init__(self, every: int = 3, share: float = 0.5, widths: tuple[int, ...] = (1, 2), name: str = "a",
                 on: bool = False, limit: int | None = None, old: Optional[float] = 1.0,
                 either: float | str = "E2", tables: list[int] = (), bare=4, profile: dict | None = None):
        self.given = dict(locals())
        del self.given["self"]

    def reset(self, run): return ()
    def plan(self, step): ...
    def tell(self, step, values): ...


class Half:
    def reset(self, run): return ()
    def plan(self, step): ...


A_NUMBER = 3
"""


@pytest.fixture
def mine(tmp_path) -> str:
    """A file with policies of a user's own."""
    path = tmp_path / "mine.py"
    path.write_text(POLICY, encoding="utf-8")
    return str(path)


def make(text: str, find=lambda method: None):
    return make_policy(parse(text), find)


def refused(text: str) -> str:
    with pytest.raises(ValueError) as error:
        make(text)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "text, specs",
    [
        ("none", [Spec("none")]),
        ("mixcache", [Spec("mixcache")]),
        ("mixcache:eff", [Spec("mixcache", "eff")]),
        ("mixcache:theta=0.2", [Spec("mixcache", "", {"theta": "0.2"})]),
        ("mixcache:eff:theta=0.2,blocks=1/2", [Spec("mixcache", "eff", {"theta": "0.2", "blocks": "1/2"})]),
        (" mixcache : theta = 0.2 , per-step = on ".replace(" :", ":"), [
            Spec("mixcache", "", {"theta": "0.2", "per_step": "on"})
        ]),
        ("mixcache:eff+unicp:ratio=0.1", [Spec("mixcache", "eff"), Spec("unicp", "", {"ratio": "0.1"})]),
        ("my_policy.py:Mine", [Spec("my_policy.py:Mine")]),
        ("../a/my_policy.py:Mine:wide:every=2", [Spec("../a/my_policy.py:Mine", "wide", {"every": "2"})]),
        ("mixcache+my_policy.py:Mine", [Spec("mixcache"), Spec("my_policy.py:Mine")]),
        ("replay:run.json", [Spec("replay", "run.json")]),
        ("replay:C:/a b/mixcache+unicp,x=1.json", [Spec("replay", "C:/a b/mixcache+unicp,x=1.json")]),
    ],
)  # fmt: skip
def test_specs_are_read(text, specs):
    assert parse(text) == tuple(specs)


def test_variants_then_options_set_what_the_constructor_takes():
    policy = make("mixcache:eff:theta=0.2,levels=step/block,interval=6,residual=yes,penalty=off")
    assert isinstance(policy, MixCache) and policy.intervals == (5, 4, 3)
    assert (policy.theta, policy.levels, policy.fixed) == (0.2, ("step", "block"), 6)
    assert (policy.residual, policy.penalty) == (True, False)
    assert make("mixcache:eff:intervals=9/8/7").intervals == (9, 8, 7)  # an option beats the variant
    assert isinstance(make("none"), NoCache)
    both = make("mixcache+unicp:threshold=E5")
    assert isinstance(both, Combined) and isinstance(both.outer, MixCache) and isinstance(both.inner, UniCP)
    assert both.inner.threshold == 0.175


def test_options_are_typed_by_annotation(mine):
    text = "every=5,share=1e-2,widths=10/20/30,name=7,on=TRUE,limit=4,old=none,either=0.25"
    given = make(f"{mine}:Mine:{text}").given
    del given["profile"], given["tables"], given["bare"]
    assert given == {
        "every": 5, "share": 0.01, "widths": (10, 20, 30), "name": "7", "on": True,
        "limit": 4, "old": None, "either": 0.25,
    }  # fmt: skip
    assert [type(value) for value in given.values()][:6] == [int, float, tuple, str, bool, int]
    assert make(f"{mine}:Mine:limit=none,either=E3,widths=8").given["limit"] is None
    assert make(f"{mine}:Mine:either=E3").given["either"] == "E3"
    assert make(f"{mine}:Mine:widths=8").given["widths"] == (8,)
    wide = make(f"{mine}:Mine:wide:every=2").given
    assert (wide["widths"], wide["every"]) == ((9, 9), 2)


@pytest.mark.parametrize(
    "words, value", [("true True yes YES on 1", True), ("false False no No off OFF 0", False)]
)
def test_words_for_booleans(words, value):
    assert all(read_value(word, bool, "x") is value for word in words.split())


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "mixcash",
            "unknown cache 'mixcash'; choose one of none, mixcache, unicp, mixcache+unicp, ",
        ),
        ("", "unknown cache ''; choose one of none"),
        ("mixcache+", "unknown cache ''"),
        ("mixcache:fast", "unknown variant 'fast' of cache mixcache; it has eff"),
        ("none:fast", "unknown variant 'fast' of cache none; it has none"),
        ("unicp:eff", "unknown variant 'eff' of cache unicp; it has none"),
        ("mixcache:eff:theta", "'theta' is not KEY=VALUE; separate options by commas"),
        ("mixcache:eff,theta=1", "'eff' is not KEY=VALUE"),
        ("mixcache:theta=", "'theta' is not KEY=VALUE"),
        ("mixcache:=3", "'' is not KEY=VALUE"),
        ("mixcache:tetha=1", "cache mixcache has no option 'tetha'; it has theta, delta, intervals"),
        ("mixcache:profile=x", "cache mixcache has no option 'profile'"),
        ("none:x=1", "cache none has no option 'x'; it has none"),
        ("mixcache:theta=often", "mixcache: theta='often'"),
        ("mixcache:interval=2.5", "cache mixcache: interval='2.5' is not int | None"),
        ("mixcache:intervals=4/x/2", "cache mixcache: intervals='x' is not int"),
        ("mixcache:residual=maybe", "cache mixcache: residual='maybe' is neither true nor false"),
        ("unicp:ratio=half", "cache unicp: ratio='half' is not float | None"),
        ("mixcache+unicp+unicp", "at most two caches can be joined by +, got 3"),
        ("unicp+mixcache", "MixCache cannot act inside the blocks of UniCP"),
        ("mixcache+none", "NoCache cannot act inside the blocks of MixCache"),
        ("my_policy.py", "names a file but no class; write my_policy.py:ClassName"),
        ("nowhere.py:Mine", "nowhere.py does not exist"),
        ("replay", "names no trace; write replay:FILE"),
        ("replay:", "names no trace; write replay:FILE"),
        ("replay:nowhere.json", "nowhere.json cannot be read as a trace"),
        ("mixcache+replay:nowhere.json", "nowhere.json cannot be read as a trace"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(text)


@pytest.mark.parametrize(
    "text, said",
    [
        ("Yours", "has no class Yours"),
        ("Half", "Half has no tell(); a policy has reset, plan and tell"),
        ("A_NUMBER", "A_NUMBER has no reset()"),
        ("Mine:narrow", "unknown variant 'narrow'"),
        ("Mine:every=2.5", "Mine: every='2.5' is not int"),
        ("Mine:bare=3", "Mine: bare cannot be set: its annotation is not int, float, bool, str"),
        ("Mine:tables=1/2", "Mine: tables cannot be set: its annotation is not"),
    ],
)
def test_a_file_of_ones_own_is_told_what_it_lacks(mine, text, said):
    assert said in refused(f"{mine}:{text}")


def test_a_profile_is_looked_for_by_those_who_take_one(mine):
    asked = []
    find = lambda method: asked.append(method) or {"for": method}
    make("none", find)
    assert asked == []
    assert make("mixcache", find).profile == {"for": "mixcache"}
    both = make("mixcache+unicp", find)
    assert (both.outer.profile, both.inner.profile) == ({"for": "mixcache"}, {"for": "unicp"})
    assert make(f"{mine}:Mine", find).given["profile"] == {"for": "Mine"}


def test_what_needs_no_profile_is_not_stopped_by_one_that_does_not_fit():
    def no_match(method: str):
        raise ValueError("no profile fits this run")

    assert make("mixcache:impact=uniform", no_match).source == "uniform"
    for text in ("mixcache", "mixcache:impact=uniform,theta=profile", "unicp"):
        with pytest.raises(ValueError, match="no profile fits"):
            make(text, no_match)


def test_replay_takes_its_plans_from_a_trace(tmp_path):
    import json

    plans = (Plan(), Plan(output=REUSE, label="step"))
    trace = {"version": 1, "depth": 2, "steps": [{"plan": to_json(plan)} for plan in plans]}
    path = tmp_path / "mixcache+unicp.json"
    path.write_text(json.dumps(trace))
    policy = make(f"replay:{path}")
    assert isinstance(policy, Replay) and policy.plans == plans


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("replay", "mixcache+unicp")])
def test_defaults_are_listed_as_they_can_be_typed(name):
    cls, (first, listed) = find_class(name), summary(name)
    assert first == inspect.getdoc(cls).splitlines()[0]
    pairs = dict(pair.split("=") for pair in listed.split(", ")) if listed else {}
    assert set(pairs) == set(options_of(cls))
    for key, text in pairs.items():
        default = options_of(cls)[key].default
        assert read_value(text, options_of(cls)[key].annotation, key) == default
    assert make(f"{name}:{listed.replace(', ', ',')}")  # all of them at once


def test_a_run_has_a_method_or_a_replay_not_both(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "a red circle", "--cache", "mixcache", "--replay", "run.json"])
    assert stop.value.code == 2 and "not allowed with argument --cache" in capsys.readouterr().err


def run_alone(*argv: str) -> str:
    """What a command prints in a process of its own, and whether it has imported torch."""
    code = "import sys; from minidit.__main__ import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True
    ).stdout


def test_the_caches_command_lists_every_method_without_torch():
    *lines, torch_is_loaded = run_alone("caches").splitlines()
    assert torch_is_loaded == "False"
    rows = {line.split()[0]: line for line in lines[1 : 1 + 2 * len(METHODS) : 2]}
    said = dict(zip(rows, lines[2 : 2 + 2 * len(METHODS) : 2], strict=True))
    assert set(rows) == set(METHODS) and len(METHODS) >= 18
    assert rows["blockdance"].split() == ["blockdance", "block", "all"]
    assert said["blockdance"].startswith(
        "    BlockDance (Zhang et al., 2025, arXiv 2503.15927): steps in groups"
    )
    assert said["dbcache"].startswith("    DBCache (vipshop/cache-dit, 2025, no paper): ")
    assert "needed" in rows["unicp"] and "guided runs" in rows["cfg-gating"]
    assert "my_policy.py:MyPolicy" in "\n".join(lines) and "replay:FILE" in "\n".join(lines)


def test_the_caches_command_explains_a_method(capsys):
    assert main(["caches", "mixcache"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("MixCache (Wei et al., 2025, arXiv 2508.12691)")
    assert "mixcache:theta=0.1,delta=none,intervals=4/3/2," in text
    assert "mixcache:eff is intervals=5/4/3" in text and "empty" not in text and "class" not in text
    assert main(["caches", "none"]) == 0
    assert "options" not in capsys.readouterr().out
    assert main(["caches", "mixcash"]) == 2
    assert "unknown cache 'mixcash'; choose one of none, mixcache" in capsys.readouterr().err


PAPERLESS = {"none", "replay", "mixcache+unicp", "planned", "fbcache", "dbcache"}


@pytest.mark.parametrize("name", METHODS)
def test_a_docstring_begins_with_the_method_its_paper_and_one_sentence(name):
    first, _ = summary(name)
    assert len(first) <= 110 and first.endswith(".")
    if name not in PAPERLESS:
        assert re.match(r"[\w -]+ \([A-Z].+, 20\d\d, arXiv \d{4}\.\d{5}[^)]*\): .+\.$", first), first
    assert ("arXiv" in first) == (name not in PAPERLESS)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_explained(name):
    text = inspect.getdoc(find_class(name))
    missing = [option for option in options_of(find_class(name)) if not re.search(rf"\b{option}\b", text)]
    assert name in ("mixcache+unicp", "replay", "duca") or not missing


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_knob_is_an_option_with_two_bounds(name):
    cls = find_class(name)
    if not hasattr(cls, "knob"):
        return
    option, low, high = cls.knob
    assert option in options_of(cls) and low < high and type(low) is type(high)
    for value in (low, high):
        assert make(f"{name}:{option}={value}")


@pytest.mark.parametrize("name", METHODS)
def test_variants_set_options_that_there_are(name):
    cls = find_class(name)
    for variant, values in getattr(cls, "variants", {}).items():
        assert set(values) <= set(options_of(cls))
        assert make(f"{name}:{variant}")


def test_two_methods_that_act_inside_blocks_are_not_joined():
    for outer in ("fora", "taylorseer", "pab", "unicp"):
        with pytest.raises(
            ValueError, match=f"{outer} and unicp both act inside blocks; put a method before"
        ):
            make(f"{outer}+unicp")
