"""Caching on Latte and Open-Sora, whose blocks attend along axes: every mode against a run by hand."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minidit.attention import FoldableAttention, Sliced
from minidit.cache.calibrate import calibrate_unicp
from minidit.cache.macs import full_macs, plan_macs
from minidit.cache.plan import RUN_ALL, Freeze, Mix, RunInfo, Slice
from minidit.cache.policies.mixcache import MixCache
from minidit.cache.policies.none import NoCache
from minidit.cache.policies.replay import Replay
from minidit.cache.policies.unicp import UniCP, search_both
from minidit.cache.profile import Announcer
from minidit.cache.trace import from_json, to_json
from minidit.models.latte import Latte
from minidit.models.open_sora import OpenSora, Video
from minidit.presets import LatteConfig, OpenSoraConfig, ScheduleConfig
from minidit.sampling import Forward, denoise
from minidit.schedules import make_schedule, make_table_schedule
from tests.cache.reference_axes import UnrolledRun
from tests.cache.reference_mixcache import mixcache_reference
from tests.tensors import randn, random, rel

SMALL = dict(width=48, mlp_width=64, heads=4, depth=4, text_width=16, text_len=8, freq_width=16)
STEPS, BRANCHES = 10, ("cond", "uncond")
SIZE = (3, 4, 6)  # latent (T, H, W): 18 tokens
REL = 2e-5  # fp32: maps are written out here and fused there; through all blocks and steps, measured 7e-6


def sharp(model):
    """Random weights whose attention maps are far from even, so that a stale one shows."""
    for name, p in random(model, 1).named_parameters():
        if "attn.qkv.weight" in name:
            p.data *= 3
    return model.eval().requires_grad_(False)


def latte_start():
    model = sharp(Latte(LatteConfig(**SMALL, frames=3)))
    context = model.prepare([randn(5, 16, seed=2), randn(5, 16, seed=3)], SIZE, branches=BRANCHES)
    schedule = make_table_schedule(ScheduleConfig("ddim", "leading", 1.0, "linear", "epsilon"), STEPS)
    return Forward(model, context, is_batched=True), schedule, randn(1, 4, *SIZE)


def open_sora_start():
    model = sharp(OpenSora(OpenSoraConfig(**SMALL)))
    with torch.no_grad():
        model.null_text.copy_(randn(8, 16, seed=4))
    video = Video(32, 48, 24)
    context = model.prepare([randn(5, 16, seed=2), None], SIZE, branches=BRANCHES, video=video)
    schedule = make_schedule(ScheduleConfig("euler", "wan", 1.5), STEPS)
    return Forward(model, context, is_batched=True), schedule, randn(1, 4, *SIZE)


@pytest.fixture(scope="module", params=["latte", "open_sora"])
def start(request):
    """(forward, schedule, noise)"""
    with torch.no_grad():
        return latte_start() if request.param == "latte" else open_sora_start()


@pytest.fixture(scope="module")
def learned(start):
    """A profile's data and tensors, made on two runs."""

    def run_once(probe):
        for prompt, noise in enumerate((start[2], randn(1, 4, *SIZE, seed=5))):
            forward = replace(start[0], probe=probe)
            denoise(forward, start[1], noise, Announcer(probe, prompt), guidance_scale=4.0)

    with torch.no_grad():
        return calibrate_unicp(run_once)


def ranked(learned, share: float, table: str = "errors") -> float:
    """A threshold below which that share of the one-step drifts lies."""
    values = sorted(row[0] for rows in learned[0][table].values() for step in rows[:-1] for row in step)
    return values[int(share * len(values))]


def run(start, policy, constants=None):
    return denoise(*start, policy, guidance_scale=4.0, constants=constants)


def by_hand(start, policy, tensors) -> tuple[Tensor, UnrolledRun]:
    """The same run without the cache package; the policy's decisions alone are taken over."""
    forward, schedule, noise = start
    unrolled = UnrolledRun(
        forward.model, forward.context, policy.sources, policy.by_map, policy.slices, tensors
    )
    return unrolled.latents(schedule, noise, 4.0), unrolled


def test_none_is_the_plain_loop(start):
    assert (
        rel(
            run(start, NoCache()).latents,
            UnrolledRun(start[0].model, start[0].context, {}).latents(*start[1:], 4.0),
        )
        < REL
    )


