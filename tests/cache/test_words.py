"""Every word that plans have for the methods of others, on a model of every family.

What it does by hand, and that batched and sequential guidance give the same.
"""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minidit.attention import windowed
from minidit.cache.loop import hash_noise, run_blocks, token_scores
from minidit.cache.measure import Measurements
from minidit.cache.plan import (
    CFG_DELTA,
    LATENTS,
    LATENTS_FULL,
    OFFSET,
    PREDICTION,
    REUSE,
    RUN_ALL,
    TIME,
    TIME_MOD,
    Add,
    Gate,
    Load,
    Measure,
    Mix,
    Need,
    Plan,
    Run,
    Share,
    Spectrum,
    Tokens,
    Window,
    residual,
    sub,
    sub_input,
    token_ages,
    window_rest,
)
from minidit.cache.policies.adacache import AdaCache
from minidit.cache.policies.ditfastattn import DiTFastAttn
from minidit.cache.policies.easycache import EasyCache
from minidit.cache.policies.fastercache import FasterCache
from minidit.cache.policies.replay import Replay
from minidit.cache.policies.teacache import TeaCache
from minidit.cache.policies.toca import DuCa, ToCa
from minidit.cache.recorder import Recorder
from minidit.cache.seam import run_block
from minidit.cache.trace import from_json, to_json
from minidit.compiled import CompiledBlock
from minidit.sampling import weigh_spectrum
from tests.cache.families import (
    BOTH,
    FAMILIES,
    SIZE,
    TOKENS,
    Scripted,
    follow,
    forward_of,
    lanes_of,
    rel,
    rows_of,
    states,
    store_of,
)
from tests.tensors import randn, rel_l1

EVERY = pytest.mark.parametrize("family", FAMILIES)
PER_TOKEN = pytest.mark.parametrize("family", ["wan", "open_sora", "latte"])
SAME = 2e-6  # fp32, batched or not: matrix products of other shapes


def both_layouts(family: str) -> list:
    return [forward_of(family, is_batched=is_batched) for is_batched in (True, False)]


# signals


@EVERY
@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("site", [TIME, sub_input(0, "attn")], ids=str)
def test_a_signal_is_measured_before_any_block_runs(family, is_batched, site):
    """In the second of two steps, against the first; what has been seen is the same either way."""
    forward = forward_of(family, is_batched=is_batched)
    kept, calls, asked, store = [], [], [], store_of(forward, site)
    plan = Plan(keep=(site,), gate=Gate(-1, Measure(site, branch="uncond")))
    decide = lambda plan, value: asked.append((value, len(calls))) or plan
    block_fn = lambda *args: calls.append(1) or run_block(*args)
    for seed, t in ((4, 900.0), (5, 300.0)):
        lanes = lanes_of(forward, randn(1, 4, *SIZE, seed=seed), t)
        recorder, before = Recorder(plan, store, Measurements(), TOKENS), len(calls)
        with torch.no_grad():
            if site == TIME:
                for lane in lanes:
                    recorder.see(TIME, lane.branches, lane.cond.time)
            run_blocks(forward.model.blocks, lanes, plan, recorder, decide=decide, block_fn=block_fn)
        assert asked[-1][1] == before < len(calls)
        kept.append(store.entries(site, "uncond")[0].clone())
        want = lanes[-1].cond.time[-1:] if site == TIME else input_by_hand(forward, lanes)
        assert torch.equal(kept[-1], want)
    rows = TOKENS if site.kind == "input" else None
    new, old = (value[:, :rows] for value in reversed(kept))
    assert [value for value, _ in asked] == [float("inf"), pytest.approx(rel_l1(new, old), rel=1e-5)]


@torch.no_grad()
def input_by_hand(forward, lanes) -> torch.Tensor:
    """What enters block 0's attention, of uncond."""
    seen = []
    probe = lambda branches, block, name, module, inputs, out: seen.append((block, name, inputs[0]))
    run_blocks(forward.model.blocks, [lanes[-1]], probe=probe)
    return next(x for block, name, x in seen if (block, name) == (0, "attn"))[-1:]


