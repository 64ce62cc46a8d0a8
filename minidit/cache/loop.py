"""The block loop, written once: every model runs its blocks here, and here alone is caching woven in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from minidit.attention import FOLDABLE, FULL, Folded, FoldedText, Frozen, Keeping, Sliced
from minidit.cache.measure import Measurements, distance
from minidit.cache.plan import (
    REUSE,
    RUN_ALL,
    Add,
    Freeze,
    Load,
    Mix,
    Plan,
    Run,
    Site,
    attention_map,
    check_change,
    h,
    residual,
    sub,
)
from minidit.cache.store import Store

Codes = tuple[tuple[str, str], ...]  # (sub-module, "run", "keep" or "reuse"); static under torch.compile
Probe = Callable[[tuple[str, ...], int, str, Callable[..., Tensor], tuple[Any, ...], Tensor], None]


class BlockCond(Protocol):
    """What a model's blocks are conditioned on; at(k) is what block k sees of it."""

    def at(self, block: int) -> Any: ...


@dataclass(frozen=True)
class Lane:
    """The guidance branches that run as one batch: a name per row, their state and their conditioning."""

    branches: tuple[str, ...]
    h: Tensor  # (B, L, D)
    cond: BlockCond


class BlockCache:
    """The seam inside a block: every sub-module (attn, cross, mlp) is called through run().

    codes: what to do with which sub-module, all others just run: "run", "keep" its attention map too, "reuse"
    stored: for "reuse" the output, else the way in which attention is to run, if it is not the full one
    """

    def __init__(self, codes: Codes = (), stored: dict[str, Any] | None = None):
        self.codes, self.stored = dict(codes), stored or {}
        self.outputs: dict[str, Tensor] = {}  # of the sub-modules that ran under a code

    def run(self, name: str, module: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """The output of `module`, before its gate. name: the sub-module as plans know it"""
        if name not in self.codes:
            return module(*inputs)
        if self.codes[name] == "reuse":
            return self.stored[name]
        if self.codes[name] == "keep":
            how = Keeping(self.stored.get(name, FULL))
            out = module(*inputs, how=how)
            self.outputs[f"{name}.map"] = how.pattern
        else:
            out = module(*inputs, how=self.stored[name]) if name in self.stored else module(*inputs)
        self.outputs[name] = out
        return out


class ProbedCache(BlockCache):
    """A BlockCache that shows every sub-module, its inputs and its output to a probe (cache/calibrate.py)."""

    def __init__(self, branches: tuple[str, ...], block: int, probe: Probe):
        super().__init__()
        self.branches, self.block, self.probe = branches, block, probe

    def run(self, name: str, module: Callable[..., Tensor], *inputs: Any) -> Tensor:
        out = super().run(name, module, *inputs)
        self.probe(self.branches, self.block, name, module, inputs, out)
        return out


def run_block(
    block: nn.Module, h: Tensor, cond: Any, codes: Codes, stored: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One block under its codes -> h after it, and the outputs of the sub-modules that ran under a code.

    A pure function of its arguments: this is what torch.compile compiles, once per distinct row of codes.
    """
    cache = BlockCache(codes, stored)
    return block(h, cond, cache), cache.outputs


class Recorder:
    """Measures and keeps what a plan wants of the values that pass by.

    video_tokens: the first rows of a state, at which alone distances look; None is all
    """

    def __init__(self, plan: Plan, store: Store, measurements: Measurements, video_tokens: int | None = None):
        self.store, self.measurements, self.video_tokens = store, measurements, video_tokens
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """Take orders from this plan from now on."""
        self.plan = plan
        self.gate_value = float("inf")  # as long as there is nothing to compare with
        self.keep = set(plan.keep)
        self.wanted = (
            self.keep | {m.site for m in plan.measure} | ({plan.gate.measure.site} if plan.gate else set())
        )
        self.starts = {site.first for site in self.wanted if site.kind == "residual"}
        self.subs = {(site.first, site.name) for site in self.wanted if site.kind == "sub"}
        self.maps = {(site.first, site.name) for site in self.wanted if site.kind == "map"}

    def see(self, site: Site, branches: Sequence[str], value: Tensor) -> None:
        """A value passes by, one batch row per branch: read new, read old, then write."""
        if site not in self.wanted:
            return
        for row, branch in zip(value.split(1), branches, strict=True):
            for measure in self.plan.measure:
                if (measure.site, measure.branch) == (site, branch or measure.branch):
                    if (old := self.old(site, branch, measure.age)) is not None:
                        self.measurements.add(measure, self.video(site, row), self.video(site, old))
            gate = self.plan.gate
            if gate and (gate.measure.site, gate.measure.branch) == (site, branch):
                if (old := self.old(site, branch, gate.measure.age)) is not None:
                    pair = self.video(site, row), self.video(site, old)
                    self.gate_value = distance(*pair, gate.measure.norm)
            if site in self.keep and self.store.holds(site, branch):
                self.store.push(site, branch, row)

    def video(self, site: Site, value: Tensor) -> Tensor:
        """What distances look at: of a state (1, L + M, D) the first L rows."""
        return value[:, : self.video_tokens] if site.kind in ("h", "residual", "sub") else value

    def old(self, site: Site, branch: str, age: int) -> Tensor | None:
        """The stored value of that age, or None while there is none."""
        if not self.store.holds(site, branch):
            return None
        entries = self.store.rings[site, branch].entries()
        return entries[age] if age < len(entries) else None


def run_blocks(
    blocks: nn.ModuleList,
    lanes: Sequence[Lane],
    plan: Plan = RUN_ALL,
    recorder: Recorder | None = None,
    *,
    decide: Callable[[Plan, float], Plan] | None = None,
    probe: Probe | None = None,
    block_fn: Callable[..., tuple[Tensor, dict[str, Tensor]]] = run_block,
) -> list[Tensor]:
    """Follow the plan's path from h(0) to h(depth) -> the last h of every lane, (B, L, D) each.

    Path items are the outer loop and lanes the inner one: a gate is decided after every branch has reached
    it, so batched and sequential guidance follow the same plan. probe sees every sub-module.
    """
    walkers = [Walker(blocks, lane, recorder, probe, block_fn) for lane in lanes]
    at = 0
    while True:
        if plan.gate is not None and plan.gate.after == at - 1:
            changed = decide(plan, recorder.gate_value)
            check_change(plan, changed, at, len(blocks))
            plan = changed
            recorder.follow(plan)
        if at == len(plan.path):
            return [walker.h for walker in walkers]
        for walker in walkers:
            walker.follow(plan.path[at], dict(plan.subs))
        at += 1


class Walker:
    """One lane on its way through the blocks."""

    def __init__(
        self, blocks, lane: Lane, recorder: Recorder | None, probe: Probe | None, block_fn: Callable
    ):
        self.blocks, self.lane, self.recorder = blocks, lane, recorder
        self.probe, self.block_fn = probe, block_fn
        self.marks: dict[int, Tensor] = {}  # states that a residual starts from
        self.h, self.at = lane.h, 0
        self.arrive(0, lane.h)

    def follow(self, item: Run | Load | Add, subs: dict) -> None:
        if isinstance(item, Run):
            for k in range(item.first, len(self.blocks) if item.last is None else item.last):
                self.arrive(k + 1, self.run(k, subs))
            return
        stored = self.recorder.store.mix(item.site, self.lane.branches, item.mix)
        if isinstance(item, Load):
            self.arrive(item.site.first, stored)
        else:
            self.arrive(item.site.last, self.h + stored)

    def run(self, k: int, subs: dict) -> Tensor:
        """Block k -> h(k + 1)"""
        if self.probe is not None:
            cache = ProbedCache(self.lane.branches, k, self.probe)
            return self.blocks[k](self.h, self.lane.cond.at(k), cache)
        if self.recorder is None:
            return self.blocks[k](self.h, self.lane.cond.at(k), BlockCache())
        codes, stored = self.row(k, subs)
        out, outputs = self.block_fn(self.blocks[k], self.h, self.lane.cond.at(k), codes, stored)
        for name, value in outputs.items():
            base, _, is_map = name.partition(".")
            site = attention_map(k, base) if is_map else sub(k, base)
            self.recorder.see(site, self.lane.branches, value)
        return out

    def row(self, k: int, subs: dict) -> tuple[Codes, dict[str, Any]]:
        """What block k does with its sub-modules, and the tensors that takes."""
        store, codes, stored = self.recorder.store, {}, {}
        for code, wanted in (("run", self.recorder.subs), ("keep", self.recorder.maps)):
            codes |= {name: code for block, name in wanted if block == k}
        for (block, name), how in subs.items():
            if block == k and isinstance(how, Mix):
                codes[name] = "reuse"
                stored[name] = store.mix(sub(k, name), self.lane.branches, how)
            elif block == k and isinstance(how, Freeze):
                codes[name] = "run"
                stored[name] = Frozen(store.mix(attention_map(k, name), self.lane.branches, REUSE))
            elif block == k:
                codes.setdefault(name, "run")
                stored[name] = self.sliced(k, name, how.width)
        return tuple(sorted(codes.items())), stored

    def sliced(self, k: int, name: str, width: int) -> Sliced | Folded | FoldedText:
        """Attention of that width: folded into the projections where that is exact, once per generation."""
        store, module = self.recorder.store, getattr(self.blocks[k], name)
        if (k, name, width) in store.folds:
            return store.folds[k, name, width]
        bases = (store.constant(k, f"{name}.{part}.{width}") for part in ("q", "k"))
        if not isinstance(module, FOLDABLE):
            return Sliced(*bases)
        return store.folds.setdefault((k, name, width), module.fold(*bases))

    def arrive(self, block: int, state: Tensor) -> None:
        """h(block) is known."""
        self.h = state
        if self.recorder is None:
            return
        if block in self.recorder.starts:
            self.marks[block] = state
        self.recorder.see(h(block), self.lane.branches, state)
        for start, earlier in self.marks.items():
            if residual(start, block) in self.recorder.wanted and start != block:
                self.recorder.see(residual(start, block), self.lane.branches, state - earlier)
