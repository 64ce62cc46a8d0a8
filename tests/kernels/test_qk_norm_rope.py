"""The kernel of norm, rope and basis gives what its definition gives."""

import pytest
import torch
from torch import Tensor

from minidit_kernels.qk_norm_rope import norm_rope, norm_rope_reference
from minidit_kernels.tuning import INTERPRET

EPS = 1e-6
SHAPES = [(2, 1, 2, 64), (1, 63, 3, 72), (1, 130, 2, 128), (2, 5, 2, 24), (1, 2, 40, 128)]
SHAPES = pytest.mark.parametrize("B, L, N, K", SHAPES, ids=str)  # the last one: D 5120
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NORMS = pytest.mark.parametrize("norm", ["full rms", "head rms", "head layer"])
REAL = [  # L, N, K, R, norm
    (32760, 40, 128, 80, "full rms"),
    (32760, 12, 128, 128, "full rms"),
    (17776, 48, 64, 48, "head layer"),
    (16384, 24, 128, 96, "head rms"),
    (16384, 16, 72, 72, "head rms"),
]
DEVICE = "cpu" if INTERPRET else "cuda"  # where kernels run


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def make(B: int, L: int, N: int, K: int, norm: str, dtype, turned: int | None, R: int | None):
    """Arguments as an attention has them: x a third of the fused projection, weights in fp32."""
    x = draw(B, L, 3 * N * K, dtype=dtype)[..., N * K : 2 * N * K]
    weight, bias = 1 + 0.1 * draw(2, N * K if norm == "full rms" else K, seed=1)
    rope = None
    if turned is not None:
        angle = 9 * draw(turned, K // 2, seed=2)
        rope = angle.cos(), angle.sin()
    basis = None if R is None else draw(N, K, R, seed=3) * K**-0.5
    arguments = (x, weight, bias - 1) if norm == "head layer" else (x, weight)
    return arguments, dict(heads=N, eps=EPS, rope=rope, basis=basis)


def assert_same(got: Tensor, want: Tensor) -> None:
    """fp32: apart by the order of sums. bf16: by one rounding that falls the other way, of y or of what a
    basis makes of up to 128 of them; 3e-2 of values near 1 is eight last places.
    """
    assert got.dtype == want.dtype and got.shape == want.shape and got.isfinite().all()
    is_fp32 = want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5 if is_fp32 else 2**-6, atol=1e-5 if is_fp32 else 3e-2)


@SHAPES
@DTYPES
@NORMS
@pytest.mark.parametrize("turned", ["all", "some", "none"])
def test_norm_rope_matches_reference(B, L, N, K, dtype, norm, turned):
    rows = {"all": L, "some": L // 2, "none": None}[turned]
    arguments, options = make(B, L, N, K, norm, dtype, rows, None)
    got = norm_rope(*arguments, impl="triton", **options)
    assert got.transpose(1, 2).is_contiguous()  # so that the attention's output is, and its heads join freely
    assert_same(got, norm_rope_reference(*arguments, **options))


@DTYPES
@NORMS
@pytest.mark.parametrize("L, N, K, R", [(130, 2, 128, 80), (63, 3, 72, 48), (1, 2, 24, 14)], ids=str)
def test_a_basis_narrows_what_was_normed_and_turned(L, N, K, R, dtype, norm):
    arguments, options = make(2, L, N, K, norm, dtype, L, R)
    got, want = norm_rope(*arguments, impl="triton", **options), norm_rope_reference(*arguments, **options)
    assert got.shape == (2, N, L, R)
    assert_same(got, want)


@SHAPES
@NORMS
def test_reference_is_norm_then_rope_in_fp64(B, L, N, K, norm):
    (x, weight, *bias), options = make(B, L, N, K, norm, torch.float32, L, None)
    y = x.double().unflatten(-1, (-1, len(weight)))
    y = y - y.mean(-1, keepdim=True) if bias else y
    y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + (bias[0] if bias else 0)
    pairs = torch.view_as_complex(y.reshape(B, L, N, K // 2, 2).transpose(1, 2).contiguous())
    turned = pairs * torch.complex(*(table.double() for table in options["rope"]))
    want = torch.view_as_real(turned).flatten(-2).float()
    torch.testing.assert_close(norm_rope_reference(x, weight, *bias, **options), want, rtol=1e-5, atol=3e-6)


def test_rows_behind_the_table_are_not_turned():
    (x, weight), options = make(1, 9, 2, 8, "head rms", torch.float32, 5, None)
    got, plain = norm_rope(x, weight, **options), norm_rope(x, weight, **options | {"rope": None})
    assert torch.equal(got[:, :, 5:], plain[:, :, 5:])
    assert (got[:, :, :5] - plain[:, :, :5]).abs().max() > 0.1


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_out_takes_some_rows_of_a_longer_tensor(impl):
    arguments, options = make(2, 5, 3, 24, "head rms", torch.float32, 5, None)
    joint = torch.full((2, 3, 9, 24), 7.0, device=DEVICE)
    norm_rope(*arguments, out=joint[:, :, 2:7], impl=impl, **options)
    assert_same(joint[:, :, 2:7], norm_rope_reference(*arguments, **options))
    assert joint[:, :, :2].eq(7).all() and joint[:, :, 7:].eq(7).all()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"heads": 5}, r"for 5 heads; wanted \(B, L, heads \* an even width\)"),
        ({"weight": torch.ones(7)}, r"a weight of 7 for x \(2, 5, 24\); wanted 24 or 8"),
        ({"bias": torch.ones(24)}, "a weight of 24 .*; wanted 8, as a bias means a LayerNorm per head"),
        ({"rope": (torch.ones(6, 4), torch.ones(6, 4))}, r"a table of \(6, 4\) for 5 rows of heads 8 wide"),
        ({"basis": torch.ones(3, 9, 4)}, r"a basis of \(3, 9, 4\); wanted \(3, 8, R\)"),
        ({"out": torch.ones(2, 3, 4, 8), "impl": "triton"}, r"out \(2, 3, 4, 8\); wanted \(2, 3, 5, 8\)"),
    ],
    ids=["heads", "weight", "bias", "rope", "basis", "out"],
)
def test_what_does_not_fit_is_refused(change, said):
    arguments = {"x": draw(2, 5, 24), "weight": torch.ones(24), "heads": 3, "eps": EPS} | change
    with pytest.raises(ValueError, match=said):
        norm_rope(**arguments)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("L, N, K, R, norm", REAL, ids=str)
def test_real_sizes_match_reference_on_the_gpu(L, N, K, R, norm, dtype):
    arguments, options = make(1, L, N, K, norm, dtype, L - 226, R if R < K else None)
    assert_same(norm_rope(*arguments, **options), norm_rope_reference(*arguments, **options))
