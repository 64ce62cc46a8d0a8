"""Several ranks, started by torchrun: one video among them, or every rank its own videos of a prompt file.

Ulysses (Jacobs et al., 2023) shares out the video tokens of a branch, as evenly as they go; attention trades
them for heads (exchange.py), all else sees its own tokens. Where attention runs within frames, or over them,
a rank has some places of all frames, so that attention over time stays with it; otherwise it has a run of
tokens. Text is replicated. cfg parallelism gives the conditional and the unconditional branch ranks of their
own. Latents are replicated: every rank draws the same noise, sees the same predictions and steps the same
solver. Distances are partial sums, added in one collective per step, so all ranks make the same plans.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from io import TextIOWrapper
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from minidit.cache.plan import Need, Plan, Policy, RunInfo, Share, Tokens, Values
from minidit.cache.spec import METHODS, parse
from minidit.cache.trace import to_json
from minidit.exchange import LOST, Exchange, all_gather
from minidit.families import Family
from minidit.settings import Settings, pick_device

MODES = ("auto", "ulysses", "cfg", "ulysses+cfg", "data")
TIMEOUT = timedelta(minutes=5)  # of a collective: a rank that hangs ends the run; one that dies does at once


@dataclass(frozen=True)
class Layout:
    """How many ranks share the tokens of a branch, and how many groups of such ranks share the branches."""

    ulysses: int = 1
    cfg: int = 1

    def __str__(self) -> str:
        return f"{self.ulysses * self.cfg} ranks (ulysses {self.ulysses}, cfg {self.cfg})"


ALONE = Layout()  # one rank has all of a video


def choose_layout(mode: str, ranks: int, heads: int, branches: int, places: int) -> Layout:
    """The layout of one video. places: tokens that attend to each other · ValueError where none fits

    auto is ulysses where the ranks divide the heads, as it leaves a caching method all it can do; else both.
    """
    both = Layout(ranks // 2, 2) if branches == 2 and ranks % 2 == 0 else None
    layouts = {"ulysses": Layout(ranks), "cfg": both, "ulysses+cfg": both}
    layouts["auto"] = Layout(ranks) if heads % ranks == 0 or both is None else both
    layout = layouts[mode]
    if layout is None or (mode == "cfg" and layout.ulysses > 1):
        wanted = "2 ranks" if mode == "cfg" else "an even number of ranks"
        raise ValueError(
            f"--parallel {mode} wants guidance with two branches and {wanted}; there are {branches} "
            f"branches and {ranks} ranks: try --parallel ulysses"
        )
    if heads % layout.ulysses:
        near = [n * layout.cfg for n in nearest_divisors(heads, layout.ulysses)]
        raise ValueError(
            f"{ranks} ranks do not share out the {heads} heads of this model; nearest counts are "
            f"{' and '.join(map(str, near))}"
        )
    if places < layout.ulysses:
        raise ValueError(f"{layout.ulysses} ranks for {places} tokens; at most one rank per token has work")
    return layout


def find_layout(
    mode: str, ranks: int, family: Family, subs: Sequence[str], heads: int, settings: Settings
) -> Layout:
    """How ranks share a video; ValueError where they cannot. subs, heads: of the transformer's blocks"""
    latent = family.latent_of(settings)
    places = family.tokens(latent) // frames_of(subs, latent[1])
    layout = choose_layout(mode, ranks, heads, len(family.branches(settings.cfg_scale)), places)
    check_levels(settings.cache, layout)
    return layout


def frames_of(subs: Sequence[str], frames: int) -> int:
    """Of so many latent frames, those within which tokens attend to each other; 1 where all of them do."""
    return frames if "t_attn" in subs else 1


def nearest_divisors(heads: int, ranks: int) -> list[int]:
    """The largest divisor of heads below `ranks`, and the smallest above it where there is one."""
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    return [n for n in divisors if n < ranks][-1:] + [n for n in divisors if n > ranks][:1]


