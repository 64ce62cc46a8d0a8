"""The distance kernel against its definition: odd shapes, views, stores, counts, the same bits every time."""

import pytest
import torch
from torch import Tensor

from minidit_kernels import rel_l1
from minidit_kernels.rel_l1 import COLUMNS, NORMS, SUMS, Pair, distance_sums, pair_sums_reference
from minidit_kernels.tuning import INTERPRET

ALL = tuple(NORMS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FP32 = 2.0**-24  # half of its last place
DEVICE = "cpu" if INTERPRET else "cuda"  # where kernels run


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def agree(got: Tensor, want: Tensor, pair: Pair) -> None:
    """A block is summed in fp32, as a tree of at most log2(4096) + 16 steps, each rounded once."""
    rounding = 32 * FP32
    sizes = want.abs()  # of the terms: the same as the sum, but for the signed difference
    sizes[SUMS.index("difference")] = want[SUMS.index("abs_difference")]
    torch.testing.assert_close(got / sizes.clamp_min(1), want / sizes.clamp_min(1), rtol=0, atol=rounding)
    broken = SUMS.index("broken")
    assert got[broken] == want[broken]  # a count


@pytest.mark.parametrize(
    "shape", [(1, 1, 5), (1, 63, 48), (2, 130, 40), (1, 130, 64), (1, 3, 3, 7, 11)], ids=str
)
@DTYPES
def test_the_kernel_matches_its_definition(shape, dtype):
    pair = Pair(draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype), norms=ALL)
    got = distance_sums([pair], impl="triton")
    assert got.shape == (1, len(SUMS)) and got.dtype == torch.float64
    agree(got[0], pair_sums_reference([pair])[0], pair)


def test_the_definition_leaves_unwanted_sums_at_zero():
    new, old = draw(2, 3), draw(2, 3, seed=1)
    for norm in ALL:
        (sums,) = distance_sums([Pair(new, old, norms=(norm,))], impl="reference")
        assert {n for n in range(len(SUMS)) if sums[n] != 0} <= set(COLUMNS[norm])
    (sums,) = distance_sums([Pair(new, old, norms=("l1", "l2"))], impl="reference")
    want = (new - old).abs().double().sum(), old.abs().double().sum()
    assert sums[COLUMNS["l1"]].tolist() == pytest.approx([w.item() for w in want], rel=1e-6)


@DTYPES
def test_views_with_a_row_stride_are_read_in_place(dtype):
    joint, other = draw(2, 16, 48, dtype=dtype), draw(2, 9, 96, seed=1, dtype=dtype)
    for new, old in (
        (joint[:, :9], other[..., :48].contiguous()),  # rows of a longer state
        (joint[:, 7:], other[..., 48:]),  # columns of a wider one
        (joint[:, :9].transpose(1, 2), other[..., :48].transpose(1, 2)),
        (joint[:, :9], other[..., :48].transpose(1, 2).contiguous().transpose(1, 2)),
    ):
        pair = Pair(new, old, norms=ALL)
        (got,) = distance_sums([pair], impl="triton")
        agree(got, pair_sums_reference([pair])[0], pair)


@DTYPES
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_the_store_is_replaced_in_the_same_pass(dtype, impl):
    new, ring = draw(1, 63, 40, dtype=dtype), draw(3, 1, 63, 40, seed=1, dtype=dtype)
    before = ring.clone()
    (got,) = distance_sums([Pair(new, ring[1], ring[1], ("l1",))], impl=impl)  # where it is read
    want = pair_sums_reference([Pair(new, before[1], norms=("l1",))])[0]
    torch.testing.assert_close(got[COLUMNS["l1"]], want[COLUMNS["l1"]], rtol=32 * FP32, atol=0)
    assert torch.equal(ring[1], new)
    distance_sums([Pair(new + 1, ring[1], ring[2], ("l1",))], impl=impl)  # another slot
    assert torch.equal(ring[1], new) and torch.equal(ring[2], new + 1) and torch.equal(ring[0], before[0])
    distance_sums([Pair(new, store=ring[0])], impl=impl)  # nothing to compare with
    assert torch.equal(ring[0], new)


def test_a_store_may_be_rows_of_a_longer_state_and_of_another_dtype():
    new, slot = draw(2, 63, 40, dtype=torch.bfloat16).float(), draw(2, 70, 40).bfloat16()
    text = slot[:, 63:].clone()
    distance_sums([Pair(new, slot[:, :63], slot[:, :63], ("l1",))], impl="triton")
    assert torch.equal(slot[:, :63], new.bfloat16()) and torch.equal(slot[:, 63:], text)