@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize(
    "options, used",
    [
        (dict(slice=False), {"out"}),
        (dict(reuse=False, maps=True, slice=False), {"map"}),
        (dict(maps=True, slice=False), {"out", "map"}),
        (dict(reuse=False, maps=True, freeze=True, slice=False), {"map"}),
        (dict(reuse=False, ratio=0.2), {"slice"}),
        (dict(maps=True, ratio=0.2), {"out", "map", "slice"}),
        (dict(maps=True, freeze=True, ratio=0.2), {"out", "map", "slice"}),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_unicp_equals_a_run_by_hand(start, learned, options, used, is_batched):
    data, tensors = learned
    table = "errors" if options.get("reuse", True) else "map_errors"
    policy = UniCP(threshold=ranked(learned, 0.5, table), profile=data, **options)
    start = (replace(start[0], is_batched=is_batched), *start[1:])
    outcome = run(start, policy, tensors)
    want, unrolled = by_hand(start, policy, tensors)
    assert set(unrolled.used) == used
    assert rel(outcome.latents, want) < REL
    assert rel(outcome.latents, run(start, NoCache()).latents) > 1e-3  # else nothing was cached
    hows = {type(how) for record in outcome.records for _, how in record.plan.subs}
    assert hows >= {{"out": Mix, "map": Freeze, "slice": Slice}[what] for what in set(unrolled.used)}


@pytest.mark.parametrize("options", [{"ratio": 0.2}, {"maps": True, "ratio": 0.2}, {}], ids=str)
def test_slices_of_everything_that_folds_equal_a_rotation_by_hand(start, learned, options):
    data, tensors = learned
    kinds = tuple(data["more_losses"])
    assert kinds == (("cross", "t_attn") if isinstance(start[0].model, Latte) else ("cross", "t_cross"))
    threshold = ranked(learned, 0.5) if options else 1.0  # whatever a slice costs: all that fold are narrow
    policy = UniCP(threshold=threshold, slice_kinds=kinds, reuse=bool(options), profile=data, **options)
    outcome = run(start, policy, tensors)
    want, unrolled = by_hand(start, policy, tensors)
    assert {name for _, name in policy.slices} == set(kinds) and "slice" in unrolled.used
    assert rel(outcome.latents, want) < REL
    assert (
        rel(outcome.latents, run(start, NoCache()).latents) > 2 * REL
    )  # of 5 text rows, 7 directions are most


def test_a_folded_projection_towards_text_is_the_rotation(start, learned):
    forward, tensors = start[0], learned[1]
    module, x, kv = forward.model.blocks[1].cross, randn(2, 18, 48), (randn(2, 4, 5, 12), randn(2, 4, 5, 12))
    cond = forward.model.embed(start[2].expand(2, -1, -1, -1, -1), torch.ones(2), forward.context)[1].at(1)
    bases = tensors[1, "cross.q.10"], tensors[1, "cross.k.10"]
    folded = module.fold(*bases)
    assert folded.weight.shape == (40, 48)
    turned = module(x, kv, cond, how=Sliced(*bases))
    assert rel(module(x, kv, cond, how=folded), turned) < 1e-5
    assert rel(turned, module(x, kv, cond)) > 1e-4


def test_a_folded_projection_is_the_rotation(start, learned):
    forward, tensors = start[0], learned[1]
    _, cond = forward.model.embed(start[2].expand(2, -1, -1, -1, -1), torch.ones(2), forward.context)
    module, x = forward.model.blocks[1].attn, randn(2, 18, 48)
    bases = tensors[1, "attn.q.10"], tensors[1, "attn.k.10"]
    if not isinstance(module, FoldableAttention):  # a norm stands between
        assert not hasattr(module, "fold")
        return
    folded, seen = module.fold(*bases), cond.at(1)
    assert folded.weight.shape == (2 * 4 * 10, 48)
    turned = module(x, seen, how=Sliced(*bases))
    assert rel(module(x, seen, how=folded), turned) < 1e-5
    assert rel(turned, module(x, seen)) > 1e-3


def test_both_projections_stay_resident_and_count(start, learned):
    data, tensors = learned
    policy = UniCP(reuse=False, ratio=0.2, profile=data)
    outcome = run(start, policy, tensors)
    bases = sum(t.numel() * 4 for t in tensors.values())
    folds = 4 * (2 * 4 * policy.widths[0] * (48 + 1)) * 4 if data["folds"] else 0
    assert data["folds"] == isinstance(start[0].model, Latte)
    assert outcome.cache_bytes == bases + folds


@pytest.mark.parametrize("options", [{}, {"residual": True}, {"block_uncond": "run"}], ids=str)
def test_mixcache_equals_a_run_by_hand(start, options):
    impact = {"step": 1.0, "cfg": 0.4, "block": {str(i): [0.5 + 0.1 * i] * STEPS for i in (1, 2)}}
    common = dict(theta=9.0, delta=(0.05, 0.5), **options)
    want, modes = mixcache_reference(*start, 4.0, impact=impact, candidates=(1, 2), **common)
    outcome = run(start, MixCache(blocks=(1, 2), profile={"impact": impact}, **common))
    assert [record.plan.label for record in outcome.records] == modes
    assert len(set(modes)) > 2
    assert rel(outcome.latents, want) < 1e-6


def test_a_window_of_the_map_opens_where_the_output_has_none():
    outputs = [[0.1, 0.3], [0.3, 0.1], [0.3], []]
    maps = [[0.1, 0.1], [0.1, 0.1], [0.1], []]
    assert search_both(outputs, maps, 0.2) == ((0, 0, 2, 2), (False, False, False, True))
    assert search_both([()] * 4, maps, 0.2) == ((0, 0, 0, 3), (False, True, True, False))
    assert search_both(outputs, [()] * 4, 0.2, "literal") == ((0, 0, 2, 3), (False,) * 4)


def test_a_budget_keeps_the_maps_that_serve_most_and_says_so(start, learned):
    data, _ = learned
    options = dict(
        reuse=False, maps=True, slice=False, threshold=ranked(learned, 0.5, "map_errors"), profile=data
    )
    free = UniCP(**options)
    bytes_of_all = run(start, free).cache_bytes
    one = (
        2 * 4 * (18 // 3) * 4 * 3 * 3
    )  # both branches: fp32, 6 places (4x6 cells in 2x2), heads, 3 x 3 frames
    assert len(free.by_map) > 1 and bytes_of_all == one * len(free.by_map)
    tight = UniCP(**options, map_gib=1.5 * one / 2**30)
    with pytest.warns(UserWarning, match=f"1 of {len(free.by_map)} attention maps fit into"):
        outcome = run(start, tight)
    assert outcome.cache_bytes == one
    served = {key: sum(by_map) for key, by_map in free.by_map.items()}
    assert [served[key] for key in tight.by_map] == [max(served.values())]
    want, _ = by_hand(start, tight, {})
    assert rel(outcome.latents, want) < REL


def test_what_is_kept_and_frozen_costs_what_it_says(start, learned):
    model, context = start[0].model, start[0].context
    table_at = lambda width: model.macs(SIZE, 5, width)
    frozen = replace(RUN_ALL, subs=(((1, "t_attn"), Freeze()), ((2, "attn"), Freeze())))
    saved = full_macs(("cond",), table_at) - plan_macs(frozen, ("cond",), table_at)
    queries_keys, scores = 2 * 18 * 48 * 48, 18 * 3 * 48
    assert saved == 2 * queries_keys + scores  # within frames the scores are made anew
    assert context.grid == (3, 2, 3)


def test_a_replayed_run_is_the_same_to_the_bit(start, learned):
    data, tensors = learned
    policy = UniCP(threshold=ranked(learned, 0.5), maps=True, freeze=True, ratio=0.2, profile=data)
    first = run(start, policy, tensors)
    plans = tuple(from_json(json.loads(json.dumps(to_json(r.plan)))) for r in first.records)
    assert torch.equal(run(start, Replay(plans), tensors).latents, first.latents)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(freeze=True), "freeze and map_gib say which attention maps are kept; add maps=on"),
        (dict(map_gib=1.0), "add maps=on"),
        (dict(maps=True), "the profile knows no attention maps of t_attn"),
    ],
)
def test_maps_that_cannot_be_are_refused(learned, options, message):
    old = {name: value for name, value in learned[0].items() if name != "map_errors"}
    table = make_schedule(ScheduleConfig("euler", "wan", 1.0), STEPS).steps(4.0)
    info = RunInfo(table, 4, Latte.subs, BRANCHES, "latte")
    with pytest.raises(ValueError, match=message):
        UniCP(profile=old, kinds=("attn",), **options).reset(info)
