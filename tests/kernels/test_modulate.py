"""The norm, modulation and residual kernels give what their definitions give."""

import pytest
import torch
from torch import Tensor

from minidit_kernels.modulate import (
    gated_residual,
    gated_residual_reference,
    layer_norm,
    layer_norm_reference,
    modulate,
    modulate_reference,
)
from minidit_kernels.tuning import INTERPRET

EPS = 1e-6
SHAPES = [(2, 1, 48), (1, 63, 72), (2, 130, 216), (1, 3, 1152), (1, 2, 1536), (1, 2, 3072), (1, 2, 5120)]
SHAPES = pytest.mark.parametrize("B, L, D", SHAPES, ids=lambda n: str(n))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
REAL = [(1, 32760, 5120), (2, 32760, 1536), (2, 17776, 1920), (1, 8192, 3072)]  # releases at their sizes
DEVICE = "cpu" if INTERPRET else "cuda"  # where kernels run


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Of one dtype, apart by the order of fp32 sums, and in bf16 by one rounding that falls the other way."""
    assert got.dtype == want.dtype and got.shape == want.shape and got.isfinite().all()
    rtol = 2e-6 if want.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, want, rtol=rtol, atol=4e-6)


@SHAPES
@DTYPES
@pytest.mark.parametrize("rows", ["sample", "token", "split"])
def test_modulate_matches_reference(B, L, D, dtype, rows):
    x = draw(B, L, D, dtype=dtype)
    split = L // 2 if rows == "split" else None
    count = {"sample": 1, "token": L, "split": 2}[rows]
    scale, shift = draw(B, 6, count, D, seed=1).unbind(1)[2:4]  # strided, as a block's modulation is
    options = dict(eps=EPS, dtype=torch.bfloat16 if rows == "token" else None, split=split)
    assert_same(
        modulate(x, scale, shift, impl="triton", **options), modulate_reference(x, scale, shift, **options)
    )


@SHAPES
@DTYPES
def test_layer_norm_matches_reference(B, L, D, dtype):
    x, (weight, bias) = draw(B, L, D, dtype=dtype), draw(2, D, seed=1, dtype=dtype)
    got = layer_norm(x, weight, bias, eps=EPS, dtype=torch.bfloat16, impl="triton")
    assert_same(got, layer_norm_reference(x, weight, bias, eps=EPS, dtype=torch.bfloat16))
    weight, bias = draw(2, B, 1, D, seed=2)
    assert_same(
        layer_norm(x, weight, bias, eps=EPS, impl="triton"), layer_norm_reference(x, weight, bias, eps=EPS)
    )


@SHAPES
@DTYPES
@pytest.mark.parametrize("rows", ["sample", "token", "split"])
def test_gated_residual_matches_reference(B, L, D, dtype, rows):
    h = draw(B, L, D, dtype=torch.float32 if rows == "token" else dtype)
    x = draw(B, L, 2 * D, seed=1, dtype=dtype)[..., D:]  # strided
    split = L // 2 if rows == "split" else None
    gate = draw(B, {"sample": 1, "token": L, "split": 2}[rows], D, seed=2)
    got = gated_residual(h, gate, x, split=split, impl="triton")
    assert_same(got, gated_residual_reference(h, gate, x, split=split))


def test_split_gives_each_stream_its_own_row():
    x, (scale, shift) = draw(1, 7, 8), draw(2, 1, 2, 8, seed=1)
    got = modulate_reference(x, scale, shift, eps=EPS, split=3)
    parts = [
        modulate_reference(part, scale[:, n : n + 1], shift[:, n : n + 1], eps=EPS)
        for n, part in enumerate((x[:, :3], x[:, 3:]))
    ]
    assert torch.equal(got, torch.cat(parts, dim=1))


def test_rows_of_a_frame_need_no_copy():
    """Groups of tokens with a row each, as Open-Sora's frames: the same call on a view."""
    x, (scale, shift) = draw(2, 12, 8), draw(2, 6, 1, 8, seed=1)  # three frames in each of two samples
    got = modulate(x.reshape(6, 4, 8), scale, shift, eps=EPS, impl="triton").view_as(x)
    per_token = (rows.reshape(2, 3, 8).repeat_interleave(4, dim=1) for rows in (scale, shift))
    assert_same(got, modulate_reference(x, *per_token, eps=EPS))


def test_rows_that_do_not_fit_are_refused():
    x, rows = draw(2, 5, 8), draw(2, 3, 8)
    with pytest.raises(ValueError, match=r"with rows \(2, 3, 8\); wanted \(2, 1, 8\) or \(2, 5, 8\)"):
        modulate(x, rows, rows, eps=EPS, impl="triton")
    with pytest.raises(ValueError, match=r"with rows \(2, 3, 8\); wanted \(2, 2, 8\)"):
        gated_residual(x, rows, x, split=2, impl="triton")
    with pytest.raises(ValueError, match="the last axis has to be contiguous"):
        modulate(x, draw(2, 8, 2).mT[:, :1], rows[:, :1], eps=EPS, impl="triton")
    with pytest.raises(ValueError, match="wanted one shape"):
        gated_residual(x, rows, x[:, :4])


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("B, L, D", REAL, ids=str)
def test_real_sizes_match_reference_on_the_gpu(B, L, D, dtype):
    x, h = draw(B, L, D, dtype=dtype), draw(B, L, D, seed=1, dtype=dtype)
    scale, shift, gate = draw(B, 3, 2, D, seed=2).unbind(1)
    for split in (None, L - 226):
        rows = [r if split else r[:, :1] for r in (scale, shift, gate)]
        assert_same(
            modulate(x, *rows[:2], eps=EPS, split=split),
            modulate_reference(x, *rows[:2], eps=EPS, split=split),
        )
        got = gated_residual(h, rows[2], x, split=split)
        assert_same(got, gated_residual_reference(h, rows[2], x, split=split))