@pytest.mark.filterwarnings("ignore:overflow")  # by the interpreter, of sums that nobody asked for
def test_what_is_not_finite_is_counted():
    x = draw(1, 130, 40)
    for n, bad in enumerate((float("nan"), float("inf"), -float("inf"))):
        x.view(-1)[[3 * n, 5000 + n]] = bad
    x[0, -1] = 3e38  # finite, but its sum is not
    for value in (x, x.bfloat16()):
        for impl in ("triton", "reference"):
            (sums,) = distance_sums([Pair(value, norms=("finite",))], impl=impl)
            assert sums[COLUMNS["finite"]].tolist() == [float((~value.isfinite()).sum())], impl
    clean, old = draw(1, 9), draw(1, 9, seed=1)
    assert distance_sums([Pair(clean, old)], impl="triton")[0, SUMS.index("broken")] == 0


@DTYPES
def test_a_pair_has_the_same_bits_whatever_else_is_in_the_launch(dtype):
    pair = Pair(draw(1, 200, 48, dtype=dtype), draw(1, 200, 48, seed=1, dtype=dtype), norms=ALL)
    others = [
        Pair(draw(1, n, 48, seed=n, dtype=dtype), draw(1, n, 48, seed=n + 1, dtype=dtype), norms=ALL)
        for n in (1, 300)
    ]
    odd = Pair(draw(1, 3, 7), draw(1, 3, 7, seed=1), norms=ALL)  # another kind: not aligned
    (alone,) = distance_sums([pair], impl="triton")
    for launch, at in (([pair], 0), ([*others, pair], 2), ([odd, pair, *others], 1), ([pair, odd], 0)):
        assert torch.equal(distance_sums(launch, impl="triton")[at], alone)
    copy = Pair(pair.new.clone(), pair.old.clone(), torch.empty_like(pair.new), ALL)  # other addresses
    assert torch.equal(distance_sums([copy], impl="triton")[0], alone)


def test_pairs_of_several_dtypes_and_shapes_fit_one_call():
    pairs = [
        Pair(draw(1, 5, 16, dtype=torch.bfloat16), draw(1, 5, 16, seed=1, dtype=torch.bfloat16), norms=ALL),
        Pair(draw(1, 3, 7), draw(1, 3, 7, seed=1), norms=ALL),
        Pair(draw(2, 9, 16, seed=4), norms=("finite",)),
        Pair(draw(1, 5, 16), draw(1, 5, 16, seed=1, dtype=torch.bfloat16), norms=ALL),
    ]
    got, want = distance_sums(pairs, impl="triton"), pair_sums_reference(pairs)
    for n in (0, 1, 3):
        agree(got[n], want[n], pairs[n])
    assert got[2, SUMS.index("broken")] == 0


def test_small_terms_are_lost_within_a_block_alone():
    """A block of 4096 is summed in fp32, blocks in fp64: beside 2^28, the ones of its block may vanish."""
    new = torch.ones(1 << 18, device=DEVICE)
    new[0] = 2.0**28
    got = distance_sums([Pair(new, torch.zeros_like(new), norms=("l1",))], impl="triton")[0, 0].item()
    want = 2.0**28 + new.numel() - 1
    assert want - rel_l1.BLOCK <= got <= want + rel_l1.BLOCK


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_what_cannot_be_compared_is_refused(impl):
    two, three = draw(2, 3), draw(3, 2)
    for pair, said in (
        (Pair(two, three, norms=("l1",)), r"new is \(2, 3\), old \(3, 2\); wanted one shape"),
        (Pair(two, two, three), r"new is \(2, 3\), store \(3, 2\); wanted one shape"),
        (Pair(two, two, two.bfloat16()), "old is torch.float32, store torch.bfloat16; wanted one dtype"),
        (Pair(two, two, norms=("l3",)), "unknown norm 'l3'; choose one of l1, l2, moments, abs, finite"),
        (Pair(two, norms=("l1",)), "l1 compares two tensors, and there is no old one"),
    ):
        with pytest.raises(ValueError, match=said):
            distance_sums([pair], impl=impl)


def test_a_store_that_is_no_rows_is_refused():
    store = draw(4, 5, 6).transpose(0, 1)[:, :, ::2]
    with pytest.raises(ValueError, match="the store's strides"):
        distance_sums([Pair(draw(5, 4, 3), store=store)], impl="triton")


@pytest.mark.gpu
@DTYPES
def test_large_states_match_on_a_card(dtype):
    """h of Wan 2.1 14B at 832x480x81, text rows behind the video, two branches in one launch."""
    L, M, D = 32760, 512, 5120
    generator = torch.Generator("cuda").manual_seed(0)
    new, ring = (torch.randn(2, L + M, D, generator=generator, device="cuda").to(dtype) for _ in range(2))
    old, norms = ring.clone(), ("l1", "l2", "moments", "abs", "finite")
    views = [(new[n : n + 1, :L], ring[n : n + 1, :L]) for n in range(2)]
    got = distance_sums([Pair(a, b, b, norms) for a, b in views])
    assert torch.equal(ring[:, :L], new[:, :L]) and torch.equal(ring[:, L:], old[:, L:])
    for n in range(2):
        pair = Pair(new[n : n + 1, :L], old[n : n + 1, :L], norms=norms)
        agree(got[n].cpu(), pair_sums_reference([pair])[0].cpu(), pair)
        assert torch.equal(distance_sums([pair])[0], got[n])  # the same bits
