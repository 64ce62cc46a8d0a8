"""Caching on CogVideoX: a joint sequence, fresh noise every step, guidance that varies by itself."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from minidit.cache.calibrate import make_bases
from minidit.cache.loop import Lane, run_blocks
from minidit.cache.measure import Measurements
from minidit.cache.plan import CFG_DELTA, GUIDED, RUN_ALL, Measure, Need, Plan, RunInfo, h, residual
from minidit.cache.policies.mixcache import MixCache
from minidit.cache.policies.none import NoCache
from minidit.cache.policies.unicp import UniCP
from minidit.cache.profile import make_profile
from minidit.cache.recorder import Recorder
from minidit.cache.seam import run_block
from minidit.cache.store import make_store
from minidit.generate import Engine
from minidit.profiles import write_profile
from minidit.sampling import Forward, NoiseSource, denoise
from minidit.schedules import make_table_schedule
from minidit.settings import Choices
from minidit_kernels.qk_norm_rope import rope
from tests.cache.reference_mixcache import mixcache_reference
from tests.cache.reference_unicp import UnrolledRun
from tests.tensors import randn, rel
from tests.tiny_cogvideox import DDIM, DPM, save_tiny, tiny

BOTH = ("cond", "uncond")
STEPS, SIZE = 16, (2, 4, 6)  # latent (T, H, W): 12 tokens, in patches of two frames 6
REL = 1e-6  # the same operations in the same order; what is left is the rounding of a fused sum


def run_of(kind: str, *, is_batched: bool = True) -> tuple[Forward, Tensor]:
    model = tiny(kind)
    with torch.inference_mode():
        context = model.prepare([randn(12, 24, seed=2), randn(12, 24, seed=3)], SIZE, branches=BOTH)
    forward = Forward(model, context, is_batched, video_tokens=context.video_tokens)
    return forward, randn(1, 4, *SIZE, seed=4)


IMPACT = {  # under which all three levels act here
    "step": 1.0,
    "cfg": 0.6,
    "block": {str(i): [0.1 + 0.1 * s for s in range(STEPS)] for i in (1, 3)},
}


@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize(
    "kind, config, options",
    [
        ("2b", DDIM, {}),
        ("5b", DPM, {}),
        ("1.5", DPM, {"block_uncond": "run"}),
        ("1.5", DPM, {"residual": True}),
        ("5b", replace(DPM, dynamic_guidance=False), {}),
    ],
    ids=["2b-ddim", "5b-dynamic", "1.5-run-uncond", "1.5-residual", "5b-one-guidance"],
)
def test_mixcache_equals_a_hand_unrolled_run(kind, config, options, is_batched):
    forward, noise = run_of(kind, is_batched=is_batched)
    schedule = make_table_schedule(config, STEPS)
    # random weights: steps are far apart
    common = {"theta": 100.0, "delta": (0.3, 0.6), "intervals": (5, 5, 4), **options}
    want, modes = mixcache_reference(
        forward, schedule, noise, 6.0, impact=IMPACT, candidates=(1, 3), draw=NoiseSource(9), **common
    )
    assert {mode.split()[0] for mode in modes} == {"full", "step", "cfg", "block"}
    policy = MixCache(profile={"impact": IMPACT}, blocks=(1, 3), **common)
    run = denoise(forward, schedule, noise, policy, guidance_scale=6.0, draw=NoiseSource(9))
    assert [record.plan.label for record in run.records] == modes
    assert rel(run.latents, want) <= REL


def test_with_dynamic_guidance_a_repeated_step_is_guided_anew():
    forward, noise = run_of("5b")
    schedule = make_table_schedule(DPM, STEPS)
    policy = MixCache(theta=100.0, impact="uniform", levels=("step",), penalty=False, interval=4, blocks=(1,))
    run = denoise(forward, schedule, noise, policy, guidance_scale=6.0, draw=NoiseSource(9))
    steps = [record for record in run.records if record.plan.label == "step"]
    assert len(steps) > 6 and all(record.plan.fill and record.plan.output is None for record in steps)


def test_the_published_thresholds_are_the_default_here():
    steps = make_table_schedule(DDIM, STEPS).steps(6.0)
    for family, delta in (("cogvideox", (0.3, 0.4)), ("wan", (0.05, 0.1))):
        policy = MixCache(impact="uniform")
        policy.reset(RunInfo(steps, 42, ("attn", "mlp"), BOTH, family))
        assert policy.bounds == delta
        assert policy.candidates == (10, 20, 30)


def test_distances_look_at_the_video_alone():
    """One measured step after a kept one: h and residuals without their text rows."""
    forward, noise = run_of("2b")
    seen, sites = [], (h(2), residual(1, 3), CFG_DELTA, GUIDED)

    class Watch(NoCache):
        def reset(self, run):
            return tuple(Need(site) for site in sites)

        def plan(self, step):
            return Plan(keep=sites, measure=tuple(map(Measure, sites)))

        def tell(self, step, values):
            seen.append(values)

    schedule, states = make_table_schedule(DDIM, 2), []
    for block in forward.model.blocks[:3]:
        block.register_forward_hook(lambda module, args, out: states.append(out[:1].clone()))
    denoise(forward, schedule, noise, Watch(), guidance_scale=6.0)
    L = forward.context.video_tokens
    before, after = states[:3], states[3:]  # after blocks 0, 1, 2 of the first and the second step
    l1 = lambda new, old: ((new - old)[:, :L].abs().sum() / old[:, :L].abs().sum()).item()
    assert seen[1][Measure(h(2))] == pytest.approx(l1(after[1], before[1]), rel=1e-5)
    want = l1(after[2] - after[0], before[2] - before[0])
    assert seen[1][Measure(residual(1, 3))] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_a_block_compiles_whole_and_once_for_all_blocks(kind):
    forward, noise = run_of(kind)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run_block, fullgraph=True, backend=counter)
    with torch.no_grad():
        for t in (999, 500):
            h, cond = forward.model.embed(
                noise.expand(2, -1, -1, -1, -1), torch.tensor([t, t]), forward.context
            )
            recorder = lambda: Recorder(RUN_ALL, make_store((), BOTH, None, "cpu"), Measurements())
            runs = [
                run_blocks(forward.model.blocks, [Lane(BOTH, h, cond)], RUN_ALL, recorder(), block_fn=fn)[0]
                for fn in (compiled, run_block)
            ]
            assert torch.equal(*runs)
    assert counter.frame_count == 1


@dataclass
class UnrolledCogVideoX(UnrolledRun):
    """The hand-written run of UniCP with this model's block."""

    def block(self, k: int, block, h: Tensor, cond, i: int, branch: str) -> Tensor:
        d = h.shape[-1]
        mod = block.mod(cond.vec)[:, None]
        for place, (name, norm) in enumerate((("attn", block.norm1), ("mlp", block.norm2))):
            shift, scale, gate = (
                torch.cat(
                    [
                        mod[..., d * (6 * stream + 3 * place + j) :][..., :d].expand(-1, rows, -1)
                        for stream, rows in enumerate(cond.streams)
                    ],
                    dim=1,
                )
                for j in range(3)
            )
            out = self.reused(k, name, i, branch) if (k, name) in self.sources else None
            if out is None:
                x = F.layer_norm(h, (d,), norm.weight, norm.bias, norm.eps) * (1 + scale) + shift
                out = self.sliced(k, block, x, cond, i) if name == "attn" else block.mlp(x)
                self.outputs[k, name, branch] = i, out
            h = h + gate * out
        return h

    def sliced(self, k: int, block, x: Tensor, cond, i: int) -> Tensor:
        attn, heads = block.attn, lambda y: y.unflatten(2, (block.attn.heads, -1)).transpose(1, 2)
        q, key, v = map(heads, attn.qkv(x).chunk(3, dim=-1))
        norm = lambda y, n: F.layer_norm(y, y.shape[-1:], n.weight, n.bias, 1e-6)
        q, key = (rope(y, *cond.context.rope) for y in (norm(q, attn.q_norm), norm(key, attn.k_norm)))
        scale = q.shape[-1] ** -0.5
        if k in self.widths and self.sources[k, "attn"][i] == i:
            width = self.widths[k]
            q, key = q @ self.bases[k, f"attn.q.{width}"], key @ self.bases[k, f"attn.k.{width}"]
        out = F.scaled_dot_product_attention(q, key, v, scale=scale)
        return attn.out(out.transpose(1, 2).flatten(2))


