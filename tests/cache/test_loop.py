"""The block loop: nothing asked for changes no bit, and every verb is what tensors by hand give."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minidit.cache.loop import Lane, run_blocks
from minidit.cache.measure import Measurements
from minidit.cache.plan import (
    PREDICTION,
    REUSE,
    RUN_ALL,
    Add,
    Gate,
    Load,
    Measure,
    Mix,
    Need,
    Plan,
    Run,
    Slice,
    h,
    residual,
    sub,
)
from minidit.cache.recorder import Recorder
from minidit.cache.seam import BlockCache, run_block
from minidit.cache.store import Store, make_store
from minidit.models.wan import Context, Wan
from minidit.presets import WanConfig
from minidit_kernels.modulate import gated_residual, modulate
from tests.tensors import rel_l1

CONFIG = WanConfig(width=48, mlp_width=64, heads=2, depth=4, channels=4, text_width=16, text_len=6)
SHAPE = (1, 8, 48)  # of one branch's h
BOTH = ("cond", "uncond")
LAYOUTS = pytest.mark.parametrize(
    "groups", [(BOTH,), (("cond",), ("uncond",))], ids=["batched", "sequential"]
)


@pytest.fixture(scope="module")
def model() -> Wan:
    torch.manual_seed(0)
    return Wan(CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def context(model) -> Context:
    draw = torch.Generator().manual_seed(1)
    return model.prepare([torch.randn(n, 16, generator=draw) for n in (5, 2)], (2, 4, 4), branches=BOTH)


@pytest.fixture
def start(model, context):
    """start(groups, seed) -> a lane for every group of branches, of one random latent"""

    def lanes(groups=(BOTH,), seed: int = 2) -> list[Lane]:
        x = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
        t = lambda group: torch.full((len(group),), 500.0)
        embed = lambda g: model.embed(x.expand(len(g), -1, -1, -1, -1), t(g), context.select(g))
        return [Lane(group, *embed(group)) for group in groups]

    return lanes


def make(*needs: Need | tuple, branches=BOTH) -> Store:
    """An empty store. needs: a Need, or a site of which one entry is kept"""
    needs = [need if isinstance(need, Need) else Need(need) for need in needs]
    return make_store(needs, branches, lambda site, branch: (SHAPE, torch.float32), "cpu")


def fill(store: Store, seed: int = 7) -> dict:
    """Random values in every slot of a store -> {(site, branch): entries, newest first}"""
    draw = torch.Generator().manual_seed(seed)
    for (site, branch), ring in store.rings.items():
        for _ in range(len(ring.slots)):
            store.push(site, branch, torch.randn(SHAPE, generator=draw))
    return {key: [entry.clone() for entry in ring.entries()] for key, ring in store.rings.items()}


def follow(model, lanes, plan, store=None, **options) -> list[Tensor]:
    recorder = Recorder(plan, store or make(), options.pop("found", None) or Measurements())
    return run_blocks(model.blocks, lanes, plan, recorder, **options)


def blocks_by_hand(model, state: Tensor, lane: Lane, first: int = 0, last: int = 4) -> Tensor:
    for k, block in enumerate(model.blocks[first:last], first):
        state = block(state, lane.cond.at(k), BlockCache())
    return state


def values_of(filled: dict, site, lane: Lane, age: int = 0) -> Tensor:
    return torch.cat([filled[site, branch][age] for branch in lane.branches])


@LAYOUTS
def test_running_everything_changes_no_bit(model, start, groups):
    lanes = start(groups)
    want = [blocks_by_hand(model, lane.h, lane) for lane in lanes]
    for got in (run_blocks(model.blocks, lanes), follow(model, lanes, RUN_ALL)):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    pieces = Plan(path=(Run(0, 1), Run(1, 3), Run(3)))
    assert torch.equal(follow(model, lanes, pieces)[0], want[0])


def test_the_models_own_forward_is_the_plain_loop(model, context):
    x = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    state, cond = model.embed(x, torch.tensor([300.0, 300.0]), context)
    want = model.head(blocks_by_hand(model, state, Lane(BOTH, state, cond)), cond)
    assert torch.equal(model(x, torch.tensor([300.0, 300.0]), context), want)


@LAYOUTS
def test_load_resumes_from_what_is_stored(model, start, groups):
    store, lanes = make(h(2)), start(groups)
    filled = fill(store)
    for lane, got in zip(lanes, follow(model, lanes, Plan(path=(Load(h(2)), Run(2))), store), strict=True):
        assert torch.equal(got, blocks_by_hand(model, values_of(filled, h(2), lane), lane, 2))


@LAYOUTS
def test_add_is_added_to_the_running_state(model, start, groups):
    site = residual(1, 3)
    store, lanes = make(site), start(groups)
    filled, plan = fill(store), Plan(path=(Run(0, 1), Add(site), Run(3)))
    for lane, got in zip(lanes, follow(model, lanes, plan, store), strict=True):
        state = blocks_by_hand(model, lane.h, lane, 0, 1) + values_of(filled, site, lane)
        assert torch.equal(got, blocks_by_hand(model, state, lane, 3))


def test_a_mix_extrapolates(model, start):
    site = residual(0, 4)
    store, (lane,) = make(Need(h(4), depth=2), Need(site, depth=2)), start()
    filled = fill(store)
    (loaded,) = follow(model, [lane], Plan(path=(Load(h(4), Mix((2, -1))),)), store)
    assert torch.equal(loaded, 2 * values_of(filled, h(4), lane) - values_of(filled, h(4), lane, 1))
    (added,) = follow(model, [lane], Plan(path=(Add(site, Mix((2, -1))),)), store)
    assert torch.equal(added, lane.h + (2 * values_of(filled, site, lane) - values_of(filled, site, lane, 1)))


@LAYOUTS
def test_what_is_kept_resumes_to_the_same_end(model, start, groups):
    store, lanes = make(h(2), residual(1, 3)), start(groups)
    ends = follow(model, lanes, Plan(keep=(h(2), residual(1, 3))), store)
    loaded = follow(model, lanes, Plan(path=(Load(h(2)), Run(2))), store)
    assert all(torch.equal(a, b) for a, b in zip(loaded, ends, strict=True))
    added = follow(model, lanes, Plan(path=(Run(0, 1), Add(residual(1, 3)), Run(3))), store)
    for a, b in zip(added, ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # h(1) + (h(3) - h(1)), rounded twice


def test_residuals_are_kept_wherever_they_start_and_end(model, start):
    sites = [residual(a, b) for a in range(4) for b in range(a + 1, 5)]
    store, (lane,) = make(*sites), start()
    follow(model, [lane], Plan(keep=tuple(sites)), store)
    states = [blocks_by_hand(model, lane.h, lane, 0, k) for k in range(5)]
    for site in sites:
        kept = torch.cat([store.entries(site, branch)[0] for branch in BOTH])
        assert torch.equal(kept, states[site.last] - states[site.first])


def block_by_hand(block, state: Tensor, cond, outputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A Wan block, but for the outputs that are given -> h after it, and every sub-module's output."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.mod + cond.mod).unsqueeze(2).unbind(1)
    run = lambda name, *inputs: outputs[name] if name in outputs else getattr(block, name)(*inputs)
    attn = run("attn", modulate(state, scale1, shift1, eps=block.eps), cond)
    state = gated_residual(state, gate1, attn)
    cross = run("cross", block.norm3(state, torch.float32), cond)
    state = state + cross
    mlp = run("mlp", modulate(state, scale2, shift2, eps=block.eps))
    return gated_residual(state, gate2, mlp), {"attn": attn, "cross": cross, "mlp": mlp}


@LAYOUTS
@pytest.mark.parametrize("mix", [REUSE, Mix((2, -1))], ids=["reuse", "extrapolate"])
@pytest.mark.parametrize("name", ["attn", "cross", "mlp"])
def test_a_reused_sub_module_is_gated_anew(model, start, groups, name, mix):
    store, lanes = make(Need(sub(1, name), depth=2)), start(groups)
    filled, plan = fill(store), Plan(subs=(((1, name), mix),))
    for lane, got in zip(lanes, follow(model, lanes, plan, store), strict=True):
        new, old = (values_of(filled, sub(1, name), lane, age) for age in (0, 1))
        stored = new if mix == REUSE else 2 * new - old
        state = blocks_by_hand(model, lane.h, lane, 0, 1)
        state, _ = block_by_hand(model.blocks[1], state, lane.cond.at(1), {name: stored})
        assert torch.equal(got, blocks_by_hand(model, state, lane, 2))


def test_outputs_are_kept_before_their_gate(model, start):
    names = ("attn", "cross", "mlp")
    store, (lane,) = make(*(sub(2, name) for name in names)), start()
    follow(model, [lane], Plan(keep=tuple(sub(2, name) for name in names)), store)
    state = blocks_by_hand(model, lane.h, lane, 0, 2)
    _, outputs = block_by_hand(model.blocks[2], state, lane.cond.at(2), {})
    for name in names:
        kept = torch.cat([store.entries(sub(2, name), branch)[0] for branch in BOTH])
        assert torch.equal(kept, outputs[name])


def sliced(store: Store, basis_q: Tensor, basis_k: Tensor) -> Plan:
    """A plan that slices block 1's attention by these bases, (N, K, R) each, placed in the store."""
    width = basis_q.shape[-1]
    store.constants = {(1, f"attn.q.{width}"): basis_q, (1, f"attn.k.{width}"): basis_k}
    return Plan(subs=(((1, "attn"), Slice(width)),))


