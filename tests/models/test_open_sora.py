import os

import pytest
import torch
from torch import nn

from minidit import attention
from minidit.cache.seam import BlockCache
from minidit.models.open_sora import Context, OpenSora, Video, grid_positions
from minidit.presets import PRESETS, OpenSoraConfig
from minidit.weights import is_fp32
from tests.recordings.base import open_recording
from tests.recordings.open_sora import run_open_sora_dit
from tests.tensors import randn, rel

TINY = OpenSoraConfig(width=48, mlp_width=80, heads=4, depth=3, text_width=16, text_len=8, freq_width=16)
SIZE = (3, 5, 6)  # latent (T, H, W): 3x3 places a frame, one row of them padded
VIDEO = Video(40, 48, 24)
REL = 1e-5  # fp32: what is compared differs in the order of sums only


def tiny(dtype: torch.dtype = torch.float32) -> OpenSora:
    """Random weights that keep activations near 1, gains and biases included; dtypes as in a loaded model."""
    model, generator = OpenSora(TINY), torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        is_matrix = p.ndim > 1 and not name.endswith("mod")
        noise = torch.randn(p.shape, generator=generator) * (p.shape[1] ** -0.5 if is_matrix else 0.1)
        noise += name.endswith("norm.weight")
        p.data = noise if is_fp32(name, OpenSora.keep_fp32) else noise.to(dtype)
    return model.eval().requires_grad_(False)


def two_branches(model: OpenSora, **options) -> Context:
    return model.prepare(
        [randn(5, 16, seed=2), None], SIZE, video=VIDEO, branches=("cond", "uncond"), **options
    )


@pytest.mark.skipif("MINIDIT_GOLDENS" not in os.environ, reason="this recording is too large to ship")
@torch.no_grad()
def test_forward_equals_the_original(goldens):
    recording = open_recording(goldens("open_sora_dit"))
    outs = run_open_sora_dit(recording).outs
    assert set(outs) == {f"out.{case}" for case in ("base", "xmask", "cfgmask", "notextmask", "image")}
    for name, out in outs.items():
        assert rel(out, recording.io[name]) < REL  # measured 4e-6


@torch.no_grad()
def test_forward_is_the_plain_loop_to_the_bit():
    model, x, t = tiny(), randn(2, 4, *SIZE), torch.tensor([700.0, 700.0])
    context = two_branches(model)
    h, cond = model.embed(x, t, context)
    for k, block in enumerate(model.blocks):
        h = block(h, cond.at(k), BlockCache())
    assert torch.equal(model(x, t, context), model.head.everything(h, cond))
    assert torch.equal(model.head(h, cond), -model(x, t, context)[:, :4])  # noise - x0, the rest is dropped


@torch.no_grad()
def test_a_batch_equals_its_samples_alone():
    model, x, t = tiny(), randn(2, 4, *SIZE), torch.tensor([900.0, 30.0])
    both = two_branches(model)
    out = model(x, t, both)
    for row, branch in enumerate(both.branches):
        rows = slice(row, row + 1)
        assert rel(model(x[rows], t[rows], both.select((branch,))), out[rows]) < REL
    assert rel(out[:1], out[1:]) > 0.1  # else this test would see nothing


@torch.no_grad()
def test_no_prompt_is_the_learned_text_at_the_prompts_length():
    model, x, t = tiny(), randn(1, 4, *SIZE), torch.tensor([500.0])
    context = model.prepare([model.null_text[:5]], SIZE, video=VIDEO, branches=("uncond",))
    assert rel(model(x, t, two_branches(model).select(("uncond",))), model(x, t, context)) < REL