@EVERY
def test_an_input_is_kept_once_where_a_gate_has_looked_at_it(family):
    """The block that the gate looked into runs after that, and shows its input a second time."""
    forward, site = forward_of(family), sub_input(1, "attn")
    store = store_of(forward, site)
    plan = Plan(path=(Run(0, 1), Run(1)), keep=(site,), gate=Gate(0, Measure(site)))
    gated = states(forward, plan, store, decide=lambda plan, value: plan)
    assert [store.rings[site, branch].pushed for branch in BOTH] == [1, 1]
    kept = store.entries(site, "cond")[0].clone()
    plain = states(forward, Plan(keep=(site,)), store)
    assert torch.equal(gated, plain) and torch.equal(store.entries(site, "cond")[0], kept)


def test_a_gate_on_an_input_that_is_not_the_first_is_refused():
    forward, site = forward_of("wan"), sub_input(0, "mlp")
    plan = Plan(gate=Gate(-1, Measure(site)))
    with pytest.raises(ValueError, match="is on input\\(0,mlp\\), but block 0 begins with attn"):
        states(forward, plan, decide=lambda plan, value: plan)


@EVERY
def test_a_gate_on_time_decides_a_whole_run(family):
    """Three steps, of which the second and third add the first one's residual."""
    rest = residual(0, 3 if family != "hunyuan_video" else 5)
    plan = Plan(keep=(TIME, rest), gate=Gate(-1, Measure(TIME)))
    skip = lambda plan, value: plan if value == float("inf") else Plan(path=(Add(rest),), label="skip")
    runs = []
    for forward in both_layouts(family):
        policy = Scripted((Need(TIME), Need(rest)), plan, plan, plan, decided=skip)
        runs.append(follow(forward, policy))
        assert [r.plan.label for r in runs[-1].records] == ["full", "skip", "skip"]
        assert policy.asked[0] == float("inf") > max(policy.asked[1:]) and policy.run.tokens == TOKENS
    assert rel(runs[0].latents, runs[1].latents) < SAME


@pytest.mark.parametrize("family", ["wan", "open_sora", "latte"])
def test_the_projected_time_is_measured_where_a_family_has_it(family):
    policy = Scripted((Need(TIME_MOD),), *[Plan(keep=(TIME_MOD,), measure=(Measure(TIME_MOD),))] * 2)
    follow(forward_of(family), policy)
    assert policy.values[0] == {} and policy.values[1][Measure(TIME_MOD)] > 0


# what a gate leaves behind


@EVERY
def test_what_a_gate_newly_keeps_of_its_own_site_is_kept(family):
    """As the block caches want it: the signal of the last computed step, and a residual from the gate on."""
    first, rest = residual(0, 1), residual(1, 3)
    for forward in both_layouts(family):
        store, end = store_of(forward, first, rest), len(forward.model.blocks)
        plan = Plan(path=(Run(0, 1), Run(1)), gate=Gate(0, Measure(first)))
        miss = lambda plan, value: replace(plan, keep=(first, rest))
        states(forward, plan, store, decide=miss)
        wanted = store_of(forward, first, rest)
        states(forward, Plan(path=(Run(0, 1), Run(1, end)), keep=(first, rest)), wanted)
        for site in (first, rest):
            for branch in BOTH:
                assert store.rings[site, branch].pushed == 1
                assert torch.equal(store.entries(site, branch)[0], wanted.entries(site, branch)[0])


# latents and offsets