@LAYOUTS
def test_a_slice_of_full_width_is_exact(model, start, groups):
    store, lanes = make(), start(groups)
    identity = torch.eye(24).expand(2, 24, 24)
    got = follow(model, lanes, sliced(store, identity, identity), store)
    for lane, state in zip(lanes, got, strict=True):
        assert torch.equal(state, blocks_by_hand(model, lane.h, lane))  # a sum of x and zeros is x


def test_a_slice_narrows_queries_and_keys_alone(model, start):
    draw = torch.Generator().manual_seed(5)
    basis_q, basis_k = (torch.randn(2, 24, 16, generator=draw) for _ in range(2))
    store, (lane,) = make(), start()
    (got,) = follow(model, [lane], sliced(store, basis_q, basis_k), store)
    state, block, cond = blocks_by_hand(model, lane.h, lane, 0, 1), model.blocks[1], lane.cond.at(1)
    shift, scale = (block.mod + cond.mod).unsqueeze(2).unbind(1)[:2]
    q, k, v = block.attn.queries_keys_values(modulate(state, scale, shift, eps=block.eps), cond)
    scores = (q @ basis_q) @ (k @ basis_k).mT * 24**-0.5  # the scale of the full width
    attn = block.attn.out((F.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))
    state, _ = block_by_hand(block, state, cond, {"attn": attn})
    want = blocks_by_hand(model, state, lane, 2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # fp32 softmax in another order
    assert rel_l1(got, blocks_by_hand(model, lane.h, lane)) > 1e-4


def test_a_slice_without_its_basis_is_refused(model, start):
    with pytest.raises(ValueError, match="no profile of this run has attn.q.16 of block 1"):
        follow(model, start(), Plan(subs=(((1, "attn"), Slice(16)),)))


def test_new_is_measured_against_old_before_it_is_kept(model, start):
    site = h(2)
    store = make(Need(site, depth=2))
    measures = tuple(Measure(site, branch=b, age=age) for b in BOTH for age in (0, 1))
    states, told = [], []
    for seed in (2, 3, 4):
        lanes, found = start(seed=seed), Measurements()
        follow(model, lanes, Plan(keep=(site,), measure=measures), store, found=found)
        states.append(blocks_by_hand(model, lanes[0].h, lanes[0], 0, 2))
        told.append(found.read()[0])
    row = {"cond": slice(0, 1), "uncond": slice(1, 2)}
    assert told[0] == {} and {m.age for m in told[1]} == {0}  # what has no counterpart is missing
    for measure in measures:
        want = rel_l1(states[2][row[measure.branch]], states[1 - measure.age][row[measure.branch]])
        assert told[2][measure] == pytest.approx(want, rel=1e-5)  # sums of fp32 against fp64
    for branch in BOTH:
        kept = store.entries(site, branch)
        assert all(torch.equal(kept[age], states[2 - age][row[branch]]) for age in (0, 1))


def test_distances_look_at_the_video_tokens_alone(model, start):
    (lane,) = start((("cond",),))
    store, plan = make(h(0), branches=("cond",)), Plan(keep=(h(0),), measure=(Measure(h(0)),))
    found = Measurements()
    for scale in (1.0, 3.0):
        state = lane.h.clone()
        state[:, 5:] *= scale
        recorder = Recorder(plan, store, found, video_tokens=5)
        run_blocks(model.blocks, [replace(lane, h=state)], plan, recorder)
    assert found.read()[0] == {Measure(h(0)): 0.0}
    assert torch.equal(store.entries(h(0), "cond")[0], state)  # but all of it is kept


def counted(calls: list[int]):
    """run_block, and calls gains an entry for every block that it runs"""

    def block_fn(*args):
        calls.append(len(calls))
        return run_block(*args)

    return block_fn


@LAYOUTS
def test_a_gate_is_decided_once_after_every_branch_has_reached_it(model, start, groups):
    store, calls, asked = make(h(2), residual(2, 4)), [], []
    filled, lanes = fill(store), start(groups)
    plan = Plan(path=(Run(0, 2), Run(2)), gate=Gate(0, Measure(h(2))))

    def decide(plan: Plan, value: float) -> Plan:
        asked.append((value, len(calls)))
        return replace(plan, path=(Run(0, 2), Add(residual(2, 4))))

    got = follow(model, lanes, plan, store, decide=decide, block_fn=counted(calls))
    reached = [blocks_by_hand(model, lane.h, lane, 0, 2) for lane in lanes]
    ((value, runs),) = asked
    assert runs == 2 * len(groups) and len(calls) == runs
    assert value == pytest.approx(rel_l1(reached[0][:1], filled[h(2), "cond"][0]), rel=1e-5)  # fp64 sums
    for lane, state, end in zip(lanes, reached, got, strict=True):
        assert torch.equal(end, state + values_of(filled, residual(2, 4), lane))


@pytest.mark.parametrize("after, runs", [(-1, 0), (0, 3), (1, 4)])
def test_gates_may_stand_before_between_and_behind(model, start, after, runs):
    site = h((0, 3, 4)[after + 1])
    store, calls, asked = make(site), [], []
    fill(store)
    plan = Plan(path=(Run(0, 3), Run(3)), gate=Gate(after, Measure(site, branch="uncond")))
    decide = lambda plan, value: asked.append((len(calls), value)) or plan
    lanes = start()
    reached = blocks_by_hand(model, lanes[0].h, lanes[0], 0, site.first)
    want = rel_l1(reached[1:], store.entries(site, "uncond")[0])
    (got,) = follow(model, lanes, plan, store, decide=decide, block_fn=counted(calls))
    assert asked == [(runs, pytest.approx(want, rel=1e-5))]  # fp64 sums
    assert torch.equal(got, blocks_by_hand(model, lanes[0].h, lanes[0])) and len(calls) == 4


def test_a_gate_without_a_stored_value_is_infinite(model, start):
    plan = Plan(path=(Run(0, 2), Run(2)), keep=(h(2),), gate=Gate(0, Measure(h(2))))
    asked = []
    decide = lambda plan, value: asked.append(value) or plan
    for store in (make(h(2)), make()):
        for _ in range(2):
            follow(model, start(), plan, store, decide=decide)
    assert asked == [float("inf"), 0.0, float("inf"), float("inf")]


def test_a_changed_plan_may_have_a_gate_of_its_own(model, start):
    store, asked = make(h(1)), []
    fill(store)
    first = Plan(path=(Run(0, 1), Run(1)), gate=Gate(0, Measure(h(1))))
    second = Plan(path=(Run(0, 1), Run(1, 3), Run(3)), keep=(h(4),), gate=Gate(1, Measure(h(3))))

    def decide(plan: Plan, value: float) -> Plan:
        asked.append((plan, value))
        return second

    store.rings |= make(h(4)).rings
    (got,) = follow(model, start(), first, store, decide=decide)
    assert [plan for plan, _ in asked] == [first, second]
    assert asked[0][1] < float("inf") == asked[1][1]  # h(3) is not stored: not the first gate's number
    assert torch.equal(store.entries(h(4), "cond")[0], got[:1])  # what the changed plan wants is kept


@pytest.mark.parametrize(
    "changed",
    [
        Plan(path=(Run(0, 1), Run(1, 3))),
        Plan(path=(Load(h(2)), Run(2))),
        Plan(path=(Run(0, 2), Run(2)), branches=("cond",)),
        Plan(output=REUSE),
        Plan(path=(Load(PREDICTION),)),
    ],
    ids=["ends early", "another beginning", "another branch", "no transformer", "a prediction"],
)
def test_a_gate_cannot_undo_what_has_run(model, start, changed):
    plan = Plan(path=(Run(0, 2), Run(2)), gate=Gate(0, Measure(h(2))))
    with pytest.raises(ValueError, match="path"):
        follow(model, start(), plan, decide=lambda plan, value: changed)


def test_kept_tensors_do_not_alias(model, start):
    store, (lane,) = make(h(0), h(4), sub(3, "mlp"), residual(0, 4)), start()
    outputs = []
    keep = lambda *args: outputs.append(run_block(*args)) or outputs[-1]
    (end,) = follow(model, [lane], Plan(keep=tuple(site for site, _ in store.rings)), store, block_fn=keep)
    before = {key: ring.slots.clone() for key, ring in store.rings.items()}
    for tensor in (lane.h, end, *(out for state, subs in outputs for out in (state, *subs.values()))):
        tensor.fill_(9.0)
    (loaded,) = follow(model, [lane], Plan(path=(Load(h(4)),)), store)
    loaded.fill_(9.0)
    assert all(torch.equal(ring.slots, before[key]) for key, ring in store.rings.items())


def test_a_step_of_one_branch_leaves_the_other_alone(model, start):
    sites = (h(2), residual(0, 4), sub(1, "attn"))
    store, plan = make(*sites), Plan(keep=sites)
    follow(model, start(), plan, store)
    before = {key: ring.slots.clone() for key, ring in store.rings.items()}
    follow(model, start((("cond",),), seed=3), plan, store)
    for (site, branch), ring in store.rings.items():
        assert torch.equal(ring.slots, before[site, branch]) == (branch == "uncond")


@LAYOUTS
def test_a_probe_sees_every_sub_module(model, start, groups):
    seen, lanes = [], start(groups)

    def probe(branches, block, name, module, inputs, out):
        seen.append((branches, block, name))
        assert module is getattr(model.blocks[block], name) and torch.equal(module(*inputs), out)

    got = run_blocks(model.blocks, lanes, probe=probe)
    assert seen == [(group, k, name) for k in range(4) for group in groups for name in model.subs]
    assert torch.equal(got[0], blocks_by_hand(model, lanes[0].h, lanes[0]))
