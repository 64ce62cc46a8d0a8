"""Several ranks make what one makes: shared tokens, shared branches, videos of their own."""

import ctypes
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks import scaling
from minidit.__main__ import main
from minidit.attention import FULL, Watched, Windowed, attend
from minidit.cache.plan import (
    REUSE,
    Freeze,
    Need,
    Plan,
    RunInfo,
    Share,
    Slice,
    Tokens,
    Window,
    attention_map,
    sub,
    window_rest,
)
from minidit.cache.profile import make_profile, methods_to_profile
from minidit.cache.spec import make_policy, parse
from minidit.compiled import CompiledBlock
from minidit.exchange import Exchange
from minidit.generate import Engine
from minidit.models.wan import WanBlock
from minidit.parallel import (
    Agreed,
    Layout,
    World,
    add_critical,
    check_levels,
    choose_layout,
    joined,
    largest_share,
    make_part,
    resolve_mode,
    share_out,
)
from minidit.profiles import write_profile
from minidit.settings import Choices
from minidit.video import read_video
from tests.cache.families import BOTH, FAMILIES, TOKENS, Scripted, follow, forward_of, rel, rows_of
from tests.tensors import randn

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of fork, in new Pythons
SECONDS = 60  # after which ranks that hang are killed and the test fails
CLOSE = 1e-5  # fp32: blocks of other shapes are summed in another order
MARGIN = 1e-4  # decisions that hang by less may differ between one rank and several


@dataclass
class Ended:
    """A rank that has ended: its exit code (-n for signal n), what it wrote, and what its work returned."""

    code: int
    out: str
    err: str
    value: object


def start_ranks(count: int, work, folder: Path) -> list[Ended]:
    """work(rank, port of a store) on forked ranks, all of them ended and reaped."""
    server, port = start_store()
    pids = [fork(rank, port, work, folder) for rank in range(count)]
    codes = wait_for(pids)
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    read = lambda rank, kind: (folder / f"rank{rank}.{kind}").read_text()
    value = lambda path: torch.load(path, weights_only=False) if path.exists() else None
    return [
        Ended(code, read(rank, "out"), read(rank, "err"), value(folder / f"rank{rank}.pt"))
        for rank, code in enumerate(codes)
    ]


def start_store() -> tuple[int, int]:
    """A process that holds a store, as torchrun's agent does -> its id, and the port.

    Not this process: ranks that are forked from it would inherit the store's connections.
    """
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        end_with_parent()
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(there, str(server.port).encode())
        while True:
            signal.pause()
    port = int(os.read(here, 16))
    os.close(here), os.close(there)
    return pid, port