@EVERY
def test_an_offset_is_added_to_the_latents_without_the_transformer(family):
    xs: list[torch.Tensor] = [randn(1, 4, *SIZE, seed=4)]
    for forward in both_layouts(family):
        needs = (Need(OFFSET), Need(PREDICTION))
        policy = Scripted(needs, Plan(keep=(OFFSET, PREDICTION)), Plan(path=(Load(OFFSET),), label="skip"))
        outcome = follow(forward, policy, on_step=lambda record, x: xs.append(x))
        plain = Scripted(needs, RUN_ALL, Plan(path=(Load(PREDICTION),)))
        plain.plans = (Plan(keep=(OFFSET, PREDICTION)), plain.plans[1])
        stale = follow(forward, plain)
        # the guided offset is that of the branches: guidance is linear and its weights add up to 1
        step = outcome.records[1].step
        moved = xs[-1] - stale.latents
        want = (xs[-2] - xs[0]) * (0 - step.sigma)  # Euler's last step, of a prediction that is x larger
        assert rel(moved, want) < 1e-4


def test_a_gate_on_the_latents_may_answer_with_any_plan():
    """Before everything: the branches, the path and the output are all free."""
    forward = forward_of("wan")
    plan = Plan(keep=(LATENTS, OFFSET, CFG_DELTA), gate=Gate(-1, Measure(LATENTS)))
    answers = [
        Plan(keep=(OFFSET, CFG_DELTA)),
        Plan(path=(Load(OFFSET),), label="skip"),
        Plan(branches=("cond",), fill=REUSE, label="cond"),
    ]
    policy = Scripted((Need(LATENTS), Need(OFFSET), Need(CFG_DELTA)), plan, plan, plan)
    policy.decided = lambda plan, value: answers[len(policy.asked) - 1]
    outcome = follow(forward, policy)
    assert [record.plan for record in outcome.records] == answers
    assert policy.asked[0] == float("inf") and 0 < policy.asked[1] < 2


def test_latents_are_measured_as_they_enter_a_step():
    forward, xs = forward_of("wan"), [randn(1, 4, *SIZE, seed=4)]
    plan = Plan(keep=(LATENTS,), measure=(Measure(LATENTS), Measure(LATENTS_FULL)))
    full = replace(plan, keep=(LATENTS, LATENTS_FULL))
    policy = Scripted((Need(LATENTS), Need(LATENTS_FULL)), full, plan, full)
    follow(forward, policy, on_step=lambda record, x: xs.append(x))
    assert policy.values[0] == {}
    assert policy.values[2][Measure(LATENTS)] == pytest.approx(rel_l1(xs[2], xs[1]), rel=1e-5)
    assert policy.values[2][Measure(LATENTS_FULL)] == pytest.approx(rel_l1(xs[2], xs[0]), rel=1e-5)


# guidance by frequencies


def spectrum_by_hand(x, low: float, high: float):
    """Frame by frame, with zero in the middle."""
    out = torch.empty_like(x)
    rows, columns = x.shape[-2:]
    v, u = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    disc = (v - rows // 2) ** 2 + (u - columns // 2) ** 2 <= (min(rows, columns) // 5) ** 2
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-2])).tolist():
        f = torch.fft.fftshift(torch.fft.fft2(x[tuple(index)].double()))
        f = f * torch.where(disc, low, high)
        out[tuple(index)] = torch.fft.ifft2(torch.fft.ifftshift(f)).real.float()
    return out


@pytest.mark.parametrize("size", [(4, 6), (11, 15), (16, 10), (5, 5)])
def test_frequencies_are_weighed_frame_by_frame(size):
    x = randn(1, 3, 2, *size)
    got = weigh_spectrum(x, Spectrum(1.3, 0.6))
    torch.testing.assert_close(got, spectrum_by_hand(x, 1.3, 0.6), rtol=1e-5, atol=1e-5)  # fp32 transforms
    torch.testing.assert_close(weigh_spectrum(x, Spectrum()), x, rtol=1e-5, atol=1e-5)
    flat = torch.ones(1, 1, 1, *size)
    torch.testing.assert_close(weigh_spectrum(flat, Spectrum(2.0, 9.0)), 2 * flat, rtol=1e-5, atol=1e-5)


