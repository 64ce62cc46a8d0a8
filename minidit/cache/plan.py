"""The vocabulary of caching: what a policy says about one step, as frozen data. Standard library only.

A policy is asked for a Plan before every step, and cache/loop.py carries it out. Blocks are numbered
0 .. depth-1; h(k) is the hidden state that enters block k, and h(depth) enters the head. Branches are the
guidance branches by name, "cond" and "uncond". A policy holds numbers and never tensors; tensors live in the
store, in one ring per (site, branch), newest first.
"""

from dataclasses import dataclass
from typing import Any, Protocol

Sub = tuple[int, str]  # (block, sub-module), such as (7, "attn")


@dataclass(frozen=True)
class Site:
    """A place in the forward pass whose value can be kept or measured. Made by the functions below."""

    kind: str
    first: int = 0
    last: int = 0
    name: str = ""

    def __str__(self) -> str:
        numbers = {"h": f"({self.first})", "residual": f"({self.first},{self.last})"}
        return self.kind + numbers.get(self.kind, f"({self.first},{self.name})" if self.name else "")


def h(block: int) -> Site:
    """The hidden state that enters this block."""
    return Site("h", block)


def residual(first: int, last: int) -> Site:
    """h(last) - h(first): what blocks first .. last-1 add."""
    return Site("residual", first, last)


def sub(block: int, name: str) -> Site:
    """The output of a sub-module, before its gate."""
    return Site("sub", block, name=name)


def attention_map(block: int, name: str) -> Site:
    """What decides an attention's map: the map itself over time, queries and keys within frames."""
    return Site("map", block, name=name)


PREDICTION = Site("prediction")  # of one branch
GUIDED = Site("guided")  # after guidance; like the ones below it belongs to no branch
GUIDED_FULL = Site("guided_full")  # the guided prediction of the last step that a policy called full
CFG_DELTA = Site("cfg_delta")  # uncond - cond
SHARED = (GUIDED, GUIDED_FULL, CFG_DELTA)


@dataclass(frozen=True)
class Mix:
    """A weighted sum of a ring's entries, newest first: (1,) is reuse, (2, -1) linear extrapolation."""

    coefficients: tuple[float, ...] = (1.0,)


REUSE = Mix()


@dataclass(frozen=True)
class Run:
    """Run blocks first .. last-1; last=None runs to the end."""

    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class Load:
    """The hidden state becomes a stored one."""

    site: Site
    mix: Mix = REUSE


@dataclass(frozen=True)
class Add:
    """The hidden state gains a stored residual."""

    site: Site
    mix: Mix = REUSE


@dataclass(frozen=True)
class Slice:
    """Attention with queries and keys of `width` directions, by the basis in the store's constants."""

    width: int


@dataclass(frozen=True)
class Freeze:
    """Attention with the map that was kept last: of its inputs, values alone count."""


@dataclass(frozen=True)
class Measure:
    """The distance of this step's value from the stored one, read before the store is overwritten.

    norm: "l1" is sum|new - old| / sum|old|, "l2" the same with root sums of squares, "moments" the mean and
    standard deviation of new - old, "abs" the means of |new| and |old|
    """

    site: Site
    norm: str = "l1"
    branch: str = "cond"
    age: int = 0


@dataclass(frozen=True)
class Gate:
    """After path item `after` (-1: before the first), one measured number goes to the policy's decide()."""

    after: int
    measure: Measure


@dataclass(frozen=True)
class Plan:
    """One step. The default runs everything and keeps nothing."""

    path: tuple[Run | Load | Add, ...] = (Run(),)  # from h(0) to h(depth)
    branches: tuple[str, ...] = ()  # those that run; () is all
    subs: tuple[tuple[Sub, Mix | Slice | Freeze], ...] = ()  # sub-modules that do not run in full
    keep: tuple[Site, ...] = ()
    measure: tuple[Measure, ...] = ()
    fill: Mix | None = None  # a branch that does not run is cond + this mix of CFG_DELTA
    output: Mix | None = None  # the guided prediction is this mix of GUIDED: the transformer does not run
    gate: Gate | None = None
    label: str = "full"  # for people: what the policy calls this step


RUN_ALL = Plan()


@dataclass(frozen=True)
class Need:
    """A ring that a policy wants: `depth` entries of a site, for these branches (() is all)."""

    site: Site
    depth: int = 1
    branches: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunInfo:
    """What a policy is told of a generation before step 0."""

    steps: tuple[Any, ...]  # schedules.Step of every step: i, n, t, sigma, guidance, expert
    depth: int  # blocks
    subs: tuple[str, ...]  # the sub-modules of a block, in order
    branches: tuple[str, ...]
    family: str
    map_bytes: tuple[tuple[str, int], ...] = ()  # of one branch's attention map, by sub-module, once known


Values = dict[Measure, Any]


class Policy(Protocol):
    """A caching method. `decide` is called only for plans with a gate."""

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        """Begin a generation; says what the store has to hold."""
        ...

    def plan(self, step: Any) -> Plan: ...

    def decide(self, step: Any, plan: Plan, value: float) -> Plan: ...

    def tell(self, step: Any, values: Values) -> None:
        """The measurements of a step, before the next plan is asked for."""
        ...


def runs(plan: Plan, depth: int) -> set[int]:
    """The blocks that a plan runs."""
    if plan.output is not None:
        return set()
    spans = [
        (item.first, depth if item.last is None else item.last) for item in plan.path if isinstance(item, Run)
    ]
    return {k for first, last in spans for k in range(first, last)}


def recalled(plan: Plan) -> Mix | None:
    """The mix of stored predictions in place of the transformer, where the path is Load(PREDICTION) alone."""
    item = plan.path[0] if len(plan.path) == 1 else None
    return item.mix if isinstance(item, Load) and item.site == PREDICTION else None


def check(plan: Plan, depth: int) -> None:
    """Refuse a path that does not lead from h(0) to h(depth) step by step."""
    at = 0
    if plan.output is not None or recalled(plan) is not None:
        return
    for item in plan.path:
        if isinstance(item, Run):
            start, end = item.first, depth if item.last is None else item.last
        elif isinstance(item, Load):
            start, end = at, item.site.first
        else:
            start, end = item.site.first, item.site.last
        fits = isinstance(item, Run) or item.site.kind == ("h" if isinstance(item, Load) else "residual")
        if start != at or not start <= end <= depth or not fits:
            raise ValueError(
                f"the plan's path has {item} at block {at} of {depth}; wanted a Run or an Add of a residual "
                f"that starts there, or a Load of a later h"
            )
        at = end
    if at != depth:
        raise ValueError(
            f"the plan's path ends at block {at} of {depth}; end it with a Run to the last block"
        )


def check_change(plan: Plan, changed: Plan, at: int, depth: int) -> None:
    """Refuse what decide() made of a plan after `at` items of its path where it undoes what has run."""
    check(changed, depth)
    same = (changed.path[:at], changed.branches) == (plan.path[:at], plan.branches)
    if not same or changed.output is not None or recalled(changed) is not None:
        raise ValueError(
            f"decide() changed the branches, the output or the first {at} items of the path, which have run; "
            f"it may change what comes after them, and what is kept and measured"
        )