def end_with_parent() -> None:
    """Nothing is left behind where pytest itself is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of Linux


def fork(rank: int, port: int, work, folder: Path) -> int:
    """Of a process that ends without a look at what pytest has open -> its id."""
    pid = os.fork()
    if pid:
        return pid
    end_with_parent()
    code = 1
    try:
        out, err = (open(folder / f"rank{rank}.{kind}", "w", buffering=1) for kind in ("out", "err"))
        with redirect_stdout(out), redirect_stderr(err):
            try:
                torch.save(work(rank, port), folder / f"rank{rank}.pt")
                code = 0
            except SystemExit as error:
                code = error.code
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def wait_for(pids: list[int]) -> list[int]:
    """Exit codes; what has not ended in time is killed, so that nothing is left behind."""
    codes, deadline = dict.fromkeys(pids), time.monotonic() + SECONDS
    while left := [pid for pid, code in codes.items() if code is None]:
        for pid in left:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return list(codes.values())


def on_ranks(count: int, work, folder: Path) -> list:
    """work(world) on so many ranks -> what each returned."""

    def start(rank: int, port: int):
        world = World("ulysses", rank, count, dist.TCPStore("127.0.0.1", port, is_master=False))
        value = work(world)
        world.leave()
        return value

    ended = start_ranks(count, start, folder)
    assert [rank.code for rank in ended] == [0] * count, "\n".join(rank.err for rank in ended)
    return [rank.value for rank in ended]


def command_on_ranks(count: int, words: list[str], folder: Path, before=lambda rank: None) -> list[Ended]:
    """The command line on so many ranks, in the environment of torchrun. before(rank): what is done first"""

    def start(rank: int, port: int):
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        os.chdir(folder)
        before(rank)
        raise SystemExit(main(words))

    return start_ranks(count, start, folder)


# layouts


@pytest.mark.parametrize(
    "mode, ranks, heads, branches, want",
    [
        ("auto", 3, 6, 2, Layout(3, 1)),
        ("auto", 4, 6, 2, Layout(2, 2)),  # 4 does not divide 6, two groups of 2 do
        ("auto", 12, 6, 2, Layout(6, 2)),
        ("ulysses", 6, 6, 2, Layout(6, 1)),
        ("cfg", 2, 6, 2, Layout(1, 2)),
        ("ulysses+cfg", 4, 6, 2, Layout(2, 2)),
    ],
)
def test_the_layout_of_a_video(mode, ranks, heads, branches, want):
    assert choose_layout(mode, ranks, heads, branches, 80) == want


@pytest.mark.parametrize(
    "mode, ranks, branches, places, words",
    [
        ("ulysses", 4, 2, 80, "4 ranks do not share out the 6 heads of this model; nearest .* 3 and 6"),
        ("ulysses", 7, 1, 80, "nearest counts are 6"),
        ("auto", 5, 2, 80, "nearest counts are 3 and 6"),
        ("ulysses+cfg", 8, 2, 80, "nearest counts are 6 and 12"),  # 4 a branch: 3 or 6
        ("ulysses+cfg", 3, 2, 80, "wants guidance with two branches and an even number of ranks"),
        ("cfg", 2, 1, 80, "there are 1 branches"),
        ("cfg", 4, 2, 80, "and 2 ranks"),
        ("ulysses", 3, 2, 2, "3 ranks for 2 tokens"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(mode, ranks, branches, places, words):
    with pytest.raises(ValueError, match=words):
        choose_layout(mode, ranks, 6, branches, places)


def test_tokens_are_shared_out_as_evenly_as_they_go():
    assert share_out(80, 3) == (27, 27, 26)
    assert share_out(27, 2) == (14, 13)


def test_videos_are_made_side_by_side_where_every_rank_has_one():
    assert [resolve_mode("auto", 2, videos) for videos in (1, 2, 3)] == ["auto", "data", "data"]
    with pytest.raises(ValueError, match="there is one; leave it out"):
        resolve_mode("data", 2, 1)
    with pytest.raises(ValueError, match="unknown --parallel 'tensor'; choose one of auto, ulysses, cfg"):
        resolve_mode("tensor", 2, 1)


def test_one_rank_has_nothing_to_share():
    for option in ({"mode": "ulysses"}, {"mode": None, "checks": True}):
        with pytest.raises(ValueError, match="there is one"), joined(videos=1, **option):
            pass
    with joined(None, 1) as world:
        assert world is None


def test_methods_that_ranks_take_the_ground_from_are_refused():
    with pytest.raises(ValueError, match="toca picks tokens of the whole video"):
        check_levels("toca", Layout(2, 1))
    with pytest.raises(ValueError, match="cfg-gating leaves out a branch"):
        check_levels("cfg-gating", Layout(1, 2))
    check_levels("toca", Layout(1, 2)), check_levels("cfg-gating", Layout(2, 1))
    check_levels("mixcache+unicp", Layout(2, 2)), check_levels("my_policy.py:MyPolicy", Layout(2, 2))


def test_critical_multiply_adds_are_those_of_the_busiest_rank():
    both, cond, none = Plan(), Plan(branches=("cond",)), Plan(branches=("cond",))
    trace = lambda: {"steps": [{"macs": 800}, {"macs": 400}, {"macs": 0}], "total": {}}
    shared, split = trace(), trace()
    add_critical(shared, (both, cond, none), BOTH, Layout(2, 1), 0.5)
    add_critical(split, (both, cond, none), BOTH, Layout(2, 2), 0.5)
    assert [step["macs_critical"] for step in shared["steps"]] == [400, 200, 0]
    assert [step["macs_critical"] for step in split["steps"]] == [200, 200, 0]  # cond alone: the others wait
    assert shared["total"]["macs_critical"] == 600
    assert largest_share(Layout(3), 80, 1, 0) == 27 / 80
    assert largest_share(Layout(2), 90, 5, 0) == 45 / 90  # 9 and 9 places of 5 frames
    assert largest_share(Layout(4), 90, 5, 0) == 25 / 90
    assert largest_share(Layout(2), 80, 1, 20) == 0.6  # every rank has the text


# what is sent around attention


@torch.no_grad()
def test_attention_over_ragged_shares_is_attention_over_all(tmp_path):
    counts, text = (3, 2, 2), 4
    q, k, v = (randn(2, 6, 7 + text, width, seed=n) for n, width in enumerate((4, 4, 8)))
    watched, rest = Watched(2), randn(2, 7 + text, 48, seed=9)
    ways = lambda rest: (FULL, Watched(2), Windowed(2, rest))
    rows = [[*range(0, 3), *range(7, 11)], [3, 4, *range(7, 11)], [5, 6, *range(7, 11)]]

    def work(world):
        exchange = Exchange("auto", counts, world.rank, dist.group.WORLD)
        mine = rows[world.rank]
        parts = [x[:, :, mine] for x in (q, k, v)]
        # what a window left out is kept as attention has it, (B, N, l, K) in rows of D
        left = rest.view(2, 6, 11, 8)[:, :, mine].reshape(2, len(mine), 48)
        hows = ways(left)
        outs = [attend(*parts, how, scale=0.5, backend=exchange) for how in hows]
        return outs, hows[1].rest

    want = [attend(q, k, v, how, scale=0.5) for how in (FULL, watched, ways(rest)[2])]
    for mine, (outs, left) in zip(rows, on_ranks(3, work, tmp_path), strict=True):
        for got, whole in zip(outs, want, strict=True):
            torch.testing.assert_close(got, whole[:, :, mine], rtol=0, atol=1e-6)
        torch.testing.assert_close(left, watched.rest[:, :, mine], rtol=0, atol=1e-6)


# the embedded model

SIZES = {80: {}, 27: {"width": 48, "height": 48, "num_frames": 9}}  # by video tokens
UNIFORM = "mixcache:impact=uniform,penalty=false,theta=0.5"
PROFILED = ("unicp:threshold=E5", "teacache:threshold=0.3")
RUNS = {  # by ranks: tokens that these do not divide, and of three, steps that the shipped profiles are of
    2: [(spec, 27, 12) for spec in ("none", UNIFORM, "fbcache:threshold=0.2", "fora", *PROFILED)],
    3: [
        ("none", 80, 12),
        ("mixcache:eff:theta=profile", 80, 30),
        ("unicp:threshold=E3", 80, 30),
        ("teacache:threshold=0.1", 80, 30),
    ],
}
CASES = [(ranks, *run) for ranks, runs in RUNS.items() for run in runs]


def open_demo(world: World | None = None, profiles: Path | None = None) -> Engine:
    """profiles: a folder of some beside the model's own"""
    engine = Engine("demo", device="cpu", keep_text_encoder=True, world=world)
    engine.profile_folders += [profiles] if profiles else []
    return engine