@EVERY
def test_a_fill_by_frequencies_with_even_weights_is_the_plain_one(family):
    forward, needs = forward_of(family), (Need(CFG_DELTA),)
    runs = [
        follow(forward, Scripted(needs, Plan(keep=(CFG_DELTA,)), Plan(branches=("cond",), fill=fill)))
        for fill in (Mix((1.2,)), Spectrum(1.2, 1.2), Spectrum(1.2, 0.0))
    ]
    assert rel(runs[1].latents, runs[0].latents) < 1e-5 < rel(runs[2].latents, runs[0].latents)


# sharing between branches


@EVERY
def test_what_is_shared_is_computed_for_cond_and_copied(family):
    forward = forward_of(family, is_batched=False)
    depth = len(forward.model.blocks)
    keys = [(k, "attn") for k in range(depth)] + [(1, "mlp")]
    sites = tuple(sub(*key) for key in keys)
    shared = Plan(subs=tuple((key, Share()) for key in keys), keep=sites)
    stores = [store_of(forward, *sites), store_of(forward, *sites)]
    sequential = states(forward, shared, stores[0])
    batched = states(forward_of(family), shared, stores[1])
    assert rel(batched, sequential) < SAME
    for site in sites:  # both branches have what one of them computed
        for store in stores:
            assert torch.equal(*(store.entries(site, branch)[0] for branch in BOTH))
    by_hand = store_of(forward, *sites)
    plain = states(forward, Plan(keep=sites), by_hand)
    for site in sites:
        by_hand.push(site, "uncond", by_hand.entries(site, "cond")[0])
    reused = states(forward, Plan(subs=tuple((key, REUSE) for key in keys)), by_hand)
    assert rel(sequential[:1], plain[:1]) < SAME and rel(sequential[1:], reused[1:]) < SAME
    assert rel(sequential[1:], plain[1:]) > 1e-3


def test_what_enters_a_shared_sub_module_is_each_branchs_own():
    kept = []
    for forward in both_layouts("wan"):
        site = sub_input(1, "attn")
        store = store_of(forward, site)
        states(forward, Plan(subs=(((1, "attn"), Share()),), keep=(site,)), store)
        kept.append([store.entries(site, branch)[0] for branch in BOTH])
    assert rel(kept[0][1], kept[1][1]) < SAME < rel(kept[1][0], kept[1][1])


def test_sharing_between_branches_of_unequal_texts_is_refused():
    from tests.cache.test_hunyuan_video import run_of

    forward, _ = run_of((5, 3))
    plan = Plan(subs=(((0, "attn"), Share()),))
    with pytest.raises(
        ValueError, match="attn of block 0 cannot be shared: one branch has 23 rows, the other 21"
    ):
        states(forward, plan)


def test_only_the_first_branch_that_runs_can_be_shared():
    with pytest.raises(ValueError, match="shares what uncond computes, but cond is the first branch"):
        states(forward_of("wan"), Plan(subs=(((0, "attn"), Share("uncond")),)))


# windows


@pytest.mark.parametrize("length, width", [(1, 1), (7, 1), (7, 2), (8, 4), (9, 5), (12, 11)])
def test_windowed_attention_is_attention_under_a_band(length, width):
    q, k, v = (randn(2, 3, length, 8, seed=n) for n in range(3))
    at = torch.arange(length)
    band = (at - at[:, None]).abs() <= width
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=band, scale=0.3)
    torch.testing.assert_close(windowed(q, k, v, width, scale=0.3), want, rtol=1e-5, atol=1e-6)


@EVERY
def test_a_window_and_its_rest_make_full_attention_of_the_same_input(family):
    """And of another input they do not, unless the window is everything."""
    for forward in both_layouts(family):
        of = rows_of(forward)
        plain = [states(forward, RUN_ALL, seed=seed) for seed in (4, 5)]
        for width in (1, of - 1):
            window = Window(width, of)
            keys = [(k, "attn") for k in range(len(forward.model.blocks))]
            rests = tuple(window_rest(*key, window) for key in keys)
            store = store_of(forward, *rests)
            watched = states(forward, Plan(keep=rests), store)
            assert rel(watched, plain[0]) < SAME
            near = Plan(subs=tuple((key, window) for key in keys))
            assert rel(states(forward, near, store), plain[0]) < 1e-5
            other = rel(states(forward, near, store, seed=5), plain[1])
            assert other < 1e-5 if width == of - 1 else other > 1e-4