def unicp_profile(depth: int, steps: int) -> dict:
    """Windows of several lengths, and slices in two of three blocks."""
    g = torch.Generator().manual_seed(5)
    rate = 0.06 * torch.rand(depth, steps, generator=g)
    reach = lambda i: range(1, min(6, steps - 1 - i) + 1)
    errors = [[[k * rate[b, i].item() for k in reach(i)] for b in range(depth)] for i in range(steps)]
    losses = [[[0.01, 0.04, 0.06, 0.09] if k % 3 else [0.06] * 4 for k in range(depth)] for _ in range(steps)]
    return {
        "steps": steps,
        "depth": depth,
        "tokens": 17776,
        "max_window": 6,
        "errors": {"attn": errors},
        "basis": "two-sided",
        "head_width": 32,
        "widths": [28, 26, 22, 20],
        "slice_losses": losses,
    }


@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("options", [{}, {"slice": False}, {"reuse": False}], ids=["both", "reuse", "slice"])
def test_unicp_equals_a_hand_unrolled_run(options, is_batched):
    forward, noise = run_of("5b", is_batched=is_batched)
    depth, steps = len(forward.model.blocks), 8
    g = torch.Generator().manual_seed(6)
    x = torch.randn(depth, 2, 2, 64, 32, generator=g, dtype=torch.float64)
    constants = make_bases({k: tuple(x[k].mT @ x[k]) for k in range(depth)}, "two-sided")
    policy = UniCP(profile=unicp_profile(depth, steps), **options)
    schedule = make_table_schedule(DDIM, steps)
    run = denoise(forward, schedule, noise, policy, guidance_scale=6.0, constants=constants)
    reused = sum(source != i for sources in policy.sources.values() for i, source in enumerate(sources))
    assert bool(reused) == options.get("reuse", True) and bool(policy.widths) == options.get("slice", True)
    by_hand = UnrolledCogVideoX(forward.model, forward.context, policy.sources, policy.widths, constants)
    want = by_hand.latents(schedule, noise, 6.0, ["full"] * steps)
    assert rel(run.latents, want) < 2e-5  # the norms' affine is folded into the modulation; measured 2e-6


def test_calibration_and_caching_work_on_a_model_folder(tmp_path):
    folder = save_tiny(tmp_path / "model", "1.5", DPM)
    engine = Engine(folder, device="cpu", dtype="fp32")
    settings = engine.resolve("", Choices(steps=8))
    for method in ("unicp", "mixcache"):
        write_profile(folder / "profiles", make_profile(method, engine, settings, ["a", "b"]))
    plain = engine.generate("a red circle", steps=8)
    spec = "mixcache:theta=100,penalty=off+unicp:threshold=0.9"
    video = engine.generate("a red circle", steps=8, cache=spec)
    total = video.trace["total"]
    assert total["macs"] < total["macs_full"]
    assert video.frames.shape == plain.frames.shape and not torch.equal(video.latents, plain.latents)
