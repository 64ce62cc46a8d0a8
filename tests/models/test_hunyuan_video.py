from dataclasses import replace
from math import cos, sin

import pytest
import torch
from torch import Tensor

from minidit.attention import FULL
from minidit.cache.seam import BlockCache
from minidit.models.hunyuan_video import HunyuanVideo, sinusoid
from tests.recordings.base import load_upstream
from tests.tensors import randn, rel
from tests.tiny_hunyuan_video import CONFIG, text, tiny

REL = 2e-5  # fp32 on both sides: nothing but the order of sums
SIZE = (3, 4, 6)  # latent (T, H, W): 18 tokens


@pytest.fixture(scope="module")
def model() -> HunyuanVideo:
    return tiny()


@torch.inference_mode()
def run(model: HunyuanVideo, texts: list, *, t=(900.0, 40.0), **options) -> Tensor:
    x = randn(len(texts), CONFIG.channels, *SIZE, seed=7)
    context = model.prepare(texts, SIZE, branches=[str(i) for i in range(len(texts))], **options)
    return model(x, torch.tensor(t[: len(texts)]), context)


@torch.no_grad()
def test_equals_diffusers_with_the_same_random_weights():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    c = CONFIG
    oracle = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=c.channels,
        out_channels=c.channels,
        num_attention_heads=c.heads,
        attention_head_dim=c.width // c.heads,
        num_layers=c.double,
        num_single_layers=c.single,
        num_refiner_layers=c.refiner_depth,
        mlp_ratio=4.0,
        text_embed_dim=c.text_width,
        pooled_projection_dim=c.pooled_width,
        rope_axes_dim=c.rope_widths,
    ).eval()
    config = replace(CONFIG, mlp_width=4 * c.width, freq_width=256)
    model = load_upstream(HunyuanVideo(config), config, oracle.state_dict())
    rows = (9, 4)
    texts = [text(n, seed=n) for n in rows]
    padded = torch.stack([torch.nn.functional.pad(s, (0, 0, 0, 12 - len(s))) for s, _ in texts])
    mask = torch.tensor([[1] * n + [0] * (12 - n) for n in rows])
    x, t = randn(2, c.channels, *SIZE), torch.tensor([900.0, 40.0])
    pooled, guidance = torch.stack([p for _, p in texts]), torch.tensor([6000.0, 6000.0])
    want = oracle(x, t, padded, mask, pooled, guidance).sample
    for i in range(2):
        got = model(x[i : i + 1], t[i : i + 1], model.prepare([texts[i]], SIZE, guidance=6.0))
        assert rel(got, want[i : i + 1]) < REL


@pytest.mark.parametrize("change", ["text", "pooled", "guidance", "t"])
def test_every_condition_changes_the_prediction(model, change):
    states, pooled = text(5, seed=1)
    plain = run(model, [(states, pooled)])
    other = {
        "text": lambda: run(model, [(-states, pooled)]),
        "pooled": lambda: run(model, [(states, -pooled)]),
        "guidance": lambda: run(model, [(states, pooled)], guidance=1.0),
        "t": lambda: run(model, [(states, pooled)], t=(500.0,)),
    }[change]()
    assert rel(other, plain) > 1e-3


def test_rows_of_text_have_no_order_of_their_own(model):
    states, pooled = text(5, seed=1)
    assert rel(run(model, [(states.flip(0), pooled)]), run(model, [(states, pooled)])) < REL


def test_the_blocks_are_a_plain_loop(model):
    context = model.prepare([text(5, seed=1)], SIZE)
    x, t = randn(1, CONFIG.channels, *SIZE), torch.tensor([700.0])
    h, cond = model.embed(x, t, context)
    for k, block in enumerate(model.blocks):
        h = block(h, cond.at(k), BlockCache())
    assert torch.equal(model.head(h, cond), model(x, t, context))