def share_out(count: int, ranks: int) -> tuple[int, ...]:
    """As evenly as it goes, the longer shares first."""
    return tuple(count // ranks + (rank < count % ranks) for rank in range(ranks))


class World:
    """The ranks that torchrun started, and what they tell each other beside tensors.

    mode: of MODES; "data" needs no collective, all others have one process group · store: torchrun's, which
    outlives any rank
    """

    def __init__(
        self, mode: str, rank: int, size: int, store: dist.Store, *, device: str = "cpu", checks: bool = False
    ):
        self.mode, self.rank, self.size, self.store = mode, rank, size, store
        self.device, self.checks, self.meetings = torch.device(device), checks, 0
        self.groups = cache(self.make_groups)
        if mode != "data":
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            own = dist.PrefixStore("collectives", store)
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=TIMEOUT)

    @property
    def is_first(self) -> bool:
        """The rank that prints and writes files."""
        return self.rank == 0

    @property
    def is_silent(self) -> bool:
        """Says nothing, as the first rank says it."""
        return self.shares_videos and not self.is_first

    @property
    def shares_videos(self) -> bool:
        """Every video is made by all ranks together."""
        return self.mode != "data"

    def make_groups(self, layout: Layout) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Of this rank: those that share its branch, and those that have the same tokens of other branches.

        Ranks of one branch are neighbours, as they send each other most.
        """
        n = layout.ulysses
        tokens = [dist.new_group(range(c * n, (c + 1) * n), timeout=TIMEOUT) for c in range(layout.cfg)]
        branches = [dist.new_group(range(u, self.size, n), timeout=TIMEOUT) for u in range(n)]
        return tokens[self.rank // n], branches[self.rank % n]

    def own(self, jobs: Sequence[Any]) -> list[Any]:
        """This rank's of the videos to make; all of them where ranks share every video."""
        return list(jobs) if self.shares_videos else list(jobs[self.rank :: self.size])

    def meet(self) -> None:
        """Wait for all ranks, however long one of them decodes: by looking, so that signals are heard."""
        self.meetings += 1
        key = f"meeting {self.meetings}"
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.size:
            if self.store.add("failed", 0):
                raise ConnectionError(LOST)
            time.sleep(0.02)

    def count_finished(self) -> int:
        """One more video is finished -> how many are, of all ranks."""
        return self.store.add("finished videos", 1)

    def count_failed(self, failed: int) -> int:
        """Videos that failed on any rank, once all have told."""
        self.store.add("failed videos", failed)
        self.meet()
        return self.store.add("failed videos", 0)

    def told(self, value: Any) -> Any:
        """What the first rank says, in JSON's types, on all ranks."""
        if self.is_first:
            self.store.set("told", json.dumps(value))
        return json.loads(self.store.get("told"))

    def leave(self) -> None:
        """The end of a run that went well."""
        self.meet()
        if self.shares_videos:
            dist.destroy_process_group()


@contextmanager
def joined(
    mode: str | None, videos: int, *, device: str | None = None, checks: bool = False
) -> Iterator[World | None]:
    """The world of this process, by what torchrun put into the environment; None for a process by itself.

    Where a run fails, one rank raises and the others exit without a word. videos: how many are to be made ·
    checks: compare the plans of all ranks at every step
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        if mode not in (None, "auto"):
            raise ValueError(
                f"--parallel {mode} shares a run among ranks, and there is one; start them with "
                f"torchrun --nproc-per-node N -m minidit generate ..."
            )
        if checks:
            raise ValueError("--check-plans compares what several ranks plan, and there is one; leave it out")
        yield None
        return
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore("minidit", store)
    if isinstance(sys.stdout, TextIOWrapper):  # whole lines, as all ranks write to one place
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
    try:
        mode, own = resolve_mode(mode or "auto", size, videos), own_device(device)
        world = World(mode, rank, size, store, device=own, checks=checks)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if world.is_silent else sys.stdout):
            yield world
        world.leave()
    except BaseException as error:
        if isinstance(error, SystemExit) or fails_first(store):
            raise
        raise SystemExit(getattr(error, "exit_code", 2)) from None


def fails_first(store: dist.Store) -> bool:
    """Whether no other rank has failed before: the first one says why, and the others follow it."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the store went with the rank that had it
        return True


def resolve_mode(mode: str, ranks: int, videos: int) -> str:
    """auto is data parallelism where every rank has a video of its own."""
    if mode not in MODES:
        raise ValueError(f"unknown --parallel {mode!r}; choose one of {', '.join(MODES)}")
    if mode == "data" and videos == 1:
        raise ValueError("--parallel data gives every rank videos of its own, and there is one; leave it out")
    return "data" if mode == "auto" and videos >= ranks else mode


