"""Caching methods by name: "mixcache", "mixcache:eff:theta=0.1", "mixcache+unicp", "my_policy.py:MyPolicy".

SPEC = NAME[:VARIANT][:KEY=VALUE,...], joined by + where one method acts inside the blocks of another.
"""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from minidit.cache.trace import read_plans, read_trace
from minidit.errors import OWN


@dataclass(frozen=True)
class Method:
    """A caching method as it is listed. Its paper stands in the first line of the class's docstring."""

    module: str  # under minidit.cache.policies
    cls: str
    levels: str = ""  # what it reuses: step, cfg (a guidance branch), block, attention (and MLP), token
    acts_on: str = "all"  # the families that its reset() accepts; it tells the others why not
    profile: str = ""  # "needed", and what does in its place; "": it takes none
    smaller: str = ""  # the variant or option with which it keeps least, for --cache-budget

    def load(self) -> type:
        return getattr(importlib.import_module(f"minidit.cache.policies.{self.module}"), self.cls)


METHODS = {
    "none": Method("none", "NoCache"),
    "mixcache": Method(
        "mixcache",
        "MixCache",
        "step cfg block",
        profile="needed, or impact=uniform",
        smaller="levels=step/cfg",
    ),
    "unicp": Method("unicp", "UniCP", "attention", profile="needed"),
    "mixcache+unicp": Method("combined", "Combined", "step cfg block attention", profile="both needed"),
    "planned": Method("planned", "Planned", "step", profile="needed"),  # minidit's own
    "teacache": Method("teacache", "TeaCache", "step", profile="needed, unless published"),
    "magcache": Method("magcache", "MagCache", "step", profile="needed, unless published"),
    "easycache": Method("easycache", "EasyCache", "step"),
    "adacache": Method("adacache", "AdaCache", "step", profile="needed, or scale=1"),
    "abcache": Method("abcache", "ABCache", "step"),
    "cfg-gating": Method("cfg_gating", "CFGGating", "cfg", acts_on="guided runs"),
    "blockdance": Method("blockdance", "BlockDance", "block"),
    "delta-dit": Method("delta_dit", "DeltaDiT", "block"),
    "fbcache": Method("dbcache", "FBCache", "block"),
    "dbcache": Method("dbcache", "DBCache", "block"),
    "fora": Method("fora", "FORA", "attention"),
    "pab": Method("pab", "PAB", "attention"),
    "taylorseer": Method("taylorseer", "TaylorSeer", "attention", smaller="lite"),
    "ditfastattn": Method("ditfastattn", "DiTFastAttn", "attention", profile="needed"),
    "fastercache": Method(
        "fastercache", "FasterCache", "cfg attention", acts_on="guided; :attention all", smaller="cfg"
    ),
    "toca": Method("toca", "ToCa", "attention token"),
    "duca": Method("toca", "DuCa", "block attention token"),
    "replay": Method("replay", "Replay"),  # replay:FILE, the plans of a trace
}


@dataclass(frozen=True)
class Spec:
    """One method as it was asked for."""

    name: str  # of METHODS, or file.py:Class
    variant: str = ""
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return ":".join(part for part in (self.name, self.variant, options) if part)


def fewer_steps(text: str, steps: int) -> int | None:
    """How many of `steps` the spec `fewer-steps:steps=N` or `:share=S` leaves (half); None: not that spec."""
    name, _, option = text.strip().partition(":")
    if name != "fewer-steps":
        return None
    key, _, value = (option or "share=0.5").partition("=")
    most = {"steps": steps, "share": 1.0}.get(key)
    try:
        wanted = type(most)(value)
        if not 0 < wanted <= most:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"cache {text!r}: write fewer-steps:steps=N with N at most {steps}, or fewer-steps:share=0.5"
        ) from None
    return wanted if key == "steps" else max(1, round(wanted * steps))


def parse(text: str) -> tuple[Spec, ...]:
    """The methods of a --cache argument, the outer one first."""
    if text.startswith("replay:"):
        return (parse_one(text),)  # a file name may hold any character
    return tuple(parse_one(part) for part in text.split("+"))


def parse_one(text: str) -> Spec:
    head, *rest = text.strip().split(":")
    if head == "replay":
        if not any(rest):
            raise ValueError(f"cache {text!r} names no trace; write replay:FILE")
        return Spec(head, ":".join(rest))  # the rest is a file name
    if head.endswith(".py"):
        if not rest:
            raise ValueError(f"cache {text!r} names a file but no class; write {head}:ClassName")
        head, *rest = f"{head}:{rest[0]}", *rest[1:]
    elif head == "fewer-steps":
        raise ValueError(f"cache {text!r} is a run without caching; it cannot be joined to a method")
    elif head not in METHODS:
        raise ValueError(
            f"unknown cache {head!r}; choose one of {', '.join(METHODS)}, or my_policy.py:MyPolicy"
        )
    variant = rest.pop(0) if rest and "=" not in rest[0] else ""
    pairs = [pair.partition("=") for pair in ":".join(rest).split(",") if pair]
    if odd := [key for key, equals, value in pairs if not (key and equals and value)]:
        raise ValueError(f"cache {text!r}: {odd[0]!r} is not KEY=VALUE; separate options by commas")
    return Spec(head, variant, {key.strip().replace("-", "_"): value.strip() for key, _, value in pairs})


def smaller_specs(text: str) -> list[str]:
    """What a --cache argument may shrink to where it keeps too much, step by step.

    First what stands behind the + goes, then what the method can do without; what was typed stays.
    """
    outer, *inner = parse(text)
    found = [str(outer)] if inner else []
    word = METHODS[outer.name].smaller if outer.name in METHODS else ""
    key, _, value = word.partition("=")
    if value and key not in outer.options:
        found.append(str(replace(outer, options=outer.options | {key: value})))
    if word and not value and not outer.variant:
        found.append(str(replace(outer, variant=word)))
    return found


