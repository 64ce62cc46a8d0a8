import pytest
import torch
from torch import nn

from minidit import attention
from minidit.cache.seam import BlockCache
from minidit.models import wan
from minidit.models.wan import Context, Wan
from minidit.presets import PRESETS, WanConfig
from minidit.weights import is_fp32
from tests.recordings.base import open_recording
from tests.recordings.wan import wan_transformer
from tests.tensors import randn, rel

TINY = WanConfig(
    width=48, mlp_width=80, heads=4, depth=3, channels=4, text_width=16, text_len=8, freq_width=16
)
SIZE = (3, 4, 6)  # latent (T, H, W): 18 tokens
REL = 1e-5  # fp32: what is compared differs in the order of sums only


def tiny_wan(dtype: torch.dtype = torch.float32) -> Wan:
    """Random weights that keep activations near 1, gains and biases included; dtypes as in a loaded model."""
    model, generator = Wan(TINY), torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1 and not name.endswith("mod"):
            noise *= p.shape[1] ** -0.5
        else:
            noise = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        p.data = noise if is_fp32(name, Wan.keep_fp32) else noise.to(dtype)
    return model.eval().requires_grad_(False)


def two_branches(model: Wan, **options) -> Context:
    text = [randn(8, 16, seed=2), randn(3, 16, seed=3)]  # a full text and a padded one
    return model.prepare(text, SIZE, branches=("cond", "uncond"), **options)


@torch.no_grad()
def test_forward_equals_the_original(goldens):
    recording = open_recording(goldens("wan_t2v_dit"))
    model, io = wan_transformer(recording), recording.io
    text = [io["in.context_0"], io["in.context_1"]]
    context = model.prepare(text, tuple(io["in.x"].shape[2:]), branches=("first", "second"))
    assert rel(model(io["in.x"], io["in.t"], context), io["out.x"]) < REL  # measured 4e-7


@torch.no_grad()
def test_a_batch_equals_its_samples_alone():
    model, x, t = tiny_wan(), randn(2, 4, *SIZE), torch.tensor([900.0, 30.0])
    both = two_branches(model)
    out = model(x, t, both)
    for row, branch in enumerate(both.branches):
        rows = slice(row, row + 1)
        assert rel(model(x[rows], t[rows], both.select((branch,))), out[rows]) < REL
    swapped = both.select(("uncond", "cond"))
    assert rel(model(x.flip(0), t.flip(0), swapped), out.flip(0)) < REL
    assert rel(out[:1], out[1:]) > 0.1  # else this test would see nothing


@torch.no_grad()
def test_a_context_depends_on_its_own_text_alone():
    model, short = tiny_wan(), randn(3, 16, seed=3)
    alone = model.prepare([short], SIZE, branches=("uncond",))
    selected = two_branches(model).select(("uncond",))
    assert selected.branches == alone.branches == ("uncond",)
    for (k, v), (k_alone, v_alone) in zip(selected.text, alone.text, strict=True):
        assert rel(k, k_alone) < REL and rel(v, v_alone) < REL


@torch.no_grad()
def test_forward_is_the_plain_loop_to_the_bit():
    model, x, t = tiny_wan(), randn(2, 4, *SIZE), torch.tensor([700.0, 700.0])
    context = two_branches(model)
    h, cond = model.embed(x, t, context)
    for k, block in enumerate(model.blocks):
        h = block(h, cond.at(k), BlockCache())
    assert torch.equal(model(x, t, context), model.head(h, cond))


@torch.no_grad()
def test_text_padding_rows_are_zeros_that_count():
    model, x, t = tiny_wan(), randn(1, 4, *SIZE), torch.tensor([500.0])
    text = randn(3, 16, seed=3)
    forward = lambda text: model(x, t, model.prepare([text], SIZE))
    padded = torch.cat((text, torch.zeros(5, 16)))
    assert torch.equal(forward(text), forward(padded))
    assert rel(forward(text), forward(torch.cat((text, text[:1])))) > 1e-3  # one more row is another text


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_residual_names_the_dtype_of_h_between_blocks(residual):
    model, x, t = tiny_wan(torch.bfloat16), randn(2, 4, *SIZE), torch.tensor([700.0, 700.0])
    context = two_branches(model, residual=residual)
    h, cond = model.embed(x, t, context)
    for k, block in enumerate(model.blocks):
        h = block(h, cond.at(k), BlockCache())
        assert h.dtype == residual
    assert model.state_shape(context) == ((1, *h.shape[1:]), residual)
    assert model(x, t, context).dtype == torch.float32  # latents are fp32 whatever the run is


@torch.no_grad()
def test_bf16_stays_close_to_fp32_and_closer_with_an_fp32_residual():
    x, t = randn(2, 4, *SIZE), torch.tensor([700.0, 700.0])
    exact, model = tiny_wan(), tiny_wan(torch.bfloat16)
    want = exact(x, t, two_branches(exact))
    rms = lambda residual: (
        (model(x, t, two_branches(model, residual=residual)) - want).norm() / want.norm()
    ).item()
    assert rms(torch.float32) < rms(torch.bfloat16) < 0.02  # 2^-9 a rounding; measured 0.004, 0.006


@torch.no_grad()
def test_residual_is_the_run_dtype_unless_named():
    assert two_branches(tiny_wan()).residual == torch.float32
    assert two_branches(tiny_wan(torch.bfloat16)).residual == torch.bfloat16


def test_text_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="text of 9 rows does not fit this model's text_len=8"):
        tiny_wan().prepare([randn(3, 16), randn(9, 16)], SIZE, branches=("cond", "uncond"))


@torch.no_grad()
def test_macs_equal_a_count_of_what_runs(monkeypatch):
    model, counted = tiny_wan(), {}
    context = model.prepare([randn(5, 16)], SIZE)  # before counting: text keys and values are not in macs()

    def add(key, count):
        counted[key] = counted.get(key, 0) + count

    for k, block in enumerate(model.blocks):
        for sub in Wan.subs:
            for linear in (m for m in getattr(block, sub).modules() if isinstance(m, nn.Linear)):
                linear.register_forward_hook(
                    lambda m, args, out, key=(k, sub): add(key, out.numel() * m.in_features)
                )
    subs = iter([(k, sub) for k in range(TINY.depth) for sub in ("attn", "cross")])
    original = wan.attention

    def counting(q, k, v, **options):
        scores = q.shape[:-1].numel() * k.shape[-2]
        add(next(subs), scores * (q.shape[-1] + v.shape[-1]))
        return original(q, k, v, **options)

    for module in (attention, wan):
        monkeypatch.setattr(module, "attention", counting)
    model(randn(1, 4, *SIZE), torch.tensor([700.0]), context)
    assert model.macs(SIZE, TINY.text_len) == counted


@pytest.mark.parametrize(
    "name, parameters, macs", [("wan2.1-t2v-1.3b", 1.419e9, 141.5e12), ("wan2.1-t2v-14b", 14.288e9, 839e12)]
)
def test_releases_have_their_known_size_and_cost(name, parameters, macs):
    with torch.device("meta"):
        model = Wan(PRESETS[name].transformer)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    size = (21, 60, 104)  # 832x480, 81 frames
    assert sum(model.macs(size, text_len=512).values()) == pytest.approx(macs, rel=0.01)
