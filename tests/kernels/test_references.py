"""The definitions of the fused operations: their formulas in fp64, their rounding, what they refuse."""

import math

import pytest
import torch
from torch import Tensor

from minidit_kernels.mix import mix_reference
from minidit_kernels.modulate import gated_residual_reference, modulate_reference
from minidit_kernels.qk_norm_rope import rms_norm_reference, rope_reference
from minidit_kernels.rel_l1 import distance_sums_reference

REL = 2e-6  # fp32 against fp64: sums of at most 130 terms
SHAPES = pytest.mark.parametrize("B, L, D", [(1, 1, 5), (2, 63, 48), (1, 130, 40)], ids=["L1", "L63", "L130"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, want: Tensor, dtype=torch.float32) -> bool:
    """Whether a result is the fp64 one, rounded once to its dtype."""
    assert got.dtype == dtype and got.shape == want.shape
    ulp = 0 if dtype == torch.float32 else 2**-8  # half of bf16's last place
    return ((got.double() - want).abs() <= REL * want.abs().max() + ulp * want.abs()).all().item()


@SHAPES
@DTYPES
@pytest.mark.parametrize("per_token", [False, True])
def test_modulate_norms_scales_and_shifts(B, L, D, dtype, per_token):
    x, (scale, shift) = draw(B, L, D, dtype=dtype), draw(2, B, L if per_token else 1, D, seed=1)
    got = modulate_reference(x, scale, shift, eps=1e-6)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert close(got, normed * (1 + scale.double()) + shift.double(), dtype)
    other = modulate_reference(x, scale, shift, eps=1e-6, dtype=torch.bfloat16)
    assert other.dtype == torch.bfloat16


def test_modulate_keeps_small_scales_in_bf16():
    x, scale = draw(1, 4, 64, dtype=torch.bfloat16), torch.full((1, 1, 64), 0.003, dtype=torch.bfloat16)
    shift = torch.zeros(1, 1, 64)
    wide = lambda s: modulate_reference(x, s, shift, eps=1e-6, dtype=torch.float32)
    assert (1 + scale == 1).all()  # in bf16 itself it would be lost
    torch.testing.assert_close(
        wide(scale) / wide(0 * scale), torch.full((1, 4, 64), 1.003), rtol=1e-4, atol=0
    )


@SHAPES
@DTYPES
def test_gated_residual_is_rounded_once(B, L, D, dtype):
    h, x, gate = draw(B, L, D, dtype=dtype), draw(B, L, D, seed=1, dtype=dtype), draw(B, 1, D, seed=2)
    want = h.double() + gate.double() * x.double()
    assert close(gated_residual_reference(h, gate, x), want, dtype)


@SHAPES
@DTYPES
def test_rms_norm_divides_by_the_root_mean_square(B, L, D, dtype):
    x, weight = draw(B, L, D, dtype=dtype), draw(D, seed=1, dtype=dtype)
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert close(rms_norm_reference(x, weight, eps=1e-6), want)


def test_rms_norm_by_hand():
    got = rms_norm_reference(
        torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.tensor([1.0, 2.0, 1.0, 1.0]), eps=0.0
    )
    torch.testing.assert_close(got, torch.tensor([[1.2, 3.2, 0.0, 0.0]]))  # the root mean square is 2.5
    assert rms_norm_reference(torch.zeros(1, 4), torch.ones(4), eps=1e-6).eq(0).all()


@pytest.mark.parametrize("L, K", [(1, 2), (63, 6), (130, 24)])
@DTYPES
def test_rope_turns_neighbouring_channels(L, K, dtype):
    x, angle = draw(2, 3, L, K, dtype=dtype), draw(L, K // 2, seed=1).double()
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    want = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    got = rope_reference(x, angle.cos().float(), angle.sin().float())
    assert close(got, want)
    torch.testing.assert_close(got.norm(dim=-1), x.float().norm(dim=-1), rtol=1e-5, atol=0)  # a rotation


def test_rope_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    quarter, none = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])  # cos, sin
    got = rope_reference(x, quarter, none)  # the first pair by 90 degrees, the second not at all
    assert got.flatten().tolist() == [-2.0, 1.0, 3.0, 4.0]


@pytest.mark.parametrize("coefficients", [(1.0,), (2, -1), (3.0, -3.0, 1.0), (0.5,)], ids=str)
@DTYPES
def test_mix_is_a_weighted_sum_rounded_once(coefficients, dtype):
    slots = [draw(1, 63, 40, seed=n, dtype=dtype) for n in range(4)]
    want = sum(c * slot.double() for c, slot in zip(coefficients, slots, strict=False))
    assert close(mix_reference(slots, coefficients), want, dtype)


def test_mix_extrapolates_a_line_and_a_parabola():
    line = [torch.tensor([2.0 * t + 1]) for t in (5, 4, 3)]
    assert mix_reference(line, (2, -1)).item() == 2 * 6 + 1
    parabola = [torch.tensor([float(t * t)]) for t in (5, 4, 3)]
    assert mix_reference(parabola, (3, -3, 1)).item() == 36


def test_mix_gives_a_new_tensor():
    slot = draw(2, 3)
    copy = mix_reference([slot], (1.0,))
    assert torch.equal(copy, slot) and copy.data_ptr() != slot.data_ptr()


@pytest.mark.parametrize("count, coefficients", [(1, (2, -1)), (0, (1.0,)), (2, ())], ids=str)
def test_mix_refuses_coefficients_without_a_state(count, coefficients):
    said = f"{len(coefficients)} coefficients for {count} stored states"
    with pytest.raises(ValueError, match=said):
        mix_reference([torch.zeros(2)] * count, coefficients)


@SHAPES
@DTYPES
@pytest.mark.parametrize("norm", ["l1", "l2", "moments", "abs"])
def test_distance_sums_follow_their_formulas(B, L, D, dtype, norm):
    new, old = draw(B, L, D, dtype=dtype), draw(B, L, D, seed=1, dtype=dtype)
    a, b = new.double(), old.double()
    want = {
        "l1": ((a - b).abs().sum(), b.abs().sum()),
        "l2": ((a - b).square().sum(), b.square().sum()),
        "moments": ((a - b).sum(), (a - b).square().sum()),
        "abs": (a.abs().sum(), b.abs().sum()),
    }[norm]
    got = distance_sums_reference(new, old, norm=norm)
    assert got.shape == (2,) and got.dtype == torch.float64
    terms = B * L * D
    assert got.tolist() == pytest.approx([w.item() for w in want], rel=1e-6, abs=1e-7 * math.sqrt(terms))


def test_distance_sums_of_shards_add_up():
    new, old = draw(1, 130, 40), draw(1, 130, 40, seed=1)
    parts = [distance_sums_reference(new[:, rows], old[:, rows]) for rows in (slice(0, 63), slice(63, None))]
    torch.testing.assert_close(sum(parts), distance_sums_reference(new, old), rtol=1e-12, atol=0)


def test_distance_sums_do_not_lose_small_terms():
    new = torch.full((1 << 20,), 1.0)
    new[0] = 2.0**28  # in fp32 sums, the ones would vanish beside it
    first, _ = distance_sums_reference(new, torch.zeros_like(new))
    assert first.item() == 2.0**28 + (1 << 20) - 1


def test_distance_sums_refuse_other_shapes_and_norms():
    with pytest.raises(ValueError, match=r"new is \(2, 3\), old \(3, 2\); wanted one shape"):
        distance_sums_reference(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="unknown norm 'l3'; choose one of l1, l2, moments, abs"):
        distance_sums_reference(torch.zeros(2), torch.zeros(2), norm="l3")
