"""The kernel of sliced attention against its definition, and the definition against torch's attention."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minidit_kernels.pca_attention import chunks, pca_attention, pca_attention_reference, value_chunks
from minidit_kernels.tuning import INTERPRET

ROOT = Path(__file__).parents[2]
# fp32: scores up to about 50, 2^-24 of them lost in sums; below: rounding of weights and output
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)


@pytest.fixture(autouse=True)
def interpreter_or_card(request):
    """The kernel takes CPU tensors, and fp32, under the interpreter alone."""
    if not INTERPRET and not {"gpu", "slow"} & set(request.keywords):
        pytest.skip("wants TRITON_INTERPRET=1")


def draw(L: int, M: int, R: int, K: int, *, B: int = 1, N: int = 2, dtype=torch.float32, device="cpu"):
    """Queries, keys and values whose scores spread, so that the weights are far from equal."""
    seed = torch.Generator().manual_seed(L + M + R + K)
    shapes = (B, N, L, R), (B, N, M, R), (B, N, M, K)
    return [(2 * torch.randn(shape, generator=seed)).to(dtype).to(device) for shape in shapes]


def assert_close(got: Tensor, want: Tensor):
    assert got.shape == want.shape and got.dtype == want.dtype
    error = (got.float() - want.float()).abs().max() / want.float().abs().max()
    assert error <= TOLERANCE[got.dtype], error.item()


@pytest.mark.parametrize("L", [1, 63, 130])
@pytest.mark.parametrize("R, K", [(80, 72), (112, 128)], ids=str)
@DTYPES
def test_kernel_matches_reference_over_lengths(L, R, K, dtype):
    q, k, v = draw(L, 131 - L, R, K, dtype=dtype)
    got = pca_attention(q, k, v, scale=0.1, impl="triton")
    assert_close(got, pca_attention_reference(q, k, v, scale=0.1))


@pytest.mark.parametrize(
    "R, K", [(16, 64), (48, 72), (64, 128), (72, 72), (80, 64), (96, 128), (112, 72), (128, 128), (8, 24)]
)
def test_kernel_matches_reference_over_widths(R, K):
    q, k, v = draw(63, 70, R, K, N=1)
    assert_close(
        pca_attention(q, k, v, scale=0.1, impl="triton"), pca_attention_reference(q, k, v, scale=0.1)
    )


@pytest.mark.parametrize(
    "width, parts", [(16, (16,)), (72, (64, 16)), (80, (64, 16)), (112, (64, 32, 16)), (128, (128,))]
)
def test_widths_are_split_into_powers_of_two(width, parts):
    assert chunks(width) == parts
    assert value_chunks(width) == (parts if len(parts) < 3 else (128,))


@DTYPES
def test_key_lengths_leave_out_the_rest_of_each_sample(dtype):
    q, k, v = draw(20, 70, 48, 64, B=4, dtype=dtype)
    lengths = torch.tensor([70, 33, 32, 0], dtype=torch.int32)
    got = pca_attention(q, k, v, scale=0.1, key_lengths=lengths, impl="triton")
    assert_close(got, pca_attention_reference(q, k, v, scale=0.1, key_lengths=lengths))
    for b, length in enumerate(lengths.tolist()[:3]):
        alone = pca_attention_reference(q[b, None], k[b, None, :, :length], v[b, None, :, :length], scale=0.1)
        assert_close(got[b, None], alone)
    assert got[3].eq(0).all()  # no keys at all


def test_what_lies_beyond_the_keys_is_never_used():
    q, k, v = draw(20, 70, 48, 64, B=2)
    lengths = torch.tensor([33, 64], dtype=torch.int32)
    want = pca_attention(q, k, v, scale=0.1, key_lengths=lengths, impl="triton")
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:], v[b, :, length:] = torch.nan, torch.nan
    assert torch.equal(pca_attention(q, k, v, scale=0.1, key_lengths=lengths, impl="triton"), want)


def test_strided_views_are_read_in_place():
    B, N, L, K = 2, 3, 70, 64
    qkv = torch.randn(B, L, 3 * N * K, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.unflatten(-1, (N, K)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))  # (B, N, L, K)
    q, k = q[..., 16:64], k[..., :48].flip(2)[:, :, ::2]  # other rows, other columns
    v = v[:, :, ::2]
    got = pca_attention(q, k, v, scale=0.2, impl="triton")
    assert_close(got, pca_attention_reference(q, k, v, scale=0.2))
    one = v[:, :1].expand(B, N, -1, K)  # a head shared by all
    assert_close(
        pca_attention(q, k, one, scale=0.2, impl="triton"), pca_attention_reference(q, k, one, scale=0.2)
    )


def test_an_axis_of_one_may_have_any_stride():
    q, k, v = (x.as_strided(x.shape, (1, *x.stride()[1:])) for x in draw(9, 9, 16, 64))
    got = pca_attention(q, k, v, scale=0.1, impl="triton")
    assert_close(got, pca_attention_reference(q, k, v, scale=0.1))


def test_output_lies_so_that_merging_heads_is_a_view():
    q, k, v = draw(9, 9, 16, 64)
    out = pca_attention(q, k, v, scale=0.1, impl="triton")
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.slow  # the interpreter copies the whole file
@pytest.mark.parametrize("which", ["keys", "values", "queries"])
def test_offsets_beyond_int32(which, tmp_path):
    """Rows 2^24 + 8 elements apart: the last of 130 begins beyond 2^31. A sparse file holds them."""
    stride, L = 2**24 + 8, 130
    q, k, v = draw(L, L, 16, 16, N=1, dtype=torch.float16)
    near = {"queries": q, "keys": k, "values": v}
    far = torch.from_file(str(tmp_path / "far"), shared=True, size=stride * L, dtype=torch.float16)
    far = far.as_strided((1, 1, L, 16), (stride, stride, stride, 1))
    far.copy_(near[which])
    want = pca_attention_reference(q, k, v, scale=0.1)
    got = pca_attention(*(near | {which: far}).values(), scale=0.1, impl="triton")
    assert_close(got, want)


@DTYPES
def test_full_width_is_torchs_attention(dtype):
    q, k, v = draw(63, 130, 64, 64, dtype=dtype)
    want = F.scaled_dot_product_attention(q, k, v)
    assert_close(pca_attention(q, k, v, scale=64**-0.5, impl="triton"), want)
    assert_close(pca_attention_reference(q, k, v, scale=64**-0.5), want)


def test_zero_columns_change_nothing():
    q, k, v = draw(20, 40, 48, 64)
    wide = pca_attention(F.pad(q, (0, 16)), F.pad(k, (0, 16)), v, scale=0.1, impl="triton")
    assert_close(pca_attention(q, k, v, scale=0.1, impl="triton"), wide)


def test_large_scores_do_not_overflow():
    q, k, v = draw(20, 70, 16, 64)
    got = pca_attention(100 * q, 100 * k, v, scale=1.0, impl="triton")  # scores of 1e5: e^x alone is infinite
    assert_close(got, pca_attention_reference(100 * q, 100 * k, v, scale=1.0))


def test_compiled_code_keeps_the_kernel_as_one_operation():
    q, k, v = draw(20, 40, 48, 64)
    run = lambda q, k, v: pca_attention(q * 2, k, v, scale=0.1, impl="triton").transpose(1, 2).flatten(2)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), run(q, k, v))


def test_auto_takes_the_reference_off_the_gpu():
    q, k, v = draw(9, 9, 16, 64)
    assert torch.equal(pca_attention(q, k, v, scale=0.1), pca_attention_reference(q, k, v, scale=0.1))


REFUSED = {
    "odd width": (
        lambda q, k, v: (q[..., :12], k[..., :12], v),
        {},
        "widths 12 and 64; wanted multiples of 8",
    ),
    "wide": (lambda q, k, v: (q, k, torch.zeros(1, 2, 9, 136)), {}, "widths 16 and 136; .* up to 128"),
    "two widths": (lambda q, k, v: (q, k[..., :8], v), {}, r"got \(1, 2, 9, 16\), \(1, 2, 9, 8\)"),
    "no keys": (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), {}, "none empty"),
    "dtypes": (lambda q, k, v: (q, k, v.half()), {}, "wanted one device and one dtype"),
    "layout": (
        lambda q, k, v: (q, k, v.mT.contiguous().mT),
        {},
        r"last axis must be contiguous.*contiguous\(\)",
    ),
    "scale": (lambda q, k, v: (q, k, v), {"scale": 0.0}, "scale=0.0 must be above 0"),
    "lengths": (lambda q, k, v: (q, k, v), {"key_lengths": torch.ones(1)}, r"must be \(1,\) int32 on cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_the_kernel_does_not_take(case):
    change, options, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        pca_attention(*change(*draw(9, 9, 16, 64)), **{"scale": 0.1} | options, impl="triton")


@pytest.mark.slow
def test_every_width_compiles_into_matrix_units_without_spills():
    code = """if True:
        from minidit_kernels.resources import check
        from minidit_kernels.pca_attention import cases
        every = cases([(R, K) for K in (64, 72, 128) for R in range(16, K + 1, 16)] + [(72, 72), (24, 24)])
        rows = check(every)
        assert not [row for row in rows if row.complaints() or not row.unit], rows
        print(len(rows))
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "kernels")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 54


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    "L, R, K", [(4096, 80, 128), (4097, 128, 128), (3000, 64, 64), (1600, 72, 72)], ids=str
)
def test_kernel_on_the_card_matches_reference(L, R, K, dtype):
    q, k, v = draw(L, L, R, K, N=4, dtype=dtype, device="cuda")
    got = pca_attention(q, k, v, scale=K**-0.5, impl="triton")
    assert_close(got, pca_attention_reference(q, k, v, scale=K**-0.5))


@pytest.mark.gpu
def test_key_lengths_on_the_card():
    q, k, v = draw(1000, 512, 80, 128, B=3, dtype=torch.bfloat16, device="cuda")
    lengths = torch.tensor([512, 77, 0], dtype=torch.int32, device="cuda")
    got = pca_attention(q, k, v, scale=0.1, key_lengths=lengths, impl="triton")
    assert_close(got, pca_attention_reference(q, k, v, scale=0.1, key_lengths=lengths))


@pytest.mark.gpu
def test_a_real_video_on_the_card():
    """Wan 2.1 at 832x480, 81 frames: some queries against the definition, all finite."""
    q, k, v = draw(32760, 32760, 64, 128, N=12, dtype=torch.bfloat16, device="cuda")
    got = pca_attention(q, k, v, scale=128**-0.5, impl="triton")
    assert got.isfinite().all()
    rows = torch.tensor([0, 127, 128, 16000, 32759], device="cuda")
    assert_close(got[:, :, rows], pca_attention_reference(q[:, :, rows], k, v, scale=128**-0.5))
