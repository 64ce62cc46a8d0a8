"""The block loop, written once: every model runs its blocks here, and here alone is caching woven in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minidit.attention import (
    FOLDABLE,
    FULL,
    Folded,
    FoldedText,
    Frozen,
    Keeping,
    Sliced,
    Watched,
    Windowed,
)
from minidit.cache.measure import Measurements, sums_of
from minidit.cache.plan import (
    LATENTS,
    REUSE,
    RUN_ALL,
    Add,
    Freeze,
    Load,
    Measure,
    Mix,
    Plan,
    Run,
    Share,
    Site,
    SubOp,
    Tokens,
    Window,
    attention_map,
    check,
    check_change,
    h,
    residual,
    sub,
    sub_input,
    token_ages,
    window_rest,
)
from minidit.cache.store import Store
from minidit_kernels.rel_l1 import Pair

Codes = tuple[tuple[str, str], ...]  # (sub-module, what to do); static under torch.compile
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


@dataclass(frozen=True)
class Picked:
    """The tokens that a sub-module runs for, and the output that the others keep."""

    old: Tensor  # (B, L, D)
    rows: Tensor  # (B, picked), indices of tokens


class BlockCache:
    """The seam inside a block: every sub-module (attn, cross, mlp) is called through run().

    codes: what to do with which sub-module, all others just run: "run", "keep" its attention map too, "watch"
    what a window would leave out, "reuse", run for some "tokens"; "<name>.share" runs it for the first row
    and copies, "<name>.input" shows what enters it
    stored: for "reuse" the output, for "tokens" Picked, for "watch" the window, else the way in which
    attention is to run, if it is not the full one
    """

    def __init__(self, codes: Codes = (), stored: dict[str, Any] | None = None):
        self.codes, self.stored = dict(codes), stored or {}
        self.outputs: dict[str, Tensor] = {}  # of the sub-modules that ran under a code

    def run(self, name: str, module: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """The output of `module`, before its gate. name: the sub-module as plans know it"""
        if f"{name}.input" in self.codes:
            self.outputs[f"{name}.input"] = inputs[0]
        if name not in self.codes:
            return module(*inputs)
        if self.codes[name] == "reuse":
            return self.stored[name]
        if f"{name}.share" not in self.codes:
            found = self.execute(name, module, *inputs)
        else:
            found = self.execute(name, module, inputs[0][:1], *inputs[1:])
            found = {key: t.expand(len(inputs[0]), *t.shape[1:]) for key, t in found.items()}
        self.outputs |= found
        return found[name]

    def execute(self, name: str, module: Callable[..., Tensor], *inputs: Any) -> dict[str, Tensor]:
        """Run a sub-module as its code says -> its output, by name, and what else there is to keep of it."""
        code, stored = self.codes[name], self.stored.get(name)
        if code == "keep":
            how = Keeping(stored or FULL)
            return {name: module(*inputs, how=how), f"{name}.map": how.pattern}
        if code == "watch":
            how = Watched(stored.width)
            out = module(*inputs, how=how)
            return {name: out, f"{name}.rest": how.rest.reshape(out.shape)}
        if code == "tokens":
            x, *others = inputs
            index = stored.rows[..., None].expand(-1, -1, x.shape[-1])
            new = module(x.gather(1, index), *others)  # (B, picked, D)
            return {name: stored.old.scatter(1, index, new.to(stored.old.dtype))}
        return {name: module(*inputs) if stored is None else module(*inputs, how=stored)}


class Peeked(Exception):
    """Ends a block before its first sub-module."""


class PeekingCache(BlockCache):
    """A BlockCache that takes what enters a block's first sub-module and stops there."""

    def run(self, name: str, module: Callable[..., Tensor], *inputs: Any) -> Tensor:
        self.name, self.input = name, inputs[0]
        raise Peeked


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
        self.peeked: Site | None = None  # an input that a gate has seen before its block runs
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """Take orders from this plan from now on."""
        self.plan = plan
        self.gate_sums: tuple[Tensor, int] | None = None  # as long as there is nothing to compare with
        self.at_gate: dict[str, Tensor] = {}  # what the gate looked at, by branch
        self.measurements.expect(plan.measure)
        self.keep = set(plan.keep)
        self.wanted = (
            self.keep | {m.site for m in plan.measure} | ({plan.gate.measure.site} if plan.gate else set())
        )
        self.starts = {site.first for site in self.wanted if site.kind == "residual"}
        self.subs = {(site.first, site.name) for site in self.wanted if site.kind == "sub"}
        self.maps = {(site.first, site.name) for site in self.wanted if site.kind == "map"}
        self.rests = {(site.first, site.name): site for site in self.wanted if site.kind == "rest"}
        shown = self.wanted - {self.peeked}
        self.inputs = {(site.first, site.name) for site in shown if site.kind == "input"}

    def settle(self, decide: Callable[[Plan, float], Plan], depth: int, at: int | None = None) -> Plan:
        """The policy decides at the plan's gate, after `at` items of its path (None: before everything)."""
        plan, shown = self.plan, self.at_gate
        changed = decide(plan, self.gate_value)  # under several ranks, all of them meet here
        if at is None:
            check(changed, depth)
        else:
            check_change(plan, changed, at, depth)
        self.follow(changed)
        site = plan.gate.measure.site
        if site in self.keep - set(plan.keep):  # decided upon when it had passed
            for branch, value in shown.items():
                self.keep_value(site, branch, value)
        return changed

    @property
    def gate_value(self) -> float:
        """What the plan's gate has measured; infinite where there is nothing to compare with."""
        return self.measurements.at_gate(self.plan.gate.measure.norm, self.gate_sums)

    def see(self, site: Site, branches: Sequence[str], value: Tensor) -> None:
        """A value passes by, one batch row per branch: read new, read old, then write."""
        if site not in self.wanted:
            return
        found: list[tuple[Pair, list[Measure]]] = []
        for row, branch in zip(value.chunk(len(branches)), branches, strict=True):
            gate = self.plan.gate
            if gate and gate.measure.site == site:
                self.at_gate[branch] = row
            if gate and (gate.measure.site, gate.measure.branch) == (site, branch or gate.measure.branch):
                if (old := self.old(site, branch, gate.measure.age)) is not None:
                    pair = self.video(site, row), self.video(site, old)
                    self.gate_sums = sums_of(*pair, gate.measure.norm)
            if pairs := self.pairs(site, branch, row):
                found += pairs
            elif site in self.keep:
                self.keep_value(site, branch, row)
        if found:
            self.measurements.take(*zip(*found, strict=True))

    def pairs(self, site: Site, branch: str, row: Tensor) -> list[tuple[Pair, list[Measure]]]:
        """This value beside the stored ones it is measured against; the oldest pair also writes the store."""
        asked = [m for m in self.plan.measure if (m.site, m.branch) == (site, branch or m.branch)]
        ages = sorted({m.age for m in asked})
        olds = {age: old for age in ages if (old := self.old(site, branch, age)) is not None}
        slot, new = None, self.video(site, row)
        if olds and site in self.keep and self.store.holds(site, branch):
            slot = self.store.claim(site, branch)  # no entry but the oldest of all can lie there
            slot[:, new.shape[1] :].copy_(row[:, new.shape[1] :])  # text, which is not measured
        found = []
        for age, old in olds.items():
            measures = [m for m in asked if m.age == age]
            store = None if slot is None or age < max(olds) else self.video(site, slot)
            norms = tuple(m.norm for m in measures)
            found.append((Pair(new, self.video(site, old), store, norms), measures))
        return found

    def keep_value(self, site: Site, branch: str, row: Tensor) -> None:
        """Store a value where the policy has asked for a ring."""
        if self.store.holds(site, branch):
            self.store.push(site, branch, row)

    def video(self, site: Site, value: Tensor) -> Tensor:
        """What distances look at: of a state (1, L + M, D) the first L rows."""
        return value[:, : self.video_tokens] if site.kind in ("h", "residual", "sub", "input") else value

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
    expect: Callable[[Plan], None] = lambda plan: None,
) -> list[Tensor]:
    """Follow the plan's path from h(0) to h(depth) -> the last h of every lane, (B, L, D) each.

    Path items are the outer loop, then blocks, then lanes: a gate is decided after every branch has reached
    it, so batched and sequential guidance follow the same plan. probe sees every sub-module. Without a lane,
    on a rank none of whose branches run, gates alone are followed. expect(plan) is told what is going to run,
    so that blocks which are elsewhere are fetched ahead of their turn.
    """
    expect(plan)
    walkers = [Walker(blocks, lane, recorder, probe, block_fn) for lane in lanes]
    at = 0
    while True:
        gate = plan.gate
        if gate is not None and gate.after == at - 1 and gate.measure.site != LATENTS:
            plan = settle(walkers, recorder, gate.measure.site, decide, at, len(blocks))
            expect(plan)
        if at == len(plan.path):
            return [walker.h for walker in walkers]
        item = plan.path[at]
        if isinstance(item, Run):
            for k in range(item.first, len(blocks) if item.last is None else item.last) if walkers else ():
                subs = {name: how for (block, name), how in plan.subs if block == k}
                run_one(walkers, k, subs)
        else:
            for walker in walkers:
                walker.jump(item)
        at += 1