def test_branches_of_a_batch_do_not_see_each_other(model):
    texts = [text(5, seed=1), text(5, seed=2)]
    both = run(model, texts)
    context = model.prepare(texts, SIZE, branches=("cond", "uncond"))
    x, t = randn(2, CONFIG.channels, *SIZE, seed=7), torch.tensor([900.0, 40.0])
    for i, name in enumerate(context.branches):
        one = model(x[i : i + 1], t[i : i + 1], context.select((name,)))
        assert rel(one, both[i : i + 1]) < REL
    swapped = model(x.flip(0), t.flip(0), context.select(("uncond", "cond")))
    assert rel(swapped.flip(0), both) < REL


def test_every_branch_has_its_own_number_of_text_rows(model):
    context = model.prepare([text(5, seed=1), text(3, seed=2)], SIZE, branches=("cond", "uncond"))
    shapes = [model.state_shape(context.select((name,)))[0] for name in context.branches]
    assert shapes == [(1, 18 + 5, 64), (1, 18 + 3, 64)]


def test_text_that_is_too_long_is_refused(model):
    with pytest.raises(ValueError, match="text of 257 rows does not fit this model's text_len=256"):
        model.prepare([text(257, seed=1)], SIZE)


def test_only_video_rows_are_rotated(model):
    context = model.prepare([text(2, seed=1)], (1, 4, 6))  # 6 video tokens, 2 rows of text
    _, cond = model.embed(randn(1, 4, 1, 4, 6), torch.tensor([1.0]), context)
    block = model.blocks[-1].attn  # a single block's
    turned, _, _ = block.queries_keys_values(randn(1, 8, 64), cond.at(0))
    x, _, _ = block.split(randn(1, 8, 64), None, FULL)
    assert torch.equal(turned[:, :, 6:], x[:, :, 6:]) and torch.equal(turned[:, :, 0], x[:, :, 0])
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    # token (0, 1, 0): channels 4 .. 17 are the height's, and its first pair turns by 1
    a, b = x[0, 0, 3, 4:6].tolist()
    want = [a * cos(1) - b * sin(1), a * sin(1) + b * cos(1)]
    assert turned[0, 0, 3, 4:6].tolist() == pytest.approx(want, rel=1e-5)
    assert torch.equal(turned[0, 0, 3, :4], x[0, 0, 3, :4]) and torch.equal(
        turned[0, 0, 3, 18:], x[0, 0, 3, 18:]
    )


def test_in_bf16_a_guidance_of_6_is_told_as_6016():
    model = tiny().to(torch.bfloat16)
    states, pooled = text(3, seed=1)
    context = model.prepare([(states, pooled)], SIZE, guidance=6.0)
    told = model.guidance_mlp(sinusoid(torch.tensor([6016.0]), CONFIG.freq_width))
    assert torch.equal(context.vec, model.pooled_mlp(pooled[None].bfloat16()) + told)


def test_macs_count_every_linear_and_both_products_of_attention(model):
    counted = {"linear": 0, "attention": 0}
    rows = 18 + 5
    for block in model.blocks:
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) and "mod" not in name:
                n = {"video": 18, "text": 5}.get(next((s for s in ("video", "text") if s in name), ""), rows)
                counted["linear"] += n * module.weight.numel()
        counted["attention"] += 2 * rows * rows * CONFIG.width
    assert sum(model.macs(SIZE, 5).values()) == sum(counted.values())
    assert set(model.macs(SIZE, 5)) == {(k, sub) for k in range(5) for sub in ("attn", "mlp")}
    # width 24 of 32: both rotations, and a quarter of the scores less
    saved = model.macs(SIZE, 5)[0, "attn"] - model.macs(SIZE, 5, 24)[0, "attn"]
    assert saved == rows * rows * 2 * 8 - 2 * rows * 64 * 24


def test_the_release_has_2143_tmac_at_544p():
    """The figure of several papers, for 129 frames: 33 x 68 x 120 latents."""
    from minidit.components import build
    from minidit.presets import PRESETS

    macs = build(*PRESETS["hunyuan-video"].components["transformer"]).macs((33, 68, 120), 256)
    assert sum(macs.values()) / 1e12 == pytest.approx(2143, rel=1e-3)
