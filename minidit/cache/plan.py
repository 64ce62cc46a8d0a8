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
    of: int = 0  # of window_rest

    def __str__(self) -> str:
        numbers = {
            "h": f"({self.first})",
            "residual": f"({self.first},{self.last})",
            "rest": f"({self.first},{self.name},{self.last})",
        }
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


def sub_input(block: int, name: str) -> Site:
    """What enters a sub-module; of a block's first one it is known before the block has run (see Gate)."""
    return Site("input", block, name=name)


def window_rest(block: int, name: str, window: "Window") -> Site:
    """What full attention gives beyond a window, before the way out of the heads."""
    return Site("rest", block, window.width, name, window.of)


def token_ages(block: int, name: str) -> Site:
    """By token: the steps for which Tokens has passed it over. Kept by the executor itself."""
    return Site("ages", block, name=name)


TIME = Site("time")  # of one branch: the embedding of the timestep, with what is added to it
TIME_MOD = Site("time_mod")  # of one branch: TIME as projected for the blocks, where a family has that
PREDICTION = Site("prediction")  # of one branch
OFFSET = Site("offset")  # of one branch: PREDICTION - LATENTS
LATENTS = Site("latents")  # what enters the step; like the ones below it belongs to no branch
LATENTS_FULL = Site("latents_full")  # the latents of the last step that a policy called full
GUIDED = Site("guided")  # after guidance
GUIDED_FULL = Site("guided_full")  # the guided prediction of the last step that a policy called full
CFG_DELTA = Site("cfg_delta")  # uncond - cond
SHARED = (LATENTS, LATENTS_FULL, GUIDED, GUIDED_FULL, CFG_DELTA)


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
class Window:
    """Self-attention of every token to those at most `width` places away in token order, plus window_rest.

    of: the tokens that attend to each other, by which multiply-adds are counted
    """

    width: int
    of: int


@dataclass(frozen=True)
class Tokens:
    """A sub-module that sees every token alone runs for `count` of `of` video tokens, chosen anew each time.

    The others keep their stored output. Those of the highest score run: with "norm" 1 - |o| / max |o| of the
    stored output o, with "random" numbers in [0, 1) drawn from `seed`; to both `fresh` times token_ages is
    added, if these are needed. Rows of text behind the video all run; `text` of them, for multiply-adds.
    """

    count: int
    of: int
    score: str = "norm"
    fresh: float = 0.0
    seed: int = 0
    text: int = 0


@dataclass(frozen=True)
class Share:
    """A sub-module that sees no text runs for this branch, the first one; the others take its output."""

    branch: str = "cond"
    how: Window | None = None


SCORES = ("norm", "random")  # of Tokens
SubOp = Mix | Slice | Freeze | Window | Tokens | Share


@dataclass(frozen=True)
class Spectrum:
    """CFG_DELTA with its spatial frequencies weighted, frame by frame (FasterCache).

    low: those within min(H, W) // 5 of zero, in grid units · high: all others
    """

    low: float = 1.0
    high: float = 1.0


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
    """After path item `after` (-1: before the first), one measured number goes to the policy's decide().

    A gate on LATENTS stands before everything, and decide() may answer with any plan. One on sub_input stands
    before that block, which runs up to its first sub-module once more. What decide() newly wants kept of the
    gate's own site is kept.
    """

    after: int
    measure: Measure


@dataclass(frozen=True)
class Plan:
    """One step. The default runs everything and keeps nothing."""

    path: tuple[Run | Load | Add, ...] = (Run(),)  # from h(0) to h(depth), or the load of a prediction
    branches: tuple[str, ...] = ()  # those that run; () is all
    subs: tuple[tuple[Sub, SubOp], ...] = ()  # sub-modules that do not run in full
    keep: tuple[Site, ...] = ()
    measure: tuple[Measure, ...] = ()
    fill: Mix | Spectrum | None = None  # a branch that does not run is cond + this of CFG_DELTA
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
    model: str = ""  # the release's preset name, for which a paper may have numbers
    tokens: int = 0  # video tokens of one branch
    text_tokens: int = 0  # rows of text behind them in h, where a family has both in one sequence
    token_ranks: int = 1  # ranks that share the tokens of a branch
    cfg_ranks: int = 1  # 2: each branch has ranks of its own, so that one left out saves no time

    @property
    def guidance_varies(self) -> bool:
        """Whether steps are guided by several scales: one's guided prediction will not do for another."""
        return len(self.branches) > 1 and len({step.guidance for step in self.steps}) > 1


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


def recalled(plan: Plan) -> Load | None:
    """The path item in place of the transformer, where the path is Load(PREDICTION) or Load(OFFSET) alone."""
    item = plan.path[0] if len(plan.path) == 1 else None
    return item if isinstance(item, Load) and item.site in (PREDICTION, OFFSET) else None


def check(plan: Plan, depth: int) -> None:
    """Refuse a path that does not lead from h(0) to h(depth) step by step, and what cannot be done on it."""
    if plan.output is not None or recalled(plan) is not None:
        return
    places = follow_path(plan, depth)
    for (block, name), how in plan.subs:
        check_sub(block, name, how, plan.branches)
    if plan.gate is not None:
        check_gate(plan.gate, places)


def follow_path(plan: Plan, depth: int) -> list[int]:
    """The block reached before the path, and after each of its items."""
    places = [0]
    for item in plan.path:
        at = places[-1]
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
        places.append(end)
    if places[-1] != depth:
        raise ValueError(
            f"the plan's path ends at block {places[-1]} of {depth}; end it with a Run to the last block"
        )
    return places


def check_sub(block: int, name: str, how: SubOp, branches: tuple[str, ...]) -> None:
    """Refuse what cannot be done with a sub-module. branches: of the plan, () is all"""
    where = f"the plan wants {how} of {name} in block {block}"
    inner = how.how if isinstance(how, Share) else how
    if isinstance(how, Share) and "cross" in name:
        raise ValueError(f"{where}, which looks at the text of its branch; share attn or mlp")
    if isinstance(how, Share) and branches and branches[0] != how.branch:
        raise ValueError(f"{where}, but {branches[0]} runs first; share the branch that does")
    if isinstance(inner, Window) and (name != "attn" or not 0 < inner.width < inner.of):
        raise ValueError(f"{where}; wanted a width of 1 .. {inner.of - 1}, of attn")
    if isinstance(how, Tokens) and ("attn" in name or not 0 < how.count <= how.of):
        raise ValueError(
            f"{where}; wanted a count of 1 .. {how.of}, of a sub-module that is no self-attention"
        )
    if isinstance(how, Tokens) and how.score not in SCORES:
        raise ValueError(f"{where}; its score is one of {', '.join(SCORES)}")


def check_gate(gate: Gate, places: list[int]) -> None:
    """Refuse a gate where its value is not known. places: see follow_path"""
    site = gate.measure.site
    if not -1 <= gate.after < len(places) - 1:
        raise ValueError(f"the plan's gate is after item {gate.after} of a path of {len(places) - 1}")
    if site in (LATENTS, TIME, TIME_MOD) and gate.after != -1:
        raise ValueError(
            f"the plan's gate on {site} is after item {gate.after}; put it before the path, at -1"
        )
    at = places[gate.after + 1]
    if site.kind == "input" and site.first != at:
        raise ValueError(
            f"the plan's gate on {site} stands before block {at}; it has to be before {site.first}"
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
