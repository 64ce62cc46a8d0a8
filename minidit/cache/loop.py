"""The block loop, written once: every model runs its blocks here, and here alone is caching woven in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minidit.attention import (
    FOLDABLE,
    Folded,
    FoldedText,
    Frozen,
    Sliced,
    Windowed,
)
from minidit.cache.plan import (
    LATENTS,
    REUSE,
    RUN_ALL,
    Add,
    Freeze,
    Load,
    Mix,
    Plan,
    Run,
    Share,
    Site,
    SubOp,
    Tokens,
    Window,
    attention_map,
    h,
    residual,
    sub,
    sub_input,
    token_ages,
    window_rest,
)
from minidit.cache.recorder import Recorder
from minidit.cache.seam import BlockCache, Codes, Peeked, PeekingCache, Picked, Probe, ProbedCache, run_block


class BlockCond(Protocol):
    """What a model's blocks are conditioned on; at(k) is what block k sees of it."""

    def at(self, block: int) -> Any: ...


@dataclass(frozen=True)
class Lane:
    """The guidance branches that run as one batch: a name per row, their state and their conditioning."""

    branches: tuple[str, ...]
    h: Tensor  # (B, L, D)
    cond: BlockCond


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