@EVERY
def test_a_shared_window_is_the_window_of_cond(family):
    runs = []
    for forward in both_layouts(family):
        window = Window(2, rows_of(forward))
        rest = window_rest(1, "attn", window)
        store = store_of(forward, rest)
        states(forward, Plan(subs=(((1, "attn"), Share()),), keep=(rest,)), store)
        assert torch.equal(*(store.entries(rest, branch)[0] for branch in BOTH))
        runs.append(states(forward, Plan(subs=(((1, "attn"), Share(how=window)),)), store, seed=5))
        alone = states(forward, Plan(subs=(((1, "attn"), window),)), store, seed=5)
        assert rel(runs[-1][:1], alone[:1]) < SAME < rel(runs[-1][1:], alone[1:])
    assert rel(*runs) < SAME


# tokens


@PER_TOKEN
def test_all_tokens_are_the_full_module(family):
    for forward in both_layouts(family):
        keys = [(k, name) for k in range(3) for name in forward.model.subs if "attn" not in name]
        store = store_of(forward, *(sub(*key) for key in keys))
        states(forward, Plan(keep=tuple(sub(*key) for key in keys)), store, seed=5)
        plan = Plan(subs=tuple((key, Tokens(TOKENS, TOKENS)) for key in keys))
        assert rel(states(forward, plan, store), states(forward, RUN_ALL)) < SAME


@PER_TOKEN
@pytest.mark.parametrize("score", ["norm", "random"])
@pytest.mark.parametrize("name", ["mlp", "cross"])
def test_tokens_that_are_not_picked_keep_their_output(family, score, name):
    site, how = sub(1, name), Tokens(5, TOKENS, score, seed=3)
    stores = []
    for forward in both_layouts(family):
        store = store_of(forward, site)
        states(forward, Plan(keep=(site,)), store, seed=5)
        old = torch.cat([store.entries(site, branch)[0] for branch in BOTH]).clone()
        states(forward, Plan(subs=(((1, name), how),), keep=(site,)), store)
        new = torch.cat([store.entries(site, branch)[0] for branch in BOTH])
        states(forward, Plan(keep=(site,)), store)
        full = torch.cat([store.entries(site, branch)[0] for branch in BOTH])
        rows = token_scores(old, how, 1).topk(5).indices
        for branch in range(2):
            picked = torch.zeros(TOKENS, dtype=torch.bool).index_fill_(0, rows[branch], True)
            assert torch.equal(new[branch, ~picked], old[branch, ~picked])
            assert rel(new[branch, picked], full[branch, picked]) < 1e-5
        stores.append(new)
    assert rel(*stores) < SAME


def test_norm_scores_are_those_by_hand():
    old = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [0.0, 10.0], [6.0, 8.0]]])
    assert token_scores(old, Tokens(1, 4), 0).tolist() == [[0.5, 1.0, 0.0, 0.0]]


def test_random_scores_are_even_and_change_with_seed_and_block():
    x = hash_noise(4096, 7, torch.device("cpu"))
    assert 0 <= x.min() and x.max() < 1 and x.dtype == torch.float32
    assert torch.histc(x, 8, 0, 1).sub(512).abs().max() < 90  # four standard deviations of 21
    assert abs(x[:-1].sub(0.5).mul(x[1:].sub(0.5)).mean()) < 0.005  # of 1/12
    scores = {
        seed: token_scores(torch.zeros(1, 64, 2), Tokens(1, 64, "random", seed=seed), 0) for seed in (1, 2)
    }
    assert not torch.equal(*scores.values())
    assert not torch.equal(scores[1], token_scores(torch.zeros(1, 64, 2), Tokens(1, 64, "random", seed=1), 1))