def own_device(device: str | None) -> str:
    """The device of this rank: the GPU of its number on this machine, which becomes the current one."""
    chosen, local_rank = pick_device(device), int(os.environ.get("LOCAL_RANK", 0))
    if chosen == "cpu":
        return chosen
    if chosen != "cuda":
        raise ValueError(f"device {chosen!r} cannot be every rank's; say cuda, and each takes its own")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; start as "
            f"many ranks with --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    return chosen


@dataclass(frozen=True)
class Part:
    """What one rank does of a generation."""

    layout: Layout
    branches: tuple[str, ...]  # those that this rank runs
    all_branches: tuple[str, ...]
    context: Any  # the blocks' context, of this rank's tokens
    tokens: int  # video tokens of this rank
    frames: int  # groups that a rank has places of; 1 where all tokens attend to each other
    exchange: Exchange
    pair: dist.ProcessGroup | None  # the ranks with these tokens, one per branch group
    device: torch.device

    @property
    def places(self) -> slice:
        """This rank's, of a group."""
        first = sum(self.exchange.counts[: self.exchange.rank])
        return slice(first, first + self.exchange.counts[self.exchange.rank])

    def take(self, h: Tensor) -> Tensor:
        """Of all tokens this rank's, and all text. h (B, L + M, D) -> (B, l + M, D)"""
        if self.layout.ulysses == 1:
            return h
        return take_places(h, self.frames, sum(self.exchange.counts), self.places, dim=1)

    def whole(self, h: Tensor) -> Tensor:
        """The way back, before the head. h (B, l + M, D) -> (B, L + M, D), the same on all ranks"""
        if self.layout.ulysses == 1:
            return h
        video, text = h[:, : self.tokens], h[:, self.tokens :]
        video = self.exchange.gather(video.unflatten(1, (self.frames, -1)), dim=2).flatten(1, 2)
        return torch.cat((video, text), dim=1)

    def all_predictions(
        self, outputs: dict[str, Tensor], names: Sequence[str], x: Tensor
    ) -> dict[str, Tensor]:
        """Those of all branches that run, by way of the ranks that ran them. x: latents, of the same shape"""
        if self.layout.cfg == 1:
            return outputs
        mine = next(iter(outputs.values()), torch.zeros_like(x))
        found = dict(zip(self.all_branches, all_gather(mine.contiguous(), self.pair), strict=True))
        return {name: found[name] for name in names}

    def add(self, sums: Tensor) -> Tensor:
        """The sums of all ranks: gathered and added in one order, so that every rank has the same bits."""
        return torch.stack(all_gather(sums.to(self.device), dist.group.WORLD)).sum(0)


def make_part(world: World, layout: Layout, model: Any, context: Any) -> Part:
    """This rank's part of a generation. context: of the whole, from model.prepare"""
    return part_of(layout, model, context, rank=world.rank, groups=world.groups(layout), device=world.device)