def settle(
    walkers: Sequence["Walker"],
    recorder: Recorder,
    site: Site,
    decide: Callable[[Plan, float], Plan],
    at: int,
    depth: int,
) -> Plan:
    """Every branch has reached the gate: what the policy makes of the plan."""
    if site.kind == "input":
        for walker in walkers:
            walker.peek(site)
    plan = recorder.settle(decide, depth, at)
    for walker in walkers:
        walker.mark()  # the changed plan may want a residual from here
    return plan


def run_one(walkers: Sequence["Walker"], k: int, subs: Mapping[str, SubOp]) -> None:
    """Block k for every lane. What the branches share is computed in the first one."""
    first = walkers[0].lane.branches[0]
    shared = {name: how for name, how in subs.items() if isinstance(how, Share)}
    if odd := [how.branch for how in shared.values() if how.branch != first]:
        raise ValueError(f"the plan shares what {odd[0]} computes, but {first} is the first branch that runs")
    found = walkers[0].run(k, subs)
    copies = {key: found[key] for name in shared for key in (name, f"{name}.rest") if key in found}
    for walker in walkers[1:]:
        walker.run(k, subs, copies)


class Walker:
    """One lane on its way through the blocks."""

    def __init__(
        self, blocks, lane: Lane, recorder: Recorder | None, probe: Probe | None, block_fn: Callable
    ):
        self.blocks, self.lane, self.recorder = blocks, lane, recorder
        self.probe, self.block_fn = probe, block_fn
        self.marks: dict[int, Tensor] = {}  # states that a residual starts from
        self.arrive(0, lane.h)

    def jump(self, item: Load | Add) -> None:
        """Over blocks, by what is stored."""
        stored = self.recorder.store.mix(item.site, self.lane.branches, item.mix)
        if isinstance(item, Load):
            self.arrive(item.site.first, stored)
        else:
            self.arrive(item.site.last, self.h + stored)

    def run(
        self, k: int, subs: Mapping[str, SubOp], copies: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Block k -> what its sub-modules gave under a code. copies: what another lane computed for it"""
        if self.probe is not None:
            cache = ProbedCache(self.lane.branches, k, self.probe)
            self.arrive(k + 1, self.blocks[k](self.h, self.lane.cond.at(k), cache))
            return {}
        if self.recorder is None:
            self.arrive(k + 1, self.blocks[k](self.h, self.lane.cond.at(k), BlockCache()))
            return {}
        codes, stored = self.row(k, subs, copies or {})
        out, outputs = self.block_fn(self.blocks[k], self.h, self.lane.cond.at(k), codes, stored)
        outputs = outputs | (copies or {})
        for name, value in outputs.items():
            self.recorder.see(self.site_of(k, name), self.lane.branches, value)
            if dict(codes).get(name) not in (None, "tokens"):
                self.forget_ages(k, name)
        self.arrive(k + 1, out)
        return outputs

    def site_of(self, k: int, name: str) -> Site:
        """Where an output of block k is kept: "attn", "attn.map", "attn.rest" or "attn.input"."""
        base, _, part = name.partition(".")
        if part == "rest":
            return self.recorder.rests[k, base]
        return {"": sub, "map": attention_map, "input": sub_input}[part](k, base)

    def row(
        self, k: int, subs: Mapping[str, SubOp], copies: Mapping[str, Tensor]
    ) -> tuple[Codes, dict[str, Any]]:
        """What block k does with its sub-modules, and the tensors that takes."""
        recorder, codes, stored = self.recorder, {}, {}
        for code, wanted in (("run", recorder.subs), ("keep", recorder.maps), ("watch", recorder.rests)):
            codes |= {name: code for block, name in wanted if block == k}
        rests = {name: site for (block, name), site in recorder.rests.items() if block == k}
        stored |= {name: Window(site.last, site.of) for name, site in rests.items()}
        codes |= {f"{name}.input": "show" for block, name in recorder.inputs if block == k}
        for name, how in subs.items():
            if name in copies:
                codes[name], stored[name] = "reuse", self.copied(k, name, copies[name])
                continue
            branches = self.lane.branches
            if isinstance(how, Share):
                branches = branches[:1]
                codes |= {f"{name}.share": "first", name: codes.get(name, "run")}
                how = how.how
            if how is not None:
                codes[name], stored[name] = self.under(k, name, how, codes.get(name), branches)
        return tuple(sorted(codes.items())), stored

    def under(
        self, k: int, name: str, how: SubOp, code: str | None, branches: Sequence[str]
    ) -> tuple[str, Any]:
        """The code of a sub-module that does not run in full, and what it takes. code: as yet"""
        store = self.recorder.store
        if isinstance(how, Mix):
            return "reuse", store.mix(sub(k, name), branches, how)
        if isinstance(how, Freeze):
            return "run", Frozen(store.mix(attention_map(k, name), branches, REUSE))
        if isinstance(how, Window):
            return "run", Windowed(how.width, store.mix(window_rest(k, name, how), branches, REUSE))
        if isinstance(how, Tokens):
            return "tokens", self.pick(k, name, how)
        return code or "run", self.sliced(k, name, how.width)

    def copied(self, k: int, name: str, value: Tensor) -> Tensor:
        """What another branch's sub-module gave, in this branch's place."""
        if value.shape[1] != self.h.shape[1]:
            raise ValueError(
                f"{name} of block {k} cannot be shared: one branch has {value.shape[1]} rows, the other "
                f"{self.h.shape[1]}, as their texts are of two lengths"
            )
        return value

    def pick(self, k: int, name: str, how: Tokens) -> Picked:
        """The tokens of the highest score, and their ages set back."""
        store, branches = self.recorder.store, self.lane.branches
        old = store.mix(sub(k, name), branches, REUSE)  # (B, L + M, D)
        video = self.recorder.video(sub(k, name), old)  # (B, L, D)
        if video.shape[1] != how.of:
            raise ValueError(
                f"the plan counts {how.of} tokens in {name} of block {k}, which sees {video.shape[1]}"
            )
        score = token_scores(video, how, k)  # (B, L)
        ages = [self.ages(k, name, branch) for branch in branches] if how.fresh else []  # (1, L + M) each
        if ages:
            score = score + how.fresh * torch.cat(ages)[:, : how.of]
        text = torch.arange(how.of, old.shape[1], device=old.device).expand(len(old), -1)  # always run
        rows = torch.cat((score.topk(how.count).indices, text), dim=1)  # (B, picked + M)
        for age, row in zip(ages, rows.split(1), strict=False):
            age.add_(1).scatter_(1, row, 0.0)
        return Picked(old, rows)

    def forget_ages(self, k: int, name: str) -> None:
        """All tokens have run."""
        for branch in self.lane.branches:
            if self.recorder.store.holds(token_ages(k, name), branch):
                self.ages(k, name, branch).zero_()

    def ages(self, k: int, name: str, branch: str) -> Tensor:
        """token_ages as they stand. -> (1, L)"""
        ring = self.recorder.store.rings.get((token_ages(k, name), branch))
        if ring is None:
            raise ValueError(f"the plan looks at {token_ages(k, name)}; name it in reset()'s needs")
        return ring.slots[0]

    def peek(self, site: Site) -> None:
        """Show what enters the first sub-module of the block that comes next, without running it."""
        cache = PeekingCache()
        try:
            self.blocks[site.first](self.h, self.lane.cond.at(site.first), cache)
        except Peeked:
            pass
        if cache.name != site.name:
            raise ValueError(f"the plan's gate is on {site}, but block {site.first} begins with {cache.name}")
        self.recorder.see(site, self.lane.branches, cache.input)
        self.recorder.peeked = site

    def sliced(self, k: int, name: str, width: int) -> Sliced | Folded | FoldedText:
        """Attention of that width: folded into the projections where that is exact, once per generation."""
        store, module = self.recorder.store, getattr(self.blocks[k], name)
        if (k, name, width) in store.folds:
            return store.folds[k, name, width]
        bases = (store.constant(k, f"{name}.{part}.{width}") for part in ("q", "k"))
        if not isinstance(module, FOLDABLE):
            return Sliced(*bases)
        return store.folds.setdefault((k, name, width), module.fold(*bases))

    def mark(self) -> None:
        """Remember this state if a residual starts from it."""
        if self.at in self.recorder.starts:
            self.marks[self.at] = self.h.clone()  # a reference would change with a block that writes in place

    def arrive(self, block: int, state: Tensor) -> None:
        """h(block) is known."""
        self.h, self.at = state, block
        if self.recorder is None:
            return
        self.mark()
        self.recorder.see(h(block), self.lane.branches, state)
        for start, earlier in self.marks.items():
            if residual(start, block) in self.recorder.wanted and start != block:
                self.recorder.see(residual(start, block), self.lane.branches, state - earlier)


def token_scores(old: Tensor, how: Tokens, block: int) -> Tensor:
    """How much each token wants to run, in [0, 1]. old (B, L, D) -> (B, L)"""
    if how.score == "random":
        return hash_noise(old.shape[1], how.seed * 1000003 + block, old.device).expand(len(old), -1)
    norms = old.float().norm(dim=2)
    return 1 - norms / norms.amax(1, keepdim=True).clamp_min(1e-20)


def hash_noise(count: int, seed: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) from integer arithmetic, the same on every device. -> (count,) fp32"""
    x = (torch.arange(count, device=device) + seed * 2654435761) % 2**32
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32  # a mixing step of integer hashing; 32 bits times 27 fit 63
    return (((x >> 16) ^ x) >> 8).float() / 2**24
