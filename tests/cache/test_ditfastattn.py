"""DiTFastAttn: the greedy search by hand, what a map becomes, and whole runs by hand on every family."""

from dataclasses import replace

import pytest
import torch

from minidit import attention as door
from minidit.attention import windowed
from minidit.cache.plan import REUSE, Share, Window, sub, window_rest
from minidit.cache.policies.ditfastattn import WAYS, DiTFastAttn, search_map, sub_op
from minidit.presets import ScheduleConfig
from minidit.schedules import make_schedule
from tests.cache.families import BOTH, FAMILIES, SIZE, ask, follow, forward_of, rel, rows_of, run_info
from tests.tensors import randn

WINDOW = Window(2, 100)


def profile(rows: list[list[str]], name: str = "attn", window: int = 2, of: int = 100) -> dict:
    return {"ditfastattn": {"depth": len(rows[0]), "window": window, "of": of, "map": {name: rows}}}


def test_the_search_takes_the_first_way_whose_loss_is_below_the_blocks_threshold():
    asked = []
    table = {"reuse": 0.45, "window-share": 0.35, "window": 0.25, "share": 0.15}

    def loss(step, row):
        asked.append((step, tuple(row)))
        return max(table.get(way, 0.0) for way in row)

    finished = []
    found = search_map(3, 4, 0.4, loss, lambda step, row: finished.append((step, list(row))))
    # thresholds 0.1, 0.2, 0.3, 0.4; a row's loss is that of its worst way
    assert found == [["full"] * 4] + [["full", "share", "window", "window-share"]] * 2
    assert finished == list(enumerate(found))
    assert asked[0] == (1, ("reuse", "full", "full", "full")) and (0, ("full",) * 4) not in asked
    assert (1, ("full", "share", "window", "reuse")) in asked  # what is decided stays, the rest is full


def test_the_search_leaves_out_ways_that_are_not_asked_for():
    found = search_map(2, 2, 1.0, lambda step, row: 0.0, ways=("window", "full"))
    assert found == [["full", "full"], ["window", "window"]]
    assert search_map(2, 1, 0.5, lambda step, row: 0.5) == [["full"], ["full"]]  # equal is not below


@pytest.mark.parametrize(
    "way, how",
    [
        ("full", None), ("reuse", REUSE), ("window", WINDOW), ("share", Share("cond")),
        ("window-share", Share("cond", WINDOW)),
    ],
)  # fmt: skip
def test_every_way_is_a_word(way, how):
    assert sub_op(way, WINDOW, "cond") == how


def test_steps_keep_what_the_steps_after_them_take():
    ways = ["full", "window", "reuse", "reuse", "window", "share", "reuse", "window-share", "full"]
    policy, run = DiTFastAttn(profile=profile([[way] for way in ways])), run_info(9, depth=1)
    needs = policy.reset(run)
    found = ask(policy, run)
    out, rest = sub(0, "attn"), window_rest(0, "attn", WINDOW)
    assert {need.site for need in needs} == {out, rest}
    assert [plan.keep for plan in found] == [(rest,), (out,), (), (), (), (out, rest), (), (), ()]
    assert [dict(plan.subs).get((0, "attn")) for plan in found] == [
        None, WINDOW, REUSE, REUSE, WINDOW, Share("cond"), REUSE, Share("cond", WINDOW), None
    ]  # fmt: skip


def test_ways_can_be_left_out():
    rows = [["full"], ["share"], ["reuse"], ["window"]]
    policy, run = DiTFastAttn(ways=("reuse",), profile=profile(rows)), run_info(4, depth=1)
    policy.reset(run)
    assert [len(plan.subs) for plan in ask(policy, run)] == [0, 0, 1, 0]