@pytest.fixture(scope="module")
def profiles(tmp_path_factory) -> Path:
    """Of 27 tokens and 12 steps, for the methods that need one."""
    folder, engine = tmp_path_factory.mktemp("profiles"), open_demo()
    settings = settings_of(engine, "none", 27, 12)
    for method in ("unicp", "teacache"):
        (kind,) = methods_to_profile(method).values()
        write_profile(folder, make_profile(kind, engine, settings, ["a red circle moves right"]))
    return folder


def settings_of(engine: Engine, spec: str, tokens: int, steps: int):
    return engine.resolve(
        "a red circle moves right", Choices(cache=spec, steps=steps, seed=5, **SIZES[tokens])
    )


def denoised(engine: Engine, spec: str, tokens: int, steps: int):
    """-> latents, and the record of every step"""
    settings = settings_of(engine, spec, tokens, steps)
    outcome = engine.denoise(settings, engine.encode(settings))
    return outcome.latents, outcome.records


@pytest.fixture(scope="module")
def alone(profiles):
    """Every run on one rank."""
    engine = open_demo(profiles=profiles)
    return engine, {run: denoised(engine, *run) for runs in RUNS.values() for run in runs}


@pytest.fixture(scope="module")
def together(tmp_path_factory, alone, profiles):
    """Every run on ranks that share tokens."""

    def work(world):
        engine = open_demo(world, profiles)
        return {run: denoised(engine, *run) for run in RUNS[world.size]}

    return {ranks: on_ranks(ranks, work, tmp_path_factory.mktemp("ranks")) for ranks in RUNS}