@pytest.mark.parametrize("is_batched", [True, False])
def test_tokens_that_are_passed_over_get_their_turn(is_batched):
    """With a weight above any score's span every token runs once before one runs twice; ages start anew."""
    forward, site, ages = forward_of("wan", is_batched=is_batched), sub(1, "mlp"), token_ages(1, "mlp")
    store = store_of(forward, site, ages)
    plan = Plan(subs=(((1, "mlp"), Tokens(6, TOKENS, fresh=2.0)),), keep=(site,))
    states(forward, Plan(keep=(site,)), store)
    for turn in range(1, 4):
        states(forward, plan, store, seed=turn)
        for branch in BOTH:
            count = torch.bincount(store.rings[ages, branch].slots.flatten().long(), minlength=4).tolist()
            assert count[:turn] == [6] * turn and count[turn] == TOKENS - 6 * turn
    states(forward, Plan(keep=(site,)), store)
    assert not any(store.rings[ages, branch].slots.any() for branch in BOTH)


def test_tokens_are_counted_as_the_module_sees_them():
    forward, site = forward_of("wan"), sub(1, "mlp")
    store = store_of(forward, site)
    states(forward, Plan(keep=(site,)), store)
    with pytest.raises(ValueError, match="counts 17 tokens in mlp of block 1, which sees 18"):
        states(forward, Plan(subs=(((1, "mlp"), Tokens(5, 17)),)), store)
    with pytest.raises(ValueError, match="ages\\(1,mlp\\); name it in reset"):
        states(forward, Plan(subs=(((1, "mlp"), Tokens(5, TOKENS, fresh=1.0)),)), store)


# all together


def rivals(of: int) -> list:
    ways = [["full"] * 3] + [["window", "share", "reuse"], ["reuse", "window-share", "full"]] * 4
    fitted = {"depth": 3, "window": 2, "of": of, "map": {"attn": ways}}
    return [
        TeaCache(2.0, signal="time", coefficients=(1.0, 0.0)),
        TeaCache(1.0, signal="input", coefficients=(1.0, 0.0)),
        EasyCache(1.0, first=3),
        AdaCache(scale=4.0),
        FasterCache(),
        DiTFastAttn(profile={"ditfastattn": fitted}),
        ToCa(score="random"),
        DuCa(),
    ]


@pytest.mark.parametrize("number", range(8))
def test_plans_with_new_words_come_back_from_a_file_and_are_replayed(number):
    """Gates are decided then, and what they decided stands in the plan."""
    forward = forward_of("wan")
    first = follow(forward, rivals(TOKENS)[number], 9, family="wan")
    plans = tuple(from_json(json.loads(json.dumps(to_json(r.plan)))) for r in first.records)
    assert plans == tuple(r.plan for r in first.records) and len({plan.label for plan in plans}) > 1
    again = follow(forward, Replay(plans), 9, family="wan")
    assert torch.equal(again.latents, first.latents)


@pytest.mark.slow
def test_new_words_compile_whole():
    """And give what they give without; one graph more for every new row of codes."""
    forward, compiled = forward_of("wan"), CompiledBlock(backend="aot_eager")
    torch._dynamo.reset()
    window = Window(2, TOKENS)
    sites = window_rest(1, "attn", window), sub(1, "mlp"), sub_input(1, "attn"), token_ages(1, "mlp")
    stores = [store_of(forward, *sites) for _ in range(2)]
    for sub_op, name, rows in (
        (None, "", 2),  # block 1, and what the others do
        (window, "attn", 3),
        (Share(), "attn", 4),
        (Share(how=window), "attn", 5),
        (Tokens(4, TOKENS, fresh=0.1), "mlp", 6),
    ):
        plan = Plan(subs=(((1, name), sub_op),)) if sub_op else Plan(keep=sites[:3])
        got = states(forward, plan, stores[0], block_fn=compiled)
        assert torch.equal(got, states(forward, plan, stores[1])) and len(compiled.rows) == rows