@pytest.mark.parametrize(
    "options, run, said",
    [
        ({}, run_info(4), "needs a map of this model; make one with"),
        ({"profile": profile([["full"]] * 4)}, run_info(5, depth=1), "the map is of 4 steps and 1 blocks"),
        ({"profile": profile([["full"]] * 4)}, run_info(4, depth=2), "this run of 4 and 2; make one"),
        (
            {"profile": profile([["full"]] * 4, "t_attn")},
            run_info(4, depth=1),
            "has 't_attn'; this model has attn",
        ),
        ({"profile": profile([["fast"]] * 4)}, run_info(4, depth=1), "has 'fast', which is none of reuse"),
        (
            {"profile": profile([["share"]] * 4)},
            run_info(4, depth=1, branches=("cond",)),
            "no rank of this run has two",
        ),
    ],
)
def test_what_cannot_run_is_refused_by_name(options, run, said):
    with pytest.raises(ValueError) as error:
        DiTFastAttn(**options).reset(run)
    assert str(error.value).startswith("ditfastattn") and said in str(error.value)


def test_branches_on_ranks_of_their_own_share_nothing():
    run = replace(run_info(4, depth=1), cfg_ranks=2)
    with pytest.raises(ValueError, match="no rank of this run has two"):
        DiTFastAttn(profile=profile([["share"]] * 4)).reset(run)
    DiTFastAttn(profile=profile([["window"]] * 4)).reset(run)


def test_one_branch_runs_without_what_is_shared():
    run = run_info(4, depth=1, branches=("cond",))
    DiTFastAttn(ways=("reuse", "window"), profile=profile([["share"]] * 4)).reset(run)
    with pytest.raises(ValueError, match="unknown way 'half'"):
        DiTFastAttn(ways=("half",))
    assert WAYS[-1] == "full"


class Unrolled:
    """Both branches' attention by hand, one after the other."""

    def __init__(self, ways, window: int):
        self.ways, self.window, self.past, self.rest, self.shared = ways, window, {}, {}, {}
        self.step = self.branch = None

    def at(self, block: int, branch: str, step: int):
        self.block, self.branch, self.step = block, branch, step
        return self

    def run(self, name, module, *inputs):
        if name != "attn":
            return module(*inputs)
        way, key = self.ways[self.step][self.block], (self.block, self.branch)
        first = self.branch == "cond"
        if way == "reuse":
            out = self.past[key]
        elif "share" in way and not first:
            out, rest = self.shared[self.block]
            if way == "share":
                self.rest[key] = rest
        else:
            out = self.attend(module, inputs, way, key)
        self.shared[self.block] = out, self.rest.get(key)
        self.past[key] = out
        return out

    def attend(self, module, inputs, way, key):
        original = door.attention

        def watched(q, k, v, *, scale=None, backend="auto"):
            near = windowed(q, k, v, self.window, scale=scale)
            if "window" in way:
                return near + self.rest[key]
            out = original(q, k, v, scale=scale, backend=backend)
            self.rest[key] = out - near
            return out

        door.attention = watched
        try:
            return module(*inputs)
        finally:
            door.attention = original


@torch.no_grad()
def by_hand(forward, ways, window: int):
    schedule, x = make_schedule(ScheduleConfig("euler", "wan", 3.0), len(ways)), randn(1, 4, *SIZE, seed=4)
    unrolled = Unrolled(ways, window)
    for step in schedule.steps(3.0):
        starts = {
            b: forward.model.embed(x, torch.tensor([step.t]), forward.context.select((b,))) for b in BOTH
        }
        states = {b: start for b, (start, _) in starts.items()}
        for k, block in enumerate(forward.model.blocks):
            for b in BOTH:
                states[b] = block(states[b], starts[b][1].at(k), unrolled.at(k, b, step.i))
        outs = {b: forward.model.head(states[b], starts[b][1]) for b in BOTH}
        v = outs["uncond"] + 3.0 * (outs["cond"] - outs["uncond"])
        x, _ = schedule.step(step.i, x, v, schedule.start())
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_are_those_by_hand(family):
    cycle = ["full", "window", "reuse", "share", "window-share", "reuse", "window", "full"]
    for is_batched in (True, False):
        forward = forward_of(family, is_batched=is_batched)
        depth, of = len(forward.model.blocks), rows_of(forward)
        ways = [["full"] * depth] + [[cycle[(i + k) % 8] for k in range(depth)] for i in range(9)]
        # a window needs the rest of an earlier full step, which step 0 is
        outcome = follow(forward, DiTFastAttn(profile=profile(ways, window=2, of=of)), 10, family=family)
        assert rel(outcome.latents, by_hand(forward, ways, 2)) < 1e-5