@torch.no_grad()
def test_given_frames_are_at_timestep_0():
    model, x, t = tiny(), randn(2, 4, *SIZE), torch.tensor([400.0, 400.0])
    plain = model(x, t, two_branches(model))
    assert rel(model(x, t, two_branches(model, frame_mask=torch.ones(3))), plain) < REL
    clean = model(x, torch.zeros(2), two_branches(model))
    assert rel(model(x, t, two_branches(model, frame_mask=torch.zeros(3))), clean) < REL
    some = two_branches(model, frame_mask=torch.tensor([0.0, 0.3, 0.5]))
    early, late = model(x, t, some), model(x, torch.full((2,), 250.0), some)
    same = two_branches(model, frame_mask=torch.tensor([0.0, 0.0, 1.0]))
    assert rel(early, model(x, t, same)) < REL  # 300 is below t = 400, 500 above
    later = two_branches(model, frame_mask=torch.tensor([0.0, 1.0, 1.0]))
    assert rel(late, model(x, torch.full((2,), 250.0), later)) < REL
    assert rel(early, plain) > 0.01


@torch.no_grad()
def test_size_and_fps_are_told():
    model, x, t = tiny(), randn(1, 4, *SIZE), torch.tensor([500.0])
    out = lambda **other: model(
        x, t, model.prepare([randn(5, 16)], SIZE, video=Video(**(dict(height=40, width=48, fps=24) | other)))
    )
    for other in ({"height": 80}, {"width": 96}, {"fps": 12}):
        assert rel(out(**other), out()) > 1e-3
    assert rel(out(height=48, width=40), out()) < REL  # the area alone counts


def test_positions_do_not_depend_on_the_size_at_one_aspect():
    near, far = (grid_positions(n, n, Video(16 * n, 16 * n, 24), TINY) for n in (4, 8))
    assert rel(far.view(8, 8, -1)[:4, :4].flatten(0, 1)[0], near[0]) < 1e-6
    # coordinates are in units of the whole side: i / scale * side / n = i * 512 / (16 n)
    assert rel(far.view(8, 8, -1)[4, 4], near.view(4, 4, -1)[2, 2]) < 1e-5


@torch.no_grad()
def test_bf16_stays_close_to_fp32():
    x, t = randn(2, 4, *SIZE), torch.tensor([700.0, 700.0])
    exact, model = tiny(), tiny(torch.bfloat16)
    want, got = exact(x, t, two_branches(exact)), model(x, t, two_branches(model))
    assert got.dtype == torch.float32
    assert ((got - want).norm() / want.norm()).item() < 0.02  # 2^-9 a rounding; measured 0.006


def test_unequal_texts_are_refused():
    with pytest.raises(ValueError, match="text of 3, 5 rows; give all branches one count up to 8"):
        tiny().prepare([randn(3, 16), randn(5, 16)], SIZE, video=VIDEO, branches=("cond", "uncond"))


@torch.no_grad()
def test_macs_equal_a_count_of_what_runs(monkeypatch):
    model, counted = tiny(), {}
    context = model.prepare([randn(5, 16)], SIZE, video=VIDEO)  # before counting: text is not in macs()

    def add(key, count):
        counted[key] = counted.get(key, 0) + count

    for k, block in enumerate(model.blocks):
        for sub in OpenSora.subs:
            for linear in (m for m in getattr(block, sub).modules() if isinstance(m, nn.Linear)):
                linear.register_forward_hook(
                    lambda m, args, out, key=(k, sub): add(key, out.numel() * m.in_features)
                )
    names = ("attn", "cross", "t_attn", "t_cross")
    subs = iter([(k, sub) for k in range(TINY.depth) for sub in names])
    original = attention.attention

    def counting(q, k, v, **options):
        add(next(subs), q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
        return original(q, k, v, **options)

    monkeypatch.setattr(attention, "attention", counting)
    model(randn(1, 4, *SIZE), torch.tensor([700.0]), context)
    assert model.macs(SIZE, 5) == counted


def test_the_release_has_its_known_size_and_cost():
    with torch.device("meta"):
        model = OpenSora(PRESETS["open-sora-1.2"].transformer)
    assert sum(p.numel() for p in model.parameters()) == 1_208_872_736
    assert sum(model.macs((15, 60, 106), text_len=300).values()) == pytest.approx(28.3e12, rel=0.01)
