"""Caching on HunyuanVideo: one branch with embedded guidance, or two branches of different text lengths."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minidit.attention import Sliced
from minidit.cache.calibrate import make_bases
from minidit.cache.loop import Lane, run_blocks
from minidit.cache.measure import Measurements
from minidit.cache.plan import GUIDED, Measure, Need, Plan, RunInfo, h, residual, sub
from minidit.cache.policies.mixcache import MixCache
from minidit.cache.policies.none import NoCache
from minidit.cache.policies.unicp import UniCP
from minidit.cache.profile import make_profile
from minidit.cache.recorder import Recorder
from minidit.cache.seam import BlockCache
from minidit.cache.store import Ring, Store
from minidit.generate import Engine
from minidit.models.hunyuan_video import Context, HunyuanVideo
from minidit.presets import ScheduleConfig
from minidit.profiles import write_profile
from minidit.sampling import Forward, denoise
from minidit.schedules import Schedule, make_schedule
from minidit.settings import Choices
from minidit_kernels.qk_norm_rope import rope
from tests.cache.reference_mixcache import distance, mixcache_reference
from tests.tensors import randn, rel
from tests.tiny_hunyuan_video import save_original, text, tiny
from weights_convert.convert import convert

SIZE, TOKENS = (3, 4, 6), 18  # latent (T, H, W)
BOTH = ("cond", "uncond")
REL = 1e-6  # the same operations in the same order; what is left is the rounding of a fused sum


def run_of(rows: tuple[int, ...], *, is_batched: bool = False) -> tuple[Forward, Tensor]:
    """The small model on prompts of so many text rows, a branch each."""
    model = tiny()
    with torch.inference_mode():
        texts = [text(n, seed=10 * i + n) for i, n in enumerate(rows)]
        context = model.prepare(texts, SIZE, branches=BOTH[: len(rows)])
    return Forward(model, context, is_batched, video_tokens=TOKENS), randn(1, 4, *SIZE, seed=4)


def schedule_of(steps: int) -> Schedule:
    return make_schedule(ScheduleConfig("euler", "wan", 7.0), steps)


# none


@torch.inference_mode()
@pytest.mark.parametrize("rows", [(5,), (5, 3)], ids=["embedded", "true-cfg"])
def test_none_is_bit_identical_to_a_plain_loop(rows):
    forward, noise = run_of(rows)
    model, schedule, x = forward.model, schedule_of(4), noise
    for step in schedule.steps(3.0):
        outs = []
        for name in forward.branches:
            state, cond = model.embed(x, torch.tensor([step.t]), forward.context.select((name,)))
            for k, block in enumerate(model.blocks):
                state = block(state, cond.at(k), BlockCache())
            outs.append(model.head(state, cond))
        v = outs[0] if len(outs) == 1 else outs[1] + 3.0 * (outs[0] - outs[1])
        x, _ = schedule.step(step.i, x, v, schedule.start())
    assert torch.equal(denoise(forward, schedule, noise, NoCache(), guidance_scale=3.0).latents, x)


@torch.inference_mode()
def test_every_sub_module_passes_the_seam():
    forward, noise = run_of((5,))
    seen = []
    h0, cond = forward.model.embed(noise, torch.tensor([900.0]), forward.context)
    lane = Lane(("cond",), h0, cond)
    probe = lambda branches, k, name, module, inputs, out: seen.append((k, name, out.shape[1]))
    run_blocks(forward.model.blocks, [lane], probe=probe)
    assert seen == [(k, name, TOKENS + 5) for k in range(5) for name in forward.model.subs]


# MixCache


@torch.inference_mode()
def unrolled_mixcache(forward, schedule, noise, *, theta, delta, intervals, impact, candidates):
    """Algorithm 1 for one branch, over plain tensors: there is no cfg level -> latents, modes"""
    model, x, modes = forward.model, noise, []
    old, D, on, count, n, last = {}, {}, False, 0, intervals[1], "full"
    for step in schedule.steps(1.0):
        on = on or D.get("step", 1e9) < theta
        count = (count + 1) % n if on else 0
        cost = {m: d * impact[m.split()[0]] for m, d in D.items() if m != last}
        mode = min(cost, key=cost.get) if count and cost else "full"
        count = 0 if mode == "full" else count
        if mode == "step":
            v = old["guided"]
        else:
            state, cond = model.embed(x, torch.tensor([step.t]), forward.context)
            start = 0
            if mode != "full":
                start = int(mode.split()[1]) + 1
                state = old[start - 1]
            for k in range(start, len(model.blocks)):
                state = model.blocks[k](state, cond.at(k), BlockCache())
                if k in candidates:
                    if k in old:
                        D[f"block {k}"] = distance(state[:, :TOKENS], old[k][:, :TOKENS])
                    old[k] = state
            v = model.head(state, cond)
            if "guided" in old:
                D["step"] = distance(v, old["guided"])
            if mode == "full":
                if on:
                    drift = distance(v, old["full"])
                    n = intervals[0 if drift < delta[0] else 1 if drift < delta[1] else 2]
                old["full"] = v
            old["guided"] = v
        last = mode
        modes.append(mode)
        x, _ = schedule.step(step.i, x, v, schedule.start())
    return x, modes


@pytest.mark.parametrize(
    "impact", [{"step": 1.0, "block": 1.0}, {"step": 1.0, "block": 0.4}], ids=["uniform", "blocks"]
)
def test_mixcache_on_one_branch_equals_a_hand_unrolled_run(impact):
    forward, noise = run_of((5,))
    schedule, steps = schedule_of(16), 16
    common = {"theta": 100.0, "delta": (0.1, 0.4), "intervals": (5, 4, 3)}
    want, modes = unrolled_mixcache(forward, schedule, noise, impact=impact, candidates=(1, 3), **common)
    assert {"full", "block 1", "block 3"} <= set(modes) and len(modes) - modes.count("full") > 6
    profile = {
        "impact": {"step": impact["step"], "block": {str(i): [impact["block"]] * steps for i in (1, 3)}}
    }
    policy = MixCache(profile=profile, blocks=(1, 3), **common)
    run = denoise(forward, schedule, noise, policy, guidance_scale=1.0, family="hunyuan_video")
    assert [record.plan.label for record in run.records] == modes
    assert rel(run.latents, want) <= REL


@pytest.mark.parametrize("rows, is_batched", [((5, 3), False), ((5, 3), True), ((5, 5), True)])
@pytest.mark.parametrize("options", [{}, {"block_uncond": "run"}, {"residual": True}], ids=str)
def test_mixcache_with_true_cfg_equals_a_hand_unrolled_run(rows, is_batched, options):
    """Branches of two lengths never run as one batch, so every store has its own shape."""
    forward, noise = run_of(rows, is_batched=is_batched)
    by_hand, _ = run_of(rows, is_batched=is_batched and rows[0] == rows[1])
    impact = {
        "step": 1.0, "cfg": 0.4, "block": {str(i): [0.1 + 0.1 * s for s in range(16)] for i in (1, 3)},
    }  # fmt: skip
    common = {"theta": 100.0, "delta": (0.3, 0.6), "intervals": (5, 5, 4), **options}
    want, modes = mixcache_reference(
        by_hand, schedule_of(16), noise, 3.0, impact=impact, candidates=(1, 3), **common
    )
    assert {mode.split()[0] for mode in modes} == {"full", "step", "cfg", "block"}
    policy = MixCache(profile={"impact": impact}, blocks=(1, 3), **common)
    run = denoise(forward, schedule_of(16), noise, policy, guidance_scale=3.0, family="hunyuan_video")
    assert [record.plan.label for record in run.records] == modes
    assert rel(run.latents, want) <= REL


def test_the_published_candidates_are_single_blocks():
    steps = schedule_of(4).steps(1.0)
    policy = MixCache(impact="uniform")
    policy.reset(RunInfo(steps, 60, HunyuanVideo.subs, ("cond",), "hunyuan_video"))
    assert policy.candidates == (30, 40, 50) and "cfg" not in policy.measures


def test_a_store_has_each_branch_in_its_own_shape():
    forward, noise = run_of((5, 3), is_batched=True)

    class Keep(NoCache):
        def reset(self, run):
            return (Need(h(2)), Need(sub(1, "attn")), Need(GUIDED))

    run = denoise(forward, schedule_of(1), noise, Keep(), guidance_scale=3.0)
    rows = (TOKENS + 5) + (TOKENS + 3)
    assert run.cache_bytes == 4 * (2 * rows * 64 + noise.numel())


@torch.inference_mode()
def test_distances_look_at_the_video_alone():
    forward, noise = run_of((5,))
    store, found = Store(), Measurements()
    old, new = randn(1, TOKENS + 5, 64, seed=1), randn(1, TOKENS + 5, 64, seed=2)
    plan = Plan(measure=(Measure(h(2)), Measure(residual(0, 2)), Measure(sub(1, "mlp"))))
    for measure in plan.measure:
        store.rings[measure.site, "cond"] = Ring(old.clone()[None])
        store.rings[measure.site, "cond"].pushed = 1
    recorder = Recorder(plan, store, found, forward.video_tokens)
    for measure in plan.measure:
        recorder.see(measure.site, ("cond",), new)
    values, _ = found.read()
    want = distance(new[:, :TOKENS], old[:, :TOKENS])
    assert list(values.values()) == pytest.approx([want] * 3) and distance(new, old) != pytest.approx(want)


# UniCP


@dataclass
class UnrolledUniCP:
    """UniCP by hand: a plain loop over the blocks, their arithmetic written out, and a dict for a cache."""

    model: HunyuanVideo
    context: Context
    sources: dict[tuple[int, str], tuple[int, ...]]
    widths: dict[int, int]
    bases: dict[tuple[int, str], Tensor]
    outputs: dict = field(default_factory=dict)

    @torch.inference_mode()
    def latents(self, schedule: Schedule, noise: Tensor, guidance: float) -> Tensor:
        x, branches = noise, self.context.branches
        for step in schedule.steps(guidance):
            v = [self.predict(x, step, name) for name in branches]
            v = v[0] if len(v) == 1 else v[1] + guidance * (v[0] - v[1])
            x, _ = schedule.step(step.i, x, v, schedule.start())
        return x

    def predict(self, x: Tensor, step, branch: str) -> Tensor:
        state, cond = self.model.embed(x, torch.tensor([step.t]), self.context.select((branch,)))
        for k, block in enumerate(self.model.blocks):
            run = self.double if k < self.model.config.double else self.single
            state = run(k, block, state, cond.at(k), step.i, branch)
        return self.model.head(state, cond)

    def reused(self, k: int, name: str, i: int, branch: str, module) -> Tensor:
        source = self.sources.get((k, name), range(99))[i]
        if source == i:
            self.outputs[k, name, branch] = module()
        return self.outputs[k, name, branch]

    def double(self, k: int, block, state: Tensor, cond, i: int, branch: str) -> Tensor:
        mods = [
            F.linear(cond.vec, block.mod[s].weight, block.mod[s].bias)[:, None].chunk(6, dim=-1)
            for s in ("video", "text")
        ]
        per_row = lambda n: torch.cat(
            [
                m[n].expand(-1, rows, -1)
                for m, rows in zip(mods, (TOKENS, state.shape[1] - TOKENS), strict=True)
            ],
            dim=1,
        )
        norm = lambda y: F.layer_norm(y, (64,), eps=1e-6)
        streams = lambda part, y: torch.cat((part.video(y[:, :TOKENS]), part.text(y[:, TOKENS:])), dim=1)
        x = norm(state) * (1 + per_row(1)) + per_row(0)
        parts = [(block.attn.video, x[:, :TOKENS]), (block.attn.text, x[:, TOKENS:])]

        def attend() -> Tensor:
            y = self.scores(k, parts, cond, i)
            return torch.cat((parts[0][0].out(y[:, :TOKENS]), parts[1][0].out(y[:, TOKENS:])), dim=1)

        state = state + per_row(2) * self.reused(k, "attn", i, branch, attend)
        x = norm(state) * (1 + per_row(4)) + per_row(3)
        return state + per_row(5) * self.reused(k, "mlp", i, branch, lambda: streams(block.mlp, x))

    def single(self, k: int, block, state: Tensor, cond, i: int, branch: str) -> Tensor:
        mod = F.linear(cond.vec, block.mod.weight, block.mod.bias)[:, None]
        shift, scale, gate = mod.chunk(3, dim=-1)
        x = F.layer_norm(state, (64,), eps=1e-6) * (1 + scale) + shift
        attend = lambda: block.attn.out(self.scores(k, [(block.attn, x)], cond, i))
        mlp = lambda: F.gelu(block.mlp.up(x), approximate="tanh") @ block.mlp.down.weight.T
        out = self.reused(k, "attn", i, branch, attend) + self.reused(k, "mlp", i, branch, mlp)
        return state + gate * out

    def scores(self, k: int, parts: list, cond, i: int) -> Tensor:
        """softmax(q k^T) v of all rows together; q and k narrowed where the profile says so."""
        heads = lambda y: y.unflatten(2, (2, 32)).transpose(1, 2)
        fused = [part.qkv(y).chunk(3, dim=-1) for part, y in parts]
        q = torch.cat([part.q_norm(heads(f[0])) for (part, _), f in zip(parts, fused, strict=True)], dim=2)
        key = torch.cat([part.k_norm(heads(f[1])) for (part, _), f in zip(parts, fused, strict=True)], dim=2)
        v = torch.cat([heads(f[2]) for f in fused], dim=2)
        turn = lambda y: torch.cat((rope(y[:, :, :TOKENS], *cond.rope), y[:, :, TOKENS:]), dim=2)
        q, key = turn(q), turn(key)
        if k in self.widths:
            width = self.widths[k]
            q, key = q @ self.bases[k, f"attn.q.{width}"], key @ self.bases[k, f"attn.k.{width}"]
        return ((q @ key.mT * 32**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def unicp_profile(depth: int, steps: int) -> dict:
    """Windows of several lengths, and slices in two of three blocks."""
    g = torch.Generator().manual_seed(5)
    reach = lambda i: range(1, min(6, steps - 1 - i) + 1)

    def table() -> list:
        rate = 0.06 * torch.rand(depth, steps, generator=g)
        return [[[k * rate[b, i].item() for k in reach(i)] for b in range(depth)] for i in range(steps)]

    losses = [[[0.01, 0.04, 0.06, 0.09] if k % 3 else [0.06] * 4 for k in range(depth)] for _ in range(steps)]
    return {
        "steps": steps, "depth": depth, "tokens": 67576, "max_window": 6,
        "errors": {"attn": table(), "mlp": table()}, "basis": "two-sided", "head_width": 32,
        "widths": [28, 26, 22, 20], "slice_losses": losses,
    }  # fmt: skip


@pytest.mark.parametrize("rows", [(5,), (5, 3)], ids=["embedded", "true-cfg"])
@pytest.mark.parametrize(
    "options",
    [{}, {"slice": False}, {"reuse": False}, {"kinds": ("attn", "mlp")}],
    ids=["both", "reuse", "slice", "mlp-too"],
)
def test_unicp_equals_a_hand_unrolled_run(rows, options):
    forward, noise = run_of(rows)
    depth, steps = len(forward.model.blocks), 8
    x = torch.randn(depth, 2, 2, 64, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    bases = make_bases({k: tuple(x[k].mT @ x[k]) for k in range(depth)}, "two-sided")
    policy = UniCP(profile=unicp_profile(depth, steps), **options)
    run = denoise(forward, schedule_of(steps), noise, policy, guidance_scale=3.0, constants=bases)
    reused = sum(source != i for sources in policy.sources.values() for i, source in enumerate(sources))
    assert bool(reused) == options.get("reuse", True) and bool(policy.widths) == options.get("slice", True)
    by_hand = UnrolledUniCP(forward.model, forward.context, policy.sources, policy.widths, bases)
    want = by_hand.latents(schedule_of(steps), noise, 3.0)
    assert rel(run.latents, want) < 2e-5  # attention is written out here, and fused there
    plain = denoise(forward, schedule_of(steps), noise, NoCache(), guidance_scale=3.0).latents
    assert rel(run.latents, plain) > 1e-3


@torch.inference_mode()
def test_slices_of_full_width_change_nothing():
    forward, noise = run_of((5,))
    eye = torch.eye(32).expand(2, 32, 32)
    h0, cond = forward.model.embed(noise, torch.tensor([900.0]), forward.context)
    for k in (0, 3):
        attn, x = (
            forward.model.blocks[k].attn,
            torch.randn(h0.shape, generator=torch.Generator().manual_seed(k)),
        )
        assert rel(attn(x, cond.at(k), how=Sliced(eye, eye)), attn(x, cond.at(k))) < 1e-6


# From a profile to a video


def test_calibration_and_caching_work_on_a_model_folder(tmp_path):
    pytest.importorskip("tokenizers")
    folder = tmp_path / "model"
    convert(save_original(tmp_path / "ckpts"), folder)
    engine = Engine(folder, device="cpu", dtype="fp32", keep_text_encoder=True)
    small = dict(width=48, height=32, num_frames=5, steps=8)
    for options in (small, small | {"true_cfg": 3.0}):
        settings = engine.resolve("", Choices(**options))
        for method in ("unicp", "mixcache"):
            write_profile(folder / "profiles", make_profile(method, engine, settings, ["two words", "a cat"]))
        plain = engine.generate("a cat walks", **options)
        spec = "mixcache:theta=100,penalty=off+unicp:threshold=0.9"
        video = engine.generate("a cat walks", cache=spec, **options)
        total = video.trace["total"]
        assert total["macs"] < total["macs_full"]
        assert not torch.equal(video.latents, plain.latents)
