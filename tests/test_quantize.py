"""Eight-bit weights: the arithmetic, what it saves and what it costs in quality."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidit.attention import fold_basis
from minidit.generate import Engine
from minidit.metrics import psnr
from minidit.models.latte import LatteBlock
from minidit.presets import LatteConfig
from minidit.quantize import (
    FP8,
    QuantLinear,
    multiply_fp8,
    multiply_fp8_reference,
    quantize,
    quantize_blocks,
)

KINDS = ("int8", "fp8", "fp8-dynamic")
PROMPT, STEPS = "a red circle moves left to right", 12


def normal(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_within_half_a_step_of_every_weight(dtype):
    w = normal(48, 65, dtype=dtype)
    q, scale = quantize(w, torch.int8)
    assert q.dtype == torch.int8 and scale.shape == (48, 1) and scale.dtype == dtype
    assert q.abs().amax(1).min() >= 126  # every row uses its range, whatever the scale's rounding
    error = (q.float() * scale.float() - w.float()).abs()
    room = (
        1.0 if dtype == torch.bfloat16 else 0.5
    )  # a scale of 8 bits may cut the largest by half a step more
    assert (error <= (room + 1e-3) * scale.float()).all()


def test_fp8_keeps_three_bits_of_mantissa_of_every_weight():
    w = normal(48, 65)
    q, scale = quantize(w, FP8)
    error = (q.float() * scale - w).abs()
    assert (error <= w.abs() / 16 + 2**-10 * scale).all()  # half of the last bit; below 2^-6 steps of 2^-9
    assert q.float().abs().max() == 448


def test_rows_of_zeros_stay_zeros():
    for dtype in (torch.int8, FP8):
        q, scale = quantize(torch.zeros(2, 8, dtype=torch.float16), dtype)
        assert (q.float() * scale == 0).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_linear_multiplies_by_its_own_weight(kind, bias):
    plain = torch.nn.Linear(64, 48, bias=bias)
    linear = QuantLinear(plain, kind)
    linear.quantized, linear.scale = quantize(plain.weight.detach(), linear.quantized.dtype)
    x = normal(2, 5, 64)
    want = F.linear(x, linear.quantized.float() * linear.scale, plain.bias)
    with torch.no_grad():
        assert torch.allclose(linear(x), want, atol=1e-5)
        assert torch.allclose(linear(x, gelu=True), F.gelu(want, approximate="tanh"), atol=1e-5)
    far = (linear.weight - plain.weight).norm() / plain.weight.norm()
    assert 0.001 < far < {"int8": 0.01, "fp8": 0.03}[kind]  # uniform steps of max/127; 3 bits of mantissa


def test_dynamic_fp8_rounds_the_activations_as_well():
    x, w = normal(3, 5, 64), normal(48, 64)
    q, scale = quantize(w, FP8)
    got, exact = multiply_fp8_reference(x, q, scale, None), x @ (q.float() * scale).T
    assert (
        0.01 < (got - exact).norm() / exact.norm() < 0.04
    )  # 3 bits of mantissa: 0.026 rms of each row's parts
    rows, row_scale = quantize(x, FP8)
    assert torch.allclose(got, (rows.float() * row_scale) @ (q.float() * scale).T, atol=1e-4)


@pytest.mark.gpu
def test_the_product_in_fp8_equals_its_definition():
    x = normal(2, 33, 256, dtype=torch.bfloat16).cuda()
    q, scale = quantize(normal(128, 256, dtype=torch.bfloat16).cuda(), FP8)
    bias = normal(128, dtype=torch.bfloat16).cuda()
    got, want = (f(x, q, scale, bias).float() for f in (multiply_fp8, multiply_fp8_reference))
    assert ((got - want).norm() / want.norm()).item() < 0.01  # one rounding to bf16


def test_slicing_bases_fold_into_quantised_projections():
    config = LatteConfig(width=32, mlp_width=64, heads=2, depth=1)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([LatteBlock(config)]).requires_grad_(False)
    attn, before = model.blocks[0].attn, model.blocks[0].attn.qkv
    quantize_blocks(model, "int8")
    attn.qkv.quantized, attn.qkv.scale = quantize(before.weight, torch.int8)
    basis = normal(2, 16, 4)
    folded = attn.fold(basis, basis)
    weight, bias = fold_basis(attn.qkv.weight.chunk(3)[0], before.bias.chunk(3)[0], basis)
    assert torch.equal(folded.weight[:8], weight) and torch.equal(folded.bias[:8], bias)
    assert not torch.allclose(folded.weight[:8], fold_basis(before.weight[:32], bias.new_zeros(32), basis)[0])


def test_linears_of_the_blocks_alone_are_quantised():
    model = Engine("demo", device="cpu", weights="int8").module("transformer")
    names = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    parts = ("attn.qkv", "attn.out", "cross.q", "cross.kv", "cross.out", "mlp.up", "mlp.down")
    assert names == {f"blocks.{k}.{part}" for k in range(8) for part in parts}
    assert model.blocks[0].mod.dtype == model.blocks[0].attn.q_norm.weight.dtype == torch.float32


@pytest.fixture(scope="module")
def plain():
    return Engine("demo", device="cpu").generate(PROMPT, steps=STEPS)


@pytest.mark.parametrize("kind, least, most", [("int8", 50, 64), ("fp8", 36, 48), ("fp8-dynamic", 35, 48)])
def test_quantised_weights_are_smaller_and_the_video_is_near(plain, kind, least, most):
    engine = Engine("demo", device="cpu", weights=kind)
    video = engine.generate(PROMPT, steps=STEPS)
    assert video.settings.weights == kind
    found = psnr(video.frames, plain.frames)
    assert least < found < most  # measured 56.7, 42.3, 41.4; equal frames would have had the same weights
    size = sum(t.nbytes for t in engine.module("transformer").state_dict().values())
    full = sum(t.nbytes for t in Engine("demo", device="cpu").module("transformer").state_dict().values())
    assert size < 0.36 * full  # fp32 to 8 bits, all but embeddings, modulation, norms and head


def test_quantised_weights_go_with_caching_and_offloading():
    spec = "mixcache:impact=uniform,theta=inf"
    options = dict(device="cpu", weights="int8")
    plain = Engine("demo", **options).generate(PROMPT, steps=8, cache=spec)
    visited = Engine("demo", **options, offload="blocks").generate(PROMPT, steps=8, cache=spec)
    assert np.array_equal(visited.frames, plain.frames)
    assert plain.trace["total"]["macs"] < plain.trace["total"]["macs_full"]


def test_unknown_weights_are_refused():
    with pytest.raises(
        ValueError, match="unknown weights 'int4'; choose one of full, int8, fp8, fp8-dynamic"
    ):
        Engine("demo", device="cpu", weights="int4")
