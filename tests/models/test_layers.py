import pytest
import torch
import torch.nn.functional as F

from minidit.layers import LayerNorm, Linear, RMSNorm
from tests.tensors import randn

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@torch.no_grad()
def test_linear_is_a_product_rounded_once(dtype, bias, gelu):
    layer = Linear(48, 72, bias=bias)
    layer.weight.data = randn(72, 48, seed=1) * 48**-0.5
    layer = layer.to(dtype)
    x = randn(2, 63, 96).to(dtype)[:, 5:, 48:]  # strided
    wide = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    want = F.gelu(wide, approximate="tanh") if gelu else wide
    got = layer(x, gelu=gelu)
    assert got.dtype == dtype and got.is_contiguous()
    rtol, atol = (1e-6, 2e-6) if dtype == torch.float32 else (2**-8, 1e-5)  # bf16: half of the last place
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


def test_linear_has_gradients_where_they_are_wanted():
    layer, x = Linear(8, 4), randn(3, 8)
    layer(x, gelu=True).sum().backward()
    plain = layer.weight.detach().clone().requires_grad_()
    F.gelu(F.linear(x, plain, layer.bias.detach()), approximate="tanh").sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.grad)


@DTYPES
@torch.no_grad()
def test_norms_into_heads_are_the_norms(dtype):
    """Over the full width or in each head, without rope and basis: forward(), split into heads."""
    x = randn(2, 5, 24).to(dtype)
    heads = lambda y: y.unflatten(-1, (3, 8)).transpose(1, 2)
    for norm, want in ((RMSNorm(24, 1e-6), lambda n: heads(n(x))), (RMSNorm(8, 1e-6), lambda n: n(heads(x)))):
        norm.weight.data = randn(len(norm.weight), seed=1)
        torch.testing.assert_close(norm.into_heads(x, 3), want(norm), rtol=0, atol=0)
    norm = LayerNorm(8, 1e-6)
    norm.weight.data, norm.bias.data = randn(2, 8, seed=1)
    want = norm(x.reshape(2, 15, 8), dtype).view(2, 5, 3, 8).transpose(1, 2)
    torch.testing.assert_close(norm.into_heads(x, 3), want, rtol=1e-6, atol=1e-6)