def find_class(name: str) -> type:
    """The policy class of a method, or of file.py:Class."""
    if ".py:" not in name:
        return METHODS[name].load()
    file, cls = name.rsplit(":", 1)
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"cache {name!r}: {path} does not exist")
    module_spec = importlib.util.spec_from_file_location(f"{OWN}{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look themselves up there
    module_spec.loader.exec_module(module)
    if not hasattr(module, cls):
        raise ValueError(f"cache {name!r}: {path} has no class {cls}")
    policy = getattr(module, cls)
    if missing := [method for method in ("reset", "plan", "tell") if not hasattr(policy, method)]:
        raise ValueError(f"cache {name!r}: {cls} has no {missing[0]}(); a policy has reset, plan and tell")
    return policy


def make_policy(specs: tuple[Spec, ...], find_profile: Callable[[str], dict | None]) -> Any:
    """The policy of a parsed --cache argument.

    find_profile(method name) -> the data of the profile that fits the run, or None; asked only for methods
    whose constructor has a parameter `profile`, unless cls.needs_profile(options) says no. The method name
    of my_policy.py:MyPolicy is MyPolicy.
    """
    policies = [make_one(spec, find_profile) for spec in specs]
    if len(policies) == 1:
        return policies[0]
    from minidit.cache.policies.combined import Combined

    if len(policies) > 2:
        raise ValueError(f"at most two caches can be joined by +, got {len(policies)}")
    joined, outer = Combined(*policies), METHODS.get(specs[0].name, Method("", ""))
    if {"attention", "token"} & set(outer.levels.split()):
        raise ValueError(
            f"{specs[0].name} and {specs[1].name} both act inside blocks; put a method before the + that "
            f"acts on steps, branches or blocks, as in mixcache+unicp"
        )
    return joined


def make_one(spec: Spec, find_profile: Callable[[str], dict | None]) -> Any:
    """Build one policy: its variant's values, then the options, each read by the parameter's annotation."""
    cls = find_class(spec.name)
    if spec.name == "replay":
        return cls(read_plans(read_trace(spec.variant), spec.variant))
    variants = getattr(cls, "variants", {})
    if spec.variant and spec.variant not in variants:
        known = f"it has {', '.join(variants)}" if variants else "it has none"
        raise ValueError(f"unknown variant {spec.variant!r} of cache {spec.name}; {known}")
    parameters = options_of(cls)
    values = dict(variants[spec.variant]) if spec.variant else {}
    for key, text in spec.options.items():
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise ValueError(f"cache {spec.name} has no option {key!r}; it has {known}")
        values[key] = read_value(text, parameters[key].annotation, f"cache {spec.name}: {key}")
    needs_profile = getattr(cls, "needs_profile", lambda options: True)
    if "profile" in inspect.signature(cls).parameters and needs_profile(values):
        values["profile"] = find_profile(spec.name.rsplit(":")[-1])
    return cls(**values)


def options_of(cls: type) -> dict[str, inspect.Parameter]:
    """What a user may set of a policy: the parameters of its constructor."""
    parameters = inspect.signature(cls, eval_str=True).parameters
    return {name: p for name, p in parameters.items() if name != "profile"}


def read_value(text: str, kind: Any, where: str) -> Any:
    """A value as its annotation says; the items of a tuple are joined by slashes: blocks=10/20/30."""
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return tuple(read_value(part, item, where) for part in text.split("/"))
    if get_origin(kind) in (Union, UnionType):
        if text == "none":
            return None
        kinds = [k for k in get_args(kind) if k is not type(None)]
        for k in sorted(kinds, key=lambda k: k is str):  # a string fits anything, so it is tried last
            try:
                return read_value(text, k, where)
            except ValueError:
                continue
        raise ValueError(f"{where}={text!r} is not {kind}")
    if kind is bool:
        if text.lower() in ("true", "yes", "on", "1"):
            return True
        if text.lower() in ("false", "no", "off", "0"):
            return False
        raise ValueError(f"{where}={text!r} is neither true nor false")
    if kind not in (int, float, str):
        raise ValueError(
            f"{where} cannot be set: its annotation is not int, float, bool, str, a tuple of one of these "
            f"such as tuple[int, ...], or one of these | None"
        )
    try:
        return kind(text)
    except (TypeError, ValueError):
        raise ValueError(f"{where}={text!r} is not {kind.__name__}") from None


def summary(name: str) -> tuple[str, str]:
    """First line of a method's docstring, and its options with their defaults."""
    cls = find_class(name)
    options = [f"{n}={show(p.default)}" for n, p in options_of(cls).items() if p.default is not p.empty]
    first = re.split(r"\n\s*\n|\n", inspect.getdoc(cls) or "", maxsplit=1)[0]
    return first, ", ".join(options)


def explain(name: str) -> str:
    """All there is to read about a method: its docstring, variants, and options with their defaults."""
    if name not in METHODS and ".py:" not in name:
        raise ValueError(f"unknown cache {name!r}; choose one of {', '.join(METHODS)}")
    cls, (_, options) = find_class(name), summary(name)
    lines = [inspect.getdoc(cls) or "", f"\noptions and their defaults: {name}:{options.replace(', ', ',')}"]
    for variant, values in getattr(cls, "variants", {}).items():
        lines.append(f"{name}:{variant} is " + ",".join(f"{key}={show(v)}" for key, v in values.items()))
    return "\n".join(lines[:1] if not options else lines)


def show(value: Any) -> str:
    """A value as it has to be typed."""
    if isinstance(value, tuple):
        return "/".join(map(show, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
