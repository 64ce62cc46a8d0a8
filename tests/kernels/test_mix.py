"""The mix kernel against its definition: odd shapes and dtypes, any number of slots, what it refuses."""

import pytest
import torch
from torch import Tensor

from minidit_kernels.mix import MOST, mix, mix_reference
from minidit_kernels.tuning import INTERPRET

COEFFICIENTS = [(1.0,), (0.5,), (2, -1), (3.0, -3.0, 1.0), (4, -6, 4, -1), tuple(range(-2, MOST - 2))]
SHAPES = pytest.mark.parametrize("shape", [(1, 1, 5), (1, 63, 48), (2, 130, 40)], ids=["L1", "L63", "L130"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


DEVICE = "cpu" if INTERPRET else "cuda"  # where kernels run


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def agree(got: Tensor, slots: list[Tensor], coefficients: tuple) -> None:
    """An fp32 sum, rounded once: to the nearest on a card, towards zero by the interpreter."""
    wide = sum(c * slot.double() for c, slot in zip(coefficients, slots, strict=False))
    size = sum(abs(c * slot.double()) for c, slot in zip(coefficients, slots, strict=False))
    ulp = 2.0 ** (-7 if INTERPRET else -8) if got.dtype == torch.bfloat16 else 0
    assert ((got.double() - wide).abs() <= 2.0**-22 * size + ulp * wide.abs()).all()


@SHAPES
@DTYPES
@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=len)
def test_the_kernel_matches_its_definition(shape, dtype, coefficients):
    ring = draw(MOST, *shape, dtype=dtype)
    got = mix(list(ring), coefficients, impl="triton")
    assert got.dtype == dtype and got.shape == shape
    agree(got, list(ring), coefficients)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_slots_behind_the_last_coefficient_are_not_read(impl):
    slots = [draw(1, 63, 40), torch.full((1, 63, 40), float("nan"), device=DEVICE)]
    assert torch.equal(mix(slots, (2.0,), impl=impl), 2 * slots[0])


@pytest.mark.parametrize("impl", ["triton", "reference"])
@DTYPES
def test_reuse_is_exact_and_a_new_tensor(impl, dtype):
    slot = draw(1, 63, 40, dtype=dtype)
    copy = mix([slot], (1.0,), impl=impl)
    assert torch.equal(copy, slot) and copy.data_ptr() != slot.data_ptr()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_mix_may_go_into_a_row_of_a_batch(impl):
    slots, batch = [draw(1, 63, 40, seed=n) for n in range(2)], torch.zeros(2, 63, 40, device=DEVICE)
    assert mix(slots, (2, -1), out=batch[1:], impl=impl).data_ptr() == batch[1].data_ptr()
    torch.testing.assert_close(batch[1:], 2 * slots[0] - slots[1])
    assert not batch[0].any()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_more_coefficients_than_slots_are_refused(impl):
    with pytest.raises(ValueError, match="2 coefficients for 1 stored states"):
        mix([draw(2)], (2, -1), impl=impl)
    with pytest.raises(ValueError, match="1 coefficients for 0 stored states"):
        mix([], (1.0,), impl=impl)


def test_the_kernel_refuses_what_it_cannot_take():
    one = draw(4, 4)
    for slots, count, out in (
        ([one] * 7, 7, None),
        ([one, draw(4)], 2, None),
        ([one, one.bfloat16()], 2, None),
        ([one], 1, draw(4, 4).T[:, :2]),
        ([one], 1, draw(4, 8)[:, ::2]),
    ):
        with pytest.raises(ValueError, match="the kernel takes up to 6 states of one shape and dtype"):
            mix(slots, (1.0,) * count, out=out, impl="triton")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("coefficients", [(1.0,), (2, -1), (3.0, -3.0, 1.0)], ids=len)
def test_large_states_match_on_a_card(dtype, coefficients):
    """h of Wan 2.1 14B at 832x480x81."""
    ring = draw(3, 1, 32760, 5120, dtype=dtype)
    got = mix(list(ring), coefficients)
    torch.testing.assert_close(got, mix_reference(list(ring), coefficients))