def part_of(
    layout: Layout,
    model: Any,
    context: Any,
    *,
    rank: int = 0,
    groups: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] = (None, None),
    device: torch.device | str = "meta",
) -> Part:
    """A rank's part of a generation; the first one's share of tokens is the largest.

    groups: of this rank, from World.groups; without them the part has its shapes, and cannot run
    """
    n = layout.ulysses
    frames = frames_of(model.subs, context.grid[0])
    places = context.grid[0] * context.grid[1] * context.grid[2] // frames
    exchange = Exchange(context.attention, share_out(places, n), rank % n, groups[0])
    branches = context.branches if layout.cfg == 1 else (context.branches[rank // n],)
    tokens, device = places * frames, torch.device(device)
    part = Part(layout, branches, context.branches, context, tokens, frames, exchange, groups[1], device)
    if n == 1:
        return part
    count = exchange.counts[exchange.rank]
    ours = {"attention": exchange, "grid": (frames, count, 1)}  # a grid of as many tokens, wherever they lie
    if frames == 1 and context.rope is not None:  # over time it is the same at every place
        ours["rope"] = tuple(take_places(table, 1, places, part.places, dim=0) for table in context.rope)
    return replace(part, context=replace(context, **ours), tokens=count * frames)


def take_places(x: Tensor, frames: int, count: int, places: slice, *, dim: int) -> Tensor:
    """Of `count` places in each of so many frames these; what follows the video stays. dim: of the tokens"""
    video, text = x.split((frames * count, x.shape[dim] - frames * count), dim=dim)
    video = video.unflatten(dim, (frames, count)).narrow(dim + 1, places.start, places.stop - places.start)
    return torch.cat((video.flatten(dim, dim + 1), text), dim=dim)


class Agreed:
    """A policy on one of several ranks: what they cannot carry out is refused, and their plans are compared.

    compare: whether; it costs a collective per plan, and is for whoever writes a policy
    """

    def __init__(self, policy: Policy, part: Part, compare: bool = False):
        self.policy, self.part, self.compare = policy, part, compare

    @property
    def needs_values(self) -> bool:
        return getattr(self.policy, "needs_values", True)

    def reset(self, run: RunInfo) -> tuple[Need, ...]:
        return self.policy.reset(run)

    def plan(self, step: Any) -> Plan:
        return self.agree(step, self.policy.plan(step))

    def decide(self, step: Any, plan: Plan, value: float) -> Plan:
        return self.agree(step, self.policy.decide(step, plan, value))

    def tell(self, step: Any, values: Values) -> None:
        self.policy.tell(step, values)

    def agree(self, step: Any, plan: Plan) -> Plan:
        """The plan, once it is known that all ranks can follow it, and do."""
        layout, kinds = self.part.layout, {type(how) for _, how in plan.subs}
        if layout.ulysses > 1 and Tokens in kinds:
            raise ValueError(
                "the plan picks tokens of the whole video, and ranks share them; try --parallel cfg"
            )
        if layout.cfg > 1 and Share in kinds:
            raise ValueError(
                "the plan shares what one branch computes, and each has ranks of its own; try ulysses"
            )
        if self.compare:
            self.compare_plans(step, plan)
        return plan

    def compare_plans(self, step: Any, plan: Plan) -> None:
        """Raise ValueError where another rank has another plan."""
        digest = hashlib.sha256(json.dumps(to_json(plan)).encode()).digest()
        mine = torch.tensor(list(digest), dtype=torch.uint8, device=self.part.device)
        found = [bytes(other.tolist()) for other in all_gather(mine, dist.group.WORLD)]
        if odd := [rank for rank, other in enumerate(found) if other != found[0]]:
            raise ValueError(
                f"step {step.i + 1}: the plan of rank {', '.join(map(str, odd))} is not that of rank 0; a "
                f"policy may depend on nothing but what it is told"
            )


def check_levels(cache: str, layout: Layout) -> None:
    """Refuse a caching method that ranks take the ground from, before step 0. cache: as --cache has it"""
    name = parse(cache)[0].name
    levels = METHODS[name].levels.split() if name in METHODS else ()
    if "token" in levels and layout.ulysses > 1:
        raise ValueError(
            f"cache {name} picks tokens of the whole video, which ranks share; use --parallel cfg, or data"
        )
    if tuple(levels) == ("cfg",) and layout.cfg > 1:
        raise ValueError(
            f"cache {name} leaves out a branch, which saves no time where it has ranks of its own; use "
            f"--parallel ulysses, or data"
        )


def most_tokens(layout: Layout, tokens: int, frames: int) -> int:
    """Video tokens of the busiest rank. frames: as in Part"""
    return frames * max(share_out(tokens // frames, layout.ulysses))


def largest_share(layout: Layout, tokens: int, frames: int, text: int) -> float:
    """The part of a branch's rows that the busiest rank has. text: rows that every rank repeats

    frames: as in Part. An upper bound of its multiply-adds: the products of attention are split evenly.
    """
    return (most_tokens(layout, tokens, frames) + text) / (tokens + text)


def busiest_share(layout: Layout, family: Family, subs: Sequence[str], settings: Settings) -> float:
    """largest_share of a video. subs: of the transformer's blocks"""
    latent = family.latent_of(settings)
    text = 0 if "cross" in subs else family.text_len  # rows of h, which every rank has
    return largest_share(layout, family.tokens(latent), frames_of(subs, latent[1]), text)


def add_critical(
    trace: dict, plans: Sequence[Plan], branches: Sequence[str], layout: Layout, share: float
) -> None:
    """Put into a trace what one rank, the busiest, computes of every step. share: see largest_share"""
    for step, plan in zip(trace["steps"], plans, strict=True):
        at_once = len(plan.branches or branches) if layout.cfg > 1 else 1
        step["macs_critical"] = round(step["macs"] / at_once * share)
    trace["ranks"] = {"ulysses": layout.ulysses, "cfg": layout.cfg, "share": share}
    trace["total"]["macs_critical"] = sum(step["macs_critical"] for step in trace["steps"])
