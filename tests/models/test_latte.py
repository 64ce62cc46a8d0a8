import pytest
import torch
from torch import nn

from minidit import attention
from minidit.cache.seam import BlockCache
from minidit.models.latte import Context, Latte
from minidit.presets import PRESETS, LatteConfig
from minidit.weights import is_fp32
from tests.recordings.base import open_recording
from tests.recordings.latte import latte_case, latte_transformer
from tests.tensors import randn, rel

TINY = LatteConfig(
    width=48, mlp_width=80, heads=4, depth=3, text_width=16, text_len=8, freq_width=16, frames=3
)
SIZE = (3, 4, 6)  # latent (T, H, W): 18 tokens
REL = 1e-5  # fp32: what is compared differs in the order of sums only


def tiny_latte(dtype: torch.dtype = torch.float32) -> Latte:
    """Random weights that keep activations near 1, biases included; dtypes as in a loaded model."""
    model, generator = Latte(TINY), torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        is_matrix = p.ndim > 1 and not name.endswith("mod")
        noise = torch.randn(p.shape, generator=generator) * (p.shape[1] ** -0.5 if is_matrix else 0.1)
        p.data = noise if is_fp32(name, Latte.keep_fp32) else noise.to(dtype)
    return model.eval().requires_grad_(False)


def two_branches(model: Latte, **options) -> Context:
    text = [randn(5, 16, seed=2), randn(5, 16, seed=3)]
    return model.prepare(text, SIZE, branches=("cond", "uncond"), **options)


@pytest.mark.parametrize("case", ["base", "encmask", "image", "notemporal"])
@torch.no_grad()
def test_forward_equals_the_original(goldens, case):
    recording = open_recording(goldens("latte_t2v_dit"))
    model = latte_transformer(recording)
    assert rel(latte_case(model, recording.io, case), recording.io[f"out.{case}"]) < REL  # measured 2e-6


@torch.no_grad()
def test_forward_is_the_plain_loop_to_the_bit():
    model, x, t = tiny_latte(), randn(2, 4, *SIZE), torch.tensor([700.0, 700.0])
    context = two_branches(model)
    h, cond = model.embed(x, t, context)
    for k, block in enumerate(model.blocks):
        h = block(h, cond.at(k), BlockCache())
    assert torch.equal(model(x, t, context), model.head.everything(h, cond))
    assert torch.equal(model.head(h, cond), model(x, t, context)[:, :4])  # the learned variance is dropped


@torch.no_grad()
def test_a_batch_equals_its_samples_alone():
    model, x, t = tiny_latte(), randn(2, 4, *SIZE), torch.tensor([900.0, 30.0])
    both = two_branches(model)
    out = model(x, t, both)
    for row, branch in enumerate(both.branches):
        rows = slice(row, row + 1)
        assert rel(model(x[rows], t[rows], both.select((branch,))), out[rows]) < REL
    assert rel(out[:1], out[1:]) > 0.1  # else this test would see nothing


@torch.no_grad()
def test_halves_see_frames_and_places_alone():
    model, x = tiny_latte(), randn(1, 18, 48)
    cond = model.embed(randn(1, 4, *SIZE), torch.tensor([1.0]), two_branches(model).select(("cond",)))[1].at(
        1
    )
    other = x.clone()
    other[:, 7] += 1  # frame 1, place 1
    changed = lambda attn: ((attn(x, cond) - attn(other, cond)).abs().amax(2)[0] > 1e-6).view(3, 6)
    want = torch.zeros(3, 6, dtype=torch.bool)
    want[1] = True
    assert torch.equal(changed(model.blocks[0].attn), want)
    assert torch.equal(changed(model.blocks[0].t_attn).nonzero()[:, 1].unique(), torch.tensor([1]))


@torch.no_grad()
def test_bf16_stays_close_to_fp32():
    x, t = randn(2, 4, *SIZE), torch.tensor([700.0, 700.0])
    exact, model = tiny_latte(), tiny_latte(torch.bfloat16)
    want, got = exact(x, t, two_branches(exact)), model(x, t, two_branches(model))
    assert got.dtype == torch.float32
    assert ((got - want).norm() / want.norm()).item() < 0.02  # 2^-9 a rounding; measured 0.006


def test_unequal_texts_and_other_frame_counts_are_refused():
    model = tiny_latte()
    with pytest.raises(ValueError, match="text of 3, 5 rows; give all branches one count up to 8"):
        model.prepare([randn(3, 16), randn(5, 16)], SIZE, branches=("cond", "uncond"))
    with pytest.raises(ValueError, match="2 latent frames; this model makes videos of 3, or 1 for an image"):
        model.prepare([randn(3, 16)], (2, 4, 6))


@torch.no_grad()
def test_macs_equal_a_count_of_what_runs(monkeypatch):
    model, counted = tiny_latte(), {}
    context = model.prepare([randn(5, 16)], SIZE)  # before counting: text keys and values are not in macs()

    def add(key, count):
        counted[key] = counted.get(key, 0) + count

    for k, block in enumerate(model.blocks):
        for sub in Latte.subs:
            for linear in (m for m in getattr(block, sub).modules() if isinstance(m, nn.Linear)):
                linear.register_forward_hook(
                    lambda m, args, out, key=(k, sub): add(key, out.numel() * m.in_features)
                )
    subs = iter([(k, sub) for k in range(TINY.depth) for sub in ("attn", "cross", "t_attn")])
    original = attention.attention

    def counting(q, k, v, **options):
        add(next(subs), q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
        return original(q, k, v, **options)

    monkeypatch.setattr(attention, "attention", counting)
    model(randn(1, 4, *SIZE), torch.tensor([700.0]), context)
    assert model.macs(SIZE, 5) == counted


def test_the_release_has_its_known_size_and_cost():
    with torch.device("meta"):
        model = Latte(PRESETS["latte-1"].transformer)
    assert sum(p.numel() for p in model.parameters()) == 1_057_246_880
    assert sum(model.macs((16, 64, 64), text_len=120).values()) == pytest.approx(17.1e12, rel=0.01)