def plans_of(records) -> list[Plan]:
    return [record.plan for record in records]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_ranks_make_the_latents_and_plans_of_one(alone, together, case):
    ranks, *run = case
    latents, records = alone[1][tuple(run)]
    assert run[0] == "none" or any(plan.label != "full" or plan.subs for plan in plans_of(records))
    for found in together[ranks]:
        got, others = found[tuple(run)]
        assert rel(got, latents) < CLOSE
        assert plans_of(others) == plans_of(records)
        for mine, one in zip(others, records, strict=True):
            assert mine.values == pytest.approx(one.values, rel=MARGIN)
            assert mine.gates == pytest.approx(one.gates, rel=MARGIN)


def test_all_ranks_have_the_same_numbers_to_the_bit(together):
    for first, *others in together.values():
        for run, (_, records) in first.items():
            for other in others:
                assert [record.values for record in other[run][1]] == [record.values for record in records]
                assert [record.gates for record in other[run][1]] == [record.gates for record in records]


class Moved:
    """Moves every number up or down by the margin."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def __call__(self, value: float) -> float:
        return value * (1 + self.random.choice((-MARGIN, MARGIN)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_no_decision_hangs_by_a_hair(alone, case):
    engine, runs = alone
    records, settings = runs[case[1:]][1], settings_of(engine, *case[1:])
    steps, model = engine.family.schedule(settings).steps(settings.cfg_scale), engine.module("transformer")
    info = RunInfo(steps, len(model.blocks), model.subs, BOTH, "wan", (), "", engine.tokens_of(settings))
    for draw in range(8):
        moved = Moved(draw)
        policy, _ = engine.policy(settings)
        policy.reset(info)
        for record in records:
            plan = policy.plan(record.step)
            for value in record.gates:
                plan = policy.decide(record.step, plan, moved(value))
            assert plan == record.plan
            policy.tell(record.step, {measure: moved(value) for measure, value in record.values.items()})


def test_cfg_parallelism_runs_a_branch_on_each_rank(tmp_path, alone):
    steps_and_cfg = "mixcache:impact=uniform,theta=0.5,levels=step/cfg"
    specs = ("none", steps_and_cfg, "fbcache:threshold=0.2")

    def work(world):
        world.mode = "cfg"
        engine = open_demo(world)
        return [denoised(engine, spec, 27, 12) for spec in specs]

    engine, runs = alone
    label = lambda records: [plan.label for plan in plans_of(records)]
    assert "cfg" in label(denoised(engine, steps_and_cfg, 27, 12)[1])  # on one rank it pays
    alike = [("none", 27, 12), ("mixcache:impact=uniform,theta=0.5,levels=step", 27, 12), (specs[2], 27, 12)]
    zero, one = on_ranks(2, work, tmp_path)
    for (got, records), (other, _), run in zip(zero, one, alike, strict=True):
        latents, twins = runs[run] if run in runs else denoised(engine, *run)
        assert torch.equal(got, other) and rel(got, latents) < CLOSE
        assert label(records) == label(twins)
    assert set(label(zero[1][1])) == {"full", "step"} and set(label(zero[2][1])) == {"full", "hit"}


def test_tokens_and_branches_are_shared_by_four_ranks(tmp_path, alone):
    runs = [("none", 27, 12), ("fbcache:threshold=0.2", 27, 12)]

    def work(world):
        world.mode = "ulysses+cfg"
        engine = open_demo(world)
        return [denoised(engine, *run) for run in runs]

    for found in on_ranks(4, work, tmp_path):
        for (got, others), run in zip(found, runs, strict=True):
            latents, records = alone[1][run]
            assert rel(got, latents) < CLOSE and plans_of(others) == plans_of(records)


def test_the_cache_of_the_busiest_rank_is_predicted(tmp_path):
    runs = [(0, UNIFORM), (0, "fora"), (1, "fora")]  # ulysses, cfg
    modes = ("ulysses", "cfg")

    def work(world):
        found = []
        for mode, spec in runs:
            world.mode = modes[mode]
            engine = open_demo(world)
            settings = settings_of(engine, spec, 27, 6)
            outcome = engine.denoise(settings, engine.encode(settings))
            found.append((engine.cache_bytes(settings), outcome.cache_bytes))
        return found

    engine = open_demo()
    whole = [engine.cache_bytes(settings_of(engine, spec, 27, 6)) for _, spec in runs]
    first, second = on_ranks(2, work, tmp_path)
    assert all(
        predicted == kept < all_of_it for (predicted, kept), all_of_it in zip(first, whole, strict=True)
    )
    assert [predicted for predicted, _ in first] == [predicted for predicted, _ in second]
    assert all(kept <= predicted for predicted, kept in second)  # 13 tokens, where the first has 14


# every family, small and random


def test_a_rank_has_its_tokens_and_its_heads(tmp_path):
    forwards = {family: forward_of(family) for family in FAMILIES}

    def work(world):
        found = {}
        for name, forward in forwards.items():
            part = make_part(world, Layout(2), forward.model, forward.context)
            rows = replace(forward, part=part).shapes["cond"][0][1]
            found[name] = part.tokens, part.exchange.counts, rows
        return found

    text = {"wan": 0, "hunyuan_video": 5, "cogvideox": 12, "open_sora": 0, "latte": 0}
    for found in on_ranks(2, work, tmp_path):
        for name, (tokens, counts, rows) in found.items():
            assert (tokens, rows) == (TOKENS // 2, TOKENS // 2 + text[name])  # text is replicated
            assert sum(counts) == rows_of(forwards[name]) - text[name]


EAGER = "mixcache:impact=uniform,theta=9,penalty=false"


def script(forward) -> Scripted:
    """Plans that keep and take what sub-modules give: maps, what a window leaves, and narrow heads."""
    width = Window(2, rows_of(forward))
    sites = [sub(1, "attn"), window_rest(0, "attn", width)]
    subs = ((0, "attn"), width), ((1, "attn"), REUSE)
    plans = [Plan(keep=tuple(sites)), Plan(subs=subs, label="window")]
    if "t_attn" in forward.model.subs:
        maps = [attention_map(1, "attn"), attention_map(1, "t_attn")]
        freeze = tuple(((1, name), Freeze()) for name in ("attn", "t_attn"))
        plans += [Plan(keep=tuple(maps)), Plan(subs=freeze, label="freeze")]
        sites += maps
    plans += [Plan(subs=(((2, "attn"), Slice(4)),), label="slice")]
    return Scripted(tuple(Need(site) for site in sites), *plans)


def constants(forward) -> dict:
    c = forward.model.config
    basis = torch.linalg.qr(randn(c.heads, c.width // c.heads, 4, seed=7))[0]
    return {(2, "attn.q.4"): basis, (2, "attn.k.4"): basis}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_two_ranks(family, tmp_path):
    forward = forward_of(family)
    fbcache = lambda: make_policy(parse("fbcache:threshold=0.9"), None)
    mixcache = lambda more="": make_policy(parse(f"{EAGER}{more}"), None)
    scripted = lambda: script(forward)
    steps = {fbcache: 6, mixcache: 6, scripted: len(scripted().plans)}
    go = lambda forward, policy, steps: follow(forward, policy, steps, constants=constants(forward))

    def work(world):
        found = []
        for layout in (Layout(2, 1), Layout(1, 2)):
            part = make_part(world, layout, forward.model, forward.context)
            for make, count in steps.items():
                outcome = go(replace(forward, part=part), Agreed(make(), part, compare=True), count)
                found.append((outcome.latents, plans_of(outcome.records)))
        return found

    shared = [go(forward, make(), count) for make, count in steps.items()]
    split = [shared[0], go(forward, mixcache(",levels=step/block"), 6), shared[2]]
    for found in on_ranks(2, work, tmp_path):
        for (latents, plans), one in zip(found, shared + split, strict=True):
            assert rel(latents, one.latents) < CLOSE
            assert [plan.label for plan in plans] == [plan.label for plan in plans_of(one.records)]
            assert len({plan.label for plan in plans}) > 1


@pytest.mark.slow  # some seconds of compiling per rank
@pytest.mark.parametrize("family", ["wan", "open_sora"])
def test_blocks_that_share_tokens_compile_in_one_graph(family, tmp_path):
    forward, fora = forward_of(family), lambda: make_policy(parse("fora"), None)

    def work(world):
        part = make_part(world, Layout(2), forward.model, forward.context)
        compiled = replace(forward, part=part, block_fn=CompiledBlock(backend="aot_eager"))
        return follow(compiled, Agreed(fora(), part), 4).latents

    want = follow(forward, fora(), 4).latents
    for latents in on_ranks(2, work, tmp_path):
        assert rel(latents, want) < CLOSE


# what goes wrong


class Partial(Scripted):
    """A policy that looks at its rank, as none may."""

    def __init__(self, rank: int):
        super().__init__((Need(sub(0, "mlp")),), *[Plan()] * 4)
        self.rank = rank

    def plan(self, step) -> Plan:
        return Plan(label="odd") if self.rank == 1 and step.i == 2 else Plan()


def test_plans_that_differ_are_named(tmp_path):
    forward = forward_of("wan")

    def work(world):
        part = make_part(world, Layout(2), forward.model, forward.context)
        try:
            follow(replace(forward, part=part), Agreed(Partial(world.rank), part, compare=True), 4)
        except ValueError as error:
            return str(error)

    for line in on_ranks(2, work, tmp_path):
        assert line.startswith("step 3: the plan of rank 1 is not that of rank 0")


def test_plans_that_ranks_cannot_follow_are_refused(tmp_path):
    forward, tokens = forward_of("wan"), Plan(subs=(((1, "mlp"), Tokens(4, TOKENS)),))
    share = Plan(subs=(((1, "attn"), Share()),))

    def work(world):
        lines = []
        for layout, plan in ((Layout(2, 1), tokens), (Layout(1, 2), share)):
            part = make_part(world, layout, forward.model, forward.context)
            try:
                follow(replace(forward, part=part), Agreed(Scripted((), plan), part), 1)
            except ValueError as error:
                lines.append(str(error))
        return lines

    for lines in on_ranks(2, work, tmp_path):
        assert ["picks tokens" in lines[0], "shares what one branch" in lines[1]] == [True, True]


def test_a_branch_that_is_not_finite_ends_all_ranks(tmp_path):
    forward = forward_of("wan")

    def work(world):
        part = make_part(world, Layout(1, 2), forward.model, forward.context)
        if world.rank == 1:
            forward.model.blocks[1].mlp.down.bias.fill_(float("nan"))
        try:
            follow(replace(forward, part=part), Agreed(Scripted((), *[Plan()] * 3), part), 3)
        except ValueError as error:
            return str(error)

    for line in on_ranks(2, work, tmp_path):
        assert line.startswith("step 1 of 3: the uncond prediction is not finite")


# the table of benchmarks/scaling.py


def test_a_count_of_ranks_stands_beside_one_rank():
    x = torch.ones(4)
    row = lambda seconds, **more: {"cache": "none", "step_s": seconds, "spread_s": 0.0, "macs": 1.0} | more
    two = {"ulysses": 2, "cfg": 1}
    found = {1: ([row(1.0, ranks_of={})], [x]), 2: ([row(0.625, ranks_of=two)], [x + 1e-7])}
    one, both = scaling.compare(found, 1e-5)
    assert (one["layout"], one["speedup"], one["efficiency"]) == ("1 x 1", "1.00x", "100%")
    assert (both["layout"], both["speedup"], both["efficiency"]) == ("2 x 1", "1.60x", "80%")
    found = {1: ([row(1.0, ranks_of={})], [x]), 2: ([row(0.625, ranks_of=two)], [x + 1e-3])}
    with pytest.raises(ValueError, match="2 ranks are 0.001 from one under none"):
        scaling.compare(found, 1e-5)


# the command line

SMALL = ["--size", "32x32", "--num-frames", "5", "--steps", "3", "--device", "cpu"]
GENERATE = ["generate", "a red circle", *SMALL, "--output", "v.npz"]


def stop_in_mid_run(rank: int, how) -> None:
    """Rank 1 ends by how() in the middle of its second step."""
    forward, left = WanBlock.forward, [12]

    def counted(*args):
        left[0] -= 1
        if left[0] < 0 and rank == 1:
            how()
        return forward(*args)

    WanBlock.forward = counted


def test_one_rank_prints_and_writes(tmp_path):
    first, second = command_on_ranks(2, [*GENERATE, "--trace", "t.json", "--cache", "fora"], tmp_path)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "2 ranks (ulysses 2, cfg 1)" in first.out and "on the busiest of 2 ranks" in first.out
    assert (second.out, second.err) == ("", "") and "denoise" in first.err  # one progress bar
    trace = json.loads((tmp_path / "t.json").read_text())
    assert trace["ranks"] == {"ulysses": 2, "cfg": 1, "share": 0.5}
    assert trace["total"]["macs_critical"] * 2 == trace["total"]["macs"]
    folder = tmp_path / "one"
    folder.mkdir()
    (alone,) = command_on_ranks(1, [*GENERATE, "--cache", "fora", "--quiet"], folder)
    assert alone.code == 0, alone.err
    want, got = (np.load(path / "v.npz")["frames"].astype(int) for path in (folder, tmp_path))
    assert np.abs(want - got).max() <= 1  # a level: latents within 1e-5
    left = {path.name for path in tmp_path.iterdir() if path.is_file() and not path.name.startswith("rank")}
    assert left == {"v.npz", "v.npz.json", "t.json"}


def test_ranks_share_out_a_prompt_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\na green square\n")
    words = ["generate", "--prompts", "prompts.txt", *SMALL, "--output", "out"]
    ended = command_on_ranks(2, words, tmp_path)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    names = ["000-a-red-circle.mp4", "001-a-blue-star.mp4", "002-a-green-square.mp4"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == names
    made = [[name for name in names if f"out/{name}  " in rank.out] for rank in ended]
    assert made == [names[::2], names[1::2]]
    assert "3 of 3 videos are done" in ended[0].out + ended[1].out and not any(rank.err for rank in ended)
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "prompts.txt").write_bytes((tmp_path / "prompts.txt").read_bytes())
    (alone,) = command_on_ranks(1, [*words, "--quiet"], folder)
    assert alone.code == 0, alone.err
    for name in names:
        want, got = (read_video(path / "out" / name)[0] for path in (folder, tmp_path))
        assert np.array_equal(got, want)


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_a_rank_that_dies_ends_the_others_with_one_line(tmp_path, how):
    def die():
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("enough of this")

    ended = command_on_ranks(2, [*GENERATE, "--quiet"], tmp_path, lambda rank: stop_in_mid_run(rank, die))
    assert [rank.code for rank in ended] == [2, -signal.SIGKILL if how == "killed" else 2]
    lines = [line for rank in ended for line in rank.err.splitlines()]
    want = "another rank ended or hung in mid-run" if how == "killed" else "enough of this"
    assert len(lines) == 1 and lines[0].startswith(f"minidit: {want}")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("v.")]


@pytest.mark.parametrize(
    "words, line",
    [
        (["--steps", "4"], "4 ranks do not share out"),
        (["--resume"], "ranks that share a video keep no checkpoints"),
        (["--cache", "toca"], "cache toca picks tokens"),
        (["--parallel", "tensor"], "unknown --parallel"),
        (["--device", "meta"], "device 'meta' cannot be used"),
    ],
)
def test_refusals_are_said_once(tmp_path, words, line):
    count = 4 if "4" in words else 2
    mode = ["--parallel", "ulysses"] if "--parallel" not in words else []
    ended = command_on_ranks(count, [*GENERATE, *mode, *words, "--quiet"], tmp_path)
    assert [rank.code for rank in ended] == [2] * count
    lines = [text for rank in ended for text in rank.err.splitlines()]
    assert len(lines) == 1 and lines[0].startswith(f"minidit: {line}")


def test_other_commands_want_one_rank(tmp_path):
    for rank in command_on_ranks(2, ["caches"], tmp_path):
        assert rank.code == 2 and "generate alone works on several ranks" in rank.err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: NCCL has one rank on each")
def test_two_cards_make_what_one_makes(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "minidit"]
    words = ["generate", "a red circle", *SMALL[:-1], "cuda", "--dtype", "fp32", "--quiet", "--cache", "fora"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = lambda command: subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    for parallel in ("ulysses", "cfg"):
        more = ["--check-plans", "--parallel", parallel, "--output", f"{parallel}.npz"]
        run(torchrun + words + more)
    run([sys.executable, "-m", "minidit", *words, "--output", "one.npz"])
    frames = lambda name: np.load(tmp_path / f"{name}.npz")["frames"].astype(int)
    assert all(np.abs(frames(name) - frames("one")).max() <= 1 for name in ("ulysses", "cfg"))


@pytest.mark.slow  # torchrun starts Python and imports torch three times
def test_torchrun_starts_the_ranks(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "-m", "minidit"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = lambda words: subprocess.run(
        torchrun + words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    done = run([*GENERATE, "--quiet"])
    assert done.returncode == 0 and "3 ranks (ulysses 3, cfg 1)" in done.stdout
    assert (tmp_path / "v.npz").exists()
    stages = re.findall(r"(\w+) (\d+) MiB predicted, (\d+) MiB measured", done.stdout)
    assert {name for name, _, _ in stages} == {"text", "denoise", "decode"}
    for name, predicted, measured in stages:
        assert float(predicted) == pytest.approx(float(measured), rel=0.1), name
    refused = run([*GENERATE, "--quiet", "--resume"])
    assert refused.returncode != 0 and refused.stderr.count("minidit: ranks that share") == 1
