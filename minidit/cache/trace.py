"""The log of a run: one record per step, as JSON, and plans back from it. Standard library only."""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from minidit.cache import plan as vocabulary
from minidit.cache.macs import Table, full_macs, plan_macs
from minidit.cache.plan import Measure, Plan, check

VERSION = 1
TYPES = {
    cls.__name__: cls
    for cls in (
        vocabulary.Site, vocabulary.Mix, vocabulary.Run, vocabulary.Load, vocabulary.Add, vocabulary.Slice,
        vocabulary.Freeze, vocabulary.Window, vocabulary.Tokens, vocabulary.Share, vocabulary.Spectrum,
        vocabulary.Measure, vocabulary.Gate, vocabulary.Plan,
    )
}  # fmt: skip


def to_json(value: Any) -> Any:
    """A plan or a part of one -> lists, numbers, strings and {"is": class, ...}; defaults are left out."""
    if is_dataclass(value):
        changed = {
            f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default
        }
        return {"is": type(value).__name__} | {name: to_json(v) for name, v in changed.items()}
    return [to_json(v) for v in value] if isinstance(value, tuple | list) else value


def from_json(value: Any) -> Any:
    """The inverse of to_json; lists become tuples."""
    if isinstance(value, dict):
        values = {name: from_json(v) for name, v in value.items() if name != "is"}
        if (name := value.get("is")) not in TYPES:
            raise ValueError(f"{name!r} is not a part of a plan")
        part = TYPES[name](**values)
        for f in fields(part):
            if not fits(item := getattr(part, f.name), f.type):
                raise ValueError(f"{name}.{f.name} is {item!r:.60}")
        return part
    return tuple(from_json(v) for v in value) if isinstance(value, list) else value


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation of a plan's parts says."""
    if isinstance(kind, UnionType):
        return any(fits(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if isinstance(value, tuple) and kinds[1:] == (...,):
            kinds = kinds[:1] * len(value)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    return type(value) in ((int, float) if kind is float else (kind,))


def name_of(measure: Measure) -> str:
    """A measurement's name in a trace, such as "l1 h(4) cond"."""
    branch = "" if measure.site in vocabulary.SHARED else f" {measure.branch}"
    return f"{measure.norm} {measure.site}{branch}" + (f" age {measure.age}" if measure.age else "")


def make_trace(
    settings: dict,
    records: Sequence[Any],
    subs: Sequence[str],
    branches: tuple[str, ...],
    table_at: Callable[[int | None], Table],
    cache_bytes: int,
) -> dict:
    """A trace of a run: settings, then every step's plan, values, seconds and MACs, then totals.

    records: sampling.Record of every step · subs: of a block · table_at: see macs.plan_macs
    """
    steps = [
        {
            "i": record.step.i,
            "t": record.step.t,
            "plan": to_json(record.plan),
            "values": {name_of(measure): value for measure, value in record.values.items()},
            "seconds": round(record.seconds, 6),
            "macs": plan_macs(record.plan, branches, table_at),
        }
        for record in records
    ]
    macs, full = sum(step["macs"] for step in steps), full_macs(branches, table_at)
    total = {
        "macs": macs,
        "macs_full": full * len(steps),
        "cache_bytes": cache_bytes,
        "full_equivalents": macs / full,
        "seconds": round(sum(step["seconds"] for step in steps), 6),
    }
    depth = 1 + max(block for block, _ in table_at(None))
    return {
        "version": VERSION,
        "settings": settings,
        "depth": depth,
        "subs": list(subs),
        "steps": steps,
        "total": total,
    }


def closing_line(trace: dict) -> str:
    """What a cache came to: "mixcache: 29.0 of 50 steps full-equivalent, ..."."""
    total, steps = trace["total"], trace["steps"]
    ratio = total["macs_full"] / total["macs"] if total["macs"] else float("inf")
    size = total["cache_bytes"]
    held = f"{size / 2**30:.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:.2f} MiB"
    done = f"{total['full_equivalents']:.1f} of {len(steps)} steps full-equivalent"
    line = f"{trace['settings']['cache']}: {done}, {ratio:.2f}x fewer MACs, {held} cache"
    if "ranks" not in trace:
        return line
    count = trace["ranks"]["ulysses"] * trace["ranks"]["cfg"]
    critical = total["macs_full"] / total["macs_critical"] if total["macs_critical"] else float("inf")
    return f"{line} per rank; {critical:.2f}x fewer MACs on the busiest of {count} ranks"


def write_trace(path: str | Path, trace: dict) -> None:
    """Write a trace, whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(trace, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def acted(trace: dict) -> bool:
    """Whether any step did less than everything."""
    return trace["total"]["macs"] < trace["total"]["macs_full"]


def read_trace(path: str | Path) -> dict:
    """A trace file; one line says what is wrong with it."""
    try:
        trace = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a trace ({error}); make one with --trace FILE") from None
    if not isinstance(trace, dict) or trace.get("version") != VERSION or "steps" not in trace:
        raise ValueError(f"{path} is not a trace of this minidit; make one with --trace FILE")
    return trace


def read_plans(trace: dict, where: str) -> tuple[Plan, ...]:
    """The plan of every step of a trace."""
    try:
        plans = tuple(from_json(step["plan"]) for step in trace["steps"])
        for plan in plans:
            if not isinstance(plan, Plan):
                raise ValueError(f"a {type(plan).__name__}")
            check(plan, trace["depth"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} holds a step that is no plan ({error}); make it again") from None
    return plans
